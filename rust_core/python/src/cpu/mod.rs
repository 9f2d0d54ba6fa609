//! The binding of the CPU kernels, for `kernels/cpu`, which checks tensors and passes their places.

mod args;
mod call;
mod decoder;
mod encoder;
mod linear;
mod logits;
mod machine;
mod ops;
mod recurrent;

use pyo3::prelude::*;

pub(crate) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    machine::register(m)?;
    linear::register(m)?;
    ops::register(m)?;
    recurrent::register(m)?;
    logits::register(m)?;
    decoder::register(m)?;
    encoder::register(m)
}
