//! The kernel's command line.

#![forbid(unsafe_code)]

use crate::errors::OrRaise;
use kho::cmdline::{self, Rounding, Trailing, Zeros};
use pyo3::prelude::*;

/// Say whether the kernel enables KHO with this command line.
///
/// The last well-formed `kho=` wins, read with kstrtobool; a malformed one, or `kho` without a value, changes nothing.
///
/// Args:
///     cmdline: as in /proc/cmdline.
///     default: CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT, which holds if no `kho=` decides.
///
/// Source: kho_parse_enable, kernel/liveupdate/kexec_handover.c.
#[pyfunction]
#[pyo3(signature = (cmdline, default=false))]
pub(crate) fn kho_is_enabled(cmdline: &str, default: bool) -> bool {
    cmdline::kho_is_enabled(cmdline, default)
}

/// Read a value of `kho_scratch=`: `N%` or `LOW,GLOBAL,PERNODE`.
///
/// Sizes are read as memparse does: decimal, 0x or octal 0, a suffix K, M, G, T, P or E; beyond 64 bits they wrap.
///
/// Args:
///     value: the text after `kho_scratch=`.
///     trailing_garbage: accept any text after the third size, as the kernels before 6.19 do.
///     zeros: accept sizes of 0 as long as one is not, as the kernels from 6.18 on do.
///
/// Raises: ParameterError with the part that is missing or malformed.
///
/// Source: kho_parse_scratch_size, kernel/liveupdate/kexec_handover.c.
#[pyfunction]
#[pyo3(signature = (value, *, trailing_garbage=false, zeros=true))]
pub(crate) fn parse_kho_scratch(value: &str, trailing_garbage: bool, zeros: bool) -> PyResult<ScratchSpec> {
    let trailing = if trailing_garbage { Trailing::Ignore } else { Trailing::Reject };
    let zeros = if zeros { Zeros::NotAll } else { Zeros::None };
    cmdline::parse_kho_scratch(value, trailing, zeros).map(ScratchSpec).or_raise()
}

/// Give the value of the last `kho_scratch=` of a command line, without quotes.
///
/// The value may be malformed; `parse_kho_scratch` decides that.
///
/// Returns: None if the command line has no `kho_scratch=`.
#[pyfunction]
pub(crate) fn kho_scratch_of(cmdline: &str) -> Option<&str> {
    cmdline::kho_scratch_of(cmdline)
}

/// The requested size of the scratch areas, as `kho_scratch=` states it.
///
/// Either `percent` is set and the three sizes are None, or the three sizes are set and `percent` is None. Instances
/// are immutable, hashable, and equal if all four values are. Made by `parse_kho_scratch`.
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
    /// Percentage of the memory that the kernel reserved during boot; None if sizes were given.
    #[getter]
    fn percent(&self) -> Option<u32> {
        match self.0 {
            cmdline::ScratchSpec::Percent(percent) => Some(percent),
            cmdline::ScratchSpec::Sizes { .. } => None,
        }
    }

    /// Bytes in low memory, before rounding; None if a percentage was given.
    #[getter]
    fn low(&self) -> Option<u64> {
        match self.0 {
            cmdline::ScratchSpec::Sizes { low, .. } => Some(low),
            cmdline::ScratchSpec::Percent(_) => None,
        }
    }

    /// Bytes on any node, before rounding; None if a percentage was given.
    #[getter]
    fn global_(&self) -> Option<u64> {
        match self.0 {
            cmdline::ScratchSpec::Sizes { global, .. } => Some(global),
            cmdline::ScratchSpec::Percent(_) => None,
        }
    }

    /// Bytes on each NUMA node, before rounding; None if a percentage was given.
    #[getter]
    fn pernode(&self) -> Option<u64> {
        match self.0 {
            cmdline::ScratchSpec::Sizes { pernode, .. } => Some(pernode),
            cmdline::ScratchSpec::Percent(_) => None,
        }
    }

    /// Compute the sizes of the areas in bytes, in the kernel's order: low, global, one per node.
    ///
    /// Args:
    ///     reserved_low: bytes that the kernel reserved below 4 GiB during boot. Only a percentage uses the reserved
    ///         amounts.
    ///     reserved_all: bytes that it reserved everywhere.
    ///     reserved_per_node: bytes that it reserved on each node; one area is computed for each item.
    ///     align: what each size is rounded up to, a power of two: a pageblock, which is 2 MiB with 4 KiB pages, 32 MiB
    ///         with 16 KiB pages, and 512 MiB with 64 KiB pages.
    ///     rounds_all: whether the low and the global size of `LOW,GLOBAL,PERNODE` are rounded, too: from Linux
    ///         6.18.42, 7.1.5 and 7.2 on (`kho.kernels.FIXES["scratch-rounding"]`).
    ///
    /// Raises: ParameterError for a wrong `align`; OutOfRangeError for a size beyond 64 bits.
    ///
    /// Source: scratch_size_update, kernel/liveupdate/kexec_handover.c.
    #[pyo3(signature = (reserved_low, reserved_all, reserved_per_node, align=2_097_152, *, rounds_all=true))]
    #[allow(clippy::needless_pass_by_value)]
    fn sizes(
        &self,
        reserved_low: u64,
        reserved_all: u64,
        reserved_per_node: Vec<u64>,
        align: u64,
        rounds_all: bool,
    ) -> PyResult<Vec<u64>> {
        let rounding = if rounds_all { Rounding::All } else { Rounding::PerNode };
        self.0.sizes(reserved_low, reserved_all, &reserved_per_node, align, rounding).or_raise()
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
