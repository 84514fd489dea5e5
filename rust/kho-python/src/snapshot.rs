//! `kho.Snapshot`: what a kernel shows of its handover in debugfs.

#![forbid(unsafe_code)]

use crate::errors::OrRaise;
use kho::snapshot::{RootFdt, Side, Snapshot};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyString};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What a kernel shows of its handover in debugfs.
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

/// Whether this is the word for the running machine: the string, if there is no file of that name.
fn is_live(source: &Bound<'_, PyAny>, path: &Path) -> bool {
    source.is_instance_of::<PyString>() && path == Path::new("live") && path.symlink_metadata().is_err()
}

#[pymethods]
impl PySnapshot {
    #[staticmethod]
    fn open(py: Python<'_>, source: &Bound<'_, PyAny>) -> PyResult<Self> {
        let path: PathBuf = source.extract()?;
        let live = is_live(source, &path);
        let opened = py.detach(|| if live { Snapshot::live() } else { Snapshot::open(&path) });
        Ok(PySnapshot { inner: Arc::new(opened.or_raise()?) })
    }

    #[staticmethod]
    fn recognizes(py: Python<'_>, source: &Bound<'_, PyAny>) -> PyResult<bool> {
        let path: PathBuf = source.extract()?;
        Ok(is_live(source, &path) || py.detach(|| Snapshot::recognizes(&path)))
    }

    #[getter]
    fn path(&self) -> PathBuf {
        self.inner.path.clone()
    }

    #[getter]
    fn kind(&self) -> &'static str {
        self.inner.kind.name()
    }

    #[getter]
    fn incoming(&self) -> Option<SnapshotSide> {
        self.inner.incoming.as_ref().map(|_| SnapshotSide { snapshot: Arc::clone(&self.inner), outgoing: false })
    }

    #[getter]
    fn outgoing(&self) -> Option<SnapshotSide> {
        self.inner.outgoing.as_ref().map(|_| SnapshotSide { snapshot: Arc::clone(&self.inner), outgoing: true })
    }

    #[getter]
    fn scratch(&self) -> Option<Vec<(u64, u64)>> {
        Some(self.inner.scratch.as_ref()?.iter().map(|area| (area.addr, area.size)).collect())
    }

    #[getter]
    fn finalized(&self) -> Option<bool> {
        self.inner.finalized
    }

    #[getter]
    fn ram(&self) -> Option<Vec<(u64, u64)>> {
        Some(self.inner.ram.as_ref()?.iter().map(|range| (range.start.0, range.len)).collect())
    }

    #[getter]
    fn cmdline(&self) -> Option<&str> {
        self.inner.cmdline.as_deref()
    }

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
    #[getter]
    fn fdt<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyBytes>> {
        Some(PyBytes::new(py, &self.root()?.bytes))
    }

    #[getter]
    fn compatible(&self) -> Option<&str> {
        self.root()?.compatible.as_deref()
    }

    #[getter]
    fn preserved_memory_map(&self) -> Option<u64> {
        self.root()?.preserved_memory_map.map(|phys| phys.0)
    }

    #[getter]
    fn truncated(&self) -> Option<(u32, usize)> {
        let root = self.root().filter(|root| root.is_truncated())?;
        Some((root.totalsize, root.bytes.len()))
    }

    #[getter]
    fn problem(&self) -> Option<String> {
        Some(self.root()?.problem.as_ref()?.to_string())
    }

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
