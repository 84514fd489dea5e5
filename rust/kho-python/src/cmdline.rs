//! The kernel's command line.

#![forbid(unsafe_code)]

use crate::errors::OrRaise;
use kho::cmdline::{self, Trailing};
use pyo3::prelude::*;

/// Whether the kernel has KHO on after this command line.
#[pyfunction]
#[pyo3(signature = (cmdline, default=false))]
pub(crate) fn kho_is_enabled(cmdline: &str, default: bool) -> bool {
    cmdline::kho_is_enabled(cmdline, default)
}

/// Read a value of `kho_scratch=` as the kernel does.
#[pyfunction]
#[pyo3(signature = (value, *, trailing_garbage=false))]
pub(crate) fn parse_kho_scratch(value: &str, trailing_garbage: bool) -> PyResult<ScratchSpec> {
    let trailing = if trailing_garbage { Trailing::Ignore } else { Trailing::Reject };
    cmdline::parse_kho_scratch(value, trailing).map(ScratchSpec).or_raise()
}

/// The value of the last `kho_scratch=` on a command line; None if there is none.
#[pyfunction]
pub(crate) fn kho_scratch_of(cmdline: &str) -> Option<&str> {
    cmdline::kho_scratch_of(cmdline)
}

/// How large the scratch areas are to be.
#[pyclass(frozen, eq, hash, module = "kho")]
#[derive(PartialEq, Eq)]
pub(crate) struct ScratchSpec(pub(crate) cmdline::ScratchSpec);
crate::assert_object_alignment!(ScratchSpec);

impl std::hash::Hash for ScratchSpec {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        (self.percent(), self.low(), self.global_(), self.pernode()).hash(state);
    }
}

#[pymethods]
impl ScratchSpec {
    #[getter]
    fn percent(&self) -> Option<u32> {
        match self.0 {
            cmdline::ScratchSpec::Percent(percent) => Some(percent),
            cmdline::ScratchSpec::Sizes { .. } => None,
        }
    }

    #[getter]
    fn low(&self) -> Option<u64> {
        match self.0 {
            cmdline::ScratchSpec::Sizes { low, .. } => Some(low),
            cmdline::ScratchSpec::Percent(_) => None,
        }
    }

    #[getter]
    fn global_(&self) -> Option<u64> {
        match self.0 {
            cmdline::ScratchSpec::Sizes { global, .. } => Some(global),
            cmdline::ScratchSpec::Percent(_) => None,
        }
    }

    #[getter]
    fn pernode(&self) -> Option<u64> {
        match self.0 {
            cmdline::ScratchSpec::Sizes { pernode, .. } => Some(pernode),
            cmdline::ScratchSpec::Percent(_) => None,
        }
    }

    /// The sizes of the areas in bytes: low, global, one per node.
    #[pyo3(signature = (reserved_low, reserved_all, reserved_per_node, align=2_097_152))]
    #[allow(clippy::needless_pass_by_value)]
    fn sizes(
        &self,
        reserved_low: u64,
        reserved_all: u64,
        reserved_per_node: Vec<u64>,
        align: u64,
    ) -> PyResult<Vec<u64>> {
        self.0.sizes(reserved_low, reserved_all, &reserved_per_node, align).or_raise()
    }

    fn __repr__(&self) -> String {
        match self.0 {
            cmdline::ScratchSpec::Percent(percent) => format!("ScratchSpec(percent={percent})"),
            cmdline::ScratchSpec::Sizes { low, global, pernode } => {
                format!("ScratchSpec(low={low:#x}, global_={global:#x}, pernode={pernode:#x})")
            }
        }
    }
}
