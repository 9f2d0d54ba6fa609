//! The binding of the CPU kernels: addresses and sizes from `kernels/cpu.py`, which took them from
//! tensors it validated. Sizes are checked against each other again here and in the kernels.
//!
//! A call that will take longer than about `DETACH_US` gives up the GIL meanwhile; a shorter one
//! would lose more by queueing for it again.

use std::sync::Arc;

use octavo_cpu::activation::{Activation, activation};
use octavo_cpu::attention::{AttentionArgs, paged_attention};
use octavo_cpu::decoder::{Decoder, Layer, Projection, Step};
use octavo_cpu::encoder::{self, Encoder};
use octavo_cpu::float::DType;
use octavo_cpu::level::Level;
use octavo_cpu::linear::int16::Words;
use octavo_cpu::linear::{Linear, Packed};
use octavo_cpu::norm::{Norm, norm};
use octavo_cpu::rope::{Cache, RopeArgs, qk_norm_rope_store_kv};
use octavo_cpu::tensor::{Rows, RowsMut, load_one};
use octavo_cpu::{logits, pool};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// Microseconds.
const DETACH_US: usize = 200;
/// What two plain cores do in a microsecond: operations, and bytes read.
const OPS_PER_US: usize = 150_000;
const BYTES_PER_US: usize = 15_000;

pub(crate) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<CpuLinear>()?;
    m.add_class::<CpuDecoder>()?;
    m.add_class::<CpuEncoder>()?;
    m.add_function(wrap_pyfunction!(cpu_norm, m)?)?;
    m.add_function(wrap_pyfunction!(cpu_activation, m)?)?;
    m.add_function(wrap_pyfunction!(cpu_rope, m)?)?;
    m.add_function(wrap_pyfunction!(cpu_attention, m)?)?;
    m.add_function(wrap_pyfunction!(cpu_argmax, m)?)?;
    m.add_function(wrap_pyfunction!(cpu_selected_logprobs, m)?)?;
    m.add_function(wrap_pyfunction!(cpu_set_num_threads, m)?)?;
    m.add_function(wrap_pyfunction!(cpu_num_threads, m)?)?;
    m.add_function(wrap_pyfunction!(cpu_level, m)?)?;
    m.add_function(wrap_pyfunction!(cpu_rounds_fast, m)?)?;
    m.add_function(wrap_pyfunction!(cpu_levels, m)?)
}

fn invalid(message: impl Into<String>) -> PyErr {
    PyValueError::new_err(message.into())
}

fn level() -> PyResult<Level> {
    Level::preferred().map_err(invalid)
}

fn dtype(code: u8) -> PyResult<DType> {
    DType::from_code(code).ok_or_else(|| invalid(format!("dtype code {code}")))
}

/// A matrix at an address that is null only if it is empty.
fn rows(ptr: usize, code: u8, rows: usize, cols: usize) -> PyResult<Rows> {
    if ptr == 0 && rows * cols > 0 {
        return Err(invalid("a tensor without memory"));
    }
    Ok(Rows::new(ptr as *const u8, dtype(code)?, rows, cols))
}

fn rows_mut(ptr: usize, code: u8, num_rows: usize, cols: usize) -> PyResult<RowsMut> {
    let r = rows(ptr, code, num_rows, cols)?;
    Ok(RowsMut::new(r.ptr.cast_mut(), r.dtype, r.rows, r.cols))
}

/// One row, or None where the address is 0.
fn optional_row(ptr: usize, code: u8, cols: usize) -> PyResult<Option<Rows>> {
    (ptr != 0).then(|| rows(ptr, code, 1, cols)).transpose()
}

/// A tensor's elements.
///
/// # Safety
/// `ptr` is the address of `len` elements that live and are not written while the slice is used.
unsafe fn slice<'a, T>(ptr: usize, len: usize) -> PyResult<&'a [T]> {
    if len == 0 {
        return Ok(&[]);
    }
    if ptr == 0 || !ptr.is_multiple_of(align_of::<T>()) {
        return Err(invalid(format!(
            "a tensor at the misaligned address {ptr:#x}"
        )));
    }
    // SAFETY: the caller's; aligned and not null.
    Ok(unsafe { std::slice::from_raw_parts(ptr as *const T, len) })
}

