//! The module `octavo._core`: the binding of the core and the CPU kernels, and the only crate that
//! names pyo3. See `_core.pyi` for the contract.

mod channels;
mod cpu;
mod delivery;
mod engine;
mod error;
mod files;
mod matcher;
mod metrics;
mod text;
mod token_ids;

use pyo3::prelude::*;

/// The compiled half of octavo. See `_core.pyi` for the contract.
#[pymodule]
fn _core(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("__version__", env!("CARGO_PKG_VERSION"))?;
    engine::register(m)?;
    delivery::register(m)?;
    token_ids::register(m)?;
    text::register(m)?;
    channels::register(m)?;
    matcher::register(m)?;
    files::register(m)?;
    cpu::register(m)
}
