//! `kho.Incoming`: a handover that was read, or taken over.

#![forbid(unsafe_code)]

use crate::abis::PyAbi;
use crate::arena::PyArena;
use crate::args::{Number, Numbers};
use crate::errors::{OrRaise, to_py};
use crate::fdt::PyFdt;
use crate::folio::{Folio, Pages, Place, next_data, phys_of, read};
use crate::folios::FolioArray;
use crate::memory::{Memory, absence, memory_of, truncated, vmcoreinfo, with_progress};
use crate::reader::reading;
use crate::tracker::PyTracker;
use kho::Error;
use kho::arena::ScratchArea;
use kho::incoming::{Address, Incoming, Options, ScratchHow};
use kho::memory::{PhysMemory, absences_in, absent_bytes, next_absence};
use kho::others::RootState;
use kho::payload::ChunkOwners;
use kho::units::{Order, PageSize, Pfn, Phys};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use std::ffi::OsString;
use std::sync::Arc;

/// A handover that was read or taken over (kho_in); each of its folios is restored once.
///
/// `Incoming(arena)` takes the arena over, as a kexec does: what was allocated is gone, what was preserved stays
/// reserved until it is restored, and all other memory outside scratch is free. `kho.open` reads an arena without that.
/// `Incoming(memory)` reads, as `kho.open` does.
///
/// Args:
///     memory: an `Arena` to take over, or a `Memory` to read.
///     fdt_phys: physical address of the root FDT; by default the one that the arena recorded, or else the one that a
///         search of the memory finds. If it is given, the memory is not searched.
///     page_size: 4096, 16384 or 65536; by default decided from evidence (abi.md section 1).
///     bitmap_bytes: for kho-v1, 512 or the page size; by default decided from evidence (abi.md section 1).
///     scratch: (addr, nbytes) of each scratch area, or the physical address of the array that lists them; by default
///         the arena's, or those that the search finds.
///     max_page_order: refuse to restore folios of a larger order, as Linux before 7.1 does.
///
/// Raises: NoHandoverError, UnsupportedAbiError, FormatError, OutsideMemoryError; ParameterError if no scratch array
/// lies at `scratch`.
#[pyclass(frozen, module = "kho", name = "Incoming", weakref)]
pub(crate) struct PyIncoming {
    pub(crate) inner: Incoming,
    /// The owner of each chunk of the page lists read so far.
    pub(crate) chunk_owners: ChunkOwners,
}
crate::assert_object_alignment!(PyIncoming);

impl From<Incoming> for PyIncoming {
    fn from(inner: Incoming) -> Self {
        PyIncoming { inner, chunk_owners: ChunkOwners::default() }
    }
}

/// A producer's blob, that a node of the root FDT points to (abi.md section 2).
#[pyclass(frozen, module = "kho")]
pub(crate) struct Subtree {
    inner: kho::root::Subtree,
    memory: Arc<dyn PhysMemory>,
}
crate::assert_object_alignment!(Subtree);

/// Calls a function of `kho.formats` with the handover. Decoders are Python, in a registry that other packages extend.
fn decoded<'py>(inc: &Bound<'py, PyIncoming>, function: &str) -> PyResult<Bound<'py, PyAny>> {
    inc.py().import("kho.formats")?.getattr(function)?.call1((inc,))
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