/// The same, to write.
///
/// # Safety
/// As `slice`, and nobody else uses the memory meanwhile.
unsafe fn slice_mut<'a, T>(ptr: usize, len: usize) -> PyResult<&'a mut [T]> {
    if len == 0 {
        return Ok(&mut []);
    }
    if ptr == 0 || !ptr.is_multiple_of(align_of::<T>()) {
        return Err(invalid(format!(
            "a tensor at the misaligned address {ptr:#x}"
        )));
    }
    // SAFETY: the caller's; aligned and not null.
    Ok(unsafe { std::slice::from_raw_parts_mut(ptr as *mut T, len) })
}

/// Run `f`, without the GIL if it will take long.
fn run<T: Send>(py: Python<'_>, ops: usize, bytes: usize, f: impl Send + FnOnce() -> T) -> T {
    if ops / OPS_PER_US + bytes / BYTES_PER_US > DETACH_US {
        py.detach(f)
    } else {
        f()
    }
}

#[pyclass(frozen, module = "octavo._core")]
pub(crate) struct CpuLinear {
    inner: Arc<Linear>,
}

#[pymethods]
impl CpuLinear {
    /// Parts: (address, bytes, rows, kind, address of an int64 permutation or 0).
    #[new]
    #[pyo3(signature = (n, k, parts, level_name=None))]
    fn new(
        py: Python<'_>,
        n: usize,
        k: usize,
        parts: Vec<(usize, usize, usize, String, usize)>,
        level_name: Option<&str>,
    ) -> PyResult<Self> {
        let level = level_name.map_or_else(level, |name| Level::parse(name).map_err(invalid))?;
        let kinds = parts
            .iter()
            .map(|p| match Packed::parse(&p.3) {
                Some(packed) => Ok((packed, p.2)),
                None => Err(invalid(format!("kind {:?}", p.3))),
            })
            .collect::<PyResult<Vec<_>>>()?;
        let inner = py
            .detach(|| {
                let mut linear = Linear::new(level, k, &kinds)?;
                if linear.n() != n {
                    return Err(format!("{} rows for a weight of {n}", linear.n()));
                }
                let mut first = 0;
                for (&(ptr, nbytes, rows, _, permutation), &(packed, _)) in parts.iter().zip(&kinds)
                {
                    if rows.checked_mul(packed.file_row_bytes(k)) != Some(nbytes) {
                        return Err(format!("{nbytes} bytes for {rows} rows of {packed:?}"));
                    }
                    // SAFETY: `kernels/cpu.py` gives the address of that many bytes, and of an
                    // int64 tensor of `rows` elements.
                    unsafe {
                        let permutation = match permutation {
                            0 => None,
                            p => Some(slice::<i64>(p, rows).map_err(|e| e.to_string())?),
                        };
                        linear.pack_rows(first, rows, ptr as *const u8, packed, permutation)?;
                    }
                    first += rows;
                }
                Ok(linear)
            })
            .map_err(invalid)?;
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    #[getter]
    fn nbytes(&self) -> usize {
        self.inner.nbytes()
    }

    #[allow(clippy::too_many_arguments)]
    fn forward(
        &self,
        py: Python<'_>,
        x: usize,
        x_code: u8,
        num_rows: usize,
        x_numel: usize,
        bias: usize,
        bias_code: u8,
        out: usize,
        out_code: u8,
        exact: bool,
    ) -> PyResult<()> {
        let w = &self.inner;
        if num_rows.checked_mul(w.k()) != Some(x_numel) {
            return Err(invalid(format!(
                "{x_numel} elements for {num_rows} x {}",
                w.k()
            )));
        }
        let x = rows(x, x_code, num_rows, w.k())?;
        let bias = optional_row(bias, bias_code, w.n())?;
        let y = rows_mut(out, out_code, num_rows, w.n())?;
        let ops = 2 * num_rows.saturating_mul(w.n()).saturating_mul(w.k());
        // SAFETY: `kernels/cpu.py` gives addresses of tensors of these shapes, y a new one.
        run(py, ops, w.nbytes(), || unsafe {
            w.forward(x, bias, y, exact)
        });
        Ok(())
    }

    fn embedding(
        &self,
        py: Python<'_>,
        ids: usize,
        tokens: usize,
        scale: f32,
        out: usize,
        out_code: u8,
    ) -> PyResult<()> {
        let w = &self.inner;
        // SAFETY: `kernels/cpu.py` gives an int32 tensor of `tokens`, and a new one for the rows.
        let ids = unsafe { slice::<i32>(ids, tokens) }?;
        let y = rows_mut(out, out_code, tokens, w.k())?;
        run(py, 0, 64 * tokens * w.k(), || {
            // SAFETY: as above.
            unsafe { w.embedding(ids, scale, y) }
        })
        .map_err(invalid)
    }
}

#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn cpu_norm(
    x: usize,
    x_code: u8,
    num_rows: usize,
    cols: usize,
    residual: usize,
    weight: usize,
    weight_code: u8,
    bias: usize,
    bias_code: u8,
    is_layer_norm: bool,
    eps: f32,
    weight_offset: f32,
    out: usize,
) -> PyResult<()> {
    let x = rows(x, x_code, num_rows, cols)?;
    let residual = (residual != 0)
        .then(|| rows_mut(residual, x_code, num_rows, cols))
        .transpose()?;
    let weight = rows(weight, weight_code, 1, cols)?;
    let kind = if is_layer_norm {
        let bias = optional_row(bias, bias_code, cols)?;
        Norm::Layer { bias }
    } else {
        Norm::Rms { weight_offset }
    };
    let y = rows_mut(out, x_code, num_rows, cols)?;
    // SAFETY: `kernels/cpu.py` gives addresses of tensors of these shapes.
    unsafe { norm(level()?, x, residual, weight, kind, eps, y) };
    Ok(())
}

