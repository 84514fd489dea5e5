//! `kho.Snapshot`: what a kernel shows of its handover in debugfs.

#![forbid(unsafe_code)]

use crate::errors::OrRaise;
use kho::snapshot::{RootFdt, Side, Snapshot};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyString};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What a kernel shows of its handover in debugfs: FDTs and scratch areas, but no memory.
///
/// Source: kernel/liveupdate/kexec_handover_debugfs.c.
#[pyclass(frozen, module = "kho", name = "Snapshot")]
pub(crate) struct PySnapshot {
    inner: Arc<Snapshot>,
}
crate::assert_object_alignment!(PySnapshot);

/// One direction of a handover, as debugfs shows it.
#[pyclass(frozen, module = "kho")]
pub(crate) struct SnapshotSide {
    snapshot: Arc<Snapshot>,
    outgoing: bool,
}
crate::assert_object_alignment!(SnapshotSide);

/// Whether `source` names the running machine: the string "live", if no file of that name exists.
fn is_live(source: &Bound<'_, PyAny>, path: &Path) -> bool {
    source.is_instance_of::<PyString>() && path == Path::new("live") && path.symlink_metadata().is_err()
}

#[pymethods]
impl PySnapshot {
    /// Read a directory, a root FDT, or the running machine.
    ///
    /// Args:
    ///     source: debugfs' `kho` directory; a directory that has it at `sys/kernel/debug/kho`, and may have
    ///         `proc/iomem`, `proc/cmdline` and `proc/version`; the file of one root FDT; or the string "live".
    ///
    /// Raises: SourceError with the path that is missing, unreadable, not a regular file, over 1 MiB, or a link out of
    /// the directory; FdtError or FormatError for a file that is not the root FDT of a handover.
    #[staticmethod]
    fn open(py: Python<'_>, source: &Bound<'_, PyAny>) -> PyResult<Self> {
        let path: PathBuf = source.extract()?;
        let live = is_live(source, &path);
        let opened = py.detach(|| if live { Snapshot::live() } else { Snapshot::open(&path) });
        Ok(PySnapshot { inner: Arc::new(opened.or_raise()?) })
    }

    /// Say whether `source` is one that `Snapshot.open` reads, rather than an image of memory.
    ///
    /// That is "live", a directory, or a file that begins as a devicetree.
    #[staticmethod]
    fn recognizes(py: Python<'_>, source: &Bound<'_, PyAny>) -> PyResult<bool> {
        let path: PathBuf = source.extract()?;
        Ok(is_live(source, &path) || py.detach(|| Snapshot::recognizes(&path)))
    }

    /// The path that was read.
    #[getter]
    fn path(&self) -> PathBuf {
        self.inner.path.clone()
    }

    /// The kind of source: "live", "root" (a directory with sys and proc), "debugfs" or "fdt".
    #[getter]
    fn kind(&self) -> &'static str {
        self.inner.kind.name()
    }

    /// What this kernel was handed; None if nothing.
    #[getter]
    fn incoming(&self) -> Option<SnapshotSide> {
        self.inner.incoming.as_ref().map(|_| SnapshotSide { snapshot: Arc::clone(&self.inner), outgoing: false })
    }

    /// What this kernel will hand over, as far as it is known; of a single FDT, that FDT.
    #[getter]
    fn outgoing(&self) -> Option<SnapshotSide> {
        self.inner.outgoing.as_ref().map(|_| SnapshotSide { snapshot: Arc::clone(&self.inner), outgoing: true })
    }

    /// The scratch areas, as (addr, nbytes): low memory, global, one per NUMA node; None if not shown.
    #[getter]
    fn scratch(&self) -> Option<Vec<(u64, u64)>> {
        Some(self.inner.scratch.as_ref()?.iter().map(|area| (area.addr, area.size)).collect())
    }

    /// The content of `out/finalize`, which Linux 6.16 to 7.0 have; None without it.
    #[getter]
    fn finalized(&self) -> Option<bool> {
        self.inner.finalized
    }

    /// System RAM, as (phys, nbytes); None if /proc/iomem is missing or hides its addresses (not root).
    #[getter]
    fn ram(&self) -> Option<Vec<(u64, u64)>> {
        Some(self.inner.ram.as_ref()?.iter().map(|range| (range.start.0, range.len)).collect())
    }

    /// The kernel's command line; None if /proc/cmdline is missing.
    #[getter]
    fn cmdline(&self) -> Option<&str> {
        self.inner.cmdline.as_deref()
    }

    /// The content of /proc/version; None if it is missing.
    #[getter]
    fn version(&self) -> Option<&str> {
        self.inner.version.as_deref()
    }

    fn __repr__(&self) -> String {
        format!("<kho.Snapshot {} {}>", self.inner.kind.name(), self.inner.path.display())
    }
}

impl SnapshotSide {
    fn side(&self) -> Option<&Side> {
        if self.outgoing { self.snapshot.outgoing.as_ref() } else { self.snapshot.incoming.as_ref() }
    }

    fn root(&self) -> Option<&RootFdt> {
        self.side()?.fdt.as_ref()
    }
}

#[pymethods]
impl SnapshotSide {
    /// The bytes of the root FDT; None before one is finalized (Linux 6.16 to 6.18).
    #[getter]
    fn fdt<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyBytes>> {
        Some(PyBytes::new(py, &self.root()?.bytes))
    }

    /// The ABI version, as "kho-v4"; known even where Linux 6.19 and later truncate the FDT.
    #[getter]
    fn compatible(&self) -> Option<&str> {
        self.root()?.compatible.as_deref()
    }

    /// Physical address of the map; known even where Linux 6.19 and later truncate the FDT.
    #[getter]
    fn preserved_memory_map(&self) -> Option<u64> {
        self.root()?.preserved_memory_map.map(|phys| phys.0)
    }

    /// (bytes according to the header, bytes shown) of a truncated FDT; None if it is whole.
    #[getter]
    fn truncated(&self) -> Option<(u32, usize)> {
        let root = self.root().filter(|root| root.is_truncated())?;
        Some((root.totalsize, root.bytes.len()))
    }

    /// What is wrong with the FDT, as text; None if nothing.
    #[getter]
    fn problem(&self) -> Option<String> {
        Some(self.root()?.problem.as_ref()?.to_string())
    }

    /// The blobs of the producers by name.
    #[getter]
    fn sub_fdts<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let blobs = PyDict::new(py);
        for (name, blob) in self.side().map_or(&[][..], |side| &side.sub_fdts) {
            blobs.set_item(name, PyBytes::new(py, blob))?;
        }
        Ok(blobs)
    }

    fn __repr__(&self) -> String {
        let way = if self.outgoing { "out" } else { "in" };
        format!("<kho.SnapshotSide {way}: {}>", self.compatible().unwrap_or("no FDT"))
    }
}
