//! `kho.Arena`: physical memory that can be written.

#![forbid(unsafe_code)]

use crate::args::{Number, copied, descriptor};
use crate::errors::{OrRaise, to_py};
use crate::folio::{Folio, phys_in};
use kho::arena::{ArenaConfig, Backing, PageKind, Region, ScratchArea};
use kho::cmdline::{self, Rounding, Trailing, Zeros, cma_alignment, parse_kho_scratch};
use kho::memory::PhysMemory;
use kho::sizes::{SizeError, parse_size};
use kho::units::{Order, PageSize, Phys};
use kho::{Error, Result};
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyString};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;

/// Physical memory that can be written: RAM at chosen addresses, a page allocator, scratch areas.
///
/// Address space is reserved and memory committed at first touch, so that 16 TiB cost next to nothing. A memfd or file
/// that backs an arena is an ELF core: `kho inspect` and any ELF tool read it, and another process opens it with
/// `Arena.open`.
///
/// Args:
///     regions: RAM, page-aligned: (start, nbytes) or (start, nbytes, numa_node) each, or the size of one region at 0,
///         as an int or a str (`1 << 30`, `"1G"`).
///     page_size: 4096, 16384 or 65536.
///     max_page_order: MAX_PAGE_ORDER, the largest order that `alloc` gives without `gigantic`; by default 10, 11 or 13
///         by page size.
///     backing: None for memory of this process, "memfd", or the path of a new file.
///     scratch: a value of `kho_scratch=` (abi.md section 5), placed as the kernel does, or (addr, nbytes) of each
///         area.
///     reserved: bytes that the kernel reserved during boot; a percentage in `scratch` refers to them.
///
/// Raises: ParameterError for regions or areas that cannot be; SourceError if the backing cannot be made.
#[pyclass(frozen, module = "kho", name = "Arena", weakref)]
pub(crate) struct PyArena {
    pub(crate) inner: Arc<kho::arena::Arena>,
}
crate::assert_object_alignment!(PyArena);

/// Regions of RAM from a size, or from `(start, size)` or `(start, size, node)` each.
fn regions(arg: &Bound<'_, PyAny>) -> PyResult<Vec<Region>> {
    let region = |start, len, node| Region { start: Phys(start), len, node };
    if let Ok(text) = arg.cast::<PyString>() {
        let invalid = |error: SizeError| to_py(Error::Invalid { what: "regions", why: error.to_string() });
        return Ok(vec![region(0, parse_size(text.to_str()?).map_err(invalid)?, 0)]);
    }
    if arg.hasattr("__index__")? {
        return Ok(vec![region(0, arg.extract::<Number>()?.0, 0)]);
    }
    let of = |item: PyResult<Bound<'_, PyAny>>| match item?.extract::<Vec<Number>>()?[..] {
        [start, len] => Ok(region(start.0, len.0, 0)),
        [start, len, node] => match u32::try_from(node.0) {
            Ok(node) => Ok(region(start.0, len.0, node)),
            Err(_) => Err(to_py(Error::OutOfRange { what: "node", value: node.0, limit: u32::MAX.into() })),
        },
        _ => Err(PyTypeError::new_err("a region is (start, size) or (start, size, node)")),
    };
    arg.try_iter()?.map(of).collect()
}

/// The scratch areas of the argument; `reserved` is the number of bytes that a percentage refers to.
fn scratch(
    arg: Option<&Bound<'_, PyAny>>,
    regions: &[Region],
    page: PageSize,
    reserved: u64,
) -> PyResult<Vec<ScratchArea>> {
    let Some(arg) = arg else { return Ok(Vec::new()) };
    let spec = if let Ok(text) = arg.cast::<PyString>() {
        parse_kho_scratch(text.to_str()?, Trailing::Reject, Zeros::NotAll).or_raise()?
    } else if let Ok(spec) = arg.cast::<crate::cmdline::ScratchSpec>() {
        spec.get().0
    } else {
        let area = |item: PyResult<Bound<'_, PyAny>>| match item?.extract::<Vec<Number>>()?[..] {
            [addr, size] => Ok(ScratchArea { addr: addr.0, size: size.0 }),
            _ => Err(PyTypeError::new_err("a scratch area is (addr, size)")),
        };
        return arg.try_iter()?.map(area).collect();
    };
    place(&spec, regions, page, reserved).or_raise()
}