#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn cpu_activation(
    py: Python<'_>,
    kind: &str,
    gated: bool,
    x: usize,
    code: u8,
    num_rows: usize,
    out_cols: usize,
    out: usize,
) -> PyResult<()> {
    let kind =
        Activation::parse(kind).ok_or_else(|| invalid(format!("unknown activation {kind:?}")))?;
    let level = level()?;
    let x = rows(x, code, num_rows, out_cols * (1 + usize::from(gated)))?;
    let y = rows_mut(out, code, num_rows, out_cols)?;
    // SAFETY: `kernels/cpu.py` gives addresses of tensors of these shapes, y a new one.
    run(py, 20 * num_rows * out_cols, 0, || unsafe {
        activation(level, kind, gated, x, y);
    });
    Ok(())
}

/// (address, blocks, heads, block_size, head_dim, elements from block to block)
type CacheShape = (usize, usize, usize, usize, usize);

fn cache(ptr: usize, code: u8, shape: CacheShape) -> PyResult<Cache> {
    let (num_blocks, num_kv_heads, block_size, head_dim, block_stride) = shape;
    let rows_of_block = num_kv_heads.saturating_mul(block_size);
    if block_size == 0 || (num_blocks > 1 && block_stride < rows_of_block * head_dim) {
        return Err(invalid("blocks of the KV cache overlap"));
    }
    Ok(Cache {
        data: rows_mut(ptr, code, num_blocks * rows_of_block, head_dim)?,
        num_blocks,
        num_kv_heads,
        block_size,
        head_dim,
        block_stride,
    })
}

#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn cpu_rope(
    py: Python<'_>,
    qkv: usize,
    code: u8,
    tokens: usize,
    positions: usize,
    cos_sin: usize,
    max_pos: usize,
    rot: usize,
    slot_mapping: usize,
    k_cache: usize,
    v_cache: usize,
    cache_code: u8,
    cache_shape: CacheShape,
    num_heads: usize,
    q_norm: usize,
    k_norm: usize,
    norm_code: u8,
    eps: f32,
    weight_offset: f32,
    interleaved: bool,
    q: usize,
) -> PyResult<()> {
    let k_cache = cache(k_cache, cache_code, cache_shape)?;
    let v_cache = cache(v_cache, cache_code, cache_shape)?;
    let dim = k_cache.head_dim;
    let cols = (num_heads + 2 * k_cache.num_kv_heads) * dim;
    let level = level()?;
    // SAFETY: `kernels/cpu.py` gives addresses of tensors of these shapes, q a new one.
    unsafe {
        let args = RopeArgs {
            qkv: rows(qkv, code, tokens, cols)?,
            positions: slice(positions, tokens)?,
            cos_sin: rows(cos_sin, 0, max_pos, rot)?,
            slot_mapping: slice(slot_mapping, tokens)?,
            k_cache,
            v_cache,
            num_heads,
            q_norm: optional_row(q_norm, norm_code, dim)?,
            k_norm: optional_row(k_norm, norm_code, dim)?,
            eps,
            weight_offset,
            interleaved,
            q: rows_mut(q, code, tokens, num_heads * dim)?,
        };
        run(py, 30 * tokens * cols, 0, || {
            qk_norm_rope_store_kv(level, args)
        })
        .map_err(invalid)
    }
}

