//! The machine: threads and instruction sets.

use octavo_cpu::level::Level;
use octavo_cpu::pool;
use pyo3::prelude::*;

use super::call::level;

pub(super) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(cpu_set_num_threads, m)?)?;
    m.add_function(wrap_pyfunction!(cpu_num_threads, m)?)?;
    m.add_function(wrap_pyfunction!(cpu_level, m)?)?;
    m.add_function(wrap_pyfunction!(cpu_rounds_fast, m)?)?;
    m.add_function(wrap_pyfunction!(cpu_levels, m)?)
}

#[pyfunction]
fn cpu_set_num_threads(py: Python<'_>, n: usize) {
    // Joins the old workers.
    py.detach(|| pool::set_num_threads(n));
}

#[pyfunction]
fn cpu_num_threads() -> usize {
    pool::num_threads()
}

#[pyfunction]
fn cpu_level() -> PyResult<&'static str> {
    Ok(level()?.name())
}

/// True where products of rounded factors are faster than exact ones.
#[pyfunction]
fn cpu_rounds_fast() -> PyResult<bool> {
    Ok(level()?.rounds_fast())
}

#[pyfunction]
fn cpu_levels() -> Vec<&'static str> {
    Level::available().into_iter().map(Level::name).collect()
}
