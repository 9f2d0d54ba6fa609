//! argmax, log-probabilities and masks of logits.

use octavo_cpu::logits;
use pyo3::prelude::*;

use super::args::{Matrix, Vector};
use super::call::{level, run};
use crate::error::value_error;

pub(super) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(cpu_argmax, m)?)?;
    m.add_function(wrap_pyfunction!(cpu_mask_logits, m)?)?;
    m.add_function(wrap_pyfunction!(cpu_selected_logprobs, m)?)
}

#[pyfunction]
fn cpu_argmax(py: Python<'_>, x: Matrix, out: Vector) -> PyResult<()> {
    let level = level()?;
    let (rows, vocab) = (x.rows(), x.cols());
    // SAFETY: `kernels/cpu/logits.py` passes tensors that it holds, out a new one.
    let (x, out) = unsafe { (x.flat()?.slice()?, out.of_len(rows)?.slice_mut()?) };
    run(py, 0, 8 * x.len(), || logits::argmax(level, x, vocab, out));
    Ok(())
}

#[pyfunction]
fn cpu_mask_logits(
    py: Python<'_>,
    x: Matrix,
    rows: Vector,
    masks: Matrix,
    has_any: Vector,
) -> PyResult<()> {
    let (num_masks, vocab) = (rows.len(), x.cols());
    // SAFETY: `kernels/cpu/logits.py` passes tensors that it holds, x the caller's to change, has_any a
    // new one.
    let (x, rows, masks, has_any) = unsafe {
        (
            x.flat()?.slice_mut()?,
            rows.slice()?,
            masks
                .of_shape(num_masks, vocab.div_ceil(32))?
                .flat()?
                .slice()?,
            has_any.of_len(num_masks)?.slice_mut()?,
        )
    };
    run(py, 0, 4 * num_masks * vocab, || {
        logits::mask(x, vocab, rows, masks, has_any)
    })
    .map_err(value_error)
}

#[pyfunction]
fn cpu_selected_logprobs(
    py: Python<'_>,
    x: Matrix,
    ids: Matrix,
    out: Matrix,
    ranks: Vector,
) -> PyResult<()> {
    let level = level()?;
    let (rows, vocab, columns) = (x.rows(), x.cols(), ids.cols());
    // SAFETY: `kernels/cpu/logits.py` passes tensors that it holds, out and ranks new ones.
    let (x, ids, out, ranks) = unsafe {
        (
            x.flat()?.slice()?,
            ids.of_shape(rows, columns)?.flat()?.slice()?,
            out.of_shape(rows, columns)?.flat()?.slice_mut()?,
            ranks.of_len(rows)?.slice_mut()?,
        )
    };
    run(py, 30 * x.len(), 0, || {
        logits::selected_logprobs(level, x, vocab, ids, out, ranks)
    })
    .map_err(value_error)
}
