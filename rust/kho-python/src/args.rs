//! Arguments as Python gives them: whole numbers, and buffers of whole numbers.

use crate::errors::to_py;
use kho::Error;
use pyo3::buffer::{PyBuffer, PyUntypedBuffer};
use pyo3::exceptions::{PyOverflowError, PyTypeError};
use pyo3::prelude::*;

/// A whole number of 64 bits. What does not fit is a `ParameterError`, as any other wrong value is.
#[derive(Clone, Copy)]
pub(crate) struct Number(pub(crate) u64);

impl<'a, 'py> FromPyObject<'a, 'py> for Number {
    type Error = PyErr;

    fn extract(obj: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        obj.extract().map(Number).map_err(|error| {
            if !error.is_instance_of::<PyOverflowError>(obj.py()) {
                return error;
            }
            to_py(Error::Invalid { what: "number", why: format!("{} is not in 0..2**64", *obj) })
        })
    }
}

/// A copy of a one-dimensional buffer of 64-bit integers (signed ones as two's complement).
pub(crate) fn words(what: &str, obj: &Bound<'_, PyAny>) -> PyResult<Vec<u64>> {
    let py = obj.py();
    let buffer = PyUntypedBuffer::get(obj)?;
    check_flat(what, &buffer)?;
    if buffer.item_count() == 0 && buffer.item_size() == size_of::<u64>() {
        // What is empty may lie anywhere, and typed buffers must be aligned.
        return Ok(Vec::new());
    }
    if let Ok(unsigned) = buffer.as_typed::<u64>() {
        return unsigned.to_vec(py);
    }
    let signed = buffer.as_typed::<i64>().map_err(|_| {
        PyTypeError::new_err(format!(
            "{what}: a buffer of 64-bit integers, aligned, is wanted, not of format {:?}",
            buffer.format().to_string_lossy()
        ))
    })?;
    let words = signed.to_vec(py)?;
    Ok(words.into_iter().map(i64::cast_unsigned).collect())
}

/// A copy of a one-dimensional buffer of bytes; `None` of what is no array, as a number is none.
pub(crate) fn bytes(what: &str, obj: &Bound<'_, PyAny>) -> PyResult<Option<Vec<u8>>> {
    let buffer = match PyUntypedBuffer::get(obj) {
        Ok(buffer) if buffer.dimensions() > 0 => buffer,
        _ => return Ok(None),
    };
    check_flat(what, &buffer)?;
    let bytes: PyBuffer<u8> =
        buffer.into_typed().map_err(|_| PyTypeError::new_err(format!("{what}: a buffer of uint8 is wanted")))?;
    bytes.to_vec(obj.py()).map(Some)
}

fn check_flat(what: &str, buffer: &PyUntypedBuffer) -> PyResult<()> {
    match buffer.dimensions() {
        1 => Ok(()),
        n => Err(to_py(Error::Invalid { what: "buffer", why: format!("{what} has {n} dimensions, not 1") })),
    }
}
