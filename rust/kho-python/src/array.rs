//! Immutable arrays of records, as sequences and as buffers: the code that the array classes share.

#![allow(unsafe_code)]

use crate::arrow::{Asked, Column, Owner};
use crate::errors::OrRaise;
use crate::listed::{Listed, Pooled, reserve};
use pyo3::exceptions::{PyBufferError, PyIndexError, PyOverflowError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PySequence, PySlice};
use std::ffi::{CStr, c_int, c_void};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A record of an array.
///
/// # Safety
/// [`Item::FORMAT`] describes the layout in memory, and every byte of it is initialized: padding is a field.
pub(crate) unsafe trait Item: Pooled + Copy + Send + Sync {
    /// The name of the class whose items these are.
    const CLASS: &'static str;
    /// The format of one item, in the syntax of PEP 3118.
    const FORMAT: &'static CStr;
    /// The Python value that an item is equal to.
    type Plain: for<'a, 'py> FromPyObject<'a, 'py> + PartialEq;

    fn plain(self) -> Self::Plain;

    fn to_object(self, py: Python<'_>) -> PyResult<Bound<'_, PyAny>>;

    fn shown(self) -> String;

    /// The columns of an Arrow array of these items. Those of one word share the memory of the array.
    fn columns(array: &Array<Self>) -> PyResult<Vec<Column>>;
}

/// A part of a list of records; parts of one list share its memory.
#[derive(Clone)]
pub(crate) struct Array<T: Item> {
    items: Arc<Listed<T>>,
    start: usize,
    /// The number of items: the buffer's shape.
    shape: isize,
    /// Bytes from one item to the next: the buffer's strides.
    stride: isize,
}

/// The result of indexing: an item, or the part that a slice selects.
pub(crate) enum Picked<'py, T: Item> {
    Item(Bound<'py, PyAny>),
    Part(Array<T>),
}

impl<T: Item> Array<T> {
    pub(crate) fn new(items: impl Into<Listed<T>>) -> Self {
        Self::part(Arc::new(items.into()), 0..usize::MAX)
    }

    /// The part of `items` that lies in `range`, which may exceed them.
    fn part(items: Arc<Listed<T>>, range: std::ops::Range<usize>) -> Self {
        let start = range.start.min(items.len());
        let end = range.end.clamp(start, items.len());
        // Lossless: a vector has at most isize::MAX bytes.
        Array { items, start, shape: (end - start).cast_signed(), stride: size_of::<T>().cast_signed() }
    }

    pub(crate) fn as_slice(&self) -> &[T] {
        &self.items[self.start..][..self.len()]
    }

    pub(crate) fn len(&self) -> usize {
        self.shape.cast_unsigned()
    }

