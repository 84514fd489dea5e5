//! `kho.Vmalloc` and `kho.Memfd`: the payloads that may be large.

#![forbid(unsafe_code)]

use crate::args::Number;
use crate::errors::{OrRaise, to_py};
use crate::incoming::PyIncoming;
use kho::Error;
use kho::memory::PhysMemory;
use kho::payload::memfd::{FileExtent, Memfd, MemfdVersion};
use kho::payload::vmalloc::{Descriptor, Vmalloc};
use kho::units::{Order, Phys};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use std::sync::Arc;

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
        PyBytes::new_with(py, len, |buf| py.detach(|| self.inner.copy(&*self.memory, offset.0, buf)).or_raise())
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
    extents: Vec<FileExtent>,
    orders: Vec<Order>,
    phys: Phys,
    memory: Arc<dyn PhysMemory>,
}
crate::assert_object_alignment!(PyMemfd);

#[pymethods]
impl PyMemfd {
    /// Reads the memfd whose structure lies at `phys`; `version` is 1 or 2.
    #[new]
    fn new(py: Python<'_>, inc: &PyIncoming, phys: Number, version: u32) -> PyResult<Self> {
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
        let (memory, page) = (Arc::clone(inc.inner.memory()), inc.inner.layout().page);
        let preserved = inc.inner.preserved();
        let phys = Phys(phys.0);
        py.detach(|| {
            let inner = Memfd::read(&*memory, page, phys, version, &inc.chunk_owners).or_raise()?;
            let extents = inner.extents(preserved);
            let orders = inner.folios.iter().map(|f| Memfd::order_of(preserved, f.pfn)).collect();
            Ok(PyMemfd { inner, extents, orders, phys, memory })
        })
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

    /// `kho.MemfdFolio(phys, order, index, flags)` each.
    #[getter]
    fn folios<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let class = py.import("kho._types")?.getattr("MemfdFolio")?;
        let page = self.inner.list.page;
        let folios = self.inner.folios.iter().zip(&self.orders);
        folios.map(|(f, order)| class.call1((page.phys(f.pfn).0, order.get(), f.index, f.flags))).collect()
    }

    /// The pages of the folio list.
    #[getter]
    fn list(&self) -> PyVmalloc {
        PyVmalloc { inner: self.inner.list.clone(), memory: Arc::clone(&self.memory) }
    }

    /// (offset, phys, nbytes) of what is data, by offset; the rest of the file is zeros.
    #[getter]
    fn extents(&self) -> Vec<(u64, u64, u64)> {
        self.extents.iter().map(|e| (e.offset, e.phys.0, e.len)).collect()
    }

    /// `n` bytes from `offset`, fewer at the end; all that follow when `n` is not given.
    #[pyo3(signature = (n = None, offset = Number(0)), text_signature = "($self, n=None, offset=0)")]
    fn read<'py>(&self, py: Python<'py>, n: Option<Number>, offset: Number) -> PyResult<Bound<'py, PyBytes>> {
        let left = self.inner.size.saturating_sub(offset.0);
        let len = n.map_or(left, |n| n.0.min(left));
        let too_long = || to_py(Error::OutOfRange { what: "memfd read", value: len, limit: isize::MAX as u64 });
        let len = usize::try_from(len).ok().filter(|len| isize::try_from(*len).is_ok()).ok_or_else(too_long)?;
        PyBytes::new_with(py, len, |buf| {
            py.detach(|| self.inner.copy(&*self.memory, &self.extents, offset.0, buf)).or_raise()
        })
    }

    fn __repr__(&self) -> String {
        format!("<kho.Memfd of {} bytes at {}>", self.inner.size, self.phys)
    }
}
