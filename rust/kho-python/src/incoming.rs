//! `kho.Incoming`: a handover that was read, or taken over.

#![forbid(unsafe_code)]

use crate::arena::PyArena;
use crate::args::{Number, Numbers};
use crate::errors::{OrRaise, to_py};
use crate::fdt::PyFdt;
use crate::folio::{Folio, Pages, Place, next_data, phys_of, read};
use crate::folios::FolioArray;
use crate::memory::{Memory, memory_of, with_progress};
use crate::tracker::PyTracker;
use kho::Error;
use kho::arena::ScratchArea;
use kho::incoming::{Address, Incoming, Options};
use kho::memory::PhysMemory;
use kho::payload::ChunkOwners;
use kho::units::{Order, PageSize, Pfn, Phys};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use std::sync::Arc;

/// A handover.
#[pyclass(frozen, module = "kho", name = "Incoming", weakref)]
pub(crate) struct PyIncoming {
    pub(crate) inner: Incoming,
    /// Whose the chunks of page lists are that were read so far.
    pub(crate) chunk_owners: ChunkOwners,
}
crate::assert_object_alignment!(PyIncoming);

impl From<Incoming> for PyIncoming {
    fn from(inner: Incoming) -> Self {
        PyIncoming { inner, chunk_owners: ChunkOwners::default() }
    }
}

/// A producer's blob.
#[pyclass(frozen, module = "kho")]
pub(crate) struct Subtree {
    inner: kho::root::Subtree,
    memory: Arc<dyn PhysMemory>,
}
crate::assert_object_alignment!(Subtree);

/// What a function of `kho.payload` makes of a handover: decoders are Python, in a registry that others add to.
fn decoded<'py>(inc: &Bound<'py, PyIncoming>, function: &str) -> PyResult<Bound<'py, PyAny>> {
    inc.py().import("kho.payload")?.getattr(function)?.call1((inc,))
}

/// `scratch` is the areas, (addr, size) each, or the address of their array.
fn options(
    fdt_phys: Option<Number>,
    page_size: Option<Number>,
    bitmap_bytes: Option<Number>,
    scratch: Option<&Bound<'_, PyAny>>,
    max_page_order: Option<u32>,
) -> PyResult<Options> {
    let (areas, array) = match scratch {
        None => (None, None),
        Some(scratch) if scratch.hasattr("__index__")? => (None, Some(scratch.extract::<Number>()?.0)),
        Some(scratch) => {
            let areas: Vec<(u64, u64)> = scratch.extract()?;
            (Some(areas.iter().map(|&(addr, size)| ScratchArea { addr, size }).collect()), None)
        }
    };
    Ok(Options {
        fdt_phys: fdt_phys.map(|n| n.0),
        page_size: page_size.map(|n| PageSize::new(n.0)).transpose().or_raise()?,
        page_why: None,
        bitmap_bytes: bitmap_bytes.map(|n| n.0),
        bitmap_why: None,
        scratch: areas,
        scratch_phys: array,
        max_page_order,
        ..Options::default()
    })
}

/// Reads the handover in a memory or, without taking it over, in an arena. `progress`, if given, is called with the
/// number of bytes searched so far.
#[pyfunction]
#[pyo3(signature = (memory, *, fdt_phys=None, page_size=None, bitmap_bytes=None, scratch=None, max_page_order=None,
                    progress=None))]
#[expect(clippy::too_many_arguments, reason = "keyword arguments of a Python function")]
pub(crate) fn open_memory(
    py: Python<'_>,
    memory: &Bound<'_, PyAny>,
    fdt_phys: Option<Number>,
    page_size: Option<Number>,
    bitmap_bytes: Option<Number>,
    scratch: Option<&Bound<'_, PyAny>>,
    max_page_order: Option<u32>,
    progress: Option<Py<PyAny>>,
) -> PyResult<PyIncoming> {
    let mut options = options(fdt_phys, page_size, bitmap_bytes, scratch, max_page_order)?;
    if let Ok(arena) = memory.cast::<PyArena>() {
        options.know_arena(&arena.get().inner);
    } else if let Ok(memory) = memory.cast::<Memory>()
        && let Some(files) = &memory.get().files
    {
        options.know_files(files);
        let files = Arc::clone(files);
        return Ok(with_progress(py, progress, |told| kho::address::open(files, &options, told))?.into());
    }
    let memory = memory_of(memory)?;
    Ok(with_progress(py, progress, |told| Incoming::open(memory, &options, told))?.into())
}

