//! `kho.Vmalloc` and `kho.Memfd`: the payloads that may be large.

#![forbid(unsafe_code)]

use crate::args::Number;
use crate::errors::{OrRaise, to_py};
use crate::folio::bytes_of;
use crate::folios::RunArray;
use crate::incoming::PyIncoming;
use crate::reader::reading;
use kho::Error;
use kho::memory::PhysMemory;
use kho::payload::memfd::{FileExtent, Memfd, MemfdVersion, joined};
use kho::payload::vmalloc::{Descriptor, Vmalloc};
use kho::units::{Pfn, Phys};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use std::sync::{Arc, OnceLock};

/// A preserved vmalloc area: a list of blocks of pages (`struct kho_vmalloc`, abi.md section 6).
///
/// Args:
///     inc: the handover.
///     descriptor: the 16 bytes of the struct.
///     owner: an address that tells lists apart, by default that of the first chunk. No two lists share a chunk or
///         block, so one that was read for another owner is refused.
///
/// Raises: FormatError for a chunk that is misaligned, outside memory, in a cycle or shared, and for more blocks than
/// an image of this size has room for; ParameterError unless `descriptor` has 16 bytes.
#[pyclass(frozen, module = "kho", name = "Vmalloc")]
pub(crate) struct PyVmalloc {
    pub(crate) inner: Vmalloc,
    memory: Arc<dyn PhysMemory>,
}
crate::assert_object_alignment!(PyVmalloc);

#[pymethods]
impl PyVmalloc {
    /// Reads the area that a `struct kho_vmalloc` (16 bytes) describes.
    #[new]
    #[pyo3(signature = (inc, descriptor, owner = None))]
    fn new(py: Python<'_>, inc: &PyIncoming, descriptor: &Bound<'_, PyBytes>, owner: Option<Number>) -> PyResult<Self> {
        let descriptor: [u8; 16] = descriptor.as_bytes().try_into().map_err(|_| {
            to_py(Error::Invalid { what: "descriptor", why: "a struct kho_vmalloc has 16 bytes".into() })
        })?;
        let memory = Arc::clone(inc.inner.memory());
        let page = inc.inner.layout().page;
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = descriptor;
        let descriptor = Descriptor {
            first: u64::from_le_bytes([a, b, c, d, e, f, g, h]).into(),
            total_pages: u32::from_le_bytes([i, j, k, l]).into(),
            flags: u16::from_le_bytes([m, n]).into(),
            order: u16::from_le_bytes([o, p]).into(),
        };
        let owner = owner.map_or(descriptor.first.get(), |owner| owner.0);
        let inner = reading(py, || Vmalloc::read(&*memory, page, descriptor, owner, &inc.chunk_owners))?.or_raise()?;
        Ok(PyVmalloc { inner, memory })
    }

    /// Physical address of the first chunk of the list.
    #[getter]
    fn first(&self) -> u64 {
        self.inner.descriptor.first.get()
    }

    /// Pages that the descriptor claims; `nr_pages` is what the list names.
    #[getter]
    fn total_pages(&self) -> u32 {
        self.inner.descriptor.total_pages.get()
    }

    /// The flags of the descriptor: 1 is VM_ALLOC, 2 is huge mappings.
    #[getter]
    fn flags(&self) -> u16 {
        self.inner.descriptor.flags.get()
    }

    /// Log2 of the number of pages of each block.
    #[getter]
    fn order(&self) -> u32 {
        self.inner.order.get()
    }

    /// Pages that the list names.
    #[getter]
    fn nr_pages(&self) -> u64 {
        self.inner.pages()
    }

    /// Bytes of the area.
    #[getter]
    fn nbytes(&self) -> u64 {
        self.inner.nbytes()
    }

    /// The number of `blocks`.
    #[getter]
    fn nr_blocks(&self) -> usize {
        self.inner.blocks.len()
    }

    /// Physical addresses of the pages that hold the list.
    #[getter]
    fn chunks(&self) -> Vec<u64> {
        self.inner.chunks.iter().map(|p| p.0).collect()
    }

    /// Physical addresses of the area's blocks, in the order of the area.
    #[getter]
    fn blocks(&self) -> Vec<u64> {
        self.inner.blocks.iter().map(|p| p.0).collect()
    }

