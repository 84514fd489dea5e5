//! `kho.Memory`: physical memory to read.

#![forbid(unsafe_code)]

use crate::arena::PyArena;
use crate::args::Number;
use crate::errors::OrRaise;
use crate::reader::{reader, reading};
use kho::memory::{
    Absence, FileMemory, PhysMemory, SliceMemory, Source, next_absence, open_sources_with, unpack_bytes as unpacked,
};
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

/// The longest time between two checks for signals, in long work without a progress callback.
const PATIENCE: Duration = Duration::from_millis(50);

/// Physical memory to read: ELF cores, dumps, raw images, byte strings.
///
/// Made by `Memory.open`, `Memory.from_segments` and `Memory.from_reader`. Threads may share it.
#[pyclass(frozen, module = "kho")]
pub(crate) struct Memory {
    /// The memory, as other bindings read it.
    pub(crate) inner: Arc<dyn PhysMemory>,
    /// The same memory, if it consists of files.
    pub(crate) files: Option<Arc<FileMemory>>,
}
crate::assert_object_alignment!(Memory);

/// The memory of a `kho.Memory` or `kho.Arena`.
pub(crate) fn memory_of(object: &Bound<'_, PyAny>) -> PyResult<Arc<dyn PhysMemory>> {
    if let Ok(arena) = object.cast::<PyArena>() {
        Ok(arena.get().inner.clone())
    } else if let Ok(memory) = object.cast::<Memory>() {
        Ok(memory.get().inner.clone())
    } else {
        Err(PyTypeError::new_err("a kho.Memory or a kho.Arena is needed"))
    }
}

/// What a truncated file claims, for Python.
pub(crate) fn truncated(memory: &dyn PhysMemory) -> Vec<(OsString, u64, u64)> {
    let cuts = memory.cuts().iter();
    cuts.map(|cut| (cut.path.to_path_buf().into_os_string(), cut.missing.start.0, cut.missing.len)).collect()
}

/// A run of memory that is not in its file, for Python.
pub(crate) fn absence(absence: &Absence) -> (u64, u64, &'static str) {
    (absence.range.start.0, absence.range.len, absence.why.name())
}

/// The value of a line of VMCOREINFO, as text.
pub(crate) fn vmcoreinfo(memory: &dyn PhysMemory, name: &str) -> Option<String> {
    let mut lines = memory.vmcoreinfo()?.split(|&byte| byte == b'\n');
    let value = lines.find_map(|line| line.strip_prefix(name.as_bytes())?.strip_prefix(b"="))?;
    Some(String::from_utf8_lossy(value).trim_end_matches(['\0', '\r']).to_owned())
}

/// Does long work, detached from the interpreter, and calls `progress` with the number of bytes done. An exception of
/// `progress`, or of a signal handler (Ctrl-C), ends the work.
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
    let done = reading(py, || work(&mut told))?;
    raised.map_or_else(|| done.or_raise(), Err)
}

#[pymethods]
impl Memory {
    /// Open files as one memory.
    ///
    /// Args:
    ///     sources: a str is `FILE`, `FILE@ADDRESS`, `FILE@ADDRESS,offset=N,size=N,hole=START:END` (numbers as
    ///         `kho.sizes` reads them: 0x40000000, 1.5G) or `FILE,machine=NAME` (the memory file of a virtual machine:
    ///         q35, pc, microvm, virt, firecracker, cloud-hypervisor, firecracker-arm64, cloud-hypervisor-arm64); if a
    ///         file of exactly that name exists, it is that file. `-` for FILE is standard input. A Path is a path. A
    ///         file without an address is read as its content says: an ELF core, a kdump file, flattened or not, LiME,
    ///         or else raw memory at 0. A file that is packed with gzip, xz, zstd, bzip2, lz4 or snappy, or that AVML
    ///         wrote, is unpacked into an unlinked temporary file, and so is the content of a pipe; a packed raw image
    ///         is accepted only if its name says what it is (`ram.bin.gz@0x40000000`). `kho.open` reads a raw image at
    ///         another address if its handover is whole only there; `,check=no` forbids that.
    ///     unpack_limit: the most bytes that a packed file or a pipe may come to. By default `KHO_UNPACK_LIMIT` of the
    ///         environment, or else the larger of 2 GiB and 128 times the packed size (for bzip2 and xz: 512 MiB and 64
    ///         times); 1 TiB for a pipe that is not packed.
    ///     progress: called with the number of bytes unpacked so far; an exception that it raises ends the call.
    ///
    /// Raises: SourceError for a file that cannot be used, or that overlaps another one; ParameterError without
    /// sources.
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
                // A str may have an address (`FILE@ADDRESS`); a Path is a plain path.
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

    /// Make a memory of byte strings at physical addresses.
    ///
    /// Args:
    ///     segments: (phys, bytes) each, in any order.
    ///
    /// Raises: ParameterError if two segments overlap; OutOfRangeError if one ends beyond the address space.
    #[staticmethod]
    fn from_segments(segments: Vec<(u64, PyBackedBytes)>) -> PyResult<Self> {
        let segments = segments.into_iter().map(|(phys, bytes)| (Phys(phys), bytes));
        Ok(Memory { inner: Arc::new(SliceMemory::new(segments).or_raise()?), files: None })
    }

