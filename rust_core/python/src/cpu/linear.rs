//! CpuLinear: a packed weight.

use std::sync::Arc;

use octavo_cpu::level::Level;
use octavo_cpu::linear::{Linear, Packed, Rounding};
use pyo3::prelude::*;

use super::args::{Matrix, Vector};
use super::call::{level, run};
use crate::error::value_error;

pub(super) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<CpuLinear>()
}

#[pyclass(frozen, module = "octavo._core")]
pub(super) struct CpuLinear {
    pub(super) inner: Arc<Linear>,
}

/// Some rows of a weight: the file's bytes, number of rows, kind, and permutation of the rows.
type Part = (Vector, usize, String, Option<Vector>);

#[pymethods]
impl CpuLinear {
    #[new]
    #[pyo3(signature = (n, k, parts, level_name=None, columns=None))]
    fn new(
        py: Python<'_>,
        n: usize,
        k: usize,
        parts: Vec<Part>,
        level_name: Option<&str>,
        columns: Option<Vector>,
    ) -> PyResult<Self> {
        let level =
            level_name.map_or_else(level, |name| Level::parse(name).map_err(value_error))?;
        let kinds = parts
            .iter()
            .map(|(_, rows, kind, _)| match Packed::parse(kind) {
                Some(packed) => Ok((packed, *rows)),
                None => Err(value_error(format!("kind {kind:?}"))),
            })
            .collect::<PyResult<Vec<_>>>()?;
        // SAFETY: `kernels/cpu/linear.py` passes tensors that it holds, and nobody writes them.
        let sources = parts
            .iter()
            .map(|&(bytes, rows, _, permutation)| unsafe {
                let permutation = permutation.map(|p| p.of_len(rows)?.slice::<i64>());
                Ok((bytes.slice::<u8>()?, permutation.transpose()?))
            })
            .collect::<PyResult<Vec<_>>>()?;
        // SAFETY: as above.
        let columns = columns.map(|c| unsafe { c.of_len(k)?.slice::<i64>() });
        let columns = columns.transpose()?;
        let inner = py
            .detach(|| {
                let mut linear = Linear::new(level, k, &kinds)?;
                if let Some(order) = columns {
                    linear.set_columns(order)?;
                }
                if linear.n() != n {
                    return Err(format!("{} rows for a weight of {n}", linear.n()));
                }
                let mut first = 0;
                for (&(bytes, permutation), &(packed, rows)) in sources.iter().zip(&kinds) {
                    if rows.checked_mul(packed.file_row_bytes(k)) != Some(bytes.len()) {
                        let len = bytes.len();
                        return Err(format!("{len} bytes for {rows} rows of {packed:?}"));
                    }
                    // SAFETY: the slice has been checked to hold the rows.
                    unsafe { linear.pack_rows(first, rows, bytes.as_ptr(), packed, permutation)? };
                    first += rows;
                }
                Ok(linear)
            })
            .map_err(value_error)?;
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    #[getter]
    fn nbytes(&self) -> usize {
        self.inner.nbytes()
    }

    fn forward(
        &self,
        py: Python<'_>,
        x: Matrix,
        bias: Option<Vector>,
        activation_bits: u8,
        out: Matrix,
    ) -> PyResult<()> {
        let rounding = Rounding::of_bits(activation_bits).map_err(value_error)?;
        let w = &self.inner;
        let rows = x.rows();
        let x = x.of_shape(rows, w.k())?.read()?;
        let bias = bias.map(|b| b.of_len(w.n())?.row()).transpose()?;
        let y = out.of_shape(rows, w.n())?.write()?;
        let ops = 2 * rows.saturating_mul(w.n()).saturating_mul(w.k());
        // SAFETY: `kernels/cpu/linear.py` passes tensors that it holds, y a new one.
        run(py, ops, w.nbytes(), || unsafe {
            w.forward(x, bias, y, rounding)
        });
        Ok(())
    }

    fn embedding(&self, py: Python<'_>, ids: Vector, scale: f32, out: Matrix) -> PyResult<()> {
        let w = &self.inner;
        let y = out.of_shape(ids.len(), w.k())?.write()?;
        // SAFETY: `kernels/cpu/linear.py` passes tensors that it holds, y a new one.
        let ids = unsafe { ids.slice::<i32>() }?;
        run(py, 0, 64 * ids.len() * w.k(), || {
            // SAFETY: as above.
            unsafe { w.embedding(ids, scale, y) }
        })
        .map_err(value_error)
    }
}
