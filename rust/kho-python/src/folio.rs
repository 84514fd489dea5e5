//! `kho.Folio` and `kho.Pages`: preserved, allocated or restored memory as buffers.

use crate::errors::{OrRaise, to_py};
use kho::Error;
use kho::arena::Arena;
use kho::memory::PhysMemory;
use kho::units::{Order, PageSize, Pfn, Phys};
use pyo3::exceptions::{PyBufferError, PyMemoryError, PyTypeError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use std::ffi::{c_int, c_void};
use std::ptr::NonNull;
use std::sync::Arc;

/// Where the bytes are.
pub(crate) enum Place {
    /// In an arena: views are the memory itself, and keep it mapped.
    Arena { arena: Arc<Arena>, generation: u64 },
    /// In an image: views are copies, read when asked for.
    Image(Arc<dyn PhysMemory>),
}

impl Place {
    pub(crate) fn arena(arena: &Arc<Arena>) -> Self {
        Place::Arena { arena: Arc::clone(arena), generation: arena.generation() }
    }

    fn memory(&self) -> &dyn PhysMemory {
        match self {
            Place::Arena { arena, .. } => &**arena,
            Place::Image(memory) => &**memory,
        }
    }

    /// The mapped bytes of an arena, as long as they are still the owner's.
    fn mapped(&self, head: Pfn, phys: Phys, len: u64) -> kho::Result<Option<NonNull<u8>>> {
        match self {
            Place::Arena { arena, generation } => {
                arena.check_generation("folio", *generation)?;
                arena.order_of(head)?;
                arena.check_allocated(head, Pfn(head.0 + (len >> arena.page().shift())))?;
                let outside = Error::OutsideMemory { what: "folio", phys: phys.0, len };
                arena.ptr(phys, len).map(Some).ok_or(outside)
            }
            Place::Image(_) => Ok(None),
        }
    }
}

/// `n` bytes of physical memory as `bytes`, bounded before they are allocated.
pub(crate) fn read<'py>(py: Python<'py>, memory: &dyn PhysMemory, phys: Phys, n: u64) -> PyResult<Bound<'py, PyBytes>> {
    let outside = || to_py(Error::OutsideMemory { what: "read", phys: phys.0, len: n });
    if !memory.contains(phys, n) {
        return Err(outside());
    }
    let len = usize::try_from(n).map_err(|_| outside())?;
    bytes_of(py, len, |buf| memory.read(phys, buf))
}

/// `len` bytes as `bytes`, filled by `fill`; OutOfMemoryError where this process cannot have as many.
pub(crate) fn bytes_of<'py>(
    py: Python<'py>,
    len: usize,
    fill: impl FnOnce(&mut [u8]) -> kho::Result<()> + Send,
) -> PyResult<Bound<'py, PyBytes>> {
    PyBytes::new_with(py, len, |buf| py.detach(|| fill(buf)).or_raise()).map_err(|error| {
        let plain = error.get_type(py).is(py.get_type::<PyMemoryError>());
        if plain { to_py(Error::TooLong { items: len, bytes: 1 }) } else { error }
    })
}

/// The first run at or behind `phys` that may hold something other than zeros, as (phys, size).
pub(crate) fn next_data(py: Python<'_>, memory: &dyn PhysMemory, phys: Phys) -> PyResult<Option<(u64, u64)>> {
    let run = py.detach(|| memory.next_data(phys)).or_raise()?;
    Ok(run.map(|run| (run.start.0, run.len)))
}

/// The address a folio argument names: a `Folio`, `Pages`, or an int.
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

/// Fills a Python buffer for `len` bytes at `phys`: the arena's memory itself, or a copy of the image's.
///
/// # Safety
/// `view` is CPython's, as `bf_getbuffer` gets it.
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
    let status = match place.mapped(head, phys, len).or_raise()? {
        Some(bytes) => {
            let len = isize::try_from(len).map_err(|_| PyBufferError::new_err("larger than a buffer can be"))?;
            // SAFETY: `bytes` is valid for `len` bytes for as long as `owner` lives, which holds the arena; the view
            // takes a reference on `owner`.
            unsafe { ffi::PyBuffer_FillInfo(view, owner.as_ptr(), bytes.as_ptr().cast::<c_void>(), len, 0, flags) }
        }
        None => {
            let copy = read(py, place.memory(), phys, len)?;
            // SAFETY: `view` is CPython's; the view it fills in holds the bytes object.
            unsafe { ffi::PyObject_GetBuffer(copy.as_ptr(), view, flags) }
        }
    };
    if status == 0 { Ok(()) } else { Err(PyErr::fetch(py)) }
}

