//! Decoder: all layers of a Llama-like model in one call, from embeddings to the final norm.
//!
//! The ops are the op set's own, in the order of `models/llama.py`; what is saved is the way from
//! op to op, which for a small model costs as much as its weights. Between two attentions nothing
//! mixes rows, so from one's output projection to the next one's queries a block of rows passes
//! through every op while it is in the cache, and where there are rows enough each thread takes
//! blocks of its own: a layer then has two regions and not thirteen. Results are those of the
//! single ops.

mod blocks;
mod step;

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use crate::activation::{Activation, activation};
use crate::attention::{AttentionArgs, paged_attention, rounds_queries};
use crate::float::DType;
use crate::kv_cache::Cache;
use crate::level::Level;
use crate::norm::{Norm, norm};
use crate::pool;
use crate::projection::Projection;
use crate::rope::{RopeArgs, qk_norm_rope_store_kv};
use crate::scratch::with_parts;
use crate::tensor::{Rows, RowsMut};

use self::blocks::Blocks;
pub use self::step::Step;
use self::step::ends;

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
    /// [Hkv] each, of keys and of values: see `RopeArgs`.
    pub kv_scales: [Vec<f32>; 2],
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

/// Rows `start..start + rows` of contiguous floats.
///
/// # Safety
/// They exist.
unsafe fn part(base: *mut f32, start: usize, rows: usize, cols: usize) -> RowsMut {
    // SAFETY: the caller's.
    unsafe { part_of(base, DType::F32, start, rows, cols) }
}

/// Rows `start..start + rows` of contiguous elements.
///
/// # Safety
/// They exist.
unsafe fn part_of(base: *mut f32, dtype: DType, start: usize, rows: usize, cols: usize) -> RowsMut {
    // SAFETY: the caller's.
    let ptr = unsafe { base.cast::<u8>().add(start * cols * dtype.size()) };
    RowsMut::new(ptr, dtype, rows, cols)
}

/// All tokens' rows.
#[derive(Clone, Copy)]
struct States {
    hidden: *mut f32,
    out: *mut f32,
    /// Elements of `Decoder::query_dtype`.
    q: *mut f32,
    attended: *mut f32,
    /// Of the widest layer.
    qkv_cols: usize,
    gated_cols: usize,
}

// SAFETY: every thread touches rows of its own.
unsafe impl Sync for States {}

impl Decoder {
    /// # Errors
    /// When sizes do not fit each other.
    pub fn check(&self) -> Result<(), String> {
        let d = self.final_norm.len();
        if self.layers.is_empty() {
            return Err("there are no layers".to_owned());
        }
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
            let fits = |scales: &Vec<f32>| scales.is_empty() || scales.len() == kv_heads;
            if !layer.kv_scales.iter().all(fits) {
                return Err("scales of keys and values are not one a head".to_owned());
            }
            let q = self.num_heads * dim;
            layer.qkv.check("qkv", q + 2 * kv_heads * dim, d)?;
            layer.o.check("o", d, q)?;
            let f = layer.down.k();
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

    /// hidden [T, D], float32: the embeddings, overwritten; out [T, D]: after the final norm;
    /// rows other than `ends_only`'s are undefined.
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
        let q = self.most(|l| l.o.k());
        with_parts(2, [tokens * q, tokens * q], |[q, attended]| {
            let states = States {
                hidden,
                out,
                q,
                attended,
                qkv_cols: self.most(|l| l.qkv.n()),
                gated_cols: self.most(|l| l.down.k()),
            };
            let blocks = Blocks::new(self.level, tokens);
            let last = self.layers.len() - 1;
            let ends = if step.ends_only {
                ends(&step, tokens)?
            } else {
                Vec::new()
            };
            // SAFETY: the caller's, and the buffers hold all tokens' rows.
            unsafe {
                self.rows(0, &blocks, &step, states)?;
                for i in 0..last {
                    self.attend(i, &blocks, &step, states)?;
                    self.rows(i + 1, &blocks, &step, states)?;
                }
                if step.ends_only && ends.len() < tokens {
                    return self.finish(&ends, &step, states);
                }
                self.attend(last, &blocks, &step, states)?;
                self.rows(last + 1, &blocks, &step, states)
            }
        })
    }

