//! `kho.Folio` and `kho.Pages`: preserved, allocated or restored memory as buffers.

#![allow(unsafe_code)]

use crate::errors::{OrRaise, to_py};
use crate::reader::reading;
use kho::Error;
use kho::arena::{Arena, Lease};
use kho::incoming::Incoming;
use kho::memory::PhysMemory;
use kho::units::{Order, PageSize, Pfn, Phys};
use pyo3::exceptions::{PyBufferError, PyMemoryError, PyTypeError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use std::ffi::{c_int, c_void};
use std::sync::Arc;

/// Where a folio's bytes lie.
pub(crate) enum Place {
    /// In an arena: views are the memory itself, and keep it mapped.
    Arena { arena: Arc<Arena>, lease: Lease },
    /// In an image: views are copies, read on demand.
    Image(Arc<dyn PhysMemory>),
}

impl Place {
    /// The place of pages that were restored from a handover.
    pub(crate) fn restored(incoming: &Incoming, start: Pfn, end: Pfn) -> kho::Result<Self> {
        Ok(match (incoming.arena(), incoming.lease(start, end)?) {
            (Some(arena), Some(lease)) => Place::Arena { arena: Arc::clone(arena), lease },
            _ => Place::Image(Arc::clone(incoming.memory())),
        })
    }

    fn memory(&self) -> &dyn PhysMemory {
        match self {
            Place::Arena { arena, .. } => &**arena,
            Place::Image(memory) => &**memory,
        }
    }

    /// Fails if the lease of the pages has ended: they were freed or taken over.
    fn check(&self) -> kho::Result<()> {
        match self {
            Place::Arena { arena, lease } => arena.check_lease(lease),
            Place::Image(_) => Ok(()),
        }
    }

    /// The arena and the lease of its pages.
    fn leased(&self) -> PyResult<(&Arc<Arena>, &Lease)> {
        match self {
            Place::Arena { arena, lease } => Ok((arena, lease)),
            Place::Image(_) => {
                Err(to_py(Error::Invalid { what: "folio", why: "it is in an image, not in an arena".into() }))
            }
        }
    }

    /// Fails if the lease of the pages has ended, or if they are of another arena than `used`.
    fn check_in(&self, used: &Arc<Arena>) -> kho::Result<()> {
        match self {
            Place::Arena { arena, .. } if !Arc::ptr_eq(arena, used) => {
                let why = "it is in another arena; give its address if the same place is meant here".into();
                Err(Error::Invalid { what: "folio", why })
            }
            _ => self.check(),
        }
    }

    /// Ends a view that [`fill`] began.
    fn release(&self) {
        if let Place::Arena { arena, lease } = self {
            arena.end_view(lease);
        }
    }
}

/// Copies `n` bytes of physical memory into a `bytes`, after a check that the memory has as many.
pub(crate) fn read<'py>(py: Python<'py>, memory: &dyn PhysMemory, phys: Phys, n: u64) -> PyResult<Bound<'py, PyBytes>> {
    let outside = || to_py(Error::OutsideMemory { what: "read", phys: phys.0, len: n });
    if !memory.contains(phys, n) {
        return Err(outside());
    }
    let len = usize::try_from(n).map_err(|_| outside())?;
    bytes_of(py, len, |buf| memory.read(phys, buf))
}

/// Makes a `bytes` of `len` bytes that `fill` fills in; OutOfMemoryError if this process cannot allocate it.
pub(crate) fn bytes_of<'py>(
    py: Python<'py>,
    len: usize,
    fill: impl FnOnce(&mut [u8]) -> kho::Result<()> + Send,
) -> PyResult<Bound<'py, PyBytes>> {
    PyBytes::new_with(py, len, |buf| reading(py, || fill(buf))?.or_raise()).map_err(|error| {
        let plain = error.get_type(py).is(py.get_type::<PyMemoryError>());
        if plain { to_py(Error::TooLong { items: len, bytes: 1 }) } else { error }
    })
}

/// The first run at or after `phys` that may hold something other than zeros, as (phys, nbytes).
pub(crate) fn next_data(py: Python<'_>, memory: &dyn PhysMemory, phys: Phys) -> PyResult<Option<(u64, u64)>> {
    let run = reading(py, || memory.next_data(phys))?.or_raise()?;
    Ok(run.map(|run| (run.start.0, run.len)))
}