#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn cpu_attention(
    py: Python<'_>,
    q: usize,
    code: u8,
    tokens: usize,
    num_heads: usize,
    k_cache: usize,
    v_cache: usize,
    cache_code: u8,
    cache_shape: CacheShape,
    block_table: usize,
    table_rows: usize,
    max_blocks: usize,
    slots: usize,
    seq_lens: usize,
    query_start_loc: usize,
    num_reqs: usize,
    scale: f32,
    sliding_window: usize,
    softcap: f32,
    causal: bool,
    max_seq_len: usize,
    out: usize,
) -> PyResult<()> {
    let k_cache = cache(k_cache, cache_code, cache_shape)?;
    let v_cache = cache(v_cache, cache_code, cache_shape)?;
    let cols = num_heads * k_cache.head_dim;
    let level = level()?;
    // SAFETY: `kernels/cpu.py` gives addresses of tensors of these shapes, out a new one.
    unsafe {
        let args = AttentionArgs {
            q: rows(q, code, tokens, cols)?,
            k_cache,
            v_cache,
            block_table: slice(block_table, table_rows * max_blocks)?,
            max_blocks,
            slots: slice(slots, num_reqs)?,
            seq_lens: slice(seq_lens, num_reqs)?,
            query_start_loc: slice(query_start_loc, num_reqs + 1)?,
            scale,
            sliding_window,
            softcap,
            causal,
            shares: &[],
            out: rows_mut(out, code, tokens, cols)?,
        };
        let ops = 8 * tokens * cols * max_seq_len;
        run(py, ops, 0, || paged_attention(level, args)).map_err(invalid)
    }
}

/// A weight, its bias (address and dtype code) or (0, 0), and whether it is exact.
type ProjectionSpec = (Py<CpuLinear>, (usize, u8), bool);

/// One layer, by attribute; vectors are (address, dtype code), (0, 0) for None.
#[derive(FromPyObject)]
struct LayerSpec {
    input_norm: (usize, u8),
    post_norm: (usize, u8),
    qkv: ProjectionSpec,
    o: ProjectionSpec,
    gate_up: ProjectionSpec,
    down: ProjectionSpec,
    q_norm: (usize, u8),
    k_norm: (usize, u8),
    k_cache: usize,
    v_cache: usize,
    sliding_window: usize,
}

/// A copy of a vector as float32; None of the address 0.
fn floats((ptr, code): (usize, u8), len: usize) -> PyResult<Option<Vec<f32>>> {
    let Some(r) = optional_row(ptr, code, len)? else {
        return Ok(None);
    };
    // SAFETY: `kernels/cpu_decoder.py` gives the address of `len` elements of this type.
    let read = |i| unsafe { load_one(r.at(0, i), r.dtype) };
    Ok(Some((0..len).map(read).collect()))
}

fn required(vector: (usize, u8), len: usize) -> PyResult<Vec<f32>> {
    floats(vector, len)?.ok_or_else(|| invalid("a norm without a weight"))
}

fn projection(spec: &ProjectionSpec) -> PyResult<Projection> {
    let weight = Arc::clone(&spec.0.get().inner);
    let bias = floats(spec.1, weight.n())?;
    Ok(Projection {
        weight,
        bias,
        exact: spec.2,
    })
}

#[pyclass(frozen, module = "octavo._core")]
pub(crate) struct CpuDecoder {
    inner: Decoder,
    /// Floats of a row, for the estimate of how long a call takes.
    ops_per_row: usize,
    nbytes: usize,
}