/// A folio: `1 << order` contiguous pages, as a buffer of bytes.
#[pyclass(frozen, module = "kho")]
pub(crate) struct Folio {
    place: Place,
    page: PageSize,
    pfn: Pfn,
    order: Order,
}

impl Folio {
    pub(crate) fn in_arena(arena: &Arc<Arena>, pfn: Pfn, order: Order) -> Self {
        Folio { place: Place::arena(arena), page: arena.page(), pfn, order }
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

    fn arena(&self) -> PyResult<&Arc<Arena>> {
        match &self.place {
            Place::Arena { arena, generation } => {
                arena.check_generation("folio", *generation).or_raise()?;
                Ok(arena)
            }
            Place::Image(_) => {
                Err(to_py(Error::Invalid { what: "folio", why: "it is in an image, not in an arena".into() }))
            }
        }
    }
}

#[pymethods]
impl Folio {
    #[getter]
    fn phys(&self) -> u64 {
        self.phys_addr().0
    }

    #[getter]
    fn pfn(&self) -> u64 {
        self.pfn.0
    }

    #[getter]
    fn order(&self) -> u32 {
        self.order.get()
    }

    #[getter]
    fn nr_pages(&self) -> u64 {
        self.order.nr_pages()
    }

    #[getter]
    fn nbytes(&self) -> u64 {
        self.len()
    }

    #[getter]
    fn refcount(&self) -> PyResult<u32> {
        Ok(self.arena()?.page_state(self.pfn).map_or(0, |state| state.refcount))
    }

    /// Takes a reference; returns the new count.
    fn get(&self) -> PyResult<u32> {
        self.arena()?.get(self.pfn).or_raise()
    }

    /// Drops a reference; True if that freed the folio.
    fn free(&self) -> PyResult<bool> {
        self.arena()?.put(self.pfn).or_raise()
    }

    fn __len__(&self) -> PyResult<usize> {
        Ok(usize::try_from(self.len())?)
    }

    fn __bytes__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        self.place.mapped(self.pfn, self.phys_addr(), self.len()).or_raise()?;
        read(py, self.place.memory(), self.phys_addr(), self.len())
    }

    fn __repr__(&self) -> String {
        format!("<kho.Folio at {:#x}, order {}>", self.phys_addr().0, self.order)
    }

    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let f = slf.get();
        // SAFETY: CPython calls this with a view of its own.
        unsafe { fill(slf.clone().into_any(), view, flags, &f.place, f.page, f.pfn, f.len()) }
    }
}

/// A range of pages that were restored together, each an order-0 page of its own, as one buffer of bytes.
#[pyclass(frozen, module = "kho")]
pub(crate) struct Pages {
    place: Place,
    page: PageSize,
    pfn: Pfn,
    nr_pages: u64,
}

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
    #[getter]
    fn phys(&self) -> u64 {
        self.phys_addr().0
    }

    #[getter]
    fn pfn(&self) -> u64 {
        self.pfn.0
    }

    #[getter]
    fn nr_pages(&self) -> u64 {
        self.nr_pages
    }

    #[getter]
    fn nbytes(&self) -> u64 {
        self.len()
    }

    fn __len__(&self) -> PyResult<usize> {
        Ok(usize::try_from(self.len())?)
    }

    fn __bytes__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        self.place.mapped(self.pfn, self.phys_addr(), self.len()).or_raise()?;
        read(py, self.place.memory(), self.phys_addr(), self.len())
    }

    fn __repr__(&self) -> String {
        format!("<kho.Pages: {} from {:#x}>", self.nr_pages, self.phys_addr().0)
    }

    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let p = slf.get();
        // SAFETY: CPython calls this with a view of its own.
        unsafe { fill(slf.clone().into_any(), view, flags, &p.place, p.page, p.pfn, p.len()) }
    }
}