    /// Make a memory that a function reads, as that of a debugger or of another tool's dump.
    ///
    /// Nothing is copied beforehand and nothing is kept: each read of kho becomes calls of the function, for at most
    /// 1 MiB each, inside `ranges`. It is called in the thread that called kho; if several threads use the memory, it
    /// is called by each. It may use kho itself.
    ///
    /// Args:
    ///     read: called as `read(phys, n)`; returns the `n` bytes at physical address `phys` as bytes or another object
    ///         with a buffer. For memory that it lacks it raises LeftOutError or another OutsideMemoryError: searches
    ///         skip that page, other readers raise the error. All other exceptions reach the caller unchanged.
    ///     ranges: (phys, nbytes) of each run of memory, in any order; runs that overlap are merged.
    ///     vmcoreinfo: VMCOREINFO, lines of `NAME=value`, if the source has it.
    ///
    /// Raises: TypeError if `read` cannot be called; OutOfRangeError if a run ends beyond the address space. A read
    /// raises SourceError if the function returns another number of bytes, TypeError if it returns no bytes.
    #[staticmethod]
    #[pyo3(signature = (read, ranges, *, vmcoreinfo=None))]
    fn from_reader(read: &Bound<'_, PyAny>, ranges: &Bound<'_, PyAny>, vmcoreinfo: Option<Vec<u8>>) -> PyResult<Self> {
        let runs: PyResult<Vec<_>> = ranges
            .try_iter()?
            .map(|run| run?.extract::<(Number, Number)>().map(|(phys, nbytes)| (phys.0, nbytes.0)))
            .collect();
        Ok(Memory { inner: Arc::new(reader(read, runs?, vmcoreinfo)?), files: None })
    }

    /// The runs of the machine's memory, as (phys, nbytes), ascending; adjacent runs are merged.
    ///
    /// What the files name and do not have is among them: `absent`.
    #[getter]
    fn ranges(&self) -> Vec<(u64, u64)> {
        self.inner.ranges().iter().map(|r| (r.start.0, r.len)).collect()
    }

    /// Bytes of `ranges`, in total.
    #[getter]
    fn nbytes(&self) -> u128 {
        self.inner.nbytes()
    }

    /// Copy `n` bytes at physical address `phys`.
    ///
    /// Raises: OutsideMemoryError if any of them is not in this memory; its subclasses LeftOutError and CutOffError if
    /// the machine had it and the files have not; SourceError on a read error, or if a file has become shorter.
    fn read<'py>(&self, py: Python<'py>, phys: Number, n: Number) -> PyResult<Bound<'py, PyBytes>> {
        crate::folio::read(py, &*self.inner, Phys(phys.0), n.0)
    }

    /// Find the first run at or after `phys` that may hold something other than zeros.
    ///
    /// Returns: (phys, nbytes), or None if only holes and zeros follow.
    ///
    /// Raises: SourceError on a read error.
    fn next_data(&self, py: Python<'_>, phys: Number) -> PyResult<Option<(u64, u64)>> {
        crate::folio::next_data(py, &*self.inner, Phys(phys.0))
    }

    /// The machine that an ELF core or kdump file names: "x86_64", "aarch64" or "machine N".
    ///
    /// Of several files the first that names one counts; None if none does.
    #[getter]
    fn machine(&self) -> Option<String> {
        Some(self.files.as_ref()?.machine()?.to_string())
    }

    /// The sources that were opened, in the order given; empty for byte strings.
    #[getter]
    fn sources(&self) -> Vec<String> {
        let sources = self.files.as_ref().map_or(&[][..], |f| f.sources());
        sources.iter().map(Source::to_string).collect()
    }

    /// The parts that truncated files claim and do not have, as (path, phys, nbytes), ascending.
    ///
    /// Reading them raises CutOffError. If a file is cut where it would name more memory, nbytes of its entry is 0.
    #[getter]
    fn truncated(&self) -> Vec<(OsString, u64, u64)> {
        truncated(&*self.inner)
    }

    /// The memory that the machine had and the files have not, as (phys, nbytes, why), ascending.
    ///
    /// `why` is "left out" (by the filter of the dump: reading it raises LeftOutError) or "cut off" (CutOffError).
    #[getter]
    fn absent(&self) -> Vec<(u64, u64, &'static str)> {
        self.inner.absences().iter().map(absence).collect()
    }

    /// Find the first run at or after `phys` that is not in the files.
    ///
    /// Returns: (phys, nbytes, why), the part of the run from `phys` on, as in `absent`; None if there is none.
    fn next_absent(&self, phys: Number) -> Option<(u64, u64, &'static str)> {
        next_absence(self.inner.absences(), Phys(phys.0)).map(|one| absence(&one))
    }

    /// The level of the filter that wrote the dump (makedumpfile's -d); None if the files name none.
    #[getter]
    fn dump_level(&self) -> Option<u32> {
        self.inner.dump_level()
    }

    /// The value of a line of VMCOREINFO, the crashed kernel's description of itself; None without it.
    ///
    /// Args:
    ///     name: as in "OSRELEASE", "CRASHTIME", "PAGESIZE".
    fn vmcoreinfo(&self, name: &str) -> Option<String> {
        vmcoreinfo(&*self.inner, name)
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

/// Unpack a byte string that is packed with gzip, xz, zstd, bzip2, lz4 or snappy.
///
/// Args:
///     path: the file that it comes from, for messages.
///     packed: the bytes; what follows the packed stream is ignored.
///     limit: the most bytes that are returned.
///
/// Returns: what was packed; of a damaged stream, or one that other bytes follow, the bytes before that.
///
/// Raises: SourceError if nothing comes out of it; ParameterError for bytes that no known packing begins with.
#[pyfunction]
pub(crate) fn unpack_bytes<'py>(
    py: Python<'py>,
    path: PathBuf,
    packed: PyBackedBytes,
    limit: usize,
) -> PyResult<Bound<'py, PyBytes>> {
    let whole = py.detach(|| unpacked(&path, &packed, limit)).or_raise()?;
    Ok(PyBytes::new(py, &whole))
}
