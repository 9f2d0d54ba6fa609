//! `json_size`. See `_core.pyi`.

use pyo3::prelude::*;

use crate::json_size::json_size as count;

pub(super) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(json_size, m)?)
}

#[pyfunction]
#[pyo3(text_signature = "(text)")]
fn json_size(py: Python<'_>, text: &[u8]) -> (usize, usize) {
    let size = py.detach(|| count(text));
    (size.num_nodes, size.num_commas)
}
