//! `kho.FolioArray`: folios by address, as a sequence and as a buffer.

use kho::tracker::Folio;
use pyo3::exceptions::{PyBufferError, PyIndexError, PyOverflowError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PySequence, PySlice, PyType};
use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Folios sorted by address, then order; immutable. Slices share the memory where they can.
#[pyclass(frozen, sequence, module = "kho", name = "FolioArray")]
pub(crate) struct FolioArray {
    folios: Arc<Vec<Folio>>,
    start: usize,
    /// Folios here: the buffer's shape.
    shape: isize,
    /// Bytes from one to the next: the buffer's strides.
    stride: isize,
}

/// One item as PEP 3118 has it: 16 bytes, of which the last 7 are padding.
const FORMAT: &std::ffi::CStr = c"T{Q:phys:B:order:7x}";

impl FolioArray {
    pub(crate) fn new(folios: Vec<Folio>) -> Self {
        Self::part(Arc::new(folios), 0..usize::MAX)
    }

    /// The part of `folios` inside `range`.
    fn part(folios: Arc<Vec<Folio>>, range: std::ops::Range<usize>) -> Self {
        let start = range.start.min(folios.len());
        let end = range.end.clamp(start, folios.len());
        FolioArray {
            folios,
            start,
            // A vector has at most isize::MAX bytes.
            shape: (end - start).cast_signed(),
            stride: size_of::<Folio>().cast_signed(),
        }
    }

    pub(crate) fn as_slice(&self) -> &[Folio] {
        &self.folios[self.start..][..self.shape.cast_unsigned()]
    }
}

/// `kho.FolioInfo(phys, order)`.
fn info(py: Python<'_>, folio: Folio) -> PyResult<Bound<'_, PyAny>> {
    static CLASS: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    CLASS.import(py, "kho._types", "FolioInfo")?.call1((folio.phys, folio.order))
}

#[pymethods]
impl FolioArray {
    fn __len__(&self) -> usize {
        self.shape.cast_unsigned()
    }

    fn __getitem__<'py>(&self, at: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let py = at.py();
        if let Ok(slice) = at.cast::<PySlice>() {
            let at = slice.indices(self.shape)?;
            let start = at.start.max(0).cast_unsigned();
            let part = if at.step == 1 {
                let start = self.start + start;
                Self::part(Arc::clone(&self.folios), start..start + at.slicelength)
            } else {
                let picked = (0..at.slicelength.cast_signed())
                    .map(|n| self.as_slice()[(at.start + n * at.step).cast_unsigned()]);
                Self::new(picked.collect())
            };
            return Ok(Bound::new(py, part)?.into_any());
        }
        let folio = match at.extract::<isize>() {
            Ok(index) => {
                let index = if index < 0 { index + self.shape } else { index };
                usize::try_from(index).map_or(None, |i| self.as_slice().get(i))
            }
            Err(e) if e.is_instance_of::<PyOverflowError>(py) => None,
            Err(e) => return Err(e),
        };
        match folio {
            Some(&folio) => info(py, folio),
            None => Err(PyIndexError::new_err(format!("index {at} is out of range for {} folios", self.shape))),
        }
    }

    fn __iter__(slf: Bound<'_, Self>) -> FolioIter {
        FolioIter { array: slf.unbind(), next: AtomicUsize::new(0) }
    }

    fn __eq__(&self, other: &Bound<'_, PyAny>) -> PyResult<Py<PyAny>> {
        let py = other.py();
        let equal = if let Ok(other) = other.cast::<FolioArray>() {
            self.as_slice() == other.get().as_slice()
        } else if let Ok(other) = other.cast::<PySequence>() {
            self.equals_pairs(other)?
        } else {
            return Ok(py.NotImplemented());
        };
        Ok(equal.into_pyobject(py)?.to_owned().into_any().unbind())
    }

    fn __repr__(&self) -> String {
        const SHOWN: usize = 4;
        let all = self.as_slice();
        let mut shown: Vec<String> = all.iter().take(SHOWN).map(|f| format!("({:#x}, {})", f.phys, f.order)).collect();
        if all.len() > SHOWN {
            shown.push(format!("... {} in all", all.len()));
        }
        format!("FolioArray([{}])", shown.join(", "))
    }

    /// PEP 3118: a read-only array of one dimension; the array stays alive as long as the view.
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        if view.is_null() {
            return Err(PyBufferError::new_err("no view to fill"));
        }
        if flags & ffi::PyBUF_WRITABLE == ffi::PyBUF_WRITABLE {
            return Err(PyBufferError::new_err("a FolioArray is read-only"));
        }
        let array = slf.get();
        let given = |flag: c_int| flags & flag == flag;
        let buf = array.as_slice().as_ptr().cast_mut().cast::<c_void>();
        let shape = ptr::from_ref(&array.shape).cast_mut();
        let strides = ptr::from_ref(&array.stride).cast_mut();
        // SAFETY: the interpreter passes a view to fill. Memory, shape and strides belong to the frozen object that
        // `obj` keeps alive until the view is released; nothing writes through them, as `readonly` says.
        unsafe {
            (*view).buf = buf;
            (*view).len = array.shape * array.stride;
            (*view).readonly = 1;
            (*view).itemsize = array.stride;
            (*view).format = match given(ffi::PyBUF_FORMAT) {
                true => FORMAT.as_ptr().cast_mut(),
                false => ptr::null_mut(),
            };
            (*view).ndim = 1;
            (*view).shape = if given(ffi::PyBUF_ND) { shape } else { ptr::null_mut() };
            (*view).strides = match given(ffi::PyBUF_STRIDES) {
                true => strides,
                false => ptr::null_mut(),
            };
            (*view).suboffsets = ptr::null_mut();
            (*view).internal = ptr::null_mut();
            (*view).obj = slf.into_ptr();
        }
        Ok(())
    }
}

impl FolioArray {
    /// Whether a sequence holds the same (phys, order) pairs. Items that are no pairs of numbers are not equal.
    fn equals_pairs(&self, other: &Bound<'_, PySequence>) -> PyResult<bool> {
        if other.len()? != self.__len__() {
            return Ok(false);
        }
        for (n, folio) in self.as_slice().iter().enumerate() {
            let pair: (u64, u8) = match other.get_item(n)?.extract() {
                Ok(pair) => pair,
                Err(_) => return Ok(false),
            };
            if pair != (folio.phys, folio.order) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Iterates over a `FolioArray`.
#[pyclass(frozen, module = "kho._kho")]
pub(crate) struct FolioIter {
    array: Py<FolioArray>,
    next: AtomicUsize,
}

#[pymethods]
impl FolioIter {
    fn __iter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __next__<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let folios = self.array.get().as_slice();
        // An exhausted iterator stays where it is, so that it stays exhausted.
        let next =
            self.next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |at| (at < folios.len()).then_some(at + 1));
        match next.ok().and_then(|at| folios.get(at)) {
            Some(&folio) => info(py, folio).map(Some),
            None => Ok(None),
        }
    }
}
