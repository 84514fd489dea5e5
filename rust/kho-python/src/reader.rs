//! Memory that a Python function reads: `kho.Memory.from_reader`.

#![forbid(unsafe_code)]

use crate::errors::to_py;
use kho::Error;
use kho::error::Missing;
use kho::filter::Absent;
use kho::memory::{PhysMemory, ReaderMemory};
use kho::units::Phys;
use pyo3::exceptions::{PyRecursionError, PyTypeError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyMemoryView};
use std::cell::RefCell;

/// The depth of readers that read through other readers, or through themselves: each level may hold a window of 1 MiB.
const DEEPEST: usize = 16;

/// What happened to readers in a call of the library, on this thread.
#[derive(Default)]
struct Call {
    /// The exception of a reader. It ends the call, although code that probes memory ignores errors.
    raised: Option<PyErr>,
}

thread_local! {
    /// The calls of the library that this thread is in, outermost first.
    static CALLS: RefCell<Vec<Call>> = const { RefCell::new(Vec::new()) };
}

/// Ends the innermost call when it is dropped, so that a panic leaves none.
struct Ended;

impl Drop for Ended {
    fn drop(&mut self) {
        CALLS.with_borrow_mut(|calls| _ = calls.pop());
    }
}

/// Does work that may read memory, detached from the interpreter.
///
/// # Errors
/// The exception that a reader raised during the work, whatever the work made of it.
pub(crate) fn reading<R: Send>(py: Python<'_>, work: impl FnOnce() -> R + Send) -> PyResult<R> {
    CALLS.with_borrow_mut(|calls| calls.push(Call::default()));
    let ended = Ended;
    let done = py.detach(work);
    let raised = CALLS.with_borrow_mut(|calls| calls.last_mut().and_then(|call| call.raised.take()));
    drop(ended);
    raised.map_or(Ok(done), Err)
}

/// Makes the memory that `read` reads.
pub(crate) fn reader(
    read: &Bound<'_, PyAny>,
    ranges: Vec<(u64, u64)>,
    vmcoreinfo: Option<Vec<u8>>,
) -> PyResult<impl PhysMemory + use<>> {
    if !read.is_callable() {
        let class = read.get_type().qualname()?;
        return Err(PyTypeError::new_err(format!("the reader is a {class}, not a function read(phys, n) -> bytes")));
    }
    let read = read.clone().unbind();
    let ranges = ranges.into_iter().map(|(start, len)| (Phys(start), len));
    ReaderMemory::new(move |phys, buf: &mut [u8]| pass_on(&read, phys, buf), ranges, vmcoreinfo).map_err(to_py)
}

/// Calls a reader, unless it or another one has raised in this call of the library.
fn pass_on(read: &Py<PyAny>, phys: Phys, buf: &mut [u8]) -> kho::Result<()> {
    Python::attach(|py| {
        let before = CALLS.with_borrow(|calls| calls.last()?.raised.as_ref().map(|raised| raised.clone_ref(py)));
        if let Some(raised) = before {
            return Err(Error::Reader { source: Box::new(raised), missing: None });
        }
        filled(read.bind(py), phys, buf).map_err(|raised| {
            let missing = missing(&raised, py);
            if missing.is_none() {
                let kept = raised.clone_ref(py);
                CALLS.with_borrow_mut(|calls| {
                    if let Some(call) = calls.last_mut() {
                        call.raised = Some(kept);
                    }
                });
            }
            Error::Reader { source: Box::new(raised), missing }
        })
    })
}

/// Fills `buf` with what a reader returns.
fn filled(read: &Bound<'_, PyAny>, phys: Phys, buf: &mut [u8]) -> PyResult<()> {
    if CALLS.with_borrow(Vec::len) > DEEPEST {
        let why = format!("memory at {phys}: readers read through {DEEPEST} others: does one read itself?");
        return Err(PyRecursionError::new_err(why));
    }
    let given = read.call1((phys.0, buf.len()))?;
    if let Ok(bytes) = given.cast::<PyBytes>() {
        return copied(bytes.as_bytes(), phys, buf);
    }
    let Ok(view) = PyMemoryView::from(&given) else {
        let class = given.get_type().qualname()?;
        let why = format!("memory at {phys}: the reader returned a {class}, not {} bytes", buf.len());
        return Err(PyTypeError::new_err(why));
    };
    let nbytes: usize = view.getattr("nbytes")?.extract()?;
    if nbytes != buf.len() {
        return Err(wrong_length(nbytes, phys, buf.len()));
    }
    copied(view.call_method0("tobytes")?.cast::<PyBytes>()?.as_bytes(), phys, buf)
}

fn copied(bytes: &[u8], phys: Phys, buf: &mut [u8]) -> PyResult<()> {
    if bytes.len() != buf.len() {
        return Err(wrong_length(bytes.len(), phys, buf.len()));
    }
    buf.copy_from_slice(bytes);
    Ok(())
}

/// `kho.SourceError` for a reader that returned another number of bytes.
fn wrong_length(returned: usize, phys: Phys, wanted: usize) -> PyErr {
    let what = format!(
        "memory at {phys}: the reader returned {returned} bytes of {wanted}; for memory that it lacks it raises kho.LeftOutError"
    );
    to_py(Error::io(what, std::io::ErrorKind::UnexpectedEof))
}

/// Why the reader lacks the memory, if it says so: it raised OutsideMemoryError, or a class derived from it.
fn missing(raised: &PyErr, py: Python<'_>) -> Option<Missing> {
    let errors = py.import("kho.errors").ok()?;
    let is = |class: &str| errors.getattr(class).is_ok_and(|class| raised.matches(py, class).unwrap_or(false));
    match () {
        () if !is("OutsideMemoryError") => None,
        () if is("LeftOutError") => Some(Missing::Absent(Absent::LeftOut)),
        () if is("CutOffError") => Some(Missing::Absent(Absent::CutOff)),
        () => Some(Missing::Outside),
    }
}
