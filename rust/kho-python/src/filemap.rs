//! `_kho.FileMapping`: a mapped file, whose parts are exported as buffers that can be referenced weakly.

#![allow(unsafe_code)]

use crate::args::descriptor;
use crate::errors::to_py;
use kho::Error;
use kho::FileView;
use pyo3::exceptions::{PyBufferError, PyOSError};
use pyo3::ffi;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use std::ffi::{c_int, c_void};

/// A shared mapping of a part of a file, unmapped when the last view of it is gone.
///
/// Raises: OSError as mmap; ParameterError for no bytes, or a negative descriptor.
#[pyclass(frozen, subclass, weakref, module = "kho._kho")]
pub(crate) struct FileMapping {
    view: FileView,
}
crate::assert_object_alignment!(FileMapping);

#[pymethods]
impl FileMapping {
    /// Map `size` bytes of a file from `offset`; the descriptor may be closed after that.
    #[new]
    #[pyo3(signature = (fd, offset, size, *, writable))]
    fn new(fd: i32, offset: u64, size: u64, writable: bool) -> PyResult<Self> {
        let view = FileView::new(descriptor(&fd)?, offset, size, writable).map_err(os_error)?;
        Ok(FileMapping { view })
    }

    /// Bytes of the mapping.
    #[getter]
    fn size(&self) -> u64 {
        self.view.len()
    }

    /// Export `nbytes` at offset `at` as a buffer: an object that lives as long as any view of it.
    ///
    /// Raises: OutsideMemoryError.
    fn exporter(slf: Bound<'_, Self>, at: u64, nbytes: u64) -> PyResult<MappedBytes> {
        let outside = || to_py(Error::OutsideMemory { what: "map", phys: at, len: nbytes });
        slf.get().view.ptr(at, nbytes).ok_or_else(outside)?;
        let nbytes = isize::try_from(nbytes).map_err(|_| outside())?;
        Ok(MappedBytes { mapping: slf.unbind(), at, nbytes })
    }

    /// Flush bytes to the medium of the file, if it has one (msync).
    ///
    /// Raises: OSError; OutsideMemoryError.
    fn flush(&self, py: Python<'_>, at: u64, nbytes: u64) -> PyResult<()> {
        py.detach(|| self.view.flush(at, nbytes)).map_err(os_error)
    }
}

/// A part of a `FileMapping` as a buffer: `FileMapping.exporter` makes it.
#[pyclass(frozen, weakref, module = "kho._kho")]
pub(crate) struct MappedBytes {
    mapping: Py<FileMapping>,
    at: u64,
    nbytes: isize,
}
crate::assert_object_alignment!(MappedBytes);

#[pymethods]
impl MappedBytes {
    fn __len__(&self) -> usize {
        self.nbytes.cast_unsigned()
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.mapping)
    }

    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let part = slf.get();
        let mapped = &part.mapping.get().view;
        let bytes = mapped.ptr(part.at, part.nbytes.unsigned_abs() as u64);
        let (Some(bytes), false) = (bytes, view.is_null()) else {
            return Err(PyBufferError::new_err("no view to fill, or nothing to show"));
        };
        let readonly = c_int::from(!mapped.writable());
        // SAFETY: `view` is CPython's own and not null. `ptr` bounded the bytes by the mapping, which lives as long as
        // `slf`, on which the view holds a reference. A mapping that cannot be written gives read-only views.
        let status = unsafe {
            ffi::PyBuffer_FillInfo(view, slf.as_ptr(), bytes.as_ptr().cast::<c_void>(), part.nbytes, readonly, flags)
        };
        if status == 0 { Ok(()) } else { Err(PyErr::fetch(slf.py())) }
    }
}

/// Free a part of a file, which reads as zeros then; the file keeps its size (FALLOC_FL_PUNCH_HOLE).
///
/// Raises: OSError as fallocate; ParameterError for a negative descriptor.
#[pyfunction]
pub(crate) fn punch_hole(py: Python<'_>, fd: i32, offset: u64, nbytes: u64) -> PyResult<()> {
    let file = descriptor(&fd)?;
    py.detach(|| kho::punch_hole(file, offset, nbytes)).map_err(|error| raised(&error))
}

fn os_error(error: Error) -> PyErr {
    match error {
        Error::Io { source, .. } => raised(&source),
        other => to_py(other),
    }
}

fn raised(error: &std::io::Error) -> PyErr {
    match error.raw_os_error() {
        Some(number) => {
            let text = error.to_string();
            let text = text.split(" (os error").next().unwrap_or_default().to_owned();
            PyOSError::new_err((number, text))
        }
        None => PyOSError::new_err(error.to_string()),
    }
}