    /// Copy `n` bytes of the area from `offset` on.
    ///
    /// Raises: OutOfRangeError beyond its end; OutsideMemoryError; SourceError on a read error.
    #[pyo3(signature = (n, offset = Number(0)), text_signature = "($self, n, offset=0)")]
    fn read<'py>(&self, py: Python<'py>, n: Number, offset: Number) -> PyResult<Bound<'py, PyBytes>> {
        let past_end = || {
            let value = offset.0.saturating_add(n.0);
            to_py(Error::OutOfRange { what: "vmalloc offset", value, limit: self.inner.nbytes() })
        };
        if offset.0.checked_add(n.0).is_none_or(|end| end > self.inner.nbytes()) {
            return Err(past_end());
        }
        let len = usize::try_from(n.0).map_err(|_| past_end())?;
        bytes_of(py, len, |buf| self.inner.copy(&*self.memory, offset.0, buf))
    }

    /// Copy records of `size` bytes, at most `most`, up to the first record of zeros.
    ///
    /// Raises: ParameterError if `size` is 0; OutsideMemoryError; SourceError on a read error.
    fn records<'py>(&self, py: Python<'py>, size: usize, most: Number) -> PyResult<Bound<'py, PyBytes>> {
        if size == 0 {
            return Err(to_py(Error::Invalid { what: "size", why: "a record has at least a byte".into() }));
        }
        let records = reading(py, || self.inner.records(&*self.memory, size, most.0))?.or_raise()?;
        Ok(PyBytes::new(py, &records))
    }

    fn __repr__(&self) -> String {
        format!("<kho.Vmalloc of {} pages, order {}>", self.inner.pages(), self.inner.order)
    }
}

/// A preserved memfd as it lies in memory (`struct memfd_luo_ser`, abi.md section 6).
///
/// Args:
///     inc: the handover.
///     phys: physical address of the structure.
///     version: 1 for memfd-v1, 2 for memfd-v2.
///     orders_by_index: the map that preserved the file is gone, so each folio reaches to the next one in the list; by
///         default a folio is as large as it was preserved, unless the map is not in the dump (`Incoming.map_lost`).
///
/// Raises: OutsideMemoryError; FormatError for a list of folios that cannot be followed; ParameterError for another
/// version.
#[pyclass(frozen, module = "kho", name = "Memfd")]
pub(crate) struct PyMemfd {
    pub(crate) inner: Memfd,
    /// Computed on first use.
    extents: OnceLock<Vec<FileExtent>>,
    phys: Phys,
    inc: Py<PyIncoming>,
}

impl PyMemfd {
    fn made(&self, py: Python<'_>) -> &[FileExtent] {
        let inc = &self.inc.get().inner;
        py.detach(|| self.extents.get_or_init(|| self.inner.extents(inc.preserved())))
    }

    fn memory(&self) -> &dyn PhysMemory {
        &**self.inc.get().inner.memory()
    }
}
crate::assert_object_alignment!(PyMemfd);

#[pymethods]
impl PyMemfd {
    /// Reads the memfd whose structure lies at `phys`; `version` is 1 or 2.
    #[new]
    #[pyo3(signature = (inc, phys, version, *, orders_by_index = false))]
    fn new(py: Python<'_>, inc: Py<PyIncoming>, phys: Number, version: u32, orders_by_index: bool) -> PyResult<Self> {
        let version = match version {
            1 => MemfdVersion::V1,
            2 => MemfdVersion::V2,
            other => {
                return Err(to_py(Error::Invalid {
                    what: "memfd version",
                    why: format!("{other} is neither 1 nor 2"),
                }));
            }
        };
        let phys = Phys(phys.0);
        let PyIncoming { inner, chunk_owners } = inc.get();
        let (memory, page, lost) = (inner.memory(), inner.layout().page, inner.map_lost());
        let inner = reading(py, || Memfd::read(&**memory, page, phys, version, chunk_owners))?.or_raise()?;
        if let Some((map, _)) = lost.filter(|_| !inner.tells_orders())
            && let Some(absent) = memory.absent(map, page.bytes())
        {
            return Err(to_py(absent)); // the map alone has the sizes of the folios
        }
        let inner = Memfd { orders_by_index: orders_by_index || lost.is_some(), ..inner };
        Ok(PyMemfd { inner, extents: OnceLock::new(), phys, inc })
    }

    /// Physical address of the structure.
    #[getter]
    fn phys(&self) -> u64 {
        self.phys.0
    }

    /// The file position, in bytes.
    #[getter]
    fn pos(&self) -> u64 {
        self.inner.pos
    }

    /// Bytes of the file.
    #[getter]
    fn size(&self) -> u64 {
        self.inner.size
    }

