//! `kho.Tracker`: a set of (pfn, order), in Python.

use crate::args::{Number, bytes, words};
use crate::errors::OrRaise;
use crate::folios::FolioArray;
use kho::tracker::{Geometry, Orders, Tracker};
use kho::units::{Order, PageSize, Pfn};
use kho::{Error, Result};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyTuple, PyType};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::vec;

type Shared = Arc<Mutex<Tracker>>;

/// The folios to hand to the next kernel: a set of (pfn, order).
#[pyclass(frozen, module = "kho", name = "Tracker")]
pub(crate) struct PyTracker {
    shared: Shared,
}

fn lock(shared: &Shared) -> MutexGuard<'_, Tracker> {
    // What panicked while it held the lock changed words and counts together or not at all.
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl PyTracker {
    pub(crate) fn from_tracker(tracker: Tracker) -> Self {
        PyTracker { shared: Arc::new(Mutex::new(tracker)) }
    }

    /// Runs `f` on the tracker, detached from the interpreter.
    pub(crate) fn read<R: Send>(&self, py: Python<'_>, f: impl FnOnce(&Tracker) -> R + Send) -> R {
        self.long(py, |tracker| f(tracker))
    }

    /// A short operation: attached, unless another thread has the tracker.
    fn quick<R: Send>(&self, py: Python<'_>, f: impl FnOnce(&mut Tracker) -> R + Send) -> R {
        match self.shared.try_lock() {
            Ok(mut tracker) => f(&mut tracker),
            Err(TryLockError::Poisoned(poisoned)) => f(&mut poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => self.long(py, f),
        }
    }

    /// A long operation: detached from the interpreter.
    fn long<R: Send>(&self, py: Python<'_>, f: impl FnOnce(&mut Tracker) -> R + Send) -> R {
        py.detach(|| f(&mut lock(&self.shared)))
    }

    /// Two trackers, locked in the order of their addresses so that no two threads wait for each other.
    fn both<R: Send>(
        &self,
        other: &PyTracker,
        py: Python<'_>,
        f: impl FnOnce(&mut Tracker, &Tracker) -> R + Send,
    ) -> R {
        let (mine, theirs) = (&self.shared, &other.shared);
        py.detach(|| {
            if Arc::ptr_eq(mine, theirs) {
                let mut mine = lock(mine);
                let same = mine.clone();
                return f(&mut mine, &same);
            }
            let (mut a, b) = if Arc::as_ptr(mine) < Arc::as_ptr(theirs) {
                let a = lock(mine);
                (a, lock(theirs))
            } else {
                let b = lock(theirs);
                (lock(mine), b)
            };
            f(&mut a, &b)
        })
    }

    /// A new tracker on the heap from both.
    fn combined<R>(
        &self,
        other: &PyTracker,
        py: Python<'_>,
        op: impl FnOnce(&mut Tracker, &Tracker) -> Result<R> + Send,
    ) -> PyResult<PyTracker> {
        let combined = self.both(other, py, |mine, theirs| {
            let mut copy = mine.try_clone()?;
            op(&mut copy, theirs).map(|_| copy)
        });
        combined.map(Self::from_tracker).or_raise()
    }
}

fn geometry(page_size: u64, bitmap_bytes: Option<u64>) -> Result<Geometry> {
    let page = PageSize::new(page_size)?;
    Geometry::new(page, bitmap_bytes.unwrap_or(page.bytes()))
}

#[pymethods]
impl PyTracker {
    #[new]
    #[pyo3(signature = (page_size = Number(4096), bitmap_bytes = None), text_signature = "(page_size=4096, bitmap_bytes=None)")]
    fn new(page_size: Number, bitmap_bytes: Option<Number>) -> PyResult<Self> {
        let geometry = geometry(page_size.0, bitmap_bytes.map(|n| n.0)).or_raise()?;
        Ok(Self::from_tracker(Tracker::new(geometry)))
    }

    /// Bytes in a page.
    #[getter]
    fn page_size(&self, py: Python<'_>) -> u64 {
        self.quick(py, |t| t.geometry().page().bytes())
    }

    /// Bytes in a bitmap: 512 (Linux 6.16) or `page_size` (6.18 and later).
    #[getter]
    fn bitmap_bytes(&self, py: Python<'_>) -> u64 {
        self.quick(py, |t| t.geometry().block_bytes())
    }

    /// Bytes of memory held.
    #[getter]
    fn nbytes(&self, py: Python<'_>) -> u64 {
        self.quick(py, |t| t.nbytes())
    }

    /// Mark the folio at `pfn`, a multiple of `1 << order` (__kho_preserve_order, kernel/kexec_handover.c).
    ///
    /// Returns True if it was not yet marked. Raises MisalignedError, OrderError, OutOfRangeError.
    #[pyo3(signature = (pfn, order = Number(0)), text_signature = "($self, pfn, order=0)")]
    fn preserve(&self, py: Python<'_>, pfn: Number, order: Number) -> PyResult<bool> {
        let order = Order::new(order.0).or_raise()?;
        self.quick(py, |t| t.preserve(Pfn(pfn.0), order)).or_raise()
    }

    /// Unmark the folio at `pfn`.
    ///
    /// Returns True if it was marked. Raises MisalignedError, OrderError, OutOfRangeError.
    #[pyo3(signature = (pfn, order = Number(0)), text_signature = "($self, pfn, order=0)")]
    fn unpreserve(&self, py: Python<'_>, pfn: Number, order: Number) -> PyResult<bool> {
        let order = Order::new(order.0).or_raise()?;
        self.quick(py, |t| t.unpreserve(Pfn(pfn.0), order)).or_raise()
    }

    /// Mark `n` pages from `pfn` as the naturally aligned folios they split into (kho_preserve_pages).
    ///
    /// Returns how many of those folios were not yet marked. Raises OutOfRangeError; then nothing changed.
    fn preserve_pages(&self, py: Python<'_>, pfn: Number, n: Number) -> PyResult<u64> {
        self.quick(py, |t| t.preserve_pages(Pfn(pfn.0), n.0)).or_raise()
    }

    /// Split `n` pages from `pfn` as `preserve_pages` does and unmark those folios.
    ///
    /// Returns how many were marked. Raises OutOfRangeError.
    fn unpreserve_pages(&self, py: Python<'_>, pfn: Number, n: Number) -> PyResult<u64> {
        self.quick(py, |t| t.unpreserve_pages(Pfn(pfn.0), n.0)).or_raise()
    }

    /// Mark many folios: `pfns` is a one-dimensional buffer of 64-bit integers, `order` one order for all or a buffer of
    /// as many uint8.
    ///
    /// Returns how many were not yet marked. Raises as `preserve` and ParameterError; then nothing changed.
    #[pyo3(signature = (pfns, order = None), text_signature = "($self, pfns, order=0)")]
    fn preserve_many(
        &self,
        py: Python<'_>,
        pfns: &Bound<'_, PyAny>,
        order: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<u64> {
        let pfns = words("pfns", pfns)?;
        let orders = order.map(|o| bytes("order", o)).transpose()?.flatten();
        let orders = match &orders {
            Some(orders) => Orders::Each(orders),
            None => {
                let order = order.map_or(Ok(Number(0)), |order| order.extract())?;
                Orders::One(Order::new(order.0).or_raise()?)
            }
        };
        self.long(py, |t| t.preserve_many(&*pfns, orders)).or_raise()
    }

    fn __contains__(&self, item: &Bound<'_, PyAny>) -> PyResult<bool> {
        let (pfn, order) = match item.cast::<PyTuple>() {
            Ok(pair) if pair.len() == 2 => (pair.get_item(0)?, pair.get_item(1)?.extract()),
            _ => (item.clone(), Ok(Number(0))),
        };
        // A number that no folio can have is in no tracker; what is no number is a mistake.
        let (pfn, order) = match (pfn.extract::<Number>(), order) {
            (Ok(pfn), Ok(order)) => (pfn.0, order.0),
            (Err(e), _) | (_, Err(e)) => {
                let value = e.is_instance_of::<pyo3::exceptions::PyValueError>(item.py());
                return if value { Ok(false) } else { Err(e) };
            }
        };
        Ok(match Order::new(order) {
            Ok(order) => self.quick(item.py(), |t| t.contains(Pfn(pfn), order)),
            Err(_) => false,
        })
    }

    fn __len__(&self, py: Python<'_>) -> PyResult<usize> {
        Ok(usize::try_from(self.quick(py, |t| t.len()))?)
    }

    fn __bool__(&self, py: Python<'_>) -> bool {
        self.quick(py, |t| !t.is_empty())
    }

    /// (pfn, order) as they are serialized: order ascending, then pfn; of a snapshot.
    fn __iter__(&self, py: Python<'_>) -> PyResult<TrackerIter> {
        let snapshot = self.long(py, |t| t.try_clone()).or_raise()?;
        Ok(TrackerIter {
            state: Mutex::new(IterState { rest: Some((Order::ZERO, Pfn(0))), batch: Vec::new().into_iter(), snapshot }),
        })
    }

    /// Runs of pages that some folio covers, as (pfn, pages), ascending.
    fn extents(&self, py: Python<'_>) -> Vec<(u64, u64)> {
        self.read(py, |tracker| tracker.extents().map(|(start, end)| (start.0, end.0 - start.0)).collect())
    }

    /// Every folio by address, then order, as a `FolioArray`.
    fn folios(&self, py: Python<'_>) -> FolioArray {
        FolioArray::new(self.long(py, |t| t.folios()))
    }

    /// Unmark everything and give the memory back.
    fn clear(&self, py: Python<'_>) {
        self.long(py, Tracker::clear);
    }

    /// A tracker of its own with the same folios.
    fn copy(&self, py: Python<'_>) -> PyResult<PyTracker> {
        self.long(py, |t| t.try_clone()).map(Self::from_tracker).or_raise()
    }

    fn __copy__(&self, py: Python<'_>) -> PyResult<PyTracker> {
        self.copy(py)
    }

    fn __deepcopy__(&self, py: Python<'_>, _memo: &Bound<'_, PyAny>) -> PyResult<PyTracker> {
        self.copy(py)
    }

    /// What each order holds and costs: {order: {"folios", "blocks", "empty_blocks", "bytes"}}.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = PyDict::new(py);
        for row in self.quick(py, |t| t.stats()) {
            let entry = PyDict::new(py);
            entry.set_item("folios", row.folios)?;
            entry.set_item("blocks", row.blocks)?;
            entry.set_item("empty_blocks", row.empty_blocks)?;
            entry.set_item("bytes", row.bytes)?;
            stats.set_item(row.order.get(), entry)?;
        }
        Ok(stats)
    }

    fn __eq__(&self, other: &Bound<'_, PyAny>) -> PyResult<Py<PyAny>> {
        let py = other.py();
        let Ok(other) = other.cast::<PyTracker>() else {
            return Ok(py.NotImplemented());
        };
        let equal = self.both(other.get(), py, |a, b| *a == *b);
        Ok(equal.into_pyobject(py)?.to_owned().into_any().unbind())
    }

    fn __or__(&self, py: Python<'_>, other: PyRef<'_, PyTracker>) -> PyResult<PyTracker> {
        self.combined(&other, py, Tracker::union_with)
    }

    fn __and__(&self, py: Python<'_>, other: PyRef<'_, PyTracker>) -> PyResult<PyTracker> {
        self.combined(&other, py, Tracker::intersect_with)
    }

    fn __sub__(&self, py: Python<'_>, other: PyRef<'_, PyTracker>) -> PyResult<PyTracker> {
        self.combined(&other, py, Tracker::subtract)
    }

    fn __xor__(&self, py: Python<'_>, other: PyRef<'_, PyTracker>) -> PyResult<PyTracker> {
        self.combined(&other, py, Tracker::symmetric_difference_with)
    }

    fn __ior__(&self, py: Python<'_>, other: PyRef<'_, PyTracker>) -> PyResult<()> {
        self.both(&other, py, |a, b| a.union_with(b).map(drop)).or_raise()
    }

    fn __iand__(&self, py: Python<'_>, other: PyRef<'_, PyTracker>) -> PyResult<()> {
        self.both(&other, py, |a, b| a.intersect_with(b).map(drop)).or_raise()
    }

    fn __isub__(&self, py: Python<'_>, other: PyRef<'_, PyTracker>) -> PyResult<()> {
        self.both(&other, py, |a, b| a.subtract(b).map(drop)).or_raise()
    }

    fn __ixor__(&self, py: Python<'_>, other: PyRef<'_, PyTracker>) -> PyResult<()> {
        self.both(&other, py, |a, b| a.symmetric_difference_with(b).map(drop)).or_raise()
    }

    /// Whether no folio is in both.
    fn isdisjoint(&self, py: Python<'_>, other: PyRef<'_, PyTracker>) -> bool {
        self.both(&other, py, |a, b| a.is_disjoint(b))
    }

    /// Whether `other` has every folio of this tracker.
    fn issubset(&self, py: Python<'_>, other: PyRef<'_, PyTracker>) -> bool {
        self.both(&other, py, |a, b| a.is_subset(b))
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        self.quick(py, |t| {
            format!(
                "<kho.Tracker of {} folios, page_size={}, bitmap_bytes={}>",
                t.len(),
                t.geometry().page().bytes(),
                t.geometry().block_bytes()
            )
        })
    }

    /// The constructor's arguments, and the bitmaps as bytes.
    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<Reduced<'py>> {
        let py = slf.py();
        let (geometry, state) = slf.get().long(py, |t| (t.geometry(), t.to_bytes()));
        let args = (geometry.page().bytes(), geometry.block_bytes());
        Ok((slf.get_type(), args, PyBytes::new(py, &state)))
    }

    /// The second half of unpickling: fill an empty tracker. Raises ParameterError.
    fn __setstate__(&self, py: Python<'_>, state: &Bound<'_, PyBytes>) -> PyResult<()> {
        let state = state.as_bytes();
        self.long(py, |t| {
            if t.orders().next().is_some() {
                return Err(Error::Invalid { what: "tracker state", why: "the tracker is not new".to_owned() });
            }
            t.adopt_bytes(state).inspect_err(|_| t.clear())
        })
        .or_raise()
    }
}

type Reduced<'py> = (Bound<'py, PyType>, (u64, u64), Bound<'py, PyBytes>);

/// Iterates over a tracker as it was.
#[pyclass(frozen, module = "kho._kho")]
pub(crate) struct TrackerIter {
    state: Mutex<IterState>,
}

struct IterState {
    snapshot: Tracker,
    batch: vec::IntoIter<(Pfn, Order)>,
    /// Where the next batch begins.
    rest: Option<(Order, Pfn)>,
}

/// Folios looked up at a time.
const BATCH: usize = 256;

impl IterState {
    fn next(&mut self) -> Option<(u64, u32)> {
        if self.batch.len() == 0 {
            let (order, from) = self.rest?;
            let batch: Vec<_> = self.snapshot.iter_from(order, from).take(BATCH).collect();
            self.rest = match batch.last() {
                Some(&(pfn, order)) => Some((order, Pfn(pfn.0 + 1))),
                None => {
                    self.snapshot.clear();
                    None
                }
            };
            self.batch = batch.into_iter();
        }
        self.batch.next().map(|(pfn, order)| (pfn.0, order.get()))
    }
}

#[pymethods]
impl TrackerIter {
    fn __iter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __next__(&self) -> Option<(u64, u32)> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.next()
    }
}