    fn most(&self, size: fn(&Layer) -> usize) -> usize {
        self.layers.iter().map(size).max().unwrap_or(0)
    }

    /// Element type of queries: the cores pass them to each other, so half as many bytes are better
    /// where attention rounds them anyway.
    fn query_dtype(&self, layer: &Layer) -> DType {
        if rounds_queries(self.level, &layer.k_cache, &layer.v_cache) {
            DType::Bf16
        } else {
            DType::F32
        }
    }

    /// Layer i's attention.
    ///
    /// # Safety
    /// As `forward`; the states hold `tokens` rows.
    unsafe fn attend(
        &self,
        i: usize,
        blocks: &Blocks,
        step: &Step,
        states: States,
    ) -> Result<(), String> {
        let layer = &self.layers[i];
        let tokens = blocks.rows.last().map_or(0, |last| last.end);
        let cols = layer.o.k();
        // SAFETY: the caller's.
        unsafe {
            paged_attention(
                self.level,
                AttentionArgs {
                    q: part_of(states.q, self.query_dtype(layer), 0, tokens, cols).read(),
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
                    sinks: &[],
                    slopes: &[],
                    shares: &blocks.row_shares,
                    out: part(states.attended, 0, tokens, cols),
                },
            )
        }
    }

    /// All rows from layer `i - 1`'s attention, or the embeddings, to layer i's, or the end.
    ///
    /// # Safety
    /// As `attend`.
    unsafe fn rows(
        &self,
        i: usize,
        blocks: &Blocks,
        step: &Step,
        states: States,
    ) -> Result<(), String> {
        // SAFETY: the caller's; blocks are disjoint rows.
        let run = |rows: &Range<usize>| unsafe { self.between(i, rows.clone(), step, &states) };
        if blocks.shares.is_empty() {
            return blocks.rows.iter().try_for_each(run);
        }
        let failed = Mutex::new(None);
        pool::run_shares(&blocks.shares, |task| {
            if let Err(message) = run(&blocks.rows[task]) {
                *failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(message);
            }
        });
        match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(message) => Err(message),
            None => Ok(()),
        }
    }

    /// The last layer's attention and all after it, for rows `ends` alone: a request's last keys and
    /// values are in the cache by now, and its other rows have no reader.
    ///
    /// # Safety
    /// As `forward`; `ends` are ascending rows, one of each request that has any.
    unsafe fn finish(&self, ends: &[usize], step: &Step, states: States) -> Result<(), String> {
        let last = self.layers.len() - 1;
        let (d, q) = (self.final_norm.len(), self.layers[last].o.k());
        let has_rows = |r: &usize| step.query_start_loc[*r] < step.query_start_loc[r + 1];
        let requests: Vec<_> = (0..step.slots.len()).filter(has_rows).collect();
        let pick = |from: &[i32]| requests.iter().map(|&r| from[r]).collect::<Vec<_>>();
        let (slots, seq_lens) = (pick(step.slots), pick(step.seq_lens));
        let starts: Vec<_> = (0..=ends.len()).map(|r| r as i32).collect();
        let step = Step {
            slots: &slots,
            seq_lens: &seq_lens,
            query_start_loc: &starts,
            ..*step
        };
        // SAFETY: the caller's. Since ends[row] >= row, no move writes to what a later one reads.
        unsafe {
            let copy = |p: *mut f32, to: usize, from: usize, bytes: usize| {
                let p = p.cast::<u8>();
                std::ptr::copy(p.add(from * bytes), p.add(to * bytes), bytes);
            };
            let row_bytes = d * DType::F32.size();
            let query_bytes = q * self.query_dtype(&self.layers[last]).size();
            for (row, &end) in ends.iter().enumerate() {
                copy(states.hidden, row, end, row_bytes);
                copy(states.q, row, end, query_bytes);
            }
            let blocks = Blocks::new(self.level, ends.len());
            self.attend(last, &blocks, &step, states)?;
            self.rows(last + 1, &blocks, &step, states)?;
            for (row, &end) in ends.iter().enumerate().rev() {
                copy(states.out, end, row, row_bytes);
            }
        }
        Ok(())
    }

    /// `rows` of these rows.
    ///
    /// # Safety
    /// As `attend`; nobody else has these rows.
    unsafe fn between(
        &self,
        i: usize,
        rows: Range<usize>,
        step: &Step,
        states: &States,
    ) -> Result<(), String> {
        let d = self.final_norm.len();
        let (start, num_rows) = (rows.start, rows.len());
        let sizes = [
            num_rows * d,
            num_rows * states.qkv_cols,
            num_rows * 2 * states.gated_cols,
            num_rows * states.gated_cols,
            num_rows * d,
        ];
        with_parts(3, sizes, |[normed, qkv, gate_up, gated, delta]| {
            // SAFETY: the caller's; the buffers have these sizes.
            unsafe {
                let residual = part(states.hidden, start, num_rows, d);
                let (normed, delta) = (part(normed, 0, num_rows, d), part(delta, 0, num_rows, d));
                let mut x = residual.read();
                let mut added = None;
                if let Some(layer) = i.checked_sub(1).map(|i| &self.layers[i]) {
                    let (q_cols, f) = (layer.o.k(), layer.down.k());
                    let gate_up = part(gate_up, 0, num_rows, 2 * f);
                    let gated = part(gated, 0, num_rows, f);
                    let attended = part(states.attended, start, num_rows, q_cols);
                    layer.o.forward(attended.read(), None, delta);
                    self.norm(delta.read(), Some(residual), &layer.post_norm, normed);
                    layer.gate_up.forward(normed.read(), None, gate_up);
                    activation(self.level, self.activation, true, gate_up.read(), gated);
                    layer.down.forward(gated.read(), None, delta);
                    (x, added) = (delta.read(), Some(residual));
                }
                let Some(layer) = self.layers.get(i) else {
                    self.norm(
                        x,
                        added,
                        &self.final_norm,
                        part(states.out, start, num_rows, d),
                    );
                    return Ok(());
                };
                self.norm(x, added, &layer.input_norm, normed);
                let qkv = part(qkv, 0, num_rows, layer.qkv.n());
                layer.qkv.forward(normed.read(), None, qkv);
                let dtype = self.query_dtype(layer);
                let q = part_of(states.q, dtype, start, num_rows, layer.o.k());
                self.rotate(layer, rows, qkv.read(), q, step)
            }
        })
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

    /// Queries of these rows into `q`, their keys and values into the cache.
    ///
    /// # Safety
    /// As `forward`.
    unsafe fn rotate(
        &self,
        layer: &Layer,
        rows: Range<usize>,
        qkv: Rows,
        q: RowsMut,
        step: &Step,
    ) -> Result<(), String> {
        // SAFETY: the caller's.
        unsafe {
            qk_norm_rope_store_kv(
                self.level,
                RopeArgs {
                    qkv,
                    positions: &step.positions[rows.clone()],
                    cos_sin: self.cos_sin,
                    slot_mapping: &step.slot_mapping[rows],
                    k_cache: layer.k_cache,
                    v_cache: layer.v_cache,
                    kv_scales: [&layer.kv_scales[0], &layer.kv_scales[1]],
                    num_heads: self.num_heads,
                    q_norm: layer.q_norm.as_deref().map(Rows::vector),
                    k_norm: layer.k_norm.as_deref().map(Rows::vector),
                    eps: self.eps,
                    weight_offset: self.weight_offset,
                    interleaved: false,
                    q,
                },
            )
        }
    }
}
