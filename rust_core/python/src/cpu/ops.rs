//! Single ops of a layer: norms, activations, rope with the KV cache's update, attention.
//!
//! Arguments of one type are taken by name: no check could tell two swapped ones apart.

use octavo_cpu::activation::activation;
use octavo_cpu::attention::{AttentionArgs, paged_attention};
use octavo_cpu::norm::{Norm, norm};
use octavo_cpu::rope::{RopeArgs, qk_norm_rope_store_kv};
use pyo3::prelude::*;

use super::args::{KvCache, Matrix, Vector, scales_of};
use super::call::{activation_named, level, run};
use crate::error::value_error;

pub(super) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(cpu_rms_norm, m)?)?;
    m.add_function(wrap_pyfunction!(cpu_layer_norm, m)?)?;
    m.add_function(wrap_pyfunction!(cpu_activation, m)?)?;
    m.add_function(wrap_pyfunction!(cpu_rope, m)?)?;
    m.add_function(wrap_pyfunction!(cpu_attention, m)?)
}

#[pyfunction]
#[pyo3(signature = (x, residual, weight, *, eps, weight_offset, out))]
fn cpu_rms_norm(
    x: Matrix,
    residual: Option<Matrix>,
    weight: Vector,
    eps: f32,
    weight_offset: f32,
    out: Matrix,
) -> PyResult<()> {
    run_norm(x, residual, weight, Norm::Rms { weight_offset }, eps, out)
}

#[pyfunction]
fn cpu_layer_norm(
    x: Matrix,
    residual: Option<Matrix>,
    weight: Vector,
    bias: Option<Vector>,
    eps: f32,
    out: Matrix,
) -> PyResult<()> {
    let bias = bias.map(|b| b.of_len(x.cols())?.row()).transpose()?;
    run_norm(x, residual, weight, Norm::Layer { bias }, eps, out)
}

fn run_norm(
    x: Matrix,
    residual: Option<Matrix>,
    weight: Vector,
    kind: Norm,
    eps: f32,
    out: Matrix,
) -> PyResult<()> {
    let residual = residual.map(|r| r.like(x)?.write()).transpose()?;
    let y = out.like(x)?.write()?;
    let weight = weight.of_len(x.cols())?.row()?;
    let (x, level) = (x.read()?, level()?);
    // SAFETY: `kernels/cpu/elementwise.py` passes tensors that it holds, y a new one.
    unsafe { norm(level, x, residual, weight, kind, eps, y) };
    Ok(())
}

#[pyfunction]
fn cpu_activation(py: Python<'_>, kind: &str, gated: bool, x: Matrix, out: Matrix) -> PyResult<()> {
    let (kind, level) = (activation_named(kind)?, level()?);
    let (rows, cols) = (out.rows(), out.cols());
    let y = out.write()?;
    let x = x.of_shape(rows, cols * (1 + usize::from(gated)))?.read()?;
    // SAFETY: `kernels/cpu/elementwise.py` passes tensors that it holds, y a new one.
    run(py, 20 * rows * cols, 0, || unsafe {
        activation(level, kind, gated, x, y);
    });
    Ok(())
}

#[pyfunction]
#[allow(clippy::too_many_arguments)] // the op's own
#[pyo3(signature = (qkv, cache, *, positions, cos_sin, slot_mapping, kv_scales, num_heads, q_norm, k_norm, eps, weight_offset, interleaved, q))]
fn cpu_rope(
    py: Python<'_>,
    qkv: Matrix,
    cache: KvCache,
    positions: Vector,
    cos_sin: Matrix,
    slot_mapping: Vector,
    kv_scales: Option<Matrix>,
    num_heads: usize,
    q_norm: Option<Vector>,
    k_norm: Option<Vector>,
    eps: f32,
    weight_offset: f32,
    interleaved: bool,
    q: Matrix,
) -> PyResult<()> {
    let (k_cache, v_cache) = cache.caches()?;
    let (tokens, dim) = (qkv.rows(), k_cache.head_dim);
    let cols = (num_heads + 2 * k_cache.num_kv_heads) * dim;
    let head = |norm: Option<Vector>| norm.map(|n| n.of_len(dim)?.row()).transpose();
    let level = level()?;
    // SAFETY: `kernels/cpu/attention.py` passes tensors that it holds, q a new one.
    unsafe {
        cos_sin.flat()?.slice::<f32>()?;
        let args = RopeArgs {
            qkv: qkv.of_shape(tokens, cols)?.read()?,
            positions: positions.of_len(tokens)?.slice()?,
            cos_sin: cos_sin.read()?,
            slot_mapping: slot_mapping.of_len(tokens)?.slice()?,
            k_cache,
            v_cache,
            kv_scales: scales_of(kv_scales, k_cache.num_kv_heads)?,
            num_heads,
            q_norm: head(q_norm)?,
            k_norm: head(k_norm)?,
            eps,
            weight_offset,
            interleaved,
            q: q.of_shape(tokens, num_heads * dim)?.write()?,
        };
        run(py, 30 * tokens * cols, 0, || {
            qk_norm_rope_store_kv(level, args)
        })
        .map_err(value_error)
    }
}

#[pyfunction]
#[allow(clippy::too_many_arguments)] // the op's own
#[pyo3(signature = (q, cache, *, block_table, slots, seq_lens, query_start_loc, scale, sliding_window, softcap, causal, sinks, slopes, max_seq_len, out))]
fn cpu_attention(
    py: Python<'_>,
    q: Matrix,
    cache: KvCache,
    block_table: Matrix,
    slots: Vector,
    seq_lens: Vector,
    query_start_loc: Vector,
    scale: f32,
    sliding_window: usize,
    softcap: f32,
    causal: bool,
    sinks: Option<Vector>,
    slopes: Option<Vector>,
    max_seq_len: usize,
    out: Matrix,
) -> PyResult<()> {
    let (k_cache, v_cache) = cache.caches()?;
    let requests = slots.len();
    let ops = 8 * q.rows() * q.cols() * max_seq_len;
    let level = level()?;
    // SAFETY: `kernels/cpu/attention.py` passes tensors that it holds, out a new one.
    unsafe {
        let args = AttentionArgs {
            q: q.read()?,
            k_cache,
            v_cache,
            block_table: block_table.flat()?.slice()?,
            max_blocks: block_table.cols(),
            slots: slots.slice()?,
            seq_lens: seq_lens.of_len(requests)?.slice()?,
            query_start_loc: query_start_loc.of_len(requests + 1)?.slice()?,
            scale,
            sliding_window,
            softcap,
            causal,
            sinks: sinks.map_or(Ok(&[][..]), |v| v.slice())?,
            slopes: slopes.map_or(Ok(&[][..]), |v| v.slice())?,
            shares: &[],
            out: out.like(q)?.write()?,
        };
        run(py, ops, 0, || paged_attention(level, args)).map_err(value_error)
    }
}
