//! CpuEncoder: all layers of an encoder.

use std::sync::Arc;

use octavo_cpu::encoder::{Encoder, Layer, LayerNorm};
use octavo_cpu::linear::Rounding;
use octavo_cpu::linear::int16::Words;
use octavo_cpu::projection::{Projection, Weight};
use pyo3::prelude::*;

use super::args::{Matrix, Vector};
use super::call::{activation_named, level, run};
use super::linear::CpuLinear;
use crate::error::value_error;

pub(super) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<CpuEncoder>()
}

/// A weight and its bias.
type DenseSpec = (Py<CpuLinear>, Option<Vector>);
/// A norm's weight and bias.
type NormSpec = (Vector, Option<Vector>);

/// One layer, by attribute.
#[derive(FromPyObject)]
struct LayerSpec {
    qkv: DenseSpec,
    o: DenseSpec,
    o_norm: NormSpec,
    up: DenseSpec,
    down: DenseSpec,
    mlp_norm: NormSpec,
}

/// # Safety
/// The bias exists.
unsafe fn dense(py: Python<'_>, spec: &DenseSpec, rounded: bool) -> PyResult<Projection> {
    // SAFETY: the caller's.
    let bias = spec.1.map(|b| unsafe { b.to_floats() }).transpose()?;
    let linear = Arc::clone(&spec.0.get().inner);
    let weight = if rounded {
        Weight::Rounded(py.detach(|| Words::new(&linear)))
    } else {
        Weight::Packed {
            linear,
            rounding: Rounding::Exact,
        }
    };
    Ok(Projection { weight, bias })
}

/// # Safety
/// The vectors exist.
unsafe fn layer_norm(spec: NormSpec) -> PyResult<LayerNorm> {
    // SAFETY: the caller's.
    unsafe {
        Ok(LayerNorm {
            weight: spec.0.to_floats()?,
            bias: spec.1.map(|b| b.to_floats()).transpose()?,
        })
    }
}

#[pyclass(frozen, module = "octavo._core")]
struct CpuEncoder {
    inner: Encoder,
    /// For the estimate of a call's time.
    ops_per_row: usize,
    nbytes: usize,
}

#[pymethods]
impl CpuEncoder {
    #[new]
    #[allow(clippy::too_many_arguments)] // the encoder's fields
    #[pyo3(signature = (layers, hidden_size, *, num_heads, eps, scale, kind, rounded))]
    fn new(
        py: Python<'_>,
        layers: Vec<LayerSpec>,
        hidden_size: usize,
        num_heads: usize,
        eps: f32,
        scale: f32,
        kind: &str,
        rounded: bool,
    ) -> PyResult<Self> {
        let layers = layers
            .iter()
            // SAFETY: `kernels/cpu/encoder.py` passes tensors that it holds.
            .map(|l| unsafe {
                Ok(Layer {
                    qkv: dense(py, &l.qkv, rounded)?,
                    o: dense(py, &l.o, rounded)?,
                    o_norm: layer_norm(l.o_norm)?,
                    up: dense(py, &l.up, rounded)?,
                    down: dense(py, &l.down, rounded)?,
                    mlp_norm: layer_norm(l.mlp_norm)?,
                })
            })
            .collect::<PyResult<Vec<_>>>()?;
        let inner = Encoder {
            level: level()?,
            layers,
            size: hidden_size,
            num_heads,
            eps,
            scale,
            activation: activation_named(kind)?,
        };
        inner.check().map_err(value_error)?;
        let sum = |of: fn(&Projection) -> usize| -> usize {
            let parts = |l: &Layer| [&l.qkv, &l.o, &l.up, &l.down].map(of);
            inner.layers.iter().flat_map(parts).sum()
        };
        Ok(Self {
            ops_per_row: sum(Projection::ops_per_row),
            nbytes: sum(Projection::nbytes),
            inner,
        })
    }

    /// Bytes of the weights.
    #[getter]
    fn nbytes(&self) -> usize {
        self.nbytes
    }

    fn forward(&self, py: Python<'_>, hidden: Matrix, starts: Vector) -> PyResult<()> {
        let tokens = hidden.rows();
        // SAFETY: `kernels/cpu/encoder.py` passes tensors that it holds, hidden its own.
        unsafe {
            let starts = starts.slice()?;
            let hidden = hidden.of_shape(tokens, self.inner.size)?;
            let hidden = hidden.flat()?.slice_mut::<f32>()?;
            run(py, self.ops_per_row * tokens, self.nbytes, || {
                self.inner.forward(hidden.as_mut_ptr(), tokens, starts)
            })
            .map_err(value_error)
        }
    }
}