    /// The seals of the file, as F_SEAL_* bits; 0 in memfd-v1, which has none.
    #[getter]
    fn seals(&self) -> u32 {
        self.inner.seals
    }

    /// The flags word of the structure.
    #[getter]
    fn flags(&self) -> u32 {
        self.inner.flags
    }

    /// Folios that the structure claims; `nr_listed` is what the list holds.
    #[getter]
    fn nr_folios(&self) -> u64 {
        self.inner.nr_folios
    }

    /// Folios that the list holds: `len(folios)`, without making them.
    #[getter]
    fn nr_listed(&self) -> usize {
        self.inner.folios.len()
    }

    /// The folios of the file, a `MemfdFolio` each, in the order of the list.
    #[getter]
    fn folios<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let class = py.import("kho._types")?.getattr("MemfdFolio")?;
        let page = self.inner.list.page;
        let preserved = self.inc.get().inner.preserved();
        let order = |n| self.inner.order(preserved, n).get();
        let folios = self.inner.folios.iter().enumerate();
        folios.map(|(n, f)| class.call1((page.phys(f.pfn()).0, order(n), f.index, f.flags()))).collect()
    }

    /// List the runs of memory that the folios take: (phys, nbytes), ascending, at most `most` of them.
    ///
    /// Adjacent and overlapping folios are one run.
    fn memory_runs(&self, py: Python<'_>, most: usize) -> Vec<(u64, u64)> {
        let inc = &self.inc.get().inner;
        py.detach(|| self.inner.memory_runs(inc.preserved(), most)).into_iter().map(|r| (r.start.0, r.len)).collect()
    }

    /// The area that holds the list of folios.
    #[getter]
    fn list(&self) -> PyVmalloc {
        PyVmalloc { inner: self.inner.list.clone(), memory: Arc::clone(self.inc.get().inner.memory()) }
    }

    /// The parts of the file that are data, as (offset, phys, nbytes), by offset; the rest is zeros.
    #[getter]
    fn extents(&self, py: Python<'_>) -> Vec<(u64, u64, u64)> {
        self.made(py).iter().map(|e| (e.offset, e.phys.0, e.len)).collect()
    }

    /// The parts of the file that are data, as (offset, nbytes), by offset; adjacent parts are merged.
    #[getter]
    fn data(&self, py: Python<'_>) -> PyResult<RunArray> {
        let extents = self.made(py);
        py.detach(|| RunArray::of(joined(extents).map(|(offset, len)| (Pfn(offset), len)))).or_raise()
    }

    /// Bytes of the file that are data.
    #[getter]
    fn data_bytes(&self, py: Python<'_>) -> u64 {
        self.made(py).iter().map(|e| e.len).sum()
    }

    /// Find the first run from `offset` to `end` that may hold other than zeros, or cannot be read.
    ///
    /// Returns: (offset, nbytes), or None if all of it is zeros.
    fn next_to_read(&self, py: Python<'_>, offset: Number, end: Number) -> PyResult<Option<(u64, u64)>> {
        let extents = self.made(py);
        reading(py, || self.inner.next_to_read(self.memory(), extents, offset.0, end.0))?.or_raise()
    }

    /// Copy `n` bytes from `offset` on, fewer at the end of the file.
    ///
    /// Args:
    ///     n: bytes; by default all that follow.
    ///     offset: in the file, in bytes.
    ///
    /// Raises: OutsideMemoryError for a folio that is not in this memory; OutOfRangeError for more bytes than an object
    /// can have; SourceError on a read error.
    #[pyo3(signature = (n = None, offset = Number(0)), text_signature = "($self, n=None, offset=0)")]
    fn read<'py>(&self, py: Python<'py>, n: Option<Number>, offset: Number) -> PyResult<Bound<'py, PyBytes>> {
        let left = self.inner.size.saturating_sub(offset.0);
        let len = n.map_or(left, |n| n.0.min(left));
        let too_long = || to_py(Error::OutOfRange { what: "memfd read", value: len, limit: isize::MAX as u64 });
        let len = usize::try_from(len).ok().filter(|len| isize::try_from(*len).is_ok()).ok_or_else(too_long)?;
        let extents = self.made(py);
        bytes_of(py, len, |buf| self.inner.copy(self.memory(), extents, offset.0, buf))
    }

    fn __repr__(&self) -> String {
        format!("<kho.Memfd of {} bytes at {}>", self.inner.size, self.phys)
    }
}
