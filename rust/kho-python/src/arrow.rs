//! Arrays for other libraries, in one process: the Arrow PyCapsule interface and DLPack.
//!
//! Sources: the Arrow C data interface (struct ArrowSchema, struct ArrowArray), dlpack.h 1.0 (DLManagedTensorVersioned).

#![allow(unsafe_code)]

use pyo3::exceptions::{PyBufferError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyCapsule;
use std::any::Any;
use std::ffi::{CStr, c_char, c_void};
use std::ptr;

/// What keeps the memory of a column.
pub(crate) type Owner = Box<dyn Any + Send + Sync>;

/// A column of an array: its name, its format in Arrow's syntax, and its values.
pub(crate) struct Column {
    pub(crate) name: &'static CStr,
    pub(crate) format: &'static CStr,
    /// The first value; aligned for its type.
    pub(crate) values: *const c_void,
    /// What keeps `values`.
    pub(crate) owner: Owner,
}

/// struct ArrowSchema.
#[repr(C)]
struct Schema {
    format: *const c_char,
    name: *const c_char,
    metadata: *const c_char,
    flags: i64,
    n_children: i64,
    children: *mut *mut Schema,
    dictionary: *mut Schema,
    release: Option<unsafe extern "C" fn(*mut Schema)>,
    private_data: *mut c_void,
}

/// struct ArrowArray.
#[repr(C)]
struct ArrowArray {
    length: i64,
    null_count: i64,
    offset: i64,
    n_buffers: i64,
    n_children: i64,
    buffers: *mut *const c_void,
    children: *mut *mut ArrowArray,
    dictionary: *mut ArrowArray,
    release: Option<unsafe extern "C" fn(*mut ArrowArray)>,
    private_data: *mut c_void,
}

/// A struct of the Arrow C data interface.
trait Exported: Sized {
    /// The name of its capsule.
    const NAME: &'static CStr;

    fn release(&self) -> Option<unsafe extern "C" fn(*mut Self)>;
}

impl Exported for Schema {
    const NAME: &'static CStr = c"arrow_schema";

    fn release(&self) -> Option<unsafe extern "C" fn(*mut Self)> {
        self.release
    }
}

impl Exported for ArrowArray {
    const NAME: &'static CStr = c"arrow_array";

    fn release(&self) -> Option<unsafe extern "C" fn(*mut Self)> {
        self.release
    }
}

/// Releases a struct unless its consumer moved it out, and frees it.
///
/// # Safety
/// `it` is from [`Box::into_raw`], and nothing uses it afterwards.
unsafe fn dispose<T: Exported>(it: *mut T) {
    // SAFETY: the caller guarantees that it is a live box. A release function of this module takes the struct that it is in.
    unsafe {
        if let Some(release) = (*it).release() {
            release(it);
        }
        drop(Box::from_raw(it));
    }
}

/// The destructor of a capsule of [`capsule`].
unsafe extern "C" fn dispose_capsule<T: Exported>(capsule: *mut ffi::PyObject) {
    // SAFETY: CPython calls this once, with the capsule, whose pointer is the box that `capsule` put in.
    unsafe {
        let it = ffi::PyCapsule_GetPointer(capsule, T::NAME.as_ptr());
        if it.is_null() {
            ffi::PyErr_Clear();
        } else {
            dispose(it.cast::<T>());
        }
    }
}

fn capsule<T: Exported>(py: Python<'_>, it: T) -> PyResult<Bound<'_, PyCapsule>> {
    let it = Box::into_raw(Box::new(it));
    // SAFETY: the pointer and the name outlive the capsule; its destructor frees the box. The new reference is owned.
    unsafe {
        let made = ffi::PyCapsule_New(it.cast(), T::NAME.as_ptr(), Some(dispose_capsule::<T>));
        if made.is_null() {
            dispose(it);
        }
        Ok(Bound::from_owned_ptr_or_err(py, made)?.cast_into_unchecked())
    }
}

/// What a schema owns: its children, boxed.
struct SchemaParts {
    children: Vec<*mut Schema>,
}

unsafe extern "C" fn release_schema(schema: *mut Schema) {
    // SAFETY: the interface calls this once for a schema of `schema_of`, whose private data is a box of its parts. A child
    // that its consumer moved out has no release function any more; its struct is freed here as that of the others.
    unsafe {
        let parts = Box::from_raw((*schema).private_data.cast::<SchemaParts>());
        for child in parts.children {
            dispose(child);
        }
        (*schema).release = None;
    }
}

fn schema_of(format: &'static CStr, name: &'static CStr, children: Vec<Schema>) -> Schema {
    let children = children.into_iter().map(|child| Box::into_raw(Box::new(child))).collect();
    let mut parts = Box::new(SchemaParts { children });
    Schema {
        format: format.as_ptr(),
        name: name.as_ptr(),
        metadata: ptr::null(),
        flags: 0,
        n_children: parts.children.len() as i64,
        children: parts.children.as_mut_ptr(),
        dictionary: ptr::null_mut(),
        release: Some(release_schema),
        private_data: Box::into_raw(parts).cast(),
    }
}

/// What an array owns: pointers to its buffers, its children, boxed, and what keeps the values.
struct ArrayParts {
    buffers: Vec<*const c_void>,
    children: Vec<*mut ArrowArray>,
    _owner: Option<Owner>,
}

unsafe extern "C" fn release_array(array: *mut ArrowArray) {
    // SAFETY: as `release_schema`. The values are freed with the parts, by whichever thread calls this: they are Send.
    unsafe {
        let parts = Box::from_raw((*array).private_data.cast::<ArrayParts>());
        for &child in &parts.children {
            dispose(child);
        }
        (*array).release = None;
    }
}

fn array_of(length: i64, values: Option<(*const c_void, Owner)>, children: Vec<ArrowArray>) -> ArrowArray {
    // The first buffer is the validity bitmap: without one, nothing is null.
    let mut buffers = vec![ptr::null()];
    let mut owner = None;
    if let Some((values, kept)) = values {
        buffers.push(values);
        owner = Some(kept);
    }
    let children = children.into_iter().map(|child| Box::into_raw(Box::new(child))).collect();
    let mut parts = Box::new(ArrayParts { buffers, children, _owner: owner });
    ArrowArray {
        length,
        null_count: 0,
        offset: 0,
        n_buffers: parts.buffers.len() as i64,
        n_children: parts.children.len() as i64,
        buffers: parts.buffers.as_mut_ptr(),
        children: parts.children.as_mut_ptr(),
        dictionary: ptr::null_mut(),
        release: Some(release_array),
        private_data: Box::into_raw(parts).cast(),
    }
}

/// The capsules of `__arrow_c_array__`: an array of the one column, or a struct array of several.
///
/// `values` of each column has `length` items of its format.
pub(crate) fn arrow(
    py: Python<'_>,
    length: usize,
    columns: Vec<Column>,
    fields: bool,
) -> PyResult<(Bound<'_, PyCapsule>, Bound<'_, PyCapsule>)> {
    let length = length as i64;
    let mut schemas: Vec<Schema> = Vec::new();
    let mut arrays: Vec<ArrowArray> = Vec::new();
    for Column { name, format, values, owner } in columns {
        schemas.push(schema_of(format, name, Vec::new()));
        arrays.push(array_of(length, Some((values, owner)), Vec::new()));
    }
    let (schema, array) = match (fields, schemas.pop(), arrays.pop()) {
        (false, Some(schema), Some(array)) => (schema, array),
        (_, schema, array) => {
            schemas.extend(schema);
            arrays.extend(array);
            (schema_of(c"+s", c"", schemas), array_of(length, None, arrays))
        }
    };
    let schema = capsule(py, schema)?;
    Ok((schema, capsule(py, array)?))
}

/// `kDLCPU`.
pub(crate) const CPU: i32 = 1;
/// `kDLUInt`.
const UINT: u8 = 1;
/// `DLPACK_FLAG_BITMASK_READ_ONLY`, `DLPACK_FLAG_BITMASK_IS_COPIED`.
const READ_ONLY: u64 = 1;
const IS_COPIED: u64 = 2;
const TENSOR: &CStr = c"dltensor_versioned";

/// DLTensor.
#[repr(C)]
struct Tensor {
    data: *mut c_void,
    device_type: i32,
    device_id: i32,
    ndim: i32,
    code: u8,
    bits: u8,
    lanes: u16,
    shape: *mut i64,
    strides: *mut i64,
    byte_offset: u64,
}

/// DLManagedTensorVersioned.
#[repr(C)]
struct ManagedTensor {
    major: u32,
    minor: u32,
    manager: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut ManagedTensor)>,
    flags: u64,
    tensor: Tensor,
}

/// What a tensor owns.
struct TensorParts {
    shape: [i64; 2],
    strides: [i64; 2],
    _owner: Owner,
}

unsafe extern "C" fn delete_tensor(tensor: *mut ManagedTensor) {
    // SAFETY: DLPack calls this once, for a tensor of `dlpack`: both are boxes.
    unsafe {
        drop(Box::from_raw((*tensor).manager.cast::<TensorParts>()));
        drop(Box::from_raw(tensor));
    }
}

unsafe extern "C" fn dispose_tensor(capsule: *mut ffi::PyObject) {
    // SAFETY: CPython calls this with the capsule of `dlpack`. A consumer that took the tensor renamed the capsule.
    unsafe {
        if ffi::PyCapsule_IsValid(capsule, TENSOR.as_ptr()) != 0 {
            delete_tensor(ffi::PyCapsule_GetPointer(capsule, TENSOR.as_ptr()).cast());
        }
    }
}

/// What a consumer of DLPack asks for.
pub(crate) struct Asked {
    pub(crate) max_version: Option<(u32, u32)>,
    pub(crate) device: Option<(i32, i32)>,
    pub(crate) copy: Option<bool>,
}

impl Asked {
    /// Refuses what a read-only array in the memory of the CPU cannot be.
    pub(crate) fn check(&self) -> PyResult<()> {
        if self.device.is_some_and(|device| device != (CPU, 0)) {
            return Err(PyBufferError::new_err("the array is in the memory of the CPU: device (1, 0)"));
        }
        if self.max_version.is_none_or(|(major, _)| major < 1) {
            return Err(PyBufferError::new_err(
                "the array is read-only, which a consumer of DLPack below 1.0 cannot know: pass it numpy.asarray(...).copy()",
            ));
        }
        Ok(())
    }
}

/// The capsule of `__dlpack__`: `rows` of `columns` integers of 64 bits, or a vector of them if `columns` is None.
///
/// `values` has `rows * columns` items, kept by `owner`; if they are a copy, a consumer may write to them.
pub(crate) fn dlpack<'py>(
    py: Python<'py>,
    values: *const u64,
    rows: usize,
    columns: Option<usize>,
    owner: Owner,
    asked: &Asked,
) -> PyResult<Bound<'py, PyCapsule>> {
    let shape = [rows, columns.unwrap_or(1)].map(|n| i64::try_from(n).unwrap_or(i64::MAX));
    let parts = Box::into_raw(Box::new(TensorParts { shape, strides: [shape[1], 1], _owner: owner }));
    // SAFETY: the box was just made; the pointers to its fields live as long as it does, until `delete_tensor`.
    let (shape, strides) = unsafe { (&raw mut (*parts).shape, &raw mut (*parts).strides) };
    let tensor = Tensor {
        data: values.cast_mut().cast(),
        device_type: CPU,
        device_id: 0,
        ndim: if columns.is_some() { 2 } else { 1 },
        code: UINT,
        bits: 64,
        lanes: 1,
        shape: shape.cast(),
        strides: strides.cast(),
        byte_offset: 0,
    };
    let flags = if asked.copy == Some(true) { IS_COPIED } else { READ_ONLY };
    let manager = parts.cast();
    let managed = ManagedTensor { major: 1, minor: 0, manager, deleter: Some(delete_tensor), flags, tensor };
    let managed = Box::into_raw(Box::new(managed));
    // SAFETY: the pointer and the name outlive the capsule, whose destructor frees the tensor unless it was taken.
    unsafe {
        let made = ffi::PyCapsule_New(managed.cast(), TENSOR.as_ptr(), Some(dispose_tensor));
        if made.is_null() {
            delete_tensor(managed);
        }
        Ok(Bound::from_owned_ptr_or_err(py, made)?.cast_into_unchecked())
    }
}

/// Refuses a schema that is not the array's own: nothing is cast.
pub(crate) fn check_schema(requested: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
    match requested {
        Some(requested) if !requested.is_instance_of::<PyCapsule>() => {
            Err(PyValueError::new_err("requested_schema is not a capsule"))
        }
        // A producer may ignore what is requested; its consumer compares the schema.
        _ => Ok(()),
    }
}
