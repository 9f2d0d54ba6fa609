//! Decoder: all layers of a Llama-like model in one call, from embeddings to the final norm.
//!
//! The ops are the op set's own, in the order of `models/llama.py`; what is saved is the way from
//! op to op, which for a small model costs as much as its weights. Between two attentions nothing
//! mixes rows, so from one's output projection to the next one's queries a block of `ROW_BLOCK`
//! rows passes through every op while it is in the cache: memory for what is in between does not
//! grow with the prompt. Results are those of the single ops, bit for bit.

use std::sync::Arc;

use super::activation::{Activation, activation};
use super::attention::{AttentionArgs, paged_attention};
use super::float::DType;
use super::level::Level;
use super::linear::Linear;
use super::norm::{Norm, norm};
use super::rope::{Cache, RopeArgs, qk_norm_rope_store_kv};
use super::scratch::with_parts;
use super::tensor::{Rows, RowsMut};

/// Rows that pass through a layer together: enough for the matrix products, few enough that
/// 2 * intermediate_size floats of each stay near the core.
const ROW_BLOCK: usize = 128;
/// A last block of fewer rows joins the one before: its products would be slower, and rounded as
/// those of a few rows.
const MIN_LAST_BLOCK: usize = 32;

/// A projection and its bias.
pub struct Projection {
    /// [N, K]
    pub weight: Arc<Linear>,
    /// [N]
    pub bias: Option<Vec<f32>>,
    /// Quantized weights meet float activations.
    pub exact: bool,
}

impl Projection {
    /// # Safety
    /// As [`Linear::forward`].
    unsafe fn forward(&self, x: Rows, y: RowsMut) {
        // SAFETY: the caller's; the bias was checked to have N elements.
        unsafe {
            self.weight
                .forward(x, self.bias.as_deref().map(Rows::vector), y, self.exact);
        }
    }

    fn check(&self, name: &str, n: usize, k: usize) -> Result<(), String> {
        let (found_n, found_k) = (self.weight.n(), self.weight.k());
        if (found_n, found_k) != (n, k) || self.bias.as_ref().is_some_and(|b| b.len() != n) {
            return Err(format!("{name} is {found_n} x {found_k}, not {n} x {k}"));
        }
        Ok(())
    }
}

/// One layer.
pub struct Layer {
    /// [D]
    pub input_norm: Vec<f32>,
    /// [D]
    pub post_norm: Vec<f32>,
    /// [(Hq + 2 Hkv) Dh, D]
    pub qkv: Projection,
    /// [D, Hq Dh]
    pub o: Projection,
    /// [2 F, D]
    pub gate_up: Projection,
    /// [D, F]
    pub down: Projection,
    /// [Dh]
    pub q_norm: Option<Vec<f32>>,
    /// [Dh]
    pub k_norm: Option<Vec<f32>>,
    /// Keys.
    pub k_cache: Cache,
    /// Values.
    pub v_cache: Cache,
    /// 0: none.
    pub sliding_window: usize,
}

/// See the module doc.
pub struct Decoder {
    /// For everything but the projections, which have their own.
    pub level: Level,
    /// First to last.
    pub layers: Vec<Layer>,
    /// [D]
    pub final_norm: Vec<f32>,
    /// Hq
    pub num_heads: usize,
    /// Of all norms.
    pub eps: f32,
    /// Added to all norms' weights.
    pub weight_offset: f32,
    /// float32 [max_pos, rot]
    pub cos_sin: Rows,
    /// Of the attention scores.
    pub scale: f32,
    /// 0: none.
    pub softcap: f32,
    /// Of the gate.
    pub activation: Activation,
}

/// One step's tokens; see [`AttentionArgs`] and [`RopeArgs`].
#[derive(Clone, Copy)]
pub struct Step<'a> {
    /// [T]
    pub positions: &'a [i32],
    /// [T]
    pub slot_mapping: &'a [i32],
    /// [table_rows, max_blocks]
    pub block_table: &'a [i32],
    /// Columns of block_table.
    pub max_blocks: usize,
    /// [R]
    pub slots: &'a [i32],
    /// [R]
    pub seq_lens: &'a [i32],
    /// [R + 1]
    pub query_start_loc: &'a [i32],
}