/// The address that an argument names: a `Folio`, `Pages`, or an int.
pub(crate) fn phys_of(object: &Bound<'_, PyAny>) -> PyResult<Phys> {
    if let Ok(folio) = object.cast::<Folio>() {
        return Ok(folio.get().phys_addr());
    }
    if let Ok(pages) = object.cast::<Pages>() {
        return Ok(pages.get().phys_addr());
    }
    let number = object.extract().map_err(|_| PyTypeError::new_err("a kho.Folio or a physical address is needed"))?;
    Ok(Phys(number))
}

/// The same, for use in an arena: a `Folio` or `Pages` must be of that arena, and its lease must not have ended.
pub(crate) fn phys_in(arena: &Arc<Arena>, object: &Bound<'_, PyAny>) -> PyResult<Phys> {
    if let Ok(folio) = object.cast::<Folio>() {
        folio.get().place.check_in(arena).or_raise()?;
    } else if let Ok(pages) = object.cast::<Pages>() {
        pages.get().place.check_in(arena).or_raise()?;
    }
    phys_of(object)
}

/// Fills a buffer view in for `len` bytes from page `head` on: the arena's memory itself, or a copy of the image's.
/// When CPython releases a view whose exporter is `owner`, `owner` has to call [`Place::release`].
///
/// # Safety
/// `view` is null or the pointer that CPython passes to `bf_getbuffer`; `owner` contains `place`.
unsafe fn fill(
    owner: Bound<'_, PyAny>,
    view: *mut ffi::Py_buffer,
    flags: c_int,
    place: &Place,
    page: PageSize,
    head: Pfn,
    len: u64,
) -> PyResult<()> {
    if view.is_null() {
        return Err(PyBufferError::new_err("no view to fill"));
    }
    let phys = page.phys(head);
    let py = owner.py();
    let status = match place {
        Place::Arena { arena, lease } => {
            let bytes = arena.begin_view(lease).or_raise()?;
            let filled = match isize::try_from(len) {
                // SAFETY: `begin_view` checked that the lease's `len` bytes lie at `bytes` in the arena's mapping. The
                // mapping lives as long as the arena, which `owner` holds, and the view holds a reference on `owner`.
                // The arena does not allocate the pages again before `end_view`, which `owner` calls when the view is
                // released.
                Ok(len) => unsafe {
                    ffi::PyBuffer_FillInfo(view, owner.as_ptr(), bytes.as_ptr().cast::<c_void>(), len, 0, flags)
                },
                Err(_) => {
                    arena.end_view(lease);
                    return Err(PyBufferError::new_err("larger than a buffer can be"));
                }
            };
            if filled != 0 {
                arena.end_view(lease);
            }
            filled
        }
        Place::Image(_) => {
            let copy = read(py, place.memory(), phys, len)?;
            // SAFETY: the caller guarantees that `view` is CPython's, and it was checked not to be null. The view that
            // the bytes object fills in holds a reference on it.
            unsafe { ffi::PyObject_GetBuffer(copy.as_ptr(), view, flags) }
        }
    };
    if status == 0 { Ok(()) } else { Err(PyErr::fetch(py)) }
}

/// A folio as a buffer of bytes: one allocation, not whatever lies at its address.
///
/// In an arena `memoryview(folio)` is the memory itself, writable, and keeps it mapped; in an image it is a read-only
/// copy. `bytes(folio)` copies, and `len(folio)` is `nbytes`. While a view exists, its pages are given to no other
/// owner, even if the folio is freed or taken over; what is written through the view after that is lost.
///
/// Raises: on every use StaleError after the arena was taken over, and FreedFolioError once the folio was freed,
/// through this object or another one.
#[pyclass(frozen, module = "kho")]
pub(crate) struct Folio {
    place: Place,
    page: PageSize,
    pfn: Pfn,
    order: Order,
}
crate::assert_object_alignment!(Folio);

impl Folio {
    pub(crate) fn in_arena(arena: &Arc<Arena>, lease: Lease, order: Order) -> Self {
        let place = Place::Arena { arena: Arc::clone(arena), lease };
        Folio { place, page: arena.page(), pfn: lease.start, order }
    }

    pub(crate) fn new(place: Place, page: PageSize, pfn: Pfn, order: Order) -> Self {
        Folio { place, page, pfn, order }
    }

    pub(crate) fn phys_addr(&self) -> Phys {
        self.page.phys(self.pfn)
    }

    pub(crate) fn order_of(&self) -> Order {
        self.order
    }

    fn len(&self) -> u64 {
        self.page.folio_bytes(self.order)
    }
}

#[pymethods]
impl Folio {
    /// Physical address of the head page.
    #[getter]
    fn phys(&self) -> u64 {
        self.phys_addr().0
    }

