//! Physical memory to read from.

#![forbid(unsafe_code)]

use crate::arena::PyArena;
use crate::args::Number;
use crate::errors::OrRaise;
use kho::memory::{FileMemory, PhysMemory, SliceMemory, Source, open_sources_with};
use kho::units::Phys;
use kho::{Error, Result};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::{PyBytes, PyString, PyTuple};
use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a signal may wait for its handler during long work of whose progress nobody is told.
const PATIENCE: Duration = Duration::from_millis(50);

/// Physical memory that can be read: ELF cores, raw images, bytes.
#[pyclass(frozen, module = "kho")]
pub(crate) struct Memory {
    /// What other bindings read.
    pub(crate) inner: Arc<dyn PhysMemory>,
    /// The same, where files are what is read.
    pub(crate) files: Option<Arc<FileMemory>>,
}
crate::assert_object_alignment!(Memory);

/// The memory behind a `kho.Memory` or `kho.Arena`.
pub(crate) fn memory_of(object: &Bound<'_, PyAny>) -> PyResult<Arc<dyn PhysMemory>> {
    if let Ok(arena) = object.cast::<PyArena>() {
        Ok(arena.get().inner.clone())
    } else if let Ok(memory) = object.cast::<Memory>() {
        Ok(memory.get().inner.clone())
    } else {
        Err(PyTypeError::new_err("a kho.Memory or a kho.Arena is needed"))
    }
}

/// Does long work detached, telling `progress` (a callable, if any) how many bytes have been seen. What it raises, or the
/// handler of a signal does (Ctrl-C), ends the work.
pub(crate) fn with_progress<R: Send>(
    py: Python<'_>,
    progress: Option<Py<PyAny>>,
    work: impl FnOnce(&mut (dyn FnMut(u64) -> Result<()> + Send)) -> Result<R> + Send,
) -> PyResult<R> {
    let mut raised = None;
    let mut asked = Instant::now();
    let mut told = |bytes: u64| {
        if progress.is_none() && asked.elapsed() < PATIENCE {
            return Ok(());
        }
        asked = Instant::now();
        let said = Python::attach(|py| {
            py.check_signals()?;
            progress.as_ref().map_or(Ok(()), |progress| progress.call1(py, (bytes,)).map(drop))
        });
        said.map_err(|error| {
            raised = Some(error);
            Error::Interrupted
        })
    };
    let done = py.detach(|| work(&mut told));
    raised.map_or_else(|| done.or_raise(), Err)
}

#[pymethods]
impl Memory {
    /// Open files as one memory.
    #[staticmethod]
    #[pyo3(signature = (*sources, unpack_limit=None, progress=None))]
    fn open(
        py: Python<'_>,
        sources: &Bound<'_, PyTuple>,
        unpack_limit: Option<Number>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Self> {
        let sources: PyResult<Vec<_>> = sources
            .iter()
            .map(|source| {
                // A str may carry an address; a Path is a path.
                if source.is_instance_of::<PyString>() {
                    Source::parse(source.extract::<PathBuf>()?).or_raise()
                } else {
                    Ok(Source::file(source.extract::<PathBuf>()?))
                }
            })
            .collect();
        let sources = sources?;
        let limit = unpack_limit.map(|limit| limit.0);
        let files = Arc::new(with_progress(py, progress, |told| open_sources_with(&sources, limit, told))?);
        Ok(Memory { inner: files.clone(), files: Some(files) })
    }

    /// Memory of byte strings at physical addresses.
    #[staticmethod]
    fn from_segments(segments: Vec<(u64, PyBackedBytes)>) -> PyResult<Self> {
        let segments = segments.into_iter().map(|(phys, bytes)| (Phys(phys), bytes));
        Ok(Memory { inner: Arc::new(SliceMemory::new(segments).or_raise()?), files: None })
    }

    /// What is here: (phys, size) of each run, ascending.
    #[getter]
    fn ranges(&self) -> Vec<(u64, u64)> {
        self.inner.ranges().iter().map(|r| (r.start.0, r.len)).collect()
    }

    #[getter]
    fn nbytes(&self) -> u128 {
        self.inner.nbytes()
    }

    /// `n` bytes at `phys`.
    fn read<'py>(&self, py: Python<'py>, phys: Number, n: Number) -> PyResult<Bound<'py, PyBytes>> {
        crate::folio::read(py, &*self.inner, Phys(phys.0), n.0)
    }

    /// The first run at or behind `phys` that may hold something other than zeros.
    fn next_data(&self, py: Python<'_>, phys: Number) -> PyResult<Option<(u64, u64)>> {
        crate::folio::next_data(py, &*self.inner, Phys(phys.0))
    }

    /// The machine an ELF core names: "x86_64", "aarch64" or "machine N".
    #[getter]
    fn machine(&self) -> Option<String> {
        Some(self.files.as_ref()?.machine()?.to_string())
    }

    /// What was opened, in the order given.
    #[getter]
    fn sources(&self) -> Vec<String> {
        let sources = self.files.as_ref().map_or(&[][..], |f| f.sources());
        sources.iter().map(Source::to_string).collect()
    }

    /// (path, phys, size) of what a core that is cut short claims and does not have.
    #[getter]
    fn truncated(&self) -> Vec<(OsString, u64, u64)> {
        let cuts = self.files.as_ref().map_or(&[][..], |f| f.truncated());
        cuts.iter().map(|cut| (cut.path.clone().into_os_string(), cut.missing.start.0, cut.missing.len)).collect()
    }

    fn __repr__(&self) -> String {
        let runs = self.inner.ranges();
        format!(
            "<kho.Memory of {:#x} bytes in {} run{}>",
            self.inner.nbytes(),
            runs.len(),
            if runs.len() == 1 { "" } else { "s" }
        )
    }
}