#[pymethods]
impl PyIncoming {
    #[new]
    #[pyo3(signature = (memory, fdt_phys=None, *, page_size=None, bitmap_bytes=None, scratch=None,
                        max_page_order=None))]
    fn new(
        py: Python<'_>,
        memory: &Bound<'_, PyAny>,
        fdt_phys: Option<Number>,
        page_size: Option<Number>,
        bitmap_bytes: Option<Number>,
        scratch: Option<&Bound<'_, PyAny>>,
        max_page_order: Option<u32>,
    ) -> PyResult<Self> {
        let Ok(arena) = memory.cast::<PyArena>() else {
            return open_memory(py, memory, fdt_phys, page_size, bitmap_bytes, scratch, max_page_order, None);
        };
        let arena = arena.get().inner.clone();
        if page_size.is_some_and(|page| page.0 != arena.page().bytes()) {
            let why = format!("the arena's pages have {} bytes", arena.page().bytes());
            return Err(to_py(Error::Invalid { what: "page_size", why }));
        }
        let options = options(None, None, bitmap_bytes, scratch, max_page_order)?;
        Ok(py.detach(|| Incoming::take_over(&arena, fdt_phys.map(|n| n.0), &options)).or_raise()?.into())
    }

    fn restore_folio(&self, phys: &Bound<'_, PyAny>) -> PyResult<Folio> {
        let (pfn, order) = self.inner.restore_folio(phys_of(phys)?).or_raise()?;
        let place = Place::restored(&self.inner, pfn, Pfn(pfn.0 + order.nr_pages())).or_raise()?;
        Ok(Folio::new(place, self.inner.layout().page, pfn, order))
    }

    fn restore_many<'py>(&self, py: Python<'py>, phys: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyBytes>> {
        let phys = Numbers::new("phys", phys)?;
        Ok(PyBytes::new(py, &py.detach(|| self.inner.restore_many(&phys.to_vec()?)).or_raise()?))
    }

    fn restore_pages(&self, phys: &Bound<'_, PyAny>, n: Number) -> PyResult<Pages> {
        let pfn = self.inner.restore_pages(phys_of(phys)?, n.0).or_raise()?;
        let place = Place::restored(&self.inner, pfn, Pfn(pfn.0 + n.0)).or_raise()?;
        Ok(Pages::new(place, self.inner.layout().page, pfn, n.0))
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = py.detach(|| self.inner.stats());
        let dict = PyDict::new(py);
        dict.set_item("blocks", stats.blocks)?;
        dict.set_item("map_bytes", stats.map_bytes)?;
        dict.set_item("in_place_bytes", stats.in_place_bytes)?;
        dict.set_item("held_bytes", stats.held_bytes)?;
        Ok(dict)
    }

    fn retrieve_subtree(&self, name: &str) -> PyResult<Subtree> {
        Ok(self.subtree(self.inner.retrieve_subtree(name).or_raise()?))
    }

    /// `n` bytes of the memory, whatever they are.
    fn read<'py>(&self, py: Python<'py>, phys: Number, n: Number) -> PyResult<Bound<'py, PyBytes>> {
        read(py, &**self.inner.memory(), Phys(phys.0), n.0)
    }

    /// Whether the folio of this order at `phys` was preserved.
    fn preserves(&self, phys: Number, order: u32) -> bool {
        let page = self.inner.layout().page;
        let order = Order::new(order.into()).ok();
        order.is_some_and(|order| {
            phys.0.is_multiple_of(page.bytes()) && self.inner.preserved().contains(page.pfn(Phys(phys.0)), order)
        })
    }

    /// The order of the largest preserved folio that begins at `phys`; None without one.
    fn order_at(&self, phys: Number) -> Option<u32> {
        let page = self.inner.layout().page;
        let pfn = Some(page.pfn(Phys(phys.0))).filter(|_| phys.0.is_multiple_of(page.bytes()));
        pfn.and_then(|pfn| self.inner.preserved().head_order(pfn)).map(|order| order.get())
    }

    /// The first run in `nbytes` from `phys` that may read as something other than zeros, or not at all.
    fn next_to_read(&self, py: Python<'_>, phys: Number, nbytes: Number) -> PyResult<Option<(u64, u64)>> {
        let Some(more) = nbytes.0.checked_sub(1) else { return Ok(None) };
        let last = Phys(phys.0.saturating_add(more));
        let run = py.detach(|| self.inner.memory().next_to_read(Phys(phys.0), last)).or_raise()?;
        Ok(run.map(|run| (run.start.0, run.len)))
    }

    /// Whether `nbytes` from `phys` are in this memory.
    fn has(&self, phys: Number, nbytes: Number) -> bool {
        self.inner.memory().contains(Phys(phys.0), nbytes.0)
    }

    /// A limit that goes with the bytes of the files that are read: `held` (these bytes), `items`, `objects`,
    /// `fdt_bytes`, `contents`.
    fn room(&self, what: &str) -> PyResult<u64> {
        let room = self.inner.memory().room();
        Ok(match what {
            "held" => room.held(),
            "items" => room.items(),
            "objects" => room.objects(),
            "fdt_bytes" => room.fdt_bytes(),
            "contents" => room.contents(),
            _ => return Err(to_py(Error::Invalid { what: "room", why: format!("there is none of {what:?}") })),
        })
    }

    fn unrestored(&self, py: Python<'_>) -> PyResult<FolioArray> {
        py.detach(|| self.inner.unrestored().and_then(|left| FolioArray::of(&left))).or_raise()
    }

    /// A copy of what was preserved, as a `Tracker`.
    fn tracker(&self, py: Python<'_>) -> PyTracker {
        PyTracker::from_tracker(py.detach(|| self.inner.preserved().clone()))
    }

    #[getter]
    fn folios(&self, py: Python<'_>) -> PyResult<FolioArray> {
        py.detach(|| FolioArray::of(self.inner.preserved())).or_raise()
    }

    #[getter]
    fn compatible(&self) -> &'static str {
        self.inner.abi().compatible
    }

    #[getter]
    fn kernels(&self) -> &'static str {
        self.inner.abi().kernels
    }

    #[getter]
    fn page_size(&self) -> u64 {
        self.inner.layout().page.bytes()
    }

    #[getter]
    fn page_size_why(&self) -> &str {
        &self.inner.layout().page_why
    }

    #[getter]
    fn bitmap_bytes(&self) -> Option<u64> {
        self.inner.layout().bitmap.as_ref().map(|(bytes, _)| *bytes)
    }

    #[getter]
    fn bitmap_bytes_why(&self) -> Option<&str> {
        self.inner.layout().bitmap.as_ref().map(|(_, why)| why.as_str())
    }

    #[getter]
    fn certainty(&self) -> String {
        self.inner.layout().certainty.to_string()
    }

    #[getter]
    fn fdt(&self) -> PyResult<PyFdt> {
        PyFdt::of(self.inner.root().fdt.as_bytes())
    }

    #[getter]
    fn fdt_phys(&self) -> u64 {
        self.inner.root().phys.0
    }

    #[getter]
    fn preserved_memory_map(&self) -> u64 {
        self.inner.root().map.0
    }

    #[getter]
    fn nr_folios(&self) -> u64 {
        self.inner.preserved().len()
    }

    #[getter]
    fn nr_restored(&self) -> u64 {
        self.inner.nr_restored()
    }

    #[getter]
    fn preserved_bytes(&self) -> u128 {
        self.inner.preserved().nr_pages() << self.inner.layout().page.shift()
    }

    /// Order to number of folios, for orders that have any.
    #[getter]
    fn folios_by_order<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        let preserved = self.inner.preserved();
        for order in preserved.orders().filter(|order| preserved.len_of(*order) > 0) {
            dict.set_item(order.get(), preserved.len_of(order))?;
        }
        Ok(dict)
    }

    #[getter]
    fn metadata_pages(&self) -> usize {
        self.inner.map_pages().len()
    }

    /// Addresses of the pages that hold the map.
    #[getter]
    fn map_pages(&self) -> Vec<u64> {
        self.inner.map_pages()
    }

    /// Where the memory's addresses are from.
    #[getter]
    fn address(&self) -> &'static str {
        match self.inner.address() {
            Address::Own => "own",
            Address::Named => "named",
            Address::Assumed => "assumed",
            Address::Solved(_) => "solved",
        }
    }

    /// Where a raw image was read; `None` where that is where it was named.
    #[getter]
    fn placement<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let Address::Solved(at) = self.inner.address() else { return Ok(None) };
        let fields = (&at.argument, &at.named, &at.as_is, at.certainty.to_string(), &at.why);
        py.import("kho._types")?.getattr("Placement")?.call1(fields).map(Some)
    }

    #[getter]
    fn ranges(&self) -> Vec<(u64, u64)> {
        self.inner.memory().ranges().iter().map(|r| (r.start.0, r.len)).collect()
    }

    /// The first run at or behind `phys` that may hold something other than zeros.
    fn next_data(&self, py: Python<'_>, phys: Number) -> PyResult<Option<(u64, u64)>> {
        next_data(py, &**self.inner.memory(), Phys(phys.0))
    }

    #[getter]
    fn scratch_phys(&self) -> Option<u64> {
        self.inner.scratch_phys().map(|phys| phys.0)
    }

    #[getter]
    fn machine(&self) -> Option<String> {
        self.inner.machine().map(|machine| machine.to_string())
    }

    /// Write an ELF core of the handover, or of all memory.
    #[pyo3(signature = (path, *, everything=false))]
    fn save(slf: &Bound<'_, Self>, path: &Bound<'_, PyAny>, everything: bool) -> PyResult<()> {
        let image = slf.py().import("kho.image")?.getattr("Image")?.call1((slf,))?;
        let given = PyDict::new(slf.py());
        given.set_item("everything", everything)?;
        image.call_method("save", (path,), Some(&given))?;
        Ok(())
    }

    /// (phys, nbytes) of the map's chunks and bitmaps, or of its tree's nodes.
    #[getter]
    fn map_nodes(&self) -> Vec<(u64, u64)> {
        self.inner.map_nodes().iter().map(|node| (node.start.0, node.len)).collect()
    }

    #[getter]
    fn pages_outside(&self) -> u128 {
        self.inner.pages_outside()
    }

    #[getter]
    fn scratch(&self) -> Option<Vec<(u64, u64)>> {
        self.inner.scratch().map(|areas| areas.iter().map(|a| (a.addr, a.size)).collect())
    }

    /// Addresses of other handovers in the same memory.
    #[getter]
    fn others(&self) -> Vec<u64> {
        self.inner.others().iter().map(|phys| phys.0).collect()
    }

    #[getter]
    fn subtrees<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        for subtree in &self.inner.root().subtrees {
            dict.set_item(&subtree.name, self.subtree(subtree))?;
        }
        Ok(dict)
    }

    /// Every subtree's payload, decoded: name to `kho.payload.Payload`.
    #[getter]
    fn payloads<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        decoded(slf, "payloads")
    }

    /// The live update orchestrator's sessions.
    #[getter]
    fn luo<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        decoded(slf, "luo_of")
    }

    /// The chain of kexecs.
    #[getter]
    fn metadata<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        decoded(slf, "metadata_of")
    }

    /// `reserve_mem=` regions by name.
    #[getter]
    fn reserve_mem<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        decoded(slf, "reserve_mem_of")
    }

    /// Names of nodes that are no subtree, with the reason.
    #[getter]
    fn malformed_subtrees<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        for (name, why) in &self.inner.root().malformed {
            dict.set_item(name, why)?;
        }
        Ok(dict)
    }

    fn __repr__(&self) -> String {
        let root = self.inner.root();
        format!("<kho.Incoming {} at {}: {} folios>", root.abi.compatible, root.phys, self.inner.preserved().len())
    }
}