    /// Page frame number of the head page.
    #[getter]
    fn pfn(&self) -> u64 {
        self.pfn.0
    }

    /// Log2 of the number of pages.
    #[getter]
    fn order(&self) -> u32 {
        self.order.get()
    }

    /// Number of pages, `1 << order`.
    #[getter]
    fn nr_pages(&self) -> u64 {
        self.order.nr_pages()
    }

    /// Bytes in the folio.
    #[getter]
    fn nbytes(&self) -> u64 {
        self.len()
    }

    /// The number of references; 0 once the folio was freed.
    ///
    /// Raises: StaleError; ParameterError for a folio in an image.
    #[getter]
    fn refcount(&self) -> PyResult<u32> {
        let (arena, lease) = self.place.leased()?;
        match arena.check_lease(lease) {
            Ok(()) => Ok(arena.page_state(self.pfn).map_or(0, |state| state.refcount)),
            // A freed folio has no references.
            Err(Error::Freed { .. }) => Ok(0),
            Err(error) => Err(to_py(error)),
        }
    }

    /// Take a reference (folio_get).
    ///
    /// Returns: the new number of references.
    ///
    /// Raises: FreedFolioError; StaleError; ParameterError for a folio in an image.
    fn get(&self) -> PyResult<u32> {
        let (arena, lease) = self.place.leased()?;
        arena.get_leased(lease).or_raise()
    }

    /// Drop a reference, as `Arena.free`; the last one frees the folio.
    ///
    /// After that this object, and every other object of the same folio, is refused.
    ///
    /// Returns: True if this was the last reference.
    ///
    /// Raises: FreedFolioError if it was freed before; StaleError; ParameterError for a folio in an image;
    /// PageStateError and OwnedPageError as `Arena.free`.
    pub(crate) fn free(&self) -> PyResult<bool> {
        let (arena, lease) = self.place.leased()?;
        arena.put_leased(lease).or_raise()
    }

    fn __len__(&self) -> PyResult<usize> {
        Ok(usize::try_from(self.len())?)
    }

    fn __bytes__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        self.place.check().or_raise()?;
        read(py, self.place.memory(), self.phys_addr(), self.len())
    }

    fn __repr__(&self) -> String {
        format!("<kho.Folio at {:#x}, order {}>", self.phys_addr().0, self.order)
    }

    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let f = slf.get();
        // SAFETY: CPython calls this with its own view, and `slf` contains the place.
        unsafe { fill(slf.clone().into_any(), view, flags, &f.place, f.page, f.pfn, f.len()) }
    }

    /// # Safety
    /// No condition: the view is not accessed.
    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {
        self.place.release();
    }
}

/// A range of pages that were restored together, as one buffer of bytes; each page has order 0.
///
/// The buffer behaves as that of a `Folio`.
#[pyclass(frozen, module = "kho")]
pub(crate) struct Pages {
    place: Place,
    page: PageSize,
    pfn: Pfn,
    nr_pages: u64,
}
crate::assert_object_alignment!(Pages);

impl Pages {
    pub(crate) fn new(place: Place, page: PageSize, pfn: Pfn, nr_pages: u64) -> Self {
        Pages { place, page, pfn, nr_pages }
    }

    fn phys_addr(&self) -> Phys {
        self.page.phys(self.pfn)
    }

    fn len(&self) -> u64 {
        self.nr_pages << self.page.shift()
    }
}

#[pymethods]
impl Pages {
    /// Physical address of the first page.
    #[getter]
    fn phys(&self) -> u64 {
        self.phys_addr().0
    }

    /// Page frame number of the first page.
    #[getter]
    fn pfn(&self) -> u64 {
        self.pfn.0
    }

    /// Number of pages.
    #[getter]
    fn nr_pages(&self) -> u64 {
        self.nr_pages
    }

    /// Bytes in the range.
    #[getter]
    fn nbytes(&self) -> u64 {
        self.len()
    }

    fn __len__(&self) -> PyResult<usize> {
        Ok(usize::try_from(self.len())?)
    }

    fn __bytes__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        self.place.check().or_raise()?;
        read(py, self.place.memory(), self.phys_addr(), self.len())
    }

    fn __repr__(&self) -> String {
        format!("<kho.Pages: {} from {:#x}>", self.nr_pages, self.phys_addr().0)
    }

    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let p = slf.get();
        // SAFETY: CPython calls this with its own view, and `slf` contains the place.
        unsafe { fill(slf.clone().into_any(), view, flags, &p.place, p.page, p.pfn, p.len()) }
    }

    /// # Safety
    /// No condition: the view is not accessed.
    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {
        self.place.release();
    }
}
