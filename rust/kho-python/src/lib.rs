//! The Python bindings of kho: convert, call, convert back. One file per class; errors in `errors.rs`.

#![deny(unsafe_code)]

mod abis;
mod alignment;
mod arena;
mod args;
mod array;
mod arrow;
mod cmdline;
mod errors;
mod fdt;
mod filemap;
mod folio;
mod folios;
mod incoming;
mod listed;
mod memory;
mod outgoing;
mod payload;
mod reader;
mod shared;
mod snapshot;
mod tracker;
mod verify;

pub(crate) use alignment::assert_object_alignment;

use pyo3::prelude::*;

/// The compiled half of kho; import `kho`, not this module.
///
/// Sizes are in bytes and addresses are physical unless a name says otherwise. A pfn is an address divided by the page
/// size; a folio of order `o` is `1 << o` pages. An integer that does not fit 64 bits raises ParameterError or
/// OverflowError.
#[pymodule]
mod _kho {
    use pyo3::prelude::*;

    #[pymodule_export]
    use crate::abis::{PyAbi, abis, split_compatible, versions_of};
    #[pymodule_export]
    use crate::arena::PyArena;
    #[pymodule_export]
    use crate::cmdline::{ScratchSpec, kho_is_enabled, kho_scratch_of, parse_kho_scratch};
    #[pymodule_export]
    use crate::fdt::{NodeBlock, PyFdt, PyFdtNode, PyFdtPlaceholder, PyFdtWriter};
    #[pymodule_export]
    use crate::filemap::{FileMapping, MappedBytes, punch_hole};
    #[pymodule_export]
    use crate::folio::{Folio, Pages};
    #[pymodule_export]
    use crate::folios::{FolioArray, PfnArray, RunArray};
    #[pymodule_export]
    use crate::incoming::{PyIncoming, Subtree, open_memory};
    #[pymodule_export]
    use crate::memory::{Memory, unpack_bytes};
    #[pymodule_export]
    use crate::outgoing::PyOutgoing;
    #[pymodule_export]
    use crate::payload::{PyMemfd, PyVmalloc};
    #[pymodule_export]
    use crate::snapshot::{PySnapshot, SnapshotSide};
    #[pymodule_export]
    use crate::tracker::PyTracker;
    #[pymodule_export]
    use crate::verify::{
        OwnerRows, check_map, check_memfd_folios, find_memory, find_outside_map, find_unlisted, join_owners,
    };

    #[pymodule_init]
    fn init(m: &Bound<'_, PyModule>) -> PyResult<()> {
        m.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
