//! Errors of the core as Python exceptions.

use std::fmt::Display;

use octavo_core::error::Error;
use pyo3::PyErr;
use pyo3::exceptions::{PyRuntimeError, PyValueError};

/// The exception for an error of the engine: by whose fault it is.
pub(crate) fn engine_error(error: Error) -> PyErr {
    let message = error.to_string();
    match error {
        Error::InvalidArgument(_) => PyValueError::new_err(message),
        Error::Integrity(_) | Error::Panic(_) => PyRuntimeError::new_err(message),
    }
}

/// A ValueError, for an error that only a wrong text or file can cause.
pub(crate) fn value_error(error: impl Display) -> PyErr {
    PyValueError::new_err(error.to_string())
}
