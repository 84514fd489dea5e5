//! `kho.Outgoing`: handing an arena over.

#![forbid(unsafe_code)]

use crate::arena::PyArena;
use crate::args::{Number, Numbers, OrderArg, copied};
use crate::errors::OrRaise;
use crate::folio::{Folio, phys_in};
use crate::folios::FolioArray;
use crate::tracker::PyTracker;
use kho::outgoing::Placement;
use kho::units::{Order, Pfn, Phys};
use pyo3::buffer::PyBuffer;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A handover in the making.
#[pyclass(frozen, subclass, module = "kho", name = "Outgoing", weakref)]
pub(crate) struct PyOutgoing {
    inner: Mutex<kho::outgoing::Outgoing>,
    arena: Py<PyArena>,
}
crate::assert_object_alignment!(PyOutgoing);

impl PyOutgoing {
    fn lock(&self) -> MutexGuard<'_, kho::outgoing::Outgoing> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pfn and order of a folio argument: a `Folio`, or an address with an order (by default the order of the
    /// folio allocated there).
    fn folio(&self, folio: &Bound<'_, PyAny>, order: Option<Number>) -> PyResult<(Pfn, Order)> {
        let arena = &self.arena.get().inner;
        let pfn = arena.page().pfn_exact("phys", phys_in(arena, folio)?).or_raise()?;
        let order = match (order, folio.cast::<Folio>()) {
            (Some(order), _) => Order::new(order.0).or_raise()?,
            (None, Ok(folio)) => folio.get().order_of(),
            (None, Err(_)) => arena.order_of(pfn).or_raise()?,
        };
        Ok((pfn, order))
    }

    fn pfn(&self, phys: &Bound<'_, PyAny>) -> PyResult<Pfn> {
        let arena = &self.arena.get().inner;
        arena.page().pfn_exact("phys", phys_in(arena, phys)?).or_raise()
    }
}

#[pymethods]
impl PyOutgoing {
    #[new]
    #[pyo3(signature = (arena, abi="kho-v1", *, bitmap_bytes=None, fdt_phys=None, map_phys=None))]
    fn new(
        py: Python<'_>,
        arena: Py<PyArena>,
        abi: &str,
        bitmap_bytes: Option<Number>,
        fdt_phys: Option<Number>,
        map_phys: Option<Number>,
    ) -> PyResult<Self> {
        let place = Placement { fdt: fdt_phys.map(|phys| Phys(phys.0)), map: map_phys.map(|phys| Phys(phys.0)) };
        let memory = arena.get().inner.clone();
        let inner =
            py.detach(|| kho::outgoing::Outgoing::new(&memory, abi, bitmap_bytes.map(|n| n.0), place)).or_raise()?;
        Ok(PyOutgoing { inner: Mutex::new(inner), arena })
    }

    #[pyo3(signature = (folio, order=None))]
    fn preserve_folio(&self, folio: &Bound<'_, PyAny>, order: Option<Number>) -> PyResult<bool> {
        let (pfn, order) = self.folio(folio, order)?;
        self.lock().preserve_folio(pfn, order).or_raise()
    }

    #[pyo3(signature = (folio, order=None))]
    fn unpreserve_folio(&self, folio: &Bound<'_, PyAny>, order: Option<Number>) -> PyResult<bool> {
        let (pfn, order) = self.folio(folio, order)?;
        self.lock().unpreserve_folio(pfn, order).or_raise()
    }