/// Read the handover in a memory or arena without changing anything, as `kho.open` does.
///
/// Args:
///     memory: a `Memory` or `Arena`.
///     fdt_phys, page_size, bitmap_bytes, scratch, max_page_order: as of `Incoming`.
///     progress: called with the number of bytes searched so far; an exception that it raises ends the call.
///
/// Raises: as `Incoming`; SourceError for a raw image whose handover is whole at no address, or at several.
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

    /// Restore the folio whose head is at `phys`, once (kho_restore_folio).
    ///
    /// In an arena it is allocated then.
    ///
    /// Args:
    ///     phys: physical address of the head page, or a `Folio` there.
    ///
    /// Raises: NotRestorableError for an address that is not the head of a preserved folio, or whose folio was restored
    /// before; StaleError.
    fn restore_folio(&self, phys: &Bound<'_, PyAny>) -> PyResult<Folio> {
        let (pfn, order) = self.inner.restore_folio(phys_of(phys)?).or_raise()?;
        let place = Place::restored(&self.inner, pfn, Pfn(pfn.0 + order.nr_pages())).or_raise()?;
        Ok(Folio::new(place, self.inner.layout().page, pfn, order))
    }

    /// Restore the folios whose heads are at many addresses, all or nothing.
    ///
    /// In an arena they are allocated then.
    ///
    /// Args:
    ///     phys: a buffer of 64-bit or 32-bit integers (numpy array, array.array, memoryview), no address twice.
    ///
    /// Returns: their orders, one byte each.
    ///
    /// Raises: NotRestorableError for the first that cannot be restored; StaleError; TypeError for other buffers.
    fn restore_many<'py>(&self, py: Python<'py>, phys: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyBytes>> {
        let phys = Numbers::new("phys", phys)?;
        Ok(PyBytes::new(py, &py.detach(|| self.inner.restore_many(&phys.to_vec()?)).or_raise()?))
    }

    /// Restore `n` pages that were preserved as a range, all or nothing (kho_restore_pages).
    ///
    /// From kho-v3 on, ranges are cut where the NUMA node changes (kho_preserve_pages): here at the arena's nodes, or
    /// where those of an image were cut. kho_restore_pages of Linux 7.1 to 7.3 does not cut: it restores the first
    /// folio of each piece of the uncut split, and the rest of the piece stays reserved.
    ///
    /// Args:
    ///     phys: physical address of the first page, or a `Folio` or `Pages` there.
    ///     n: the number of pages.
    ///
    /// Raises: NotRestorableError unless each folio of the range's greedy split is preserved and was not restored;
    /// StaleError.
    fn restore_pages(&self, phys: &Bound<'_, PyAny>, n: Number) -> PyResult<Pages> {
        let pfn = self.inner.restore_pages(phys_of(phys)?, n.0).or_raise()?;
        let place = Place::restored(&self.inner, pfn, Pfn(pfn.0 + n.0)).or_raise()?;
        Ok(Pages::new(place, self.inner.layout().page, pfn, n.0))
    }

    /// Give what the map costs.
    ///
    /// Returns: a dict of `blocks` (bitmaps, empty ones included), `map_bytes` (bytes of chunks and bitmaps, or of the
    /// tree's nodes), `in_place_bytes` (bytes of bitmaps that are used where they lie), and `held_bytes` (bytes held
    /// next to the map: copies of bitmaps, directories, the set of restored folios).
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = py.detach(|| self.inner.stats());
        let dict = PyDict::new(py);
        dict.set_item("blocks", stats.blocks)?;
        dict.set_item("map_bytes", stats.map_bytes)?;
        dict.set_item("in_place_bytes", stats.in_place_bytes)?;
        dict.set_item("held_bytes", stats.held_bytes)?;
        Ok(dict)
    }

    /// Find a producer's blob by the name of its node (kho_retrieve_subtree).
    ///
    /// Raises: NotFoundError; FormatError for a malformed node.
    fn retrieve_subtree(&self, name: &str) -> PyResult<Subtree> {
        Ok(self.subtree(self.inner.retrieve_subtree(name).or_raise()?))
    }

    /// Copy `n` bytes of the memory at physical address `phys`.
    ///
    /// Raises: OutsideMemoryError; SourceError on a read error.
    fn read<'py>(&self, py: Python<'py>, phys: Number, n: Number) -> PyResult<Bound<'py, PyBytes>> {
        read(py, &**self.inner.memory(), Phys(phys.0), n.0)
    }

    /// Say whether the folio of this order at physical address `phys` was preserved.
    fn preserves(&self, phys: Number, order: u32) -> bool {
        let page = self.inner.layout().page;
        let order = Order::new(order.into()).ok();
        order.is_some_and(|order| {
            phys.0.is_multiple_of(page.bytes()) && self.inner.preserved().contains(page.pfn(Phys(phys.0)), order)
        })
    }

    /// Give the order of the largest preserved folio that begins at `phys`; None without one.
    fn order_at(&self, phys: Number) -> Option<u32> {
        let page = self.inner.layout().page;
        let pfn = Some(page.pfn(Phys(phys.0))).filter(|_| phys.0.is_multiple_of(page.bytes()));
        pfn.and_then(|pfn| self.inner.preserved().head_order(pfn)).map(|order| order.get())
    }

    /// Find the first run in `nbytes` from `phys` on that may hold other than zeros, or cannot be read.
    ///
    /// Returns: (phys, nbytes), or None if all of it is zeros.
    ///
    /// Raises: SourceError on a read error.
    fn next_to_read(&self, py: Python<'_>, phys: Number, nbytes: Number) -> PyResult<Option<(u64, u64)>> {
        let Some(more) = nbytes.0.checked_sub(1) else { return Ok(None) };
        let last = Phys(phys.0.saturating_add(more));
        let run = reading(py, || self.inner.memory().next_to_read(Phys(phys.0), last))?.or_raise()?;
        Ok(run.map(|run| (run.start.0, run.len)))
    }

    /// Say whether all of `nbytes` from `phys` on are in this memory.
    fn has(&self, phys: Number, nbytes: Number) -> bool {
        self.inner.memory().contains(Phys(phys.0), nbytes.0)
    }

    /// Give a limit proportional to the bytes of the files that are read, not to what their headers claim.
    ///
    /// Args:
    ///     what: `held` (bytes of the files), `items` (of a list or report), `objects` (sessions, files, regions),
    ///         `fdt_bytes` (of devicetrees of subtrees), or `contents` (bytes of contents worth reading).
    ///
    /// Raises: ParameterError for another name.
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

    /// List the preserved folios that were not restored, by address.
    ///
    /// Raises: OutOfMemoryError if this process cannot allocate the list.
    fn unrestored(&self, py: Python<'_>) -> PyResult<FolioArray> {
        py.detach(|| self.inner.unrestored().and_then(|left| FolioArray::of(&left))).or_raise()
    }

    /// Copy the set of preserved folios, restored or not.
    fn tracker(&self, py: Python<'_>) -> PyTracker {
        PyTracker::from_tracker(py.detach(|| self.inner.preserved().clone()))
    }

    /// Every preserved folio, restored or not, by address, then order.
    #[getter]
    fn folios(&self, py: Python<'_>) -> PyResult<FolioArray> {
        py.detach(|| FolioArray::of(self.inner.preserved())).or_raise()
    }

    /// The `compatible` of the root FDT, as "kho-v1".
    #[getter]
    fn compatible(&self) -> &str {
        &self.inner.root().compatible
    }

    /// The ABI version that the handover is read as: the one that `compatible` names, if it names one.
    #[getter]
    fn abi(&self) -> PyAbi {
        PyAbi(self.inner.abi())
    }

    /// Why the handover may not be what it is read as; empty if its version is known.
    ///
    /// A version that is neither released nor a known draft is read as the one that fits best (abi.md section 9).
    #[getter]
    fn unverified(&self) -> Vec<String> {
        self.inner.root().doubts.clone()
    }

    /// The kernel versions that write this ABI, as text (abi.md section 1).
    #[getter]
    fn kernels(&self) -> &'static str {
        if self.inner.root().doubts.is_empty() { self.inner.abi().kernels } else { "no known kernel" }
    }

    /// Bytes in a page of the kernel that handed over.
    #[getter]
    fn page_size(&self) -> u64 {
        self.inner.layout().page.bytes()
    }

    /// The reason for `page_size`, as text.
    #[getter]
    fn page_size_why(&self) -> &str {
        &self.inner.layout().page_why
    }

    /// Bytes in a bitmap of kho-v1; None for later versions, whose bitmaps are a page.
    #[getter]
    fn bitmap_bytes(&self) -> Option<u64> {
        self.inner.layout().bitmap.as_ref().map(|(bytes, _)| *bytes)
    }

    /// The reason for `bitmap_bytes`, as text; None without bitmaps.
    #[getter]
    fn bitmap_bytes_why(&self) -> Option<&str> {
        self.inner.layout().bitmap.as_ref().map(|(_, why)| why.as_str())
    }

    /// How certain the layout is: "given", "certain", "likely", "guess"; "not read" without a map.
    #[getter]
    fn certainty(&self) -> String {
        self.inner.layout().certainty.to_string()
    }

    /// The page of the map that is not in the dump, as (phys, why), else None.
    ///
    /// `why` is "left out" (by the filter that wrote the dump) or "cut off" (with the end of the file). What was
    /// preserved is not known then, so that no folio is; the root FDT, the subtrees and what they lead to are read.
    #[getter]
    fn map_lost(&self) -> Option<(u64, &'static str)> {
        self.inner.map_lost().map(|(phys, why)| (phys.0, why.name()))
    }

    /// The root FDT (abi.md section 2).
    ///
    /// Raises: FdtError.
    #[getter]
    fn fdt(&self) -> PyResult<PyFdt> {
        PyFdt::of(self.inner.root().fdt.as_bytes())
    }

    /// Physical address of the root FDT.
    #[getter]
    fn fdt_phys(&self) -> u64 {
        self.inner.root().phys.0
    }

    /// Physical address of the map's first node.
    ///
    /// That is a chunk in kho-v1 (abi.md section 3), and the root of the tree later (abi.md section 4). It is 0 in a
    /// root of kho-v1 that was never finalized, which Linux 6.19 and 7.0 pass on: nothing is preserved then.
    #[getter]
    fn preserved_memory_map(&self) -> u64 {
        self.inner.root().map.0
    }

    /// Whether there is a map. If not, nothing was finalized, and the next kernel boots cold.
    #[getter]
    fn finalized(&self) -> bool {
        self.inner.is_finalized()
    }

    /// The number of preserved folios.
    #[getter]
    fn nr_folios(&self) -> u64 {
        self.inner.preserved().len()
    }

    /// The number of folios that were restored.
    #[getter]
    fn nr_restored(&self) -> u64 {
        self.inner.nr_restored()
    }

    /// Bytes of the preserved folios.
    #[getter]
    fn preserved_bytes(&self) -> u128 {
        self.inner.preserved().nr_pages() << self.inner.layout().page.shift()
    }

    /// The number of preserved folios by order, for the orders that have any.
    #[getter]
    fn folios_by_order<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        let preserved = self.inner.preserved();
        for order in preserved.orders().filter(|order| preserved.len_of(*order) > 0) {
            dict.set_item(order.get(), preserved.len_of(order))?;
        }
        Ok(dict)
    }

    /// The number of pages that hold the map.
    #[getter]
    fn metadata_pages(&self) -> usize {
        self.inner.map_pages().len()
    }

    /// Physical addresses of the pages that hold the map, ascending.
    #[getter]
    fn map_pages(&self) -> Vec<u64> {
        self.inner.map_pages()
    }

    /// Where the memory's addresses come from: "own", "named", "assumed" or "solved".
    ///
    /// own: the source states them, as an ELF core does, or is not a file. Of a raw image, named: its name states them;
    /// assumed: it was named without an address and is read at 0; solved: it is read at another address, see
    /// `placement`.
    #[getter]
    fn address(&self) -> &'static str {
        match self.inner.address() {
            Address::Own => "own",
            Address::Named => "named",
            Address::Assumed => "assumed",
            Address::Solved(_) => "solved",
        }
    }

    /// Where a raw image was read, if that is not where it was named; else None.
    #[getter]
    fn placement<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let Address::Solved(at) = self.inner.address() else { return Ok(None) };
        let fields = (&at.argument, &at.named, &at.as_is, at.certainty.to_string(), &at.why);
        py.import("kho._types")?.getattr("Placement")?.call1(fields).map(Some)
    }

    /// The runs of the memory, as (phys, nbytes), ascending.
    #[getter]
    fn ranges(&self) -> Vec<(u64, u64)> {
        self.inner.memory().ranges().iter().map(|r| (r.start.0, r.len)).collect()
    }

    /// The parts that truncated files claim and do not have, as `Memory.truncated`.
    #[getter]
    fn truncated(&self) -> Vec<(OsString, u64, u64)> {
        truncated(&**self.inner.memory())
    }

    /// The level of the filter that wrote the dump, as `Memory.dump_level`.
    #[getter]
    fn dump_level(&self) -> Option<u32> {
        self.inner.memory().dump_level()
    }

    /// The value of a line of VMCOREINFO, as `Memory.vmcoreinfo`.
    fn vmcoreinfo(&self, name: &str) -> Option<String> {
        vmcoreinfo(&**self.inner.memory(), name)
    }

    /// List what of the memory in `nbytes` from `phys` on is not in the files (`Memory.absent`).
    #[pyo3(signature = (phys=None, nbytes=None))]
    fn absent(&self, phys: Option<Number>, nbytes: Option<Number>) -> Vec<(u64, u64, &'static str)> {
        let (phys, nbytes) = (phys.map_or(0, |n| n.0), nbytes.map_or(u64::MAX, |n| n.0));
        absences_in(self.inner.memory().absences(), Phys(phys), nbytes).map(|one| absence(&one)).collect()
    }

    /// Count the bytes of the memory in `nbytes` from `phys` on that are not in the files.
    ///
    /// Returns: bytes that were left out, and bytes that are cut off.
    #[pyo3(signature = (phys=None, nbytes=None))]
    fn absent_bytes(&self, phys: Option<Number>, nbytes: Option<Number>) -> (u128, u128) {
        let (phys, nbytes) = (phys.map_or(0, |n| n.0), nbytes.map_or(u64::MAX, |n| n.0));
        let [left_out, cut_off] = absent_bytes(self.inner.memory().absences(), Phys(phys), nbytes);
        (left_out, cut_off)
    }

    /// Find the first run at or after `phys` that is not in the files.
    ///
    /// Returns: (phys, nbytes, why), the part of the run from `phys` on, as `Memory.absent` has it, or None.
    fn next_absent(&self, phys: Number) -> Option<(u64, u64, &'static str)> {
        next_absence(self.inner.memory().absences(), Phys(phys.0)).map(|one| absence(&one))
    }

    /// The files that are cut off, each once.
    #[getter]
    fn cut_files(&self) -> Vec<OsString> {
        let mut files: Vec<OsString> = Vec::new();
        for cut in self.inner.memory().cuts() {
            if files.iter().all(|file| *file != *cut.path) {
                files.push(cut.path.to_path_buf().into_os_string());
            }
        }
        files
    }

    /// Count what is preserved and not in the files.
    ///
    /// Returns: preserved pages that were left out, those that are cut off, and the folios whose second page alone was
    /// left out.
    fn count_absent(&self, py: Python<'_>) -> (u64, u64, u64) {
        let lost = py.detach(|| kho::verify::lost(&self.inner));
        (lost.pages[0], lost.pages[1], lost.second_pages)
    }

    /// Find the first run at or after `phys` that may hold something other than zeros.
    ///
    /// Returns: (phys, nbytes), or None if only holes and zeros follow.
    ///
    /// Raises: SourceError on a read error.
    fn next_data(&self, py: Python<'_>, phys: Number) -> PyResult<Option<(u64, u64)>> {
        next_data(py, &**self.inner.memory(), Phys(phys.0))
    }

    /// Physical address of the array that lists the scratch areas; None if not known.
    #[getter]
    fn scratch_phys(&self) -> Option<u64> {
        self.inner.scratch_phys().map(|phys| phys.0)
    }

    /// The machine that the source names, as `Memory.machine`; None if none does.
    #[getter]
    fn machine(&self) -> Option<String> {
        self.inner.machine().map(|machine| machine.to_string())
    }

    /// Write the handover as an ELF core, as `kho.Image.save` does.
    ///
    /// Args:
    ///     path: of the new file.
    ///     everything: write all memory, not only what belongs to the handover.
    ///
    /// Raises: SourceError.
    #[pyo3(signature = (path, *, everything=false))]
    fn save(slf: &Bound<'_, Self>, path: &Bound<'_, PyAny>, everything: bool) -> PyResult<()> {
        let image = slf.py().import("kho.handover.elfcore")?.getattr("Image")?.call1((slf,))?;
        let given = PyDict::new(slf.py());
        given.set_item("everything", everything)?;
        image.call_method("save", (path,), Some(&given))?;
        Ok(())
    }

    /// The map itself, as (phys, nbytes), ascending: its chunks and bitmaps, or its tree's nodes.
    #[getter]
    fn map_nodes(&self) -> Vec<(u64, u64)> {
        self.inner.map_nodes().iter().map(|node| (node.start.0, node.len)).collect()
    }

    /// The number of preserved pages that this memory does not have.
    #[getter]
    fn pages_outside(&self) -> u128 {
        self.inner.pages_outside()
    }

    /// The scratch areas, as (addr, nbytes): low memory, global, one per NUMA node; None if not known.
    #[getter]
    fn scratch(&self) -> Option<Vec<(u64, u64)>> {
        self.inner.scratch().map(|areas| areas.iter().map(|a| (a.addr, a.size)).collect())
    }

    /// How `scratch` is known: "given", "told", "doubtful", "content" or "kho_scratch"; None if it is not.
    ///
    /// told: a kernel was told of the array with its FDT; doubtful: the same, of areas that are not all in this memory
    /// or that no kernel aligns so; content: an array was found by its content; kho_scratch: by the variable of the
    /// kernel (`kho.handover.symbols`).
    #[getter]
    fn scratch_how(&self) -> Option<&'static str> {
        self.inner.scratch_how().map(ScratchHow::name)
    }

    /// Use scratch areas that the kernel's variable `kho_scratch` names, unless better ones are known.
    fn _know_scratch(&self, areas: Vec<(u64, u64)>, phys: Number) -> bool {
        let areas = areas.iter().map(|&(addr, size)| ScratchArea { addr, size }).collect();
        self.inner.know_own_scratch(areas, Phys(phys.0))
    }

    /// Physical addresses of the pages with VMCOREINFO that the search found, ascending.
    ///
    /// Such a page begins with `OSRELEASE=`. After a handover that of the kernel before may still be there.
    #[getter]
    fn vmcoreinfo_pages(&self) -> Vec<u64> {
        self.inner.vmcoreinfo_pages().iter().map(|phys| phys.0).collect()
    }

    /// Physical addresses of other root FDTs that the search found in the same memory.
    #[getter]
    fn others(&self) -> Vec<u64> {
        self.inner.others().iter().map(|other| other.phys.0).collect()
    }

    /// What is left of the handovers of these other root FDTs, an `OtherRoot` each.
    #[getter]
    fn other_roots<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let class = py.import("kho._types")?.getattr("OtherRoot")?;
        let others = self.inner.others().iter();
        let fields = others.map(|other| {
            let why = match &other.state {
                RootState::Broken(why) => Some(why.as_str()),
                _ => None,
            };
            (other.phys.0, other.state.name(), why, other.kexec_count)
        });
        fields.map(|fields| class.call1(fields)).collect()
    }

    /// Whether there can be memfds in no session: false if a search found no page like their structure.
    #[getter]
    fn may_have_unlisted(&self) -> bool {
        self.inner.may_have_unlisted()
    }

    /// The memfds that no session lists, a `kho.formats.MemfdFile` each, ascending; found at each access.
    ///
    /// A memfd is in no list from PRESERVE_FD until LUO's lists are written at the jump. In the memory of a kernel that
    /// booted from a handover, those of this handover that were not retrieved are found as well, if the memory was
    /// searched: their `in_map` is False.
    ///
    /// Raises: SourceError on a read error.
    ///
    /// Source: abi.md section 6.
    #[getter]
    fn unlisted_memfds<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        slf.py().import("kho.handover.owners")?.getattr("unlisted")?.call1((slf,))
    }

    /// The subtrees of the root FDT by name.
    #[getter]
    fn subtrees<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        for subtree in &self.inner.root().subtrees {
            dict.set_item(&subtree.name, self.subtree(subtree))?;
        }
        Ok(dict)
    }

    /// Every subtree's payload by name, decoded at each access.
    ///
    /// A subtree without a decoder is a `Raw`, one that its decoder refuses a `Broken`.
    #[getter]
    fn payloads<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        decoded(slf, "payloads")
    }

    /// The live update orchestrator's state: `inc.luo.sessions["vm-1"].files[0x10].read()`.
    ///
    /// Raises: NotFoundError without one; FormatError if it cannot be decoded.
    ///
    /// Source: abi.md section 6.
    #[getter]
    fn luo<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        decoded(slf, "luo_of")
    }

    /// The chain of kexecs: `inc.metadata.previous_release`.
    ///
    /// Raises: NotFoundError without one; FormatError if it cannot be decoded.
    ///
    /// Source: abi.md section 6.
    #[getter]
    fn metadata<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        decoded(slf, "metadata_of")
    }

    /// The `reserve_mem=` regions by name.
    ///
    /// Raises: FormatError if their subtree cannot be decoded.
    ///
    /// Source: abi.md section 6.
    #[getter]
    fn reserve_mem<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        decoded(slf, "reserve_mem_of")
    }

    /// Nodes of the root FDT that are not valid subtrees: name to reason.
    #[getter]
    fn malformed_subtrees<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        for (name, why) in &self.inner.root().malformed {
            dict.set_item(name, why)?;
        }
        Ok(dict)
    }

    /// The handover as HTML, for notebooks (`kho.handover.html`).
    fn _repr_html_<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        slf.py().import("kho.handover.html")?.getattr("incoming")?.call1((slf,))
    }

    fn __repr__(&self) -> String {
        let root = self.inner.root();
        let folios = match self.inner.map_lost() {
            None => format!("{} folios", self.inner.preserved().len()),
            Some((phys, why)) => format!("folios not known, the map's page at {phys} is {}", why.name()),
        };
        format!("<kho.Incoming {} at {}: {folios}>", root.compatible, root.phys)
    }
}

