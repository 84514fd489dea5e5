//! The lists that trackers give: `kho.FolioArray`, `kho.PfnArray`, `kho.RunArray`.

#![allow(unsafe_code)]
// In a macro the lint sees the code that `pymethods` generates from an unsafe function; the function's own unsafe
// operations are in blocks.
#![allow(unsafe_op_in_unsafe_fn)]

use crate::array::{Array, ArrayIter, Item, Picked, array_class};
use crate::arrow::{Asked, Column};
use crate::listed::{Listed, Pooled};
use kho::BufferPool;
use kho::Result;
use kho::tracker::{Folio, Tracker};
use kho::units::{Order, Pfn};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyCapsule, PyType};
use std::ffi::{CStr, c_int};

array_class! {
    /// Folios as a sequence of `FolioInfo(phys, order)`, and as a read-only buffer of 16-byte records.
    ///
    /// Sorted by address, then order; immutable. Slices with step 1 share the memory. `numpy.asarray(folios)` is a
    /// structured array with the fields `phys` (u8) and `order` (u1), without a copy. The memory of a long list (4 to
    /// 256 MiB) is kept for the next one after the last reference to it is gone: it counts as resident until the kernel
    /// reclaims it (MADV_FREE).
    FolioArray of Folio
}

array_class! {
    /// Pfns as a sequence of int, and as a read-only buffer of 8-byte integers (format `Q`).
    ///
    /// Ascending; immutable. Slices with step 1 share the memory. `numpy.asarray(pfns)` is an array of uint64 without a
    /// copy; `memoryview(pfns).tolist()` is the fastest way to a list. The memory of long lists is reused as that of a
    /// `FolioArray`.
    PfnArray of u64
}

array_class! {
    /// Runs of pages or folios as a sequence of (pfn, n), and as a read-only buffer of 16-byte records.
    ///
    /// Ascending; immutable. Slices with step 1 share the memory. `numpy.asarray(runs)` is a structured array with the
    /// fields `pfn` and `n` (u8), without a copy.
    RunArray of Run
}

impl FolioArray {
    /// Lists every folio of a tracker.
    ///
    /// # Errors
    /// [`kho::Error::TooLong`].
    pub(crate) fn of(tracker: &Tracker) -> Result<Self> {
        Listed::new(tracker.len() as usize, |folios| tracker.folios_into(folios)).map(Self::new)
    }
}

impl PfnArray {
    /// Lists the pfns of one order.
    ///
    /// # Errors
    /// [`kho::Error::TooLong`].
    pub(crate) fn of(tracker: &Tracker, order: Order) -> Result<Self> {
        Listed::new(tracker.len_of(order) as usize, |pfns| tracker.pfns_into(order, pfns)).map(Self::new)
    }
}

impl RunArray {
    /// Collects runs: the first pfn and the length of each.
    ///
    /// # Errors
    /// [`kho::Error::TooLong`].
    pub(crate) fn of(runs: impl Iterator<Item = (Pfn, u64)>) -> Result<Self> {
        Listed::of(runs.map(|(pfn, n)| Run { pfn: pfn.0, n })).map(Self::new)
    }
}

/// A column of values that are a copy.
fn column<T: Send + Sync + 'static>(name: &'static CStr, format: &'static CStr, values: Vec<T>) -> Column {
    Column { name, format, values: values.as_ptr().cast(), owner: Box::new(values) }
}

impl Pooled for Folio {
    fn spare() -> Option<&'static BufferPool<Folio>> {
        static SPARE: BufferPool<Folio> = BufferPool::new();
        Some(&SPARE)
    }
}

// SAFETY: `repr(C)`: a u64, a u8 and 7 bytes of padding that are a field, which is what `FORMAT` says; 16 bytes, all of them
// initialized.
unsafe impl Item for Folio {
    const CLASS: &'static str = "FolioArray";
    const FORMAT: &'static CStr = c"T{Q:phys:B:order:7x}";
    type Plain = (u64, u8);

    fn plain(self) -> (u64, u8) {
        (self.phys, self.order)
    }

    /// `kho.FolioInfo(phys, order)`.
    fn to_object(self, py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
        static CLASS: PyOnceLock<Py<PyType>> = PyOnceLock::new();
        CLASS.import(py, "kho._types", "FolioInfo")?.call1((self.phys, self.order))
    }

    fn shown(self) -> String {
        format!("({:#x}, {})", self.phys, self.order)
    }

    fn columns(array: &Array<Self>) -> PyResult<Vec<Column>> {
        let phys = array.copied(|folio| folio.phys)?;
        let order = array.copied(|folio| folio.order)?;
        Ok(vec![column(c"phys", c"L", phys), column(c"order", c"C", order)])
    }
}

impl Pooled for u64 {
    fn spare() -> Option<&'static BufferPool<u64>> {
        static SPARE: BufferPool<u64> = BufferPool::new();
        Some(&SPARE)
    }
}

// SAFETY: `Q` is an integer of 8 bytes, all of them initialized.
unsafe impl Item for u64 {
    const CLASS: &'static str = "PfnArray";
    const FORMAT: &'static CStr = c"Q";
    type Plain = u64;

    fn plain(self) -> u64 {
        self
    }

    fn to_object(self, py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
        Ok(self.into_pyobject(py)?.into_any())
    }

    fn shown(self) -> String {
        format!("{self:#x}")
    }

    fn columns(array: &Array<Self>) -> PyResult<Vec<Column>> {
        let (values, owner) = array.kept(false)?;
        Ok(vec![Column { name: c"pfn", format: c"L", values: values.cast(), owner }])
    }
}

/// Consecutive pages or folios.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Run {
    pfn: u64,
    n: u64,
}

impl Pooled for Run {}

// SAFETY: `repr(C)`: two integers of 8 bytes each, without padding, which is what `FORMAT` says.
unsafe impl Item for Run {
    const CLASS: &'static str = "RunArray";
    const FORMAT: &'static CStr = c"T{Q:pfn:Q:n:}";
    type Plain = (u64, u64);

    fn plain(self) -> (u64, u64) {
        (self.pfn, self.n)
    }

    fn to_object(self, py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
        Ok(self.plain().into_pyobject(py)?.into_any())
    }

    fn shown(self) -> String {
        format!("({:#x}, {})", self.pfn, self.n)
    }

    fn columns(array: &Array<Self>) -> PyResult<Vec<Column>> {
        let pfn = array.copied(|run| run.pfn)?;
        let n = array.copied(|run| run.n)?;
        Ok(vec![column(c"pfn", c"L", pfn), column(c"n", c"L", n)])
    }
}
