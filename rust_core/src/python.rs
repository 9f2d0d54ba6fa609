//! The binding: the only file that names pyo3.

use pyo3::prelude::*;

/// The compiled half of octavo. See `_core.pyi` for the contract.
#[pymodule]
fn _core(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("__version__", env!("CARGO_PKG_VERSION"))?;
    Ok(())
}
