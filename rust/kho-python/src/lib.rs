//! The Python bindings of kho: convert, call, convert back. One file per class; errors in `errors.rs`.

mod cmdline;
mod errors;
mod memory;

use pyo3::prelude::*;

/// The compiled half of the `kho` package; import `kho`, not this.
#[pymodule]
mod _kho {
    use pyo3::prelude::*;

    #[pymodule_export]
    use crate::cmdline::{ScratchSpec, kho_is_enabled, kho_scratch_of, parse_kho_scratch};
    #[pymodule_export]
    use crate::memory::Memory;

    #[pymodule_init]
    fn init(m: &Bound<'_, PyModule>) -> PyResult<()> {
        m.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
