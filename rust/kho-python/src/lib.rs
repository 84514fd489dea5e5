//! The Python bindings of kho: convert, call, convert back. One file per class; errors in `errors.rs`.

mod args;
mod errors;
mod folios;
mod tracker;

use pyo3::prelude::*;

/// The compiled half of the `kho` package; import `kho`, not this.
#[pymodule]
mod _kho {
    use pyo3::prelude::*;

    #[pymodule_export]
    use crate::folios::FolioArray;
    #[pymodule_export]
    use crate::tracker::PyTracker;

    #[pymodule_init]
    fn init(m: &Bound<'_, PyModule>) -> PyResult<()> {
        m.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
