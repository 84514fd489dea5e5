//! `kho.Vmalloc` and `kho.Memfd`: the payloads that may be large.

#![forbid(unsafe_code)]

use crate::args::Number;
use crate::errors::{OrRaise, to_py};
use crate::folio::bytes_of;
use crate::folios::RunArray;
use crate::incoming::PyIncoming;
use kho::Error;
use kho::memory::PhysMemory;
use kho::payload::memfd::{FileExtent, Memfd, MemfdFolio, MemfdVersion, joined};
use kho::payload::vmalloc::{Descriptor, Vmalloc};
use kho::units::{Pfn, Phys};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use std::sync::{Arc, OnceLock};

/// A preserved vmalloc area.
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
        let inner = py.detach(|| Vmalloc::read(&*memory, page, descriptor, owner, &inc.chunk_owners)).or_raise()?;
        Ok(PyVmalloc { inner, memory })
    }

    #[getter]
    fn first(&self) -> u64 {
        self.inner.descriptor.first.get()
    }

    #[getter]
    fn total_pages(&self) -> u32 {
        self.inner.descriptor.total_pages.get()
    }

    #[getter]
    fn flags(&self) -> u16 {
        self.inner.descriptor.flags.get()
    }

    #[getter]
    fn order(&self) -> u32 {
        self.inner.order.get()
    }

    #[getter]
    fn nr_pages(&self) -> u64 {
        self.inner.pages()
    }

    #[getter]
    fn nbytes(&self) -> u64 {
        self.inner.nbytes()
    }

    #[getter]
    fn nr_blocks(&self) -> usize {
        self.inner.blocks.len()
    }

    #[getter]
    fn chunks(&self) -> Vec<u64> {
        self.inner.chunks.iter().map(|p| p.0).collect()
    }

    #[getter]
    fn blocks(&self) -> Vec<u64> {
        self.inner.blocks.iter().map(|p| p.0).collect()
    }

    #[pyo3(signature = (n, offset = Number(0)), text_signature = "($self, n, offset=0)")]
    fn read<'py>(&self, py: Python<'py>, n: Number, offset: Number) -> PyResult<Bound<'py, PyBytes>> {
        let behind = || {
            let value = offset.0.saturating_add(n.0);
            to_py(Error::OutOfRange { what: "vmalloc offset", value, limit: self.inner.nbytes() })
        };
        if offset.0.checked_add(n.0).is_none_or(|end| end > self.inner.nbytes()) {
            return Err(behind());
        }
        let len = usize::try_from(n.0).map_err(|_| behind())?;
        bytes_of(py, len, |buf| self.inner.copy(&*self.memory, offset.0, buf))
    }

    /// Records of `size` bytes, at most `most`, up to the first that is all zeros.
    fn records<'py>(&self, py: Python<'py>, size: usize, most: Number) -> PyResult<Bound<'py, PyBytes>> {
        if size == 0 {
            return Err(to_py(Error::Invalid { what: "size", why: "a record has at least a byte".into() }));
        }
        let records = py.detach(|| self.inner.records(&*self.memory, size, most.0)).or_raise()?;
        Ok(PyBytes::new(py, &records))
    }

    fn __repr__(&self) -> String {
        format!("<kho.Vmalloc of {} pages, order {}>", self.inner.pages(), self.inner.order)
    }
}

/// A preserved memfd.
#[pyclass(frozen, module = "kho", name = "Memfd")]
pub(crate) struct PyMemfd {
    pub(crate) inner: Memfd,
    /// Made when first asked for.
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
    fn new(py: Python<'_>, inc: Py<PyIncoming>, phys: Number, version: u32) -> PyResult<Self> {
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
        let page = inner.layout().page;
        let inner = py.detach(|| Memfd::read(&**inner.memory(), page, phys, version, chunk_owners)).or_raise()?;
        Ok(PyMemfd { inner, extents: OnceLock::new(), phys, inc })
    }

    #[getter]
    fn phys(&self) -> u64 {
        self.phys.0
    }

    #[getter]
    fn pos(&self) -> u64 {
        self.inner.pos
    }

    #[getter]
    fn size(&self) -> u64 {
        self.inner.size
    }

    #[getter]
    fn seals(&self) -> u32 {
        self.inner.seals
    }

    #[getter]
    fn flags(&self) -> u32 {
        self.inner.flags
    }

    #[getter]
    fn nr_folios(&self) -> u64 {
        self.inner.nr_folios
    }

    /// How many folios the list has.
    #[getter]
    fn nr_listed(&self) -> usize {
        self.inner.folios.len()
    }

    /// `kho.MemfdFolio(phys, order, index, flags)` each.
    #[getter]
    fn folios<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let class = py.import("kho._types")?.getattr("MemfdFolio")?;
        let page = self.inner.list.page;
        let preserved = self.inc.get().inner.preserved();
        let order = |f: &MemfdFolio| Memfd::order_of(preserved, f.pfn()).get();
        let folios = self.inner.folios.iter();
        folios.map(|f| class.call1((page.phys(f.pfn()).0, order(f), f.index, f.flags()))).collect()
    }

    /// (phys, nbytes) of the folios' memory by address, what adjoins or overlaps made one; at most `most` of them.
    fn memory_runs(&self, py: Python<'_>, most: usize) -> Vec<(u64, u64)> {
        let inc = &self.inc.get().inner;
        py.detach(|| self.inner.memory_runs(inc.preserved(), most)).into_iter().map(|r| (r.start.0, r.len)).collect()
    }

    /// The pages of the folio list.
    #[getter]
    fn list(&self) -> PyVmalloc {
        PyVmalloc { inner: self.inner.list.clone(), memory: Arc::clone(self.inc.get().inner.memory()) }
    }

    /// (offset, phys, nbytes) of what is data, by offset; the rest of the file is zeros.
    #[getter]
    fn extents(&self, py: Python<'_>) -> Vec<(u64, u64, u64)> {
        self.made(py).iter().map(|e| (e.offset, e.phys.0, e.len)).collect()
    }

    /// (offset, nbytes) of what is data, by offset, what adjoins made one.
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

    /// The first run at or after `offset`, and before `end`, that may read as something other than zeros, or not at all:
    /// (offset, nbytes).
    fn next_to_read(&self, py: Python<'_>, offset: Number, end: Number) -> PyResult<Option<(u64, u64)>> {
        let extents = self.made(py);
        py.detach(|| self.inner.next_to_read(self.memory(), extents, offset.0, end.0)).or_raise()
    }

    /// `n` bytes from `offset`, fewer at the end; all that follow when `n` is not given.
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