#[pymethods]
impl CpuDecoder {
    #[new]
    #[allow(clippy::too_many_arguments)]
    fn new(
        layers: Vec<LayerSpec>,
        hidden_size: usize,
        final_norm: (usize, u8),
        num_heads: usize,
        cache_code: u8,
        cache_shape: CacheShape,
        cos_sin: usize,
        max_pos: usize,
        rot: usize,
        eps: f32,
        weight_offset: f32,
        scale: f32,
        softcap: f32,
        kind: &str,
    ) -> PyResult<Self> {
        let dim = cache_shape.3;
        let layers = layers
            .iter()
            .map(|l| {
                Ok(Layer {
                    input_norm: required(l.input_norm, hidden_size)?,
                    post_norm: required(l.post_norm, hidden_size)?,
                    qkv: projection(&l.qkv)?,
                    o: projection(&l.o)?,
                    gate_up: projection(&l.gate_up)?,
                    down: projection(&l.down)?,
                    q_norm: floats(l.q_norm, dim)?,
                    k_norm: floats(l.k_norm, dim)?,
                    k_cache: cache(l.k_cache, cache_code, cache_shape)?,
                    v_cache: cache(l.v_cache, cache_code, cache_shape)?,
                    sliding_window: l.sliding_window,
                })
            })
            .collect::<PyResult<Vec<_>>>()?;
        let inner = Decoder {
            level: level()?,
            layers,
            final_norm: required(final_norm, hidden_size)?,
            num_heads,
            eps,
            weight_offset,
            cos_sin: rows(cos_sin, 0, max_pos, rot)?,
            scale,
            softcap,
            activation: Activation::parse(kind)
                .ok_or_else(|| invalid(format!("unknown activation {kind:?}")))?,
        };
        inner.check().map_err(invalid)?;
        let weights = |size: fn(&Linear) -> usize| -> usize {
            let of = |l: &Layer| [&l.qkv, &l.o, &l.gate_up, &l.down].map(|p| size(&p.weight));
            inner.layers.iter().flat_map(of).sum()
        };
        Ok(Self {
            ops_per_row: weights(|w| 2 * w.n() * w.k()),
            nbytes: weights(Linear::nbytes),
            inner,
        })
    }

    #[allow(clippy::too_many_arguments)]
    fn forward(
        &self,
        py: Python<'_>,
        hidden: usize,
        tokens: usize,
        positions: usize,
        slot_mapping: usize,
        block_table: usize,
        table_rows: usize,
        max_blocks: usize,
        slots: usize,
        seq_lens: usize,
        query_start_loc: usize,
        num_reqs: usize,
        ends_only: bool,
        out: usize,
    ) -> PyResult<()> {
        let size = tokens * self.inner.final_norm.len();
        // SAFETY: `kernels/cpu_decoder.py` gives addresses of tensors of these shapes, hidden and
        // out its own, and keeps those that the decoder was made with.
        unsafe {
            let step = Step {
                positions: slice(positions, tokens)?,
                slot_mapping: slice(slot_mapping, tokens)?,
                block_table: slice(block_table, table_rows * max_blocks)?,
                max_blocks,
                slots: slice(slots, num_reqs)?,
                seq_lens: slice(seq_lens, num_reqs)?,
                query_start_loc: slice(query_start_loc, num_reqs + 1)?,
                ends_only,
            };
            let hidden = slice_mut::<f32>(hidden, size)?;
            let out = slice_mut::<f32>(out, size)?;
            run(py, self.ops_per_row * tokens, self.nbytes, || {
                self.inner
                    .forward(hidden.as_mut_ptr(), out.as_mut_ptr(), tokens, step)
            })
            .map_err(invalid)
        }
    }
}

/// A weight, and its bias (address and dtype code) or (0, 0).
type DenseSpec = (Py<CpuLinear>, (usize, u8));
/// A norm's weight and bias, each as a vector's (address, dtype code).
type NormSpec = ((usize, u8), (usize, u8));

/// One layer, by attribute.
#[derive(FromPyObject)]
struct EncoderLayerSpec {
    qkv: DenseSpec,
    o: DenseSpec,
    o_norm: NormSpec,
    up: DenseSpec,
    down: DenseSpec,
    mlp_norm: NormSpec,
}

fn dense(py: Python<'_>, spec: &DenseSpec, rounded: bool) -> PyResult<encoder::Projection> {
    let linear = &spec.0.get().inner;
    let weight = if rounded {
        encoder::Weight::Rounded(py.detach(|| Words::new(linear)))
    } else {
        encoder::Weight::Plain(Arc::clone(linear))
    };
    Ok(encoder::Projection {
        weight,
        bias: floats(spec.1, linear.n())?,
    })
}

fn layer_norm(spec: NormSpec, size: usize) -> PyResult<encoder::LayerNorm> {
    Ok(encoder::LayerNorm {
        weight: required(spec.0, size)?,
        bias: floats(spec.1, size)?,
    })
}