impl PyIncoming {
    fn subtree(&self, subtree: &kho::root::Subtree) -> Subtree {
        Subtree { inner: subtree.clone(), memory: Arc::clone(self.inner.memory()) }
    }
}

#[pymethods]
impl Subtree {
    /// The name of its node in the root FDT.
    #[getter]
    fn name(&self) -> &str {
        &self.inner.name
    }

    /// Physical address of the blob.
    #[getter]
    fn phys(&self) -> u64 {
        self.inner.phys.0
    }

    /// Bytes of the blob; None if neither the root FDT nor the blob states it.
    #[getter]
    fn size(&self) -> Option<u64> {
        self.inner.size
    }

    /// Copy the blob.
    ///
    /// Raises: ParameterError if its size is not known; OutsideMemoryError; SourceError on a read error.
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

    /// Read the blob as a devicetree.
    ///
    /// Raises: FdtError; as `read`.
    fn fdt(&self, py: Python<'_>) -> PyResult<PyFdt> {
        PyFdt::of(self.read(py)?.as_bytes())
    }

    fn __repr__(&self) -> String {
        let size = self.inner.size.map_or("unknown size".into(), |size| format!("{size} bytes"));
        format!("<kho.Subtree {:?} at {}, {size}>", self.inner.name, self.inner.phys)
    }
}