impl PyIncoming {
    fn subtree(&self, subtree: &kho::root::Subtree) -> Subtree {
        Subtree { inner: subtree.clone(), memory: Arc::clone(self.inner.memory()) }
    }
}

#[pymethods]
impl Subtree {
    #[getter]
    fn name(&self) -> &str {
        &self.inner.name
    }

    #[getter]
    fn phys(&self) -> u64 {
        self.inner.phys.0
    }

    #[getter]
    fn size(&self) -> Option<u64> {
        self.inner.size
    }

    /// The blob's bytes.
    fn read<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let Some(size) = self.inner.size else {
            let why = format!(
                "{:?} at {}: its size is not known; read the memory there instead",
                self.inner.name, self.inner.phys
            );
            return Err(to_py(Error::Invalid { what: "subtree", why }));
        };
        read(py, &*self.memory, self.inner.phys, size)
    }

    /// The blob as a devicetree.
    fn fdt(&self, py: Python<'_>) -> PyResult<PyFdt> {
        PyFdt::of(self.read(py)?.as_bytes())
    }

    fn __repr__(&self) -> String {
        let size = self.inner.size.map_or("unknown size".into(), |size| format!("{size} bytes"));
        format!("<kho.Subtree {:?} at {}, {size}>", self.inner.name, self.inner.phys)
    }
}
