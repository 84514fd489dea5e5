//! `kho.Outgoing`: handing an arena over.

#![forbid(unsafe_code)]

use crate::arena::PyArena;
use crate::args::{Number, Numbers, OrderArg, copied};
use crate::errors::OrRaise;
use crate::folio::{Folio, phys_in};
use crate::folios::FolioArray;
use crate::tracker::PyTracker;
use kho::abi::SubtreeOrder;
use kho::outgoing::{Placement, RootForm, Style};
use kho::units::{Order, Pfn, Phys};
use pyo3::buffer::PyBuffer;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The compiled base of `kho.Outgoing`: a handover in the making (kho_out).
///
/// Bitmaps lie in the arena's pages and are never copied. An object that is dropped before `finalize` leaves nothing in
/// the arena. The page of the FDT is allocated and preserved at once.
///
/// Args:
///     arena: the memory to hand over.
///     abi: the `compatible` to write.
///     bitmap_bytes: for kho-v1, 512 (Linux 6.16 and 6.17) or the page size (6.18 and later, the default).
///     fdt_phys: a free page for the FDT; chosen by default.
///     map_phys: a free page for the first node of the map; chosen by default. Both serve to write an image again,
///         address for address.
///     edited_root: write the root FDT at once, with map 0 until `finalize`, and edit it, as Linux 6.19 and 7.0 do
///         with kho-v1; always so from kho-v2 on (abi.md section 2).
///
/// Raises: UnsupportedAbiError, ParameterError, OutOfMemoryError, PageStateError, OwnedPageError.
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
    #[pyo3(signature = (arena, abi="kho-v1", *, bitmap_bytes=None, fdt_phys=None, map_phys=None, edited_root=false))]
    fn new(
        py: Python<'_>,
        arena: Py<PyArena>,
        abi: &str,
        bitmap_bytes: Option<Number>,
        fdt_phys: Option<Number>,
        map_phys: Option<Number>,
        edited_root: bool,
    ) -> PyResult<Self> {
        let place = Placement { fdt: fdt_phys.map(|phys| Phys(phys.0)), map: map_phys.map(|phys| Phys(phys.0)) };
        let memory = arena.get().inner.clone();
        let root = if edited_root { RootForm::Edited } else { RootForm::OfAbi };
        let style = Style { bitmap_bytes: bitmap_bytes.map(|n| n.0), root, place };
        let inner = py.detach(|| kho::outgoing::Outgoing::styled(&memory, abi, style)).or_raise()?;
        Ok(PyOutgoing { inner: Mutex::new(inner), arena })
    }

    /// Preserve an allocated folio (kho_preserve_folio).
    ///
    /// Args:
    ///     folio: a `Folio`, or the physical address of its head page.
    ///     order: by default that of the folio allocated there.
    ///
    /// Returns: True if it was not yet preserved.
    ///
    /// Raises: FinalizedError, ScratchOverlapError, PageStateError for pages that are not allocated,
    /// OutsideMemoryError, MisalignedError, OrderError, OutOfMemoryError; FreedFolioError, StaleError, ParameterError
    /// for a `Folio` that is freed, taken over, or of another arena.
    #[pyo3(signature = (folio, order=None))]
    fn preserve_folio(&self, folio: &Bound<'_, PyAny>, order: Option<Number>) -> PyResult<bool> {
        let (pfn, order) = self.folio(folio, order)?;
        self.lock().preserve_folio(pfn, order).or_raise()
    }

    /// Withdraw a folio from the handover (kho_unpreserve_folio).
    ///
    /// Args:
    ///     folio: a `Folio`, or the physical address of its head page.
    ///     order: by default that of the folio allocated there.
    ///
    /// Returns: True if it was preserved.
    ///
    /// Raises: FinalizedError, MisalignedError; ParameterError for the pages of the FDT and of subtrees.
    #[pyo3(signature = (folio, order=None))]
    fn unpreserve_folio(&self, folio: &Bound<'_, PyAny>, order: Option<Number>) -> PyResult<bool> {
        let (pfn, order) = self.folio(folio, order)?;
        self.lock().unpreserve_folio(pfn, order).or_raise()
    }

    /// Preserve many allocated folios, all or nothing.
    ///
    /// Args:
    ///     phys: their physical addresses, a buffer of 64-bit or 32-bit integers (numpy array, array.array,
    ///         memoryview).
    ///     order: one order for all, or a buffer of integers with one for each.
    ///
    /// Returns: the number of folios that were not yet preserved.
    ///
    /// Raises: as `preserve_folio`, for the first folio that is refused; ParameterError if the lengths differ;
    /// TypeError for other buffers.
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

    /// Preserve `count` consecutive folios of one order, all or nothing.
    ///
    /// Args:
    ///     phys: a `Folio`, `Pages`, or the physical address of the first.
    ///     order: log2 of the number of pages of each.
    ///     count: the number of folios.
    ///
    /// Returns: the number of folios that were not yet preserved.
    ///
    /// Raises: as `preserve_folio`.
    fn preserve_run(&self, py: Python<'_>, phys: &Bound<'_, PyAny>, order: Number, count: Number) -> PyResult<u64> {
        let (pfn, order) = (self.pfn(phys)?, Order::new(order.0).or_raise()?);
        py.detach(|| self.lock().preserve_run(pfn, order, count.0)).or_raise()
    }

    /// Preserve `n` allocated pages in the kernel's greedy split, all or nothing (kho_preserve_pages).
    ///
    /// Args:
    ///     phys: a `Folio`, `Pages`, or the physical address of the first page.
    ///     n: the number of pages.
    ///
    /// Returns: the number of folios of the split that were not yet preserved.
    ///
    /// Raises: as `preserve_folio`.
    fn preserve_pages(&self, phys: &Bound<'_, PyAny>, n: Number) -> PyResult<u64> {
        let pfn = self.pfn(phys)?;
        self.lock().preserve_pages(pfn, n.0).or_raise()
    }

    /// Withdraw the folios that `preserve_pages` preserves for the same range (kho_unpreserve_pages).
    ///
    /// Returns: the number of these folios that were preserved.
    ///
    /// Raises: FinalizedError, MisalignedError; ParameterError for the pages of the FDT and of subtrees.
    fn unpreserve_pages(&self, phys: &Bound<'_, PyAny>, n: Number) -> PyResult<u64> {
        let pfn = self.pfn(phys)?;
        self.lock().unpreserve_pages(pfn, n.0).or_raise()
    }

    /// Preserve every folio of a tracker with the same page size, all or nothing.
    ///
    /// Returns: the number of folios that were not yet preserved.
    ///
    /// Raises: as `preserve_folio`; ParameterError if the page sizes differ.
    fn preserve_all(&self, py: Python<'_>, tracker: &PyTracker) -> PyResult<u64> {
        tracker.read(py, |tracker| self.lock().preserve_all(tracker)).or_raise()
    }

    /// Copy a producer's blob into preserved pages of its own (kho_add_subtree).
    ///
    /// Args:
    ///     name: of its node in the root FDT.
    ///     blob: the bytes. Before kho-v3 a devicetree, since the root FDT does not state the size then (abi.md section
    ///         2).
    ///     phys: where the copy goes, free pages; chosen by default.
    ///
    /// Returns: the physical address of the copy.
    ///
    /// Raises: ExistsError; FdtError for a name that no node can have, or if the page of the root FDT is full;
    /// FinalizedError; OutOfMemoryError; PageStateError.
    #[pyo3(signature = (name, blob, *, phys=None))]
    fn add_subtree(&self, py: Python<'_>, name: &str, blob: PyBuffer<u8>, phys: Option<Number>) -> PyResult<u64> {
        let bytes = copied(py, &blob)?;
        Ok(self.lock().add_subtree(name, &bytes, phys.map(|phys| Phys(phys.0))).or_raise()?.0)
    }

    /// Add a subtree whose blob lies in the arena already, at `phys`; the caller preserves it.
    ///
    /// Its pages cannot be freed until it is removed; the caller may write them.
    ///
    /// Raises: as `add_subtree`; OutsideMemoryError; ScratchOverlapError.
    fn link_subtree(&self, name: &str, phys: Number, size: Number) -> PyResult<()> {
        self.lock().link_subtree(name, Phys(phys.0), size.0).or_raise()
    }

    /// Another blob of the same size in the place of one that `add_subtree` copied.
    fn _rewrite_subtree(&self, py: Python<'_>, name: &str, blob: PyBuffer<u8>) -> PyResult<()> {
        let bytes = copied(py, &blob)?;
        self.lock().rewrite_subtree(name, &bytes).or_raise()
    }

    /// Remove a subtree and free the pages allocated for it (kho_remove_subtree).
    ///
    /// Raises: NotFoundError; FinalizedError.
    fn remove_subtree(&self, name: &str) -> PyResult<()> {
        self.lock().remove_subtree(name).or_raise()
    }

    /// Write the map and the FDT into the arena.
    ///
    /// Bitmaps stay where they are; a chunk is exactly one page, with 255 entries at 4 KiB (abi.md section 3).
    ///
    /// Returns: the bytes of the FDT.
    ///
    /// Raises: OutOfMemoryError; an earlier serialization stays in place then.
    fn serialize<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &py.detach(|| self.lock().serialize()).or_raise()?))
    }

    /// Serialize and close the handover: from now on changes raise FinalizedError (EBUSY).
    ///
    /// Returns: the physical address of the root FDT, which the arena records.
    ///
    /// Raises: FinalizedError if it is finalized; OutOfMemoryError.
    fn finalize(&self, py: Python<'_>) -> PyResult<u64> {
        Ok(py.detach(|| self.lock().finalize()).or_raise()?.0)
    }

    /// Undo `finalize`, so that the handover can be changed again.
    ///
    /// Raises: FinalizedError if it is not finalized.
    fn abort(&self) -> PyResult<()> {
        self.lock().abort().or_raise()
    }

    /// Copy the set of preserved folios, the FDT's and the subtrees' included.
    ///
    /// Raises: OutOfMemoryError; SourceError if the arena's file was truncated.
    fn tracker(&self, py: Python<'_>) -> PyResult<PyTracker> {
        let copy = py.detach(|| {
            let out = self.lock();
            out.arena().check_whole()?;
            out.tracker().try_clone()
        });
        copy.map(PyTracker::from_tracker).or_raise()
    }

    /// List the preserved folios, by address, then order.
    ///
    /// Raises: OutOfMemoryError; SourceError if the arena's file was truncated.
    fn folios(&self, py: Python<'_>) -> PyResult<FolioArray> {
        py.detach(|| {
            let out = self.lock();
            out.arena().check_whole()?;
            FolioArray::of(&out.tracker())
        })
        .or_raise()
    }

    /// The arena that is handed over.
    #[getter]
    fn arena(&self, py: Python<'_>) -> Py<PyArena> {
        self.arena.clone_ref(py)
    }

    /// The `compatible` that is written, as "kho-v1".
    #[getter]
    fn abi(&self) -> &'static str {
        self.lock().abi().compatible
    }

    /// Bytes in a bitmap of kho-v1; None for later versions, whose bitmaps are a page.
    #[getter]
    fn bitmap_bytes(&self) -> Option<u64> {
        self.lock().bitmap_bytes()
    }

    /// Where a new subtree goes among the root's nodes: "append" or "prepend".
    #[getter]
    fn subtree_order(&self) -> &'static str {
        match self.lock().subtree_order() {
            SubtreeOrder::Append => "append",
            SubtreeOrder::Prepend => "prepend",
        }
    }

    /// Physical address of the root FDT's page.
    #[getter]
    fn fdt_phys(&self) -> u64 {
        self.lock().fdt_phys().0
    }

    /// Whether `finalize` was called, and not undone.
    #[getter]
    fn finalized(&self) -> bool {
        self.lock().is_finalized()
    }

    /// The number of preserved folios.
    #[getter]
    fn nr_folios(&self) -> u64 {
        self.lock().tracker().len()
    }

    /// Bytes of the preserved folios.
    #[getter]
    fn preserved_bytes(&self) -> u128 {
        let out = self.lock();
        let tracker = out.tracker();
        tracker.nr_pages() << tracker.geometry().page().shift()
    }

    /// The subtrees: name to (phys, nbytes).
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
