//! Arguments of Python calls: integers, buffers of integers, descriptors.

#![allow(unsafe_code)]

use crate::errors::{OrRaise, to_py};
use crate::listed::reserve;
use kho::Error;
use kho::tracker::{Orders, Words};
use kho::units::Order;
use pyo3::buffer::{PyBuffer, PyUntypedBuffer};
use pyo3::exceptions::{PyOverflowError, PyTypeError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyInt};
use std::borrow::Cow;
use std::os::fd::BorrowedFd;
use std::ptr;

/// An integer of 64 bits. One that does not fit raises ParameterError, as any other wrong value does.
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

/// The integer type of a buffer's items.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Integer {
    bytes: usize,
    signed: bool,
}

impl Integer {
    const WORD: usize = size_of::<u64>();

    /// The type that a buffer's format names; `None` unless that is an integer in native byte order.
    fn of(buffer: &PyUntypedBuffer) -> Option<Self> {
        let kind = match buffer.format().to_bytes() {
            [kind] | [b'@' | b'=', kind] => *kind,
            [b'<', kind] if cfg!(target_endian = "little") => *kind,
            [b'>' | b'!', kind] if cfg!(target_endian = "big") => *kind,
            _ => return None,
        };
        let known = b"bBhHiIlLqQnN".contains(&kind) && [1, 2, 4, 8].contains(&buffer.item_size());
        known.then_some(Integer { bytes: buffer.item_size(), signed: kind.is_ascii_lowercase() })
    }

    /// Reads an item; a signed one is sign-extended to 64 bits.
    ///
    /// # Safety
    /// `self.bytes` bytes can be read at `at`.
    #[inline]
    unsafe fn read(self, at: *const u8) -> u64 {
        // SAFETY: the caller guarantees `self.bytes` readable bytes, each read takes exactly as many and needs no
        // alignment, and every bit pattern is an integer.
        unsafe {
            match (self.bytes, self.signed) {
                (1, false) => at.read().into(),
                (1, true) => i64::from(at.cast::<i8>().read()) as u64,
                (2, false) => at.cast::<u16>().read_unaligned().into(),
                (2, true) => i64::from(at.cast::<i16>().read_unaligned()) as u64,
                (4, false) => at.cast::<u32>().read_unaligned().into(),
                (4, true) => i64::from(at.cast::<i32>().read_unaligned()) as u64,
                _ => at.cast::<u64>().read_unaligned(),
            }
        }
    }

    /// Every item, whatever the strides and suboffsets.
    fn all(self, buffer: &PyUntypedBuffer) -> impl Iterator<Item = u64> + '_ {
        // SAFETY: `n` is below `item_count`, so `get_ptr` gives the address of an item, which has `item_size` bytes,
        // and `Integer::of` took `bytes` from that.
        (0..buffer.item_count()).map(move |n| unsafe { self.read(buffer.get_ptr(&[n]).cast()) })
    }
}

/// A one-dimensional buffer of 64-bit or 32-bit integers, read in place; signed ones are sign-extended.
pub(crate) struct Numbers {
    start: *const u8,
    /// Bytes from one item to the next.
    stride: isize,
    len: usize,
    item: Integer,
    _held: PyUntypedBuffer,
}

// SAFETY: only `copy` reads the memory, through raw pointers and without a reference to it, and the buffer stays valid
// until `_held` is dropped, which attaches to the interpreter to release it, on any thread.
unsafe impl Send for Numbers {}
// SAFETY: through `&Numbers` memory is only read, as above.
unsafe impl Sync for Numbers {}

impl Numbers {
    pub(crate) fn new(what: &str, obj: &Bound<'_, PyAny>) -> PyResult<Self> {
        let wanted = |what: &str, got: &str| {
            PyTypeError::new_err(format!(
                "{what}: a one-dimensional buffer of 64-bit or 32-bit integers is wanted, not {got}"
            ))
        };
        let Ok(buffer) = PyUntypedBuffer::get(obj) else {
            return Err(wanted(what, &obj.get_type().name()?.to_string()));
        };
        check_flat(what, &buffer)?;
        let Some(item) = Integer::of(&buffer).filter(|item| item.bytes >= Integer::WORD / 2) else {
            return Err(wanted(what, &format!("one of format {:?}", buffer.format().to_string_lossy())));
        };
        let leads_on = buffer.suboffsets().is_some_and(|offsets| offsets.iter().any(|offset| *offset >= 0));
        let &[stride] = buffer.strides() else { return Err(wanted(what, "one without strides")) };
        if leads_on {
            return Err(wanted(what, "one of pointers"));
        }
        Ok(Numbers { start: buffer.buf_ptr().cast(), stride, len: buffer.item_count(), item, _held: buffer })
    }