    pub(crate) fn pick<'py>(&self, at: &Bound<'py, PyAny>) -> PyResult<Picked<'py, T>> {
        let py = at.py();
        if let Ok(slice) = at.cast::<PySlice>() {
            let at = slice.indices(self.shape)?;
            let start = at.start.max(0).cast_unsigned();
            return Ok(Picked::Part(if at.step == 1 {
                let start = self.start + start;
                Self::part(Arc::clone(&self.items), start..start + at.slicelength)
            } else {
                let all = self.as_slice();
                let nth = |n: isize| all[(at.start + n * at.step).cast_unsigned()];
                Self::new((0..at.slicelength.cast_signed()).map(nth).collect::<Vec<_>>())
            }));
        }
        let item = match at.extract::<isize>() {
            Ok(index) => {
                let index = if index < 0 { index + self.shape } else { index };
                usize::try_from(index).map_or(None, |i| self.as_slice().get(i))
            }
            Err(e) if e.is_instance_of::<PyOverflowError>(py) => None,
            Err(e) => return Err(e),
        };
        match item {
            Some(&item) => item.to_object(py).map(Picked::Item),
            None => Err(PyIndexError::new_err(format!("index {at} is out of range for {} items", self.shape))),
        }
    }

    /// Compares with an array of the same class, or with any sequence; `None` for other objects.
    pub(crate) fn equals(&self, same_class: Option<&Self>, other: &Bound<'_, PyAny>) -> PyResult<Option<bool>> {
        if let Some(other) = same_class {
            let pairs = self.as_slice().iter().zip(other.as_slice());
            return Ok(Some(self.shape == other.shape && { pairs }.all(|(a, b)| a.plain() == b.plain())));
        }
        let Ok(other) = other.cast::<PySequence>() else {
            return Ok(None);
        };
        if other.len()? != self.len() {
            return Ok(Some(false));
        }
        for (n, item) in self.as_slice().iter().enumerate() {
            // An object that does not convert to an item is not equal to one.
            if other.get_item(n)?.extract::<T::Plain>().ok() != Some(item.plain()) {
                return Ok(Some(false));
            }
        }
        Ok(Some(true))
    }

    pub(crate) fn shown(&self) -> String {
        const SHOWN: usize = 4;
        let mut shown: Vec<String> = self.as_slice().iter().take(SHOWN).map(|item| item.shown()).collect();
        if self.len() > SHOWN {
            shown.push(format!("... {} in all", self.shape));
        }
        format!("{}([{}])", T::CLASS, shown.join(", "))
    }

    pub(crate) fn iter(&self) -> ArrayIter {
        let array = self.clone();
        let item = move |py: Python<'_>, at: usize| {
            let item = array.as_slice().get(at).map(|item| item.to_object(py)).transpose()?;
            Ok(item.map(Bound::unbind))
        };
        ArrayIter { item: Box::new(item), next: AtomicUsize::new(0) }
    }

    /// A copy of a field of each item.
    pub(crate) fn copied<U>(&self, field: impl Fn(&T) -> U) -> PyResult<Vec<U>> {
        let mut values = Vec::new();
        reserve(&mut values, self.len()).or_raise()?;
        values.extend(self.as_slice().iter().map(field));
        Ok(values)
    }

    /// The items, and what keeps them: this array's list, or a copy.
    pub(crate) fn kept(&self, copy: bool) -> PyResult<(*const T, Owner)> {
        if copy {
            let items = self.copied(|item| *item)?;
            return Ok((items.as_ptr(), Box::new(items)));
        }
        Ok((self.as_slice().as_ptr(), Box::new(Arc::clone(&self.items))))
    }

    /// The capsule of `__dlpack__`: items of one word are a vector, items of two are rows.
    pub(crate) fn dlpack<'py>(&self, py: Python<'py>, asked: &Asked) -> PyResult<Bound<'py, PyCapsule>> {
        asked.check()?;
        let (items, owner) = self.kept(asked.copy == Some(true))?;
        let columns = (size_of::<T>() > size_of::<u64>()).then_some(size_of::<T>() / size_of::<u64>());
        crate::arrow::dlpack(py, items.cast(), self.len(), columns, owner, asked)
    }

    /// Fills a buffer view (PEP 3118) in: read-only, one-dimensional.
    ///
    /// # Safety
    /// `view` is null or the pointer that CPython passes to `bf_getbuffer`; `owner` is frozen and contains this array.
    pub(crate) unsafe fn fill(&self, owner: Bound<'_, PyAny>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        if view.is_null() {
            return Err(PyBufferError::new_err("no view to fill"));
        }
        if flags & ffi::PyBUF_WRITABLE == ffi::PyBUF_WRITABLE {
            return Err(PyBufferError::new_err(format!("a {} is read-only", T::CLASS)));
        }
        let given = |flag: c_int| flags & flag == flag;
        let buf = self.as_slice().as_ptr().cast_mut().cast::<c_void>();
        let shape = ptr::from_ref(&self.shape).cast_mut();
        let strides = ptr::from_ref(&self.stride).cast_mut();
        // SAFETY: the caller guarantees that `view` is CPython's, and it was checked not to be null. Memory, shape and
        // strides are part of `owner`, which is frozen and which `obj` keeps alive until the view is released;
        // consumers may not write through them, since `readonly` is set.
        unsafe {
            (*view).buf = buf;
            (*view).len = self.shape * self.stride;
            (*view).readonly = 1;
            (*view).itemsize = self.stride;
            (*view).format = match given(ffi::PyBUF_FORMAT) {
                true => T::FORMAT.as_ptr().cast_mut(),
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
            (*view).obj = owner.into_ptr();
        }
        Ok(())
    }
}