fn place(spec: &cmdline::ScratchSpec, regions: &[Region], page: PageSize, reserved: u64) -> Result<Vec<ScratchArea>> {
    let nodes = kho::arena::nodes(regions);
    let align = cma_alignment(page);
    let mut per_node = vec![0; nodes.len()];
    if let Some(first) = per_node.first_mut() {
        *first = reserved;
    }
    let sizes = spec.sizes(reserved, reserved, &per_node, align, Rounding::All)?;
    kho::arena::place(regions, &sizes, align)
}

#[pymethods]
impl PyArena {
    #[new]
    #[pyo3(
        signature = (regions, *, page_size = Number(4096), max_page_order = None, backing = None, scratch = None,
                     reserved = Number(0)),
        text_signature = "(regions, *, page_size=4096, max_page_order=None, backing=None, scratch=None, reserved=0)"
    )]
    fn new(
        py: Python<'_>,
        regions: &Bound<'_, PyAny>,
        page_size: Number,
        max_page_order: Option<Number>,
        backing: Option<PathBuf>,
        scratch: Option<&Bound<'_, PyAny>>,
        reserved: Number,
    ) -> PyResult<Self> {
        let page = PageSize::new(page_size.0).or_raise()?;
        let mut regions = self::regions(regions)?;
        regions.sort_by_key(|r| r.start);
        let scratch = self::scratch(scratch, &regions, page, reserved.0)?;
        let max_order = Order::new(max_page_order.map_or(default_max_order(page), |n| n.0)).or_raise()?;
        let backing = match backing {
            None => Backing::Anonymous,
            Some(text) if text.as_os_str() == "memfd" => Backing::Memfd,
            Some(path) => Backing::File(path),
        };
        let config = ArenaConfig { page, max_order, regions, scratch, backing };
        Ok(PyArena { inner: py.detach(|| kho::arena::Arena::new(config)).or_raise()? })
    }

    /// Map the arena in a file, or of a file descriptor, which is duplicated.
    ///
    /// A memory file must be sealed against shrinking (F_SEAL_SHRINK), as `Arena(backing="memfd")` makes it. Any other
    /// file can be truncated by a process that may write it: kho's own reads and writes then raise SourceError, and
    /// touching a view that was taken before is fatal (SIGBUS). While the file holds a handover that was not taken
    /// over, nothing can be allocated.
    ///
    /// Args:
    ///     source: a path, or the number of an open file descriptor.
    ///
    /// Raises: ParameterError for a file that no arena made; SourceError for one that cannot be read or mapped, or for
    /// a memory file that is not sealed.
    #[staticmethod]
    fn open(py: Python<'_>, source: &Bound<'_, PyAny>) -> PyResult<Self> {
        let inner = if let Ok(fd) = source.extract::<i32>() {
            kho::arena::Arena::open_fd(descriptor(&fd)?)
        } else {
            let path: PathBuf = source.extract()?;
            py.detach(|| kho::arena::Arena::open(&path))
        };
        Ok(PyArena { inner: inner.or_raise()? })
    }

    /// Allocate a folio of `1 << order` pages, at the lowest free address (alloc_pages).
    ///
    /// Scratch and preserved pages are never allocated. The folio holds zeros at first, and later what its last owner
    /// left.
    ///
    /// Args:
    ///     order: log2 of the number of pages.
    ///     node: the NUMA node to allocate from; any node by default.
    ///     gigantic: accept orders above `max_page_order`.
    ///
    /// Returns: the folio, with one reference.
    ///
    /// Raises: OutOfMemoryError; OrderError above `max_page_order` without `gigantic`; PageStateError while the arena
    /// holds a handover that was not taken over.
    #[pyo3(
        signature = (order = Number(0), *, node = None, gigantic = false),
        text_signature = "($self, order=0, *, node=None, gigantic=False)"
    )]
    fn alloc(&self, order: Number, node: Option<u32>, gigantic: bool) -> PyResult<Folio> {
        let order = Order::new(order.0).or_raise()?;
        let lease = self.inner.lease(order, node, gigantic).or_raise()?;
        Ok(Folio::in_arena(&self.inner, lease, order))
    }

    /// Allocate the folio of `1 << order` pages at physical address `phys`.
    ///
    /// Raises: PageStateError if one of its pages is in use; OutsideMemoryError; MisalignedError; OrderError.
    #[pyo3(signature = (phys, order = Number(0)), text_signature = "($self, phys, order=0)")]
    fn alloc_at(&self, phys: Number, order: Number) -> PyResult<Folio> {
        let order = Order::new(order.0).or_raise()?;
        let pfn = self.inner.page().pfn_exact("phys", Phys(phys.0)).or_raise()?;
        let lease = self.inner.lease_at(pfn, order).or_raise()?;
        Ok(Folio::in_arena(&self.inner, lease, order))
    }

    /// Give the folio that is allocated at physical address `phys`, the address of its head page.
    ///
    /// Raises: PageStateError if no folio begins there; OwnedPageError for a page that holds a bitmap, the map, the FDT
    /// or a subtree of a handover; MisalignedError.
    fn folio(&self, phys: Number) -> PyResult<Folio> {
        let pfn = self.inner.page().pfn_exact("phys", Phys(phys.0)).or_raise()?;
        let (lease, order) = self.inner.lease_of(pfn).or_raise()?;
        Ok(Folio::in_arena(&self.inner, lease, order))
    }

    /// Drop a reference on an allocated folio (folio_put); the last one frees it.
    ///
    /// The pages can be allocated again once no view of them is left.
    ///
    /// Args:
    ///     folio: a `Folio`, or the physical address of its head page.
    ///
    /// Returns: True if this was the last reference.
    ///
    /// Raises: PageStateError for an address that is not the head of an allocated folio, and while the folio is
    /// preserved or linked as a subtree; FreedFolioError for a `Folio` that was freed before; OwnedPageError as
    /// `Arena.folio`; ParameterError for a `Folio` of another arena.
    fn free(&self, folio: &Bound<'_, PyAny>) -> PyResult<bool> {
        if let Ok(folio) = folio.cast::<Folio>() {
            phys_in(&self.inner, folio)?;
            return folio.get().free();
        }
        let pfn = self.inner.page().pfn_exact("phys", phys_in(&self.inner, folio)?).or_raise()?;
        self.inner.put(pfn).or_raise()
    }

    /// Describe the page that holds physical address `phys`.
    ///
    /// Returns: a `PageInfo`.
    ///
    /// Raises: OutsideMemoryError.
    fn page<'py>(&self, py: Python<'py>, phys: Number) -> PyResult<Bound<'py, PyAny>> {
        let page = self.inner.page();
        let pfn = page.pfn(Phys(phys.0));
        let state = self
            .inner
            .page_state(pfn)
            .ok_or_else(|| to_py(Error::OutsideMemory { what: "page", phys: page.phys(pfn).0, len: page.bytes() }))?;
        let (name, head, order) = match state.kind {
            PageKind::Free { order } => ("free", None, Some(order)),
            PageKind::Head { order } => ("head", Some(pfn), Some(order)),
            PageKind::Tail { head, order } => ("tail", Some(head), Some(order)),
            PageKind::Reserved => ("reserved", None, None),
        };
        let head = head.map(|head| page.phys(head).0);
        let fields = (name, order.map(Order::get), state.refcount, state.private, state.node, head);
        py.import("kho._types")?.getattr("PageInfo")?.call1(fields)
    }

    /// Copy `n` bytes at physical address `phys`.
    ///
    /// Raises: OutsideMemoryError unless all of them are in RAM; SourceError on a read error.
    fn read<'py>(&self, py: Python<'py>, phys: Number, n: Number) -> PyResult<Bound<'py, PyBytes>> {
        crate::folio::read(py, &*self.inner, Phys(phys.0), n.0)
    }

    /// Find the first run at or after `phys` that may hold something other than zeros.
    ///
    /// Returns: (phys, nbytes), or None if only zeros follow.
    fn next_data(&self, py: Python<'_>, phys: Number) -> PyResult<Option<(u64, u64)>> {
        crate::folio::next_data(py, &*self.inner, Phys(phys.0))
    }

    /// Copy bytes into memory at physical address `phys`, allocated or not.
    ///
    /// Raises: OutsideMemoryError; OwnedPageError, and nothing is written, if a page holds a bitmap, the map, the FDT
    /// or a subtree of a handover, or a bitmap of a map that was taken over and is in use.
    fn write(&self, py: Python<'_>, phys: Number, data: PyBuffer<u8>) -> PyResult<()> {
        let bytes = copied(py, &data)?;
        self.inner.write(Phys(phys.0), &bytes).or_raise()
    }

    /// Give the descriptor of the memfd or file, for another process to open.
    ///
    /// Raises: ParameterError for an arena in memory of this process.
    fn fileno(&self) -> PyResult<i32> {
        match self.inner.fd() {
            Some(fd) => Ok(fd.as_raw_fd()),
            None => Err(to_py(Error::Invalid { what: "fileno", why: "an anonymous arena has no file".into() })),
        }
    }

    /// Bytes in a page.
    #[getter]
    fn page_size(&self) -> u64 {
        self.inner.page().bytes()
    }

    /// MAX_PAGE_ORDER: the largest order that `alloc` gives without `gigantic`.
    #[getter]
    fn max_page_order(&self) -> u32 {
        self.inner.config().max_order.get()
    }

    /// RAM, as (start, nbytes, numa_node) of each region, ascending.
    #[getter]
    fn regions(&self) -> Vec<(u64, u64, u32)> {
        self.inner.config().regions.iter().map(|r| (r.start.0, r.len, r.node)).collect()
    }

    /// The NUMA nodes that have memory, ascending.
    #[getter]
    fn nodes(&self) -> Vec<u32> {
        kho::arena::nodes(&self.inner.config().regions)
    }

    /// The scratch areas, as (addr, nbytes): low memory, global, then one per node.
    #[getter]
    fn scratch(&self) -> Vec<(u64, u64)> {
        self.inner.scratch().iter().map(|s| (s.addr, s.size)).collect()
    }

    /// Physical address of the scratch array, which lies in scratch itself; None without scratch.
    #[getter]
    fn scratch_phys(&self) -> Option<u64> {
        Some(self.inner.scratch_phys()).filter(|phys| *phys != 0)
    }

    /// Physical address of the root FDT of a finalized handover; None without one.
    #[getter]
    fn fdt_phys(&self) -> Option<u64> {
        Some(self.inner.recorded().fdt_phys).filter(|phys| *phys != 0)
    }

    /// Bytes of RAM.
    #[getter]
    fn nbytes(&self) -> u128 {
        self.inner.nbytes()
    }

    /// Pages that can be allocated.
    #[getter]
    fn free_pages(&self) -> u128 {
        self.inner.usage().0
    }

    /// Pages of allocated folios.
    #[getter]
    fn allocated_pages(&self) -> u128 {
        self.inner.usage().1
    }

    /// Pages that cannot be allocated: page 0, scratch, inherited and not restored, freed with a view left.
    #[getter]
    fn reserved_pages(&self) -> u128 {
        let (free, allocated) = self.inner.usage();
        (self.inner.nbytes() >> self.inner.page().shift()) - free - allocated
    }

    /// Bytes of bookkeeping outside the arena's RAM.
    #[getter]
    fn metadata_bytes(&self) -> u64 {
        self.inner.metadata_bytes()
    }

    fn __repr__(&self) -> String {
        let config = self.inner.config();
        let backing = match &config.backing {
            Backing::Anonymous => "anonymous memory".into(),
            Backing::Memfd => "a memfd".into(),
            Backing::File(path) => path.display().to_string(),
        };
        format!("<kho.Arena of {:#x} bytes, {} pages, in {backing}>", self.inner.nbytes(), config.page)
    }
}

/// MAX_PAGE_ORDER of kernels with this page size (mm/Kconfig, arch/arm64/Kconfig).
fn default_max_order(page: PageSize) -> u64 {
    match page {
        PageSize::Size4K => 10,
        PageSize::Size16K => 11,
        PageSize::Size64K => 13,
    }
}
