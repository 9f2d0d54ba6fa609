//! A kernel's call: its instruction set, and the GIL given up where it takes long.

use octavo_cpu::activation::Activation;
use octavo_cpu::level::Level;
use pyo3::prelude::*;

use crate::error::value_error;

/// Microseconds from which a call gives up the GIL. A shorter one would lose more by queueing for it
/// again.
const DETACH_US: usize = 200;
/// Operations, and bytes read, of two plain cores in a microsecond.
const OPS_PER_US: usize = 150_000;
const BYTES_PER_US: usize = 15_000;

/// The instruction set of new weights and calls.
pub(super) fn level() -> PyResult<Level> {
    Level::preferred().map_err(value_error)
}

/// The activation of this name.
pub(super) fn activation_named(name: &str) -> PyResult<Activation> {
    Activation::parse(name).ok_or_else(|| value_error(format!("unknown activation {name:?}")))
}

/// Run `f`, without the GIL if that many operations or bytes take long.
pub(super) fn run<T: Send>(
    py: Python<'_>,
    ops: usize,
    bytes: usize,
    f: impl Send + FnOnce() -> T,
) -> T {
    if ops / OPS_PER_US + bytes / BYTES_PER_US > DETACH_US {
        py.detach(f)
    } else {
        f()
    }
}
