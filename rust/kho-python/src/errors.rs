//! Maps `kho::Error` to the exception classes of `kho.errors`, in one match.

#![forbid(unsafe_code)]

use kho::Error;
use kho::error::SourceProblem;
use pyo3::prelude::*;
use pyo3::types::PyType;
use std::io::ErrorKind;

/// Makes the exception for an error. The classes are defined in `python/kho/errors.py` and imported at the first error.
pub(crate) fn to_py(error: Error) -> PyErr {
    let error = match error {
        // What a reader raised reaches the caller as it is.
        Error::Reader { source, missing } => match source.downcast::<PyErr>() {
            Ok(raised) => return *raised,
            Err(source) => Error::Reader { source, missing },
        },
        error => error,
    };
    let class = match &error {
        Error::Misaligned { .. } => "MisalignedError",
        Error::OrderTooLarge { .. } => "OrderError",
        Error::OutOfRange { .. } => "OutOfRangeError",
        Error::PageSize { .. } | Error::BitmapBytes { .. } | Error::Invalid { .. } => "ParameterError",
        Error::OutsideMemory { .. } => "OutsideMemoryError",
        Error::LeftOut { .. } => "LeftOutError",
        Error::CutOff { .. } => "CutOffError",
        Error::ScratchOverlap { .. } => "ScratchOverlapError",
        Error::Finalized { .. } | Error::NotFinalized => "FinalizedError",
        Error::Exists { .. } => "ExistsError",
        Error::NoSubtree { .. } => "NotFoundError",
        Error::Fdt {
            problem: kho::error::FdtProblem::NoNode { .. } | kho::error::FdtProblem::NoProperty { .. },
            ..
        } => "NotFoundError",
        Error::NotRestorable { .. } => "NotRestorableError",
        Error::PageState { .. } | Error::Untaken { .. } => "PageStateError",
        Error::Owned { .. } => "OwnedPageError",
        Error::Freed { .. } => "FreedFolioError",
        Error::NoMemory { .. } | Error::TooLong { .. } => "OutOfMemoryError",
        Error::Stale { .. } => "StaleError",
        Error::Fdt { .. } | Error::Root { problem: kho::error::RootProblem::NotKho, .. } => "FdtError",
        Error::Root { .. } | Error::Map { .. } | Error::NoLayout { .. } => "FormatError",
        Error::UnsupportedAbi { .. } => "UnsupportedAbiError",
        Error::NoHandover { .. } => "NoHandoverError",
        Error::Io { source, .. } if matches!(source.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) => {
            "OutOfMemoryError"
        }
        Error::Source { problem: SourceProblem::Io(source), .. } | Error::Io { source, .. }
            if source.kind() == ErrorKind::PermissionDenied =>
        {
            "AccessError"
        }
        Error::Source { .. } | Error::Io { .. } | Error::Unsealed { .. } | Error::Cut { .. } => "SourceError",
        _ => "KhoError",
    };
    let message = error.to_string();
    let (kind, phys) = error.place();
    Python::attach(|py| {
        let class = py.import("kho.errors").and_then(|m| m.getattr(class)).and_then(|c| Ok(c.cast_into::<PyType>()?));
        match class {
            Ok(class) => {
                let raised = PyErr::from_type(class, message);
                let told = kind.map_or(Ok(()), |kind| raised.value(py).setattr("kind", kind));
                let told = told.and_then(|()| phys.map_or(Ok(()), |phys| raised.value(py).setattr("phys", phys)));
                told.err().unwrap_or(raised)
            }
            Err(import_failed) => import_failed,
        }
    })
}

/// Converts a `kho::Result` to a `PyResult`, for `?`.
pub(crate) trait OrRaise<T> {
    fn or_raise(self) -> PyResult<T>;
}

impl<T> OrRaise<T> for kho::Result<T> {
    fn or_raise(self) -> PyResult<T> {
        self.map_err(to_py)
    }
}
