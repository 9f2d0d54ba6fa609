//! CpuDecoder: all layers of a decoder.
//!
//! Arguments of one type are taken by name: no check could tell two swapped ones apart.

use std::sync::Arc;

use octavo_cpu::decoder::{Decoder, Layer, Step};
use octavo_cpu::linear::Rounding;
use octavo_cpu::projection::{Projection, Weight};
use pyo3::prelude::*;

use super::args::{KvCache, Matrix, Vector, scales_of};
use super::call::{activation_named, level, run};
use super::linear::CpuLinear;
use crate::error::value_error;

pub(super) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<CpuDecoder>()
}

/// A weight, its bias, and the bits of `Weight::Packed`'s rounding.
type ProjectionSpec = (Py<CpuLinear>, Option<Vector>, u8);

/// One layer, by attribute.
#[derive(FromPyObject)]
struct LayerSpec {
    input_norm: Vector,
    post_norm: Vector,
    qkv: ProjectionSpec,
    o: ProjectionSpec,
    gate_up: ProjectionSpec,
    down: ProjectionSpec,
    q_norm: Option<Vector>,
    k_norm: Option<Vector>,
    cache: KvCache,
    kv_scales: Option<Matrix>,
    sliding_window: usize,
}

/// # Safety
/// The bias exists.
unsafe fn projection(spec: &ProjectionSpec) -> PyResult<Projection> {
    // SAFETY: the caller's.
    let bias = spec.1.map(|b| unsafe { b.to_floats() }).transpose()?;
    let linear = Arc::clone(&spec.0.get().inner);
    let weight = Weight::Packed {
        linear,
        rounding: Rounding::of_bits(spec.2).map_err(value_error)?,
    };
    Ok(Projection { weight, bias })
}

impl LayerSpec {
    /// # Safety
    /// Its tensors exist, the caches as long as the layer does.
    unsafe fn layer(&self) -> PyResult<Layer> {
        let (k_cache, v_cache) = self.cache.caches()?;
        // SAFETY: the caller's.
        unsafe {
            let head = |norm: Option<Vector>| norm.map(|n| n.to_floats()).transpose();
            Ok(Layer {
                input_norm: self.input_norm.to_floats()?,
                post_norm: self.post_norm.to_floats()?,
                qkv: projection(&self.qkv)?,
                o: projection(&self.o)?,
                gate_up: projection(&self.gate_up)?,
                down: projection(&self.down)?,
                q_norm: head(self.q_norm)?,
                k_norm: head(self.k_norm)?,
                k_cache,
                v_cache,
                kv_scales: scales_of(self.kv_scales, k_cache.num_kv_heads)?.map(<[f32]>::to_vec),
                sliding_window: self.sliding_window,
            })
        }
    }
}

#[pyclass(frozen, module = "octavo._core")]
struct CpuDecoder {
    inner: Decoder,
    /// For the estimate of a call's time.
    ops_per_row: usize,
    nbytes: usize,
}

#[pymethods]
impl CpuDecoder {
    #[new]
    #[allow(clippy::too_many_arguments)] // the decoder's fields
    #[pyo3(signature = (layers, final_norm, *, num_heads, cos_sin, eps, weight_offset, scale, softcap, kind))]
    fn new(
        layers: Vec<LayerSpec>,
        final_norm: Vector,
        num_heads: usize,
        cos_sin: Matrix,
        eps: f32,
        weight_offset: f32,
        scale: f32,
        softcap: f32,
        kind: &str,
    ) -> PyResult<Self> {
        // SAFETY: `kernels/cpu/decoder.py` passes tensors that it holds as long as this.
        let (layers, final_norm) = unsafe {
            let layers = layers.iter().map(|layer| layer.layer());
            (
                layers.collect::<PyResult<Vec<_>>>()?,
                final_norm.to_floats()?,
            )
        };
        let inner = Decoder {
            level: level()?,
            layers,
            final_norm,
            num_heads,
            eps,
            weight_offset,
            cos_sin: cos_sin.read()?,
            scale,
            softcap,
            activation: activation_named(kind)?,
        };
        inner.check().map_err(value_error)?;
        let sum = |of: fn(&Projection) -> usize| -> usize {
            let parts = |l: &Layer| [&l.qkv, &l.o, &l.gate_up, &l.down].map(of);
            inner.layers.iter().flat_map(parts).sum()
        };
        Ok(Self {
            ops_per_row: sum(Projection::ops_per_row),
            nbytes: sum(Projection::nbytes),
            inner,
        })
    }

    #[allow(clippy::too_many_arguments)] // the step's fields
    #[pyo3(signature = (hidden, *, positions, slot_mapping, block_table, slots, seq_lens, query_start_loc, ends_only, out))]
    fn forward(
        &self,
        py: Python<'_>,
        hidden: Matrix,
        positions: Vector,
        slot_mapping: Vector,
        block_table: Matrix,
        slots: Vector,
        seq_lens: Vector,
        query_start_loc: Vector,
        ends_only: bool,
        out: Matrix,
    ) -> PyResult<()> {
        let (tokens, requests) = (hidden.rows(), slots.len());
        let size = self.inner.final_norm.len();
        // SAFETY: `kernels/cpu/decoder.py` passes tensors that it holds, hidden and out its own, and
        // keeps those that the decoder was made with.
        unsafe {
            let step = Step {
                positions: positions.of_len(tokens)?.slice()?,
                slot_mapping: slot_mapping.of_len(tokens)?.slice()?,
                block_table: block_table.flat()?.slice()?,
                max_blocks: block_table.cols(),
                slots: slots.slice()?,
                seq_lens: seq_lens.of_len(requests)?.slice()?,
                query_start_loc: query_start_loc.of_len(requests + 1)?.slice()?,
                ends_only,
            };
            let out = out.like(hidden)?.flat()?.slice_mut::<f32>()?;
            let hidden = hidden.of_shape(tokens, size)?.flat()?.slice_mut::<f32>()?;
            run(py, self.ops_per_row * tokens, self.nbytes, || {
                self.inner
                    .forward(hidden.as_mut_ptr(), out.as_mut_ptr(), tokens, step)
            })
            .map_err(value_error)
        }
    }
}
