//! The rows of the ABI table.

#![forbid(unsafe_code)]

use crate::errors::OrRaise;
use crate::fdt::PyFdt;
use kho::abi::composite::Composite;
use kho::abi::{Abi, DRAFTS, MapFormat, SubtreeOrder};
use kho::units::{PageSize, Phys};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::collections::BTreeMap;

/// The versions of KHO's ABI that this library knows, oldest first, by `compatible`: abi.md section 1.
///
/// This is the one table of what differs between versions; Python keeps none of its own. With `drafts`, those of public
/// drafts follow, which no release of Linux writes or reads (abi.md section 9).
#[pyfunction]
#[pyo3(signature = (*, drafts = false))]
pub(crate) fn abis(py: Python<'_>, drafts: bool) -> PyResult<Bound<'_, PyDict>> {
    let rows = PyDict::new(py);
    let drafts: &'static [Abi] = if drafts { &DRAFTS } else { &[] };
    for abi in Abi::all().chain(drafts) {
        rows.set_item(abi.compatible, PyAbi(abi))?;
    }
    Ok(rows)
}

/// Take a compatible apart, as the draft of June 2026 composes it: `base;part;part` (abi.md section 9).
///
/// Returns: the base, the parts, and what speaks against reading each part as the known version of it: unknown parts by
/// name, and an order that no writer makes. A compatible without parts is its own base.
#[pyfunction]
pub(crate) fn split_compatible(compatible: &str) -> (String, Vec<String>, Vec<String>) {
    let composite = Composite::of(compatible);
    (composite.base.into(), composite.parts.iter().map(|part| part.to_string()).collect(), composite.doubts())
}

/// As which versions a root FDT may be read, the most plausible first.
///
/// Each is `(abi, doubts)` (abi.md section 9). There is one, without doubts, if the FDT's `compatible` names a version,
/// released or draft. Otherwise its properties decide, and the doubts say what is not known.
///
/// Raises: FormatError without a `compatible`; UnsupportedAbiError if the FDT fits no version.
#[pyfunction]
pub(crate) fn versions_of(fdt: &PyFdt) -> PyResult<Vec<(PyAbi, Vec<String>)>> {
    let versions = kho::root::versions(fdt.inner(), Phys(0)).or_raise()?;
    Ok(versions.into_iter().map(|(abi, doubts)| (PyAbi(abi), doubts)).collect())
}

/// One version of KHO's ABI: what its kernels write and read, a row of `abis()`.
#[pyclass(frozen, name = "Abi", module = "kho._kho")]
pub(crate) struct PyAbi(pub(crate) &'static Abi);
crate::assert_object_alignment!(PyAbi);

#[pymethods]
impl PyAbi {
    /// The root FDT's `compatible`.
    #[getter]
    fn compatible(&self) -> &'static str {
        self.0.compatible
    }

    /// The kernels that write and read it, as "Linux 7.2 and 7.3".
    #[getter]
    fn kernels(&self) -> &'static str {
        self.0.kernels
    }

    /// Whether a release of Linux writes it; otherwise only development trees did.
    #[getter]
    fn released(&self) -> bool {
        self.0.released
    }

    /// Whether only a public draft has it; such a version is written only if asked for by its name.
    #[getter]
    fn draft(&self) -> bool {
        self.0.draft
    }

    /// Whether this library reads and writes it.
    #[getter]
    fn decoded(&self) -> bool {
        self.0.decoded
    }

    /// How the preserved-memory map is written: "chunk list" or "radix tree" (abi.md sections 3 and 4).
    #[getter]
    fn map(&self) -> &'static str {
        match self.0.map {
            MapFormat::Chunks => "chunk list",
            MapFormat::Radix { .. } => "radix tree",
        }
    }

    /// Levels of the tree by page size in bytes, leaves included; empty for a chunk list.
    ///
    /// As KHO_TREE_MAX_DEPTH (include/linux/kho/abi/kexec_handover.h).
    #[getter]
    fn levels(&self) -> BTreeMap<u64, u32> {
        PageSize::ALL.into_iter().filter_map(|page| Some((page.bytes(), self.0.levels(page)?))).collect()
    }

    /// Whether the tree's depth allows for the bit of a key that tells order 0, which counts at 16 KiB.
    #[getter]
    fn order_bit(&self) -> bool {
        matches!(self.0.map, MapFormat::Radix { order_bit: true })
    }

    /// Sizes of the bitmaps of a chunk list, as `(bytes, kernels)`; empty for a tree.
    ///
    /// The bytes are None for a bitmap of one page.
    #[getter]
    fn bitmaps(&self) -> Vec<(Option<u64>, &'static str)> {
        self.0.bitmaps.iter().map(|(size, kernels)| (size.fixed_bytes(), *kernels)).collect()
    }

    /// Whether map and root FDT are in force from the start; otherwise they are written by finalizing.
    #[getter]
    fn live(&self) -> bool {
        self.0.live
    }

    /// Where kho puts a new subtree among the root's nodes: "append" or "prepend".
    #[getter]
    fn subtree_order(&self) -> &'static str {
        match self.0.subtree_order {
            SubtreeOrder::Append => "append",
            SubtreeOrder::Prepend => "prepend",
        }
    }

    /// The root's property with the map's address.
    #[getter]
    fn map_property(&self) -> &'static str {
        self.0.map_property
    }

    /// A subtree's property with its blob's address.
    #[getter]
    fn subtree_property(&self) -> &'static str {
        self.0.subtree_property
    }

    /// A subtree's property with its blob's bytes; None if the version has none.
    #[getter]
    fn size_property(&self) -> Option<&'static str> {
        self.0.size_property
    }

    /// Whether a preserved range of pages is cut where the NUMA node changes.
    #[getter]
    fn cuts_at_nodes(&self) -> bool {
        self.0.cuts_at_nodes
    }

    /// The compatible of the LUO subtree that its kernels read; None if they have no LUO.
    #[getter]
    fn luo(&self) -> Option<&'static str> {
        self.0.luo
    }

    /// The compatible of a memfd in a LUO session that its kernels read.
    #[getter]
    fn memfd(&self) -> Option<&'static str> {
        self.0.memfd
    }

    /// Add a version that is `like` another but for the columns given. For tests only.
    ///
    /// A row that was added stays in memory until the process ends, so that nothing that refers to it can break.
    ///
    /// Raises: ValueError for a `compatible` that there is, a `like` or a column that there is not.
    #[staticmethod]
    #[pyo3(signature = (compatible, *, like, **columns))]
    fn _add(compatible: String, like: &str, columns: Option<BTreeMap<String, String>>) -> PyResult<PyAbi> {
        let like = Abi::named(like).ok_or_else(|| PyValueError::new_err(format!("no ABI {like:?}")))?;
        let leaked = |text: String| -> &'static str { Box::leak(text.into_boxed_str()) };
        let mut row = Abi { compatible: leaked(compatible), ..like.clone() };
        for (column, value) in columns.unwrap_or_default() {
            match column.as_str() {
                "kernels" => row.kernels = leaked(value),
                "map_property" => row.map_property = leaked(value),
                "subtree_property" => row.subtree_property = leaked(value),
                "size_property" => row.size_property = Some(leaked(value)),
                "luo" => row.luo = Some(leaked(value)),
                "memfd" => row.memfd = Some(leaked(value)),
                _ => return Err(PyValueError::new_err(format!("no column {column:?} that can be given"))),
            }
        }
        let name = row.compatible;
        Abi::add(row).map(PyAbi).ok_or_else(|| PyValueError::new_err(format!("ABI {name:?} exists")))
    }

    /// Remove a version that `_add` added; whether it was there. For tests only.
    #[staticmethod]
    fn _remove(compatible: &str) -> bool {
        Abi::remove(compatible)
    }

    fn __repr__(&self) -> String {
        format!("<Abi {}: {}, {}>", self.0.compatible, self.map(), self.0.kernels)
    }
}