/// Makes the item of a number; `None` after the last.
type Nth = dyn Fn(Python<'_>, usize) -> PyResult<Option<Py<PyAny>>> + Send + Sync;

/// Iterates over an array.
#[pyclass(frozen, module = "kho._kho")]
pub(crate) struct ArrayIter {
    item: Box<Nth>,
    next: AtomicUsize,
}
crate::assert_object_alignment!(ArrayIter);

#[pymethods]
impl ArrayIter {
    fn __iter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __next__(&self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
        let at = self.next.fetch_add(1, Ordering::Relaxed);
        let item = (self.item)(py, at)?;
        if item.is_none() {
            // An exhausted iterator stays exhausted, and its counter cannot wrap.
            self.next.fetch_sub(1, Ordering::Relaxed);
        }
        Ok(item)
    }
}

/// Defines a class of arrays: `array_class! { /// docstring\n Class of Item }`.
macro_rules! array_class {
    ($(#[$doc:meta])* $class:ident of $item:ty) => {
        $(#[$doc])*
        #[pyclass(frozen, sequence, module = "kho")]
        pub(crate) struct $class(Array<$item>);
        crate::assert_object_alignment!($class);

        impl $class {
            pub(crate) fn new(items: impl Into<Listed<$item>>) -> Self {
                Self(Array::new(items))
            }
        }

        #[pymethods]
        impl $class {
            fn __len__(&self) -> usize {
                self.0.len()
            }

            fn __getitem__<'py>(&self, at: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
                match self.0.pick(at)? {
                    Picked::Item(item) => Ok(item),
                    Picked::Part(part) => Ok(Bound::new(at.py(), Self(part))?.into_any()),
                }
            }

            fn __iter__(&self) -> ArrayIter {
                self.0.iter()
            }

            fn __eq__(&self, other: &Bound<'_, PyAny>) -> PyResult<Py<PyAny>> {
                let same_class = other.cast::<$class>().ok().map(|other| &other.get().0);
                match self.0.equals(same_class, other)? {
                    Some(equal) => Ok(equal.into_pyobject(other.py())?.to_owned().into_any().unbind()),
                    None => Ok(other.py().NotImplemented()),
                }
            }

            fn __repr__(&self) -> String {
                self.0.shown()
            }

            /// The array for a library that reads Arrow's C data interface.
            #[pyo3(signature = (requested_schema=None))]
            fn __arrow_c_array__<'py>(
                &self,
                py: Python<'py>,
                requested_schema: Option<&Bound<'py, PyAny>>,
            ) -> PyResult<(Bound<'py, PyCapsule>, Bound<'py, PyCapsule>)> {
                crate::arrow::check_schema(requested_schema)?;
                let columns = <$item as Item>::columns(&self.0)?;
                let fields = columns.len() > 1;
                crate::arrow::arrow(py, self.0.len(), columns, fields)
            }

            /// The array for a library that reads DLPack 1.0 or later; without `copy` it is read-only.
            #[pyo3(signature = (*, stream=None, max_version=None, dl_device=None, copy=None))]
            fn __dlpack__<'py>(
                &self,
                py: Python<'py>,
                stream: Option<&Bound<'py, PyAny>>,
                max_version: Option<(u32, u32)>,
                dl_device: Option<(i32, i32)>,
                copy: Option<bool>,
            ) -> PyResult<Bound<'py, PyCapsule>> {
                let _ = stream; // of a device with streams, which the CPU is not
                self.0.dlpack(py, &Asked { max_version, device: dl_device, copy })
            }

            /// The device of DLPack that has the array: the CPU.
            fn __dlpack_device__(&self) -> (i32, i32) {
                (crate::arrow::CPU, 0)
            }

            unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
                // SAFETY: CPython calls this with its own view, and the class is frozen, hence immutable.
                unsafe { slf.get().0.fill(slf.clone().into_any(), view, flags) }
            }
        }
    };
}

pub(crate) use array_class;