#[pyclass(frozen, module = "octavo._core")]
pub(crate) struct CpuEncoder {
    inner: Encoder,
    /// For the estimate of how long a call takes.
    ops_per_row: usize,
    nbytes: usize,
}

#[pymethods]
impl CpuEncoder {
    #[new]
    #[allow(clippy::too_many_arguments)]
    fn new(
        py: Python<'_>,
        layers: Vec<EncoderLayerSpec>,
        hidden_size: usize,
        num_heads: usize,
        eps: f32,
        scale: f32,
        kind: &str,
        rounded: bool,
    ) -> PyResult<Self> {
        let layers = layers
            .iter()
            .map(|l| {
                Ok(encoder::Layer {
                    qkv: dense(py, &l.qkv, rounded)?,
                    o: dense(py, &l.o, rounded)?,
                    o_norm: layer_norm(l.o_norm, hidden_size)?,
                    up: dense(py, &l.up, rounded)?,
                    down: dense(py, &l.down, rounded)?,
                    mlp_norm: layer_norm(l.mlp_norm, hidden_size)?,
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
            activation: Activation::parse(kind)
                .ok_or_else(|| invalid(format!("unknown activation {kind:?}")))?,
        };
        inner.check().map_err(invalid)?;
        let sum = |of: fn(&encoder::Projection) -> usize| -> usize {
            let parts = |l: &encoder::Layer| [&l.qkv, &l.o, &l.up, &l.down].map(of);
            inner.layers.iter().flat_map(parts).sum()
        };
        Ok(Self {
            ops_per_row: sum(encoder::Projection::ops_per_row),
            nbytes: sum(encoder::Projection::nbytes),
            inner,
        })
    }

    /// Bytes of the weights.
    #[getter]
    fn nbytes(&self) -> usize {
        self.nbytes
    }

    fn forward(
        &self,
        py: Python<'_>,
        hidden: usize,
        tokens: usize,
        starts: usize,
        num_starts: usize,
    ) -> PyResult<()> {
        // SAFETY: `kernels/cpu_encoder.py` gives addresses of tensors of these shapes, hidden its
        // own.
        unsafe {
            let starts = slice(starts, num_starts)?;
            let hidden = slice_mut::<f32>(hidden, tokens * self.inner.size)?;
            run(py, self.ops_per_row * tokens, self.nbytes, || {
                self.inner.forward(hidden.as_mut_ptr(), tokens, starts)
            })
            .map_err(invalid)
        }
    }
}

#[pyfunction]
fn cpu_argmax(py: Python<'_>, x: usize, num_rows: usize, vocab: usize, out: usize) -> PyResult<()> {
    let level = level()?;
    // SAFETY: `kernels/cpu.py` gives float32 [num_rows, vocab] and a new int32 [num_rows].
    let (x, out) = unsafe {
        (
            slice::<f32>(x, num_rows * vocab)?,
            slice_mut::<i32>(out, num_rows)?,
        )
    };
    run(py, 0, 8 * num_rows * vocab, || {
        logits::argmax(level, x, vocab, out);
    });
    Ok(())
}

#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn cpu_selected_logprobs(
    py: Python<'_>,
    x: usize,
    num_rows: usize,
    vocab: usize,
    ids: usize,
    columns: usize,
    out: usize,
    ranks: usize,
) -> PyResult<()> {
    let level = level()?;
    // SAFETY: `kernels/cpu.py` gives float32 [num_rows, vocab], int32 [num_rows, columns], and new
    // float32 [num_rows, columns] and int32 [num_rows].
    let (x, ids, out, ranks) = unsafe {
        (
            slice::<f32>(x, num_rows * vocab)?,
            slice::<i32>(ids, num_rows * columns)?,
            slice_mut::<f32>(out, num_rows * columns)?,
            slice_mut::<i32>(ranks, num_rows)?,
        )
    };
    run(py, 30 * num_rows * vocab, 0, || {
        logits::selected_logprobs(level, x, vocab, ids, out, ranks)
    })
    .map_err(invalid)
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

/// Whether products of rounded factors are faster than exact ones here.
#[pyfunction]
fn cpu_rounds_fast() -> PyResult<bool> {
    Ok(level()?.rounds_fast())
}

#[pyfunction]
fn cpu_levels() -> Vec<&'static str> {
    Level::available().into_iter().map(Level::name).collect()
}