/// Rows `start..start + rows` of contiguous floats.
///
/// # Safety
/// They exist.
unsafe fn part(base: *mut f32, start: usize, rows: usize, cols: usize) -> RowsMut {
    // SAFETY: the caller's.
    RowsMut::new(
        unsafe { base.add(start * cols) }.cast(),
        DType::F32,
        rows,
        cols,
    )
}

fn read(r: RowsMut) -> Rows {
    Rows::new(r.ptr, r.dtype, r.rows, r.cols)
}

/// Floats of a block of rows between two attentions.
struct Buffers {
    normed: *mut f32,
    qkv: *mut f32,
    gate_up: *mut f32,
    gated: *mut f32,
    delta: *mut f32,
    q: *mut f32,
    attended: *mut f32,
}

impl Decoder {
    /// # Errors
    /// When sizes do not fit each other.
    pub fn check(&self) -> Result<(), String> {
        let d = self.final_norm.len();
        if self.cos_sin.dtype != DType::F32 {
            return Err("cos_sin must be float32".to_owned());
        }
        for layer in &self.layers {
            let cache = &layer.k_cache;
            let (dim, kv_heads) = (cache.head_dim, cache.num_kv_heads);
            let v = &layer.v_cache;
            if (v.head_dim, v.num_kv_heads, v.block_size) != (dim, kv_heads, cache.block_size)
                || (v.num_blocks, v.block_stride) != (cache.num_blocks, cache.block_stride)
            {
                return Err("keys and values differ in shape".to_owned());
            }
            let q = self.num_heads * dim;
            layer.qkv.check("qkv", q + 2 * kv_heads * dim, d)?;
            layer.o.check("o", d, q)?;
            let f = layer.down.weight.k();
            layer.gate_up.check("gate_up", 2 * f, d)?;
            layer.down.check("down", d, f)?;
            let heads = [&layer.q_norm, &layer.k_norm];
            if layer.input_norm.len() != d
                || layer.post_norm.len() != d
                || heads
                    .iter()
                    .any(|n| n.as_ref().is_some_and(|n| n.len() != dim))
            {
                return Err("a norm's weight is of another size".to_owned());
            }
        }
        Ok(())
    }

    /// hidden [T, D], float32: the embeddings, overwritten; out [T, D]: after the final norm.
    ///
    /// # Errors
    /// When an index of the step is out of range.
    ///
    /// # Safety
    /// `check` found no fault; caches, cos_sin, hidden and out describe valid memory that does not
    /// overlap; nobody else uses the caches meanwhile.
    pub unsafe fn forward(
        &self,
        hidden: *mut f32,
        out: *mut f32,
        tokens: usize,
        step: Step,
    ) -> Result<(), String> {
        assert!(step.positions.len() == tokens && step.slot_mapping.len() == tokens);
        let d = self.final_norm.len();
        let most = |size: fn(&Layer) -> usize| self.layers.iter().map(size).max().unwrap_or(0);
        let (qkv, q) = (most(|l| l.qkv.weight.n()), most(|l| l.o.weight.k()));
        let f = most(|l| l.down.weight.k());
        let block = tokens.min(ROW_BLOCK + MIN_LAST_BLOCK - 1);
        let sizes = [
            block * d,
            block * qkv,
            block * 2 * f,
            block * f,
            block * d,
            tokens * q,
            tokens * q,
        ];
        with_parts(
            2,
            sizes,
            |[normed, qkv, gate_up, gated, delta, q, attended]| {
                let buffers = Buffers {
                    normed,
                    qkv,
                    gate_up,
                    gated,
                    delta,
                    q,
                    attended,
                };
                // SAFETY: the caller's, and the buffers are of the sizes that `run` asks for.
                unsafe { self.run(hidden, out, tokens, step, &buffers) }
            },
        )
    }

