//! The Python bindings of kho: convert, call, convert back. One file per class; errors in `errors.rs`.

#![deny(unsafe_code)]

/// Refuses to compile a class that CPython could not allocate: it aligns objects to 16 bytes (`ALIGNMENT` of
/// Objects/obmalloc.c), and PyO3 does not ask for more. What needs more goes into a `Box`.
macro_rules! assert_object_alignment {
    ($class:ty) => {
        const _: () = assert!(align_of::<$class>() <= 16, "CPython aligns objects to 16 bytes: box what needs more");
    };
}
pub(crate) use assert_object_alignment;

mod abis;
mod arena;
mod args;
mod array;
mod cmdline;
mod errors;
mod fdt;
mod folio;
mod folios;
mod incoming;
mod listed;
mod memory;
mod outgoing;
mod payload;
mod shared;
mod snapshot;
mod tracker;
mod verify;

use pyo3::prelude::*;

/// The compiled half of the `kho` package; import `kho`, not this.
#[pymodule]
mod _kho {
    use pyo3::prelude::*;

    #[pymodule_export]
    use crate::abis::{PyAbi, abis};
    #[pymodule_export]
    use crate::arena::PyArena;
    #[pymodule_export]
    use crate::cmdline::{ScratchSpec, kho_is_enabled, kho_scratch_of, parse_kho_scratch};
    #[pymodule_export]
    use crate::fdt::{NodeBlock, PyFdt, PyFdtNode, PyFdtPlaceholder, PyFdtWriter};
    #[pymodule_export]
    use crate::folio::{Folio, Pages};
    #[pymodule_export]
    use crate::folios::{FolioArray, PfnArray, RunArray};
    #[pymodule_export]
    use crate::incoming::{PyIncoming, Subtree, open_memory};
    #[pymodule_export]
    use crate::memory::Memory;
    #[pymodule_export]
    use crate::outgoing::PyOutgoing;
    #[pymodule_export]
    use crate::payload::{PyMemfd, PyVmalloc};
    #[pymodule_export]
    use crate::snapshot::{PySnapshot, SnapshotSide};
    #[pymodule_export]
    use crate::tracker::PyTracker;
    #[pymodule_export]
    use crate::verify::{OwnerRows, check_map, check_memfd_folios, find_memory, join_owners};

    #[pymodule_init]
    fn init(m: &Bound<'_, PyModule>) -> PyResult<()> {
        m.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