    #[pyo3(signature = (phys, order=None), text_signature = "($self, phys, order=0)")]
    fn preserve_many(
        &self,
        py: Python<'_>,
        phys: &Bound<'_, PyAny>,
        order: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<u64> {
        let page = self.arena.get().inner.page();
        let (phys, orders) = (Numbers::new("phys", phys)?, OrderArg::new(order)?);
        py.detach(|| {
            let mut pfns = phys.to_vec()?;
            for phys in &mut pfns {
                *phys = page.pfn_exact("phys", Phys(*phys))?.0;
            }
            self.lock().preserve_many(&pfns, orders.orders())
        })
        .or_raise()
    }

    fn preserve_run(&self, py: Python<'_>, phys: &Bound<'_, PyAny>, order: Number, count: Number) -> PyResult<u64> {
        let (pfn, order) = (self.pfn(phys)?, Order::new(order.0).or_raise()?);
        py.detach(|| self.lock().preserve_run(pfn, order, count.0)).or_raise()
    }

    fn preserve_pages(&self, phys: &Bound<'_, PyAny>, n: Number) -> PyResult<u64> {
        let pfn = self.pfn(phys)?;
        self.lock().preserve_pages(pfn, n.0).or_raise()
    }

    fn unpreserve_pages(&self, phys: &Bound<'_, PyAny>, n: Number) -> PyResult<u64> {
        let pfn = self.pfn(phys)?;
        self.lock().unpreserve_pages(pfn, n.0).or_raise()
    }

    fn preserve_all(&self, py: Python<'_>, tracker: &PyTracker) -> PyResult<u64> {
        tracker.read(py, |tracker| self.lock().preserve_all(tracker)).or_raise()
    }

    #[pyo3(signature = (name, blob, *, phys=None))]
    fn add_subtree(&self, py: Python<'_>, name: &str, blob: PyBuffer<u8>, phys: Option<Number>) -> PyResult<u64> {
        let bytes = copied(py, &blob)?;
        Ok(self.lock().add_subtree(name, &bytes, phys.map(|phys| Phys(phys.0))).or_raise()?.0)
    }

    fn link_subtree(&self, name: &str, phys: Number, size: Number) -> PyResult<()> {
        self.lock().link_subtree(name, Phys(phys.0), size.0).or_raise()
    }

    /// Another blob of the same size in the place of one that `add_subtree` copied.
    fn _rewrite_subtree(&self, py: Python<'_>, name: &str, blob: PyBuffer<u8>) -> PyResult<()> {
        let bytes = copied(py, &blob)?;
        self.lock().rewrite_subtree(name, &bytes).or_raise()
    }

    fn remove_subtree(&self, name: &str) -> PyResult<()> {
        self.lock().remove_subtree(name).or_raise()
    }

    fn serialize<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &py.detach(|| self.lock().serialize()).or_raise()?))
    }

    fn finalize(&self, py: Python<'_>) -> PyResult<u64> {
        Ok(py.detach(|| self.lock().finalize()).or_raise()?.0)
    }

    fn abort(&self) -> PyResult<()> {
        self.lock().abort().or_raise()
    }

    /// A copy of what is preserved.
    fn tracker(&self, py: Python<'_>) -> PyResult<PyTracker> {
        let copy = py.detach(|| {
            let out = self.lock();
            out.arena().check_whole()?;
            out.tracker().try_clone()
        });
        copy.map(PyTracker::from_tracker).or_raise()
    }

    fn folios(&self, py: Python<'_>) -> PyResult<FolioArray> {
        py.detach(|| {
            let out = self.lock();
            out.arena().check_whole()?;
            FolioArray::of(&out.tracker())
        })
        .or_raise()
    }

    #[getter]
    fn arena(&self, py: Python<'_>) -> Py<PyArena> {
        self.arena.clone_ref(py)
    }

    #[getter]
    fn abi(&self) -> &'static str {
        self.lock().abi().compatible
    }

    #[getter]
    fn bitmap_bytes(&self) -> Option<u64> {
        self.lock().bitmap_bytes()
    }

    #[getter]
    fn fdt_phys(&self) -> u64 {
        self.lock().fdt_phys().0
    }

    #[getter]
    fn finalized(&self) -> bool {
        self.lock().is_finalized()
    }

    #[getter]
    fn nr_folios(&self) -> u64 {
        self.lock().tracker().len()
    }

    #[getter]
    fn preserved_bytes(&self) -> u128 {
        let out = self.lock();
        let tracker = out.tracker();
        tracker.nr_pages() << tracker.geometry().page().shift()
    }

    /// Name to (phys, size).
    #[getter]
    fn subtrees<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        for subtree in self.lock().subtrees() {
            dict.set_item(&subtree.name, (subtree.phys.0, subtree.size))?;
        }
        Ok(dict)
    }

    fn __repr__(&self) -> String {
        let out = self.lock();
        let state = if out.is_finalized() { "finalized" } else { "open" };
        format!("<kho.Outgoing {} {state}: {} folios>", out.abi().compatible, out.tracker().len())
    }
}