    /// Copies the items, so that no other thread can change them.
    ///
    /// # Errors
    /// [`Error::TooLong`].
    pub(crate) fn to_vec(&self) -> kho::Result<Vec<u64>> {
        let mut words = Vec::new();
        reserve(&mut words, self.len)?;
        words.resize(self.len, 0);
        self.copy(0, &mut words);
        Ok(words)
    }
}

impl Words for Numbers {
    fn len(&self) -> usize {
        self.len
    }

    fn copy(&self, at: usize, into: &mut [u64]) {
        let n = into.len().min(self.len.saturating_sub(at));
        let place = |n: usize| self.start.wrapping_offset(self.stride * n.cast_signed());
        // SAFETY: `n` is clamped so that items `at .. at + n` are in the buffer, which `_held` keeps valid; they are
        // copied as bytes, which need no alignment. Another thread may write them concurrently: then old and new bytes
        // are mixed, which is harmless, since every word is checked after it was copied, and no reference to the memory
        // is made.
        unsafe {
            if (self.item.bytes, self.stride) == (Integer::WORD, Integer::WORD.cast_signed()) {
                ptr::copy_nonoverlapping(place(at), into.as_mut_ptr().cast::<u8>(), Integer::WORD * n);
            } else {
                for (word, at) in into.iter_mut().take(n).zip(at..) {
                    *word = self.item.read(place(at));
                }
            }
        }
    }
}

/// Copies a buffer's bytes.
///
/// # Errors
/// [`Error::TooLong`].
pub(crate) fn copied(py: Python<'_>, buffer: &PyBuffer<u8>) -> PyResult<Vec<u8>> {
    let mut bytes = Vec::new();
    reserve(&mut bytes, buffer.item_count()).or_raise()?;
    bytes.resize(buffer.item_count(), 0);
    buffer.copy_to_slice(py, &mut bytes)?;
    Ok(bytes)
}

/// The bytes of a one-dimensional buffer, copied unless the object is `bytes`; `None` if it is not an array.
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
    copied(obj.py(), &bytes).map(|bytes| Some(Cow::Owned(bytes)))
}

/// The orders of a bulk operation: one for all, or a buffer of integers of any width with one for each.
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
            && let Some(each) = Self::each(order)?
        {
            return Ok(OrderArg::Each(each));
        }
        let one: Number = order.extract()?;
        Order::new(one.0).map(OrderArg::One).or_raise()
    }

    /// One order for each folio; `None` for an object that is not an array.
    fn each(orders: &'a Bound<'_, PyAny>) -> PyResult<Option<Cow<'a, [u8]>>> {
        let wider = PyUntypedBuffer::get(orders).ok().filter(|buffer| buffer.dimensions() == 1);
        let Some((item, buffer)) = wider.and_then(|buffer| Integer::of(&buffer).map(|item| (item, buffer))) else {
            return bytes("order", orders);
        };
        if item == (Integer { bytes: 1, signed: false }) {
            return bytes("order", orders);
        }
        // An order that does not fit a byte raises the same error as any other order that is too large.
        let order = |order: u64| u8::try_from(order).map_err(|_| Error::OrderTooLarge { order, max: Order::MAX });
        let mut each = Vec::new();
        reserve(&mut each, buffer.item_count()).or_raise()?;
        for number in item.all(&buffer) {
            each.push(order(number).or_raise()?);
        }
        Ok(Some(Cow::Owned(each)))
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

/// A descriptor for one call: its lifetime is that of the number that the caller gave.
pub(crate) fn descriptor(fd: &i32) -> PyResult<BorrowedFd<'_>> {
    if *fd < 0 {
        return Err(to_py(Error::Invalid { what: "file descriptor", why: format!("{fd} is negative") }));
    }
    // SAFETY: the descriptor is not -1. It is used within the call for which it was given; if it is not open, or is
    // closed in the meantime, the system call fails with EBADF or acts on the file that has its number then, as in C.
    Ok(unsafe { BorrowedFd::borrow_raw(*fd) })
}