    /// # Safety
    /// As `forward`; the buffers hold a block's rows, `q` and `attended` all tokens'.
    unsafe fn run(
        &self,
        hidden: *mut f32,
        out: *mut f32,
        tokens: usize,
        step: Step,
        b: &Buffers,
    ) -> Result<(), String> {
        let d = self.final_norm.len();
        let num_blocks = (tokens + ROW_BLOCK - MIN_LAST_BLOCK) / ROW_BLOCK;
        let blocks = || {
            (0..num_blocks.max(1)).map(|i| {
                let start = i * ROW_BLOCK;
                let last = i + 1 >= num_blocks;
                (start, if last { tokens - start } else { ROW_BLOCK })
            })
        };
        // SAFETY: the caller's; parts are inside the buffers.
        unsafe {
            for (i, layer) in self.layers.iter().enumerate() {
                if i == 0 {
                    for (start, rows) in blocks() {
                        let normed = part(b.normed, 0, rows, d);
                        let x = read(part(hidden, start, rows, d));
                        self.norm(x, None, &layer.input_norm, normed);
                        self.queries(layer, start, read(normed), &step, b)?;
                    }
                }
                let q_cols = layer.o.weight.k();
                paged_attention(
                    self.level,
                    AttentionArgs {
                        q: read(part(b.q, 0, tokens, q_cols)),
                        k_cache: layer.k_cache,
                        v_cache: layer.v_cache,
                        block_table: step.block_table,
                        max_blocks: step.max_blocks,
                        slots: step.slots,
                        seq_lens: step.seq_lens,
                        query_start_loc: step.query_start_loc,
                        scale: self.scale,
                        sliding_window: layer.sliding_window,
                        softcap: self.softcap,
                        causal: true,
                        out: part(b.attended, 0, tokens, q_cols),
                    },
                )?;
                for (start, rows) in blocks() {
                    let residual = part(hidden, start, rows, d);
                    let (normed, delta) = (part(b.normed, 0, rows, d), part(b.delta, 0, rows, d));
                    let f = layer.down.weight.k();
                    let (gate_up, gated) =
                        (part(b.gate_up, 0, rows, 2 * f), part(b.gated, 0, rows, f));
                    layer
                        .o
                        .forward(read(part(b.attended, start, rows, q_cols)), delta);
                    self.norm(read(delta), Some(residual), &layer.post_norm, normed);
                    layer.gate_up.forward(read(normed), gate_up);
                    activation(self.level, self.activation, true, read(gate_up), gated);
                    layer.down.forward(read(gated), delta);
                    if let Some(next) = self.layers.get(i + 1) {
                        self.norm(read(delta), Some(residual), &next.input_norm, normed);
                        self.queries(next, start, read(normed), &step, b)?;
                    } else {
                        let out = part(out, start, rows, d);
                        self.norm(read(delta), Some(residual), &self.final_norm, out);
                    }
                }
            }
        }
        Ok(())
    }

    /// # Safety
    /// As [`norm`].
    unsafe fn norm(&self, x: Rows, residual: Option<RowsMut>, weight: &[f32], y: RowsMut) {
        let kind = Norm::Rms {
            weight_offset: self.weight_offset,
        };
        // SAFETY: the caller's.
        unsafe {
            norm(
                self.level,
                x,
                residual,
                Rows::vector(weight),
                kind,
                self.eps,
                y,
            )
        }
    }

    /// Queries of the rows from `start` on into the buffer, their keys and values into the cache.
    ///
    /// # Safety
    /// As `forward`.
    unsafe fn queries(
        &self,
        layer: &Layer,
        start: usize,
        x: Rows,
        step: &Step,
        b: &Buffers,
    ) -> Result<(), String> {
        let rows = start..start + x.rows;
        // SAFETY: the caller's.
        unsafe {
            let qkv = part(b.qkv, 0, x.rows, layer.qkv.weight.n());
            layer.qkv.forward(x, qkv);
            qk_norm_rope_store_kv(
                self.level,
                RopeArgs {
                    qkv: read(qkv),
                    positions: &step.positions[rows.clone()],
                    cos_sin: self.cos_sin,
                    slot_mapping: &step.slot_mapping[rows],
                    k_cache: layer.k_cache,
                    v_cache: layer.v_cache,
                    num_heads: self.num_heads,
                    q_norm: layer.q_norm.as_deref().map(Rows::vector),
                    k_norm: layer.k_norm.as_deref().map(Rows::vector),
                    eps: self.eps,
                    weight_offset: self.weight_offset,
                    interleaved: false,
                    q: part(b.q, start, x.rows, layer.o.weight.k()),
                },
            )
        }
    }
}
