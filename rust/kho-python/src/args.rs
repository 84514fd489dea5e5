//! Arguments as Python gives them: whole numbers, and buffers of whole numbers.

use crate::errors::{OrRaise, to_py};
use kho::Error;
use kho::tracker::{Orders, Words};
use kho::units::Order;
use pyo3::buffer::{PyBuffer, PyUntypedBuffer};
use pyo3::exceptions::{PyOverflowError, PyTypeError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyInt};
use std::borrow::Cow;
use std::ptr;

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

/// A one-dimensional buffer of 64-bit integers (signed ones as two's complement): the caller's memory itself where they
/// lie one after another, else a copy.
pub(crate) enum Numbers {
    Copied(Vec<u64>),
    There { start: *const u8, len: usize, _held: PyUntypedBuffer },
}

// SAFETY: the memory is only read, and only by `copy`, which says why it may be; a buffer may be released by any thread.
unsafe impl Send for Numbers {}
// SAFETY: as above.
unsafe impl Sync for Numbers {}

impl Numbers {
    pub(crate) fn new(what: &str, obj: &Bound<'_, PyAny>) -> PyResult<Self> {
        let wanted = |what: &str, got: &str| {
            PyTypeError::new_err(format!("{what}: a one-dimensional buffer of 64-bit integers is wanted, not {got}"))
        };
        let Ok(buffer) = PyUntypedBuffer::get(obj) else {
            return Err(wanted(what, &obj.get_type().name()?.to_string()));
        };
        check_flat(what, &buffer)?;
        let kind = match buffer.format().to_bytes() {
            [kind] | [b'@' | b'=', kind] => *kind,
            [b'<', kind] if cfg!(target_endian = "little") => *kind,
            [b'>' | b'!', kind] if cfg!(target_endian = "big") => *kind,
            _ => b'x',
        };
        let len = buffer.item_count();
        if !b"qQlLnN".contains(&kind) || buffer.item_size() != size_of::<u64>() {
            return Err(wanted(what, &format!("one of format {:?}", buffer.format().to_string_lossy())));
        }
        if buffer.is_c_contiguous() {
            return Ok(Numbers::There { start: buffer.buf_ptr().cast(), len, _held: buffer });
        }
        // SAFETY: `get_ptr` says where item `n` of those there are lies, and it is 8 bytes long.
        let item = |n: usize| unsafe { buffer.get_ptr(&[n]).cast::<u64>().read_unaligned() };
        Ok(Numbers::Copied((0..len).map(item).collect()))
    }
}

impl Numbers {
    /// A copy, that nobody else writes to.
    pub(crate) fn to_vec(&self) -> Vec<u64> {
        let mut words = vec![0; self.len()];
        self.copy(0, &mut words);
        words
    }
}

impl Words for Numbers {
    fn len(&self) -> usize {
        match self {
            Numbers::Copied(words) => words.len(),
            Numbers::There { len, .. } => *len,
        }
    }

    fn copy(&self, at: usize, into: &mut [u64]) {
        match self {
            Numbers::Copied(words) => Words::copy(&**words, at, into),
            Numbers::There { start, len, .. } => {
                let n = into.len().min(len.saturating_sub(at));
                // SAFETY: words `at .. at + n` lie inside the contiguous buffer of 8-byte items that is held, and need
                // no alignment as bytes. Another thread may write to them meanwhile; what is copied then is some words
                // or others, each of which is checked before it is used, and no reference to the memory is ever made.
                unsafe { ptr::copy_nonoverlapping(start.add(8 * at), into.as_mut_ptr().cast::<u8>(), 8 * n) };
            }
        }
    }
}

/// A one-dimensional buffer of bytes, copied unless it is `bytes`; `None` of what is no array, as a number is none.
pub(crate) fn bytes<'a>(what: &str, obj: &'a Bound<'_, PyAny>) -> PyResult<Option<Cow<'a, [u8]>>> {
    if let Ok(bytes) = obj.cast::<PyBytes>() {
        return Ok(Some(Cow::Borrowed(bytes.as_bytes())));
    }
    let buffer = match PyUntypedBuffer::get(obj) {
        Ok(buffer) if buffer.dimensions() > 0 => buffer,
        _ => return Ok(None),
    };
    check_flat(what, &buffer)?;
    let bytes: PyBuffer<u8> =
        buffer.into_typed().map_err(|_| PyTypeError::new_err(format!("{what}: a buffer of uint8 is wanted")))?;
    bytes.to_vec(obj.py()).map(|bytes| Some(Cow::Owned(bytes)))
}

/// The orders of a bulk operation: one for all, or a buffer with one for each.
pub(crate) enum OrderArg<'a> {
    One(Order),
    Each(Cow<'a, [u8]>),
}

impl<'a> OrderArg<'a> {
    pub(crate) fn new(order: Option<&'a Bound<'_, PyAny>>) -> PyResult<Self> {
        let Some(order) = order else {
            return Ok(OrderArg::One(Order::ZERO));
        };
        if !order.is_instance_of::<PyInt>()
            && let Some(each) = bytes("order", order)?
        {
            return Ok(OrderArg::Each(each));
        }
        let one: Number = order.extract()?;
        Order::new(one.0).map(OrderArg::One).or_raise()
    }

    pub(crate) fn orders(&self) -> Orders<'_> {
        match self {
            OrderArg::One(order) => Orders::One(*order),
            OrderArg::Each(orders) => Orders::Each(orders),
        }
    }
}

fn check_flat(what: &str, buffer: &PyUntypedBuffer) -> PyResult<()> {
    match buffer.dimensions() {
        1 => Ok(()),
        n => Err(to_py(Error::Invalid { what: "buffer", why: format!("{what} has {n} dimensions, not 1") })),
    }
}
