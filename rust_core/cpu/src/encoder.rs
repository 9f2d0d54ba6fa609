//! Encoder: all layers of a BERT-like model in one call, for whole texts without a KV cache.
//!
//! Texts do not attend to one another, so neighbours are grouped to about `GROUP_ROWS` rows, and one
//! thread takes a group through all layers: what is between two ops stays in its caches, and
//! threads meet once a step. Where the groups are too few to share the work out evenly, all
//! threads take part in the ops of one group after another.
//!
//! A text's result depends on neither choice, nor on the other texts of a step.

use std::ops::Range;

use crate::activation::Activation;
use crate::encoder_attention::{Heads, attention};
use crate::float::DType;
use crate::level::Level;
use crate::norm::{Norm, norm};
use crate::pool;
use crate::projection::Projection;
use crate::scratch::with_parts;
use crate::tensor::{Rows, RowsMut, Shared};

/// Rows of a group, unless a text has more, and of a block that passes through an MLP: enough for
/// the products to read weights from the third-level cache, few enough that
/// `intermediate_size` floats of each stay in the second.
const GROUP_ROWS: usize = 128;
/// Ratio of the longest thread's work to an even share from which all threads share every op instead:
/// sharing costs about as much.
const UNEVEN: f64 = 1.25;

/// A norm's weight and bias, [D] each.
pub struct LayerNorm {
    /// Times this.
    pub weight: Vec<f32>,
    /// Plus this.
    pub bias: Option<Vec<f32>>,
}

/// One layer: norm(x + attention(x)), then norm(x + mlp(x)).
pub struct Layer {
    /// [3 D, D]
    pub qkv: Projection,
    /// [D, D]
    pub o: Projection,
    /// After attention.
    pub o_norm: LayerNorm,
    /// [F, D]
    pub up: Projection,
    /// [D, F]
    pub down: Projection,
    /// After the MLP.
    pub mlp_norm: LayerNorm,
}

/// See the module doc.
pub struct Encoder {
    /// For everything but the projections, which have their own.
    pub level: Level,
    /// First to last.
    pub layers: Vec<Layer>,
    /// D
    pub size: usize,
    /// H
    pub num_heads: usize,
    /// Of all norms.
    pub eps: f32,
    /// Of the attention scores.
    pub scale: f32,
    /// Of the MLP.
    pub activation: Activation,
}

/// Floats of one group between two ops.
struct Buffers {
    qkv: *mut f32,
    attended: *mut f32,
    mid: *mut f32,
    delta: *mut f32,
    act: *mut f32,
}

impl Encoder {
    /// # Errors
    /// When sizes do not fit each other.
    pub fn check(&self) -> Result<(), String> {
        let d = self.size;
        if self.num_heads == 0 || !d.is_multiple_of(self.num_heads) {
            return Err(format!("{d} is not {} heads", self.num_heads));
        }
        for layer in &self.layers {
            let f = layer.up.n();
            layer.qkv.check("qkv", 3 * d, d)?;
            layer.o.check("o", d, d)?;
            layer.up.check("up", f, d)?;
            layer.down.check("down", d, f)?;
            for norm in [&layer.o_norm, &layer.mlp_norm] {
                if norm.weight.len() != d || norm.bias.as_ref().is_some_and(|b| b.len() != d) {
                    return Err("a norm's weight is of another size".to_owned());
                }
            }
        }
        Ok(())
    }

    /// hidden [T, D], float32, of texts end to end: the normed embeddings, which become the last
    /// layer's states. Text i has the rows `starts[i]..starts[i + 1]`.
    ///
    /// # Errors
    /// When the texts are not all rows in their order.
    ///
    /// # Safety
    /// `check` found no fault; hidden holds `tokens` rows that nobody else uses.
    pub unsafe fn forward(
        &self,
        hidden: *mut f32,
        tokens: usize,
        starts: &[i32],
    ) -> Result<(), String> {
        let ascending = starts.windows(2).all(|pair| pair[0] <= pair[1]);
        let ends = (starts.first().copied(), starts.last().copied());
        if !ascending
            || ends.0 != Some(0)
            || ends.1.and_then(|t| usize::try_from(t).ok()) != Some(tokens)
        {
            return Err(format!("texts do not take the rows 0 to {tokens} in order"));
        }
        let starts: Vec<usize> = starts.iter().map(|&s| s as usize).collect();
        let threads = pool::free_threads();
        let groups = group(&starts, threads);
        let hidden = Shared(hidden);
        let run = |texts: &Range<usize>| {
            let first = starts[texts.start];
            let local: Vec<usize> = starts[texts.start..=texts.end]
                .iter()
                .map(|s| s - first)
                .collect();
            // SAFETY: the caller's; groups are disjoint rows.
            unsafe { self.encode(hidden.at(first * self.size), &local) };
        };
        if is_even(&groups, &starts, threads) {
            pool::run(groups.len(), |i| run(&groups[i]));
        } else {
            groups.iter().for_each(run);
        }
        Ok(())
    }

    /// One group through all layers.
    ///
    /// # Safety
    /// As `forward`, of the group's rows.
    unsafe fn encode(&self, hidden: *mut f32, starts: &[usize]) {
        let d = self.size;
        let rows = starts.last().copied().unwrap_or(0);
        let block = rows.min(2 * GROUP_ROWS - 1);
        let f = self.layers.iter().map(|l| l.up.n()).max().unwrap_or(0);
        let sizes = [rows * 3 * d, rows * d, block * d, block * d, block * f];
        with_parts(3, sizes, |[qkv, attended, mid, delta, act]| {
            let b = Buffers {
                qkv,
                attended,
                mid,
                delta,
                act,
            };
            for layer in &self.layers {
                // SAFETY: the caller's; the buffers hold the group's rows, or a block's.
                unsafe { self.layer(layer, hidden, starts, &b) };
            }
        });
    }

    /// # Safety
    /// As `encode`.
    unsafe fn layer(&self, layer: &Layer, hidden: *mut f32, starts: &[usize], b: &Buffers) {
        let (level, d) = (self.level, self.size);
        let rows = starts.last().copied().unwrap_or(0);
        let num_blocks = (rows / GROUP_ROWS).max(1);
        let blocks = (0..num_blocks).map(|i| {
            let start = i * GROUP_ROWS;
            let is_last = i + 1 == num_blocks;
            (start, if is_last { rows - start } else { GROUP_ROWS })
        });
        // SAFETY: the caller's.
        unsafe {
            for (start, rows) in blocks.clone() {
                let x = part(hidden.add(start * d), rows, d);
                let y = part(b.qkv.add(start * 3 * d), rows, 3 * d);
                layer.qkv.forward(x.read(), None, y);
            }
            let heads = Heads {
                qkv: b.qkv,
                num_heads: self.num_heads,
                head_dim: d / self.num_heads,
                scale: self.scale,
                out: b.attended,
            };
            attention(level, heads, starts);
            for (start, rows) in blocks {
                let hidden = part(hidden.add(start * d), rows, d);
                let attended = part(b.attended.add(start * d), rows, d);
                let (mid, delta) = (part(b.mid, rows, d), part(b.delta, rows, d));
                let act = part(b.act, rows, layer.up.n());
                layer.o.forward(attended.read(), None, delta);
                self.norm(&layer.o_norm, delta.read(), hidden, mid);
                layer.up.forward(mid.read(), Some(self.activation), act);
                layer.down.forward(act.read(), None, delta);
                self.norm(&layer.mlp_norm, delta.read(), mid, hidden);
            }
        }
    }

    /// y = norm(x + residual); the residual is overwritten.
    ///
    /// # Safety
    /// As [`norm`].
    unsafe fn norm(&self, weights: &LayerNorm, x: Rows, residual: RowsMut, y: RowsMut) {
        let bias = weights.bias.as_deref().map(Rows::vector);
        let weight = Rows::vector(&weights.weight);
        let kind = Norm::Layer { bias };
        // SAFETY: the caller's.
        unsafe { norm(self.level, x, Some(residual), weight, kind, self.eps, y) };
    }
}

/// Contiguous float32 rows.
fn part(base: *mut f32, rows: usize, cols: usize) -> RowsMut {
    RowsMut::new(base.cast(), DType::F32, rows, cols)
}

/// Neighbouring texts in groups of about equal size, a multiple of the threads where that leaves
/// enough for each.
fn group(starts: &[usize], threads: usize) -> Vec<Range<usize>> {
    let tokens = starts.last().copied().unwrap_or(0);
    let wanted = tokens.div_ceil(GROUP_ROWS * threads) * threads;
    let rows = tokens.div_ceil(wanted.max(1));
    let mut groups = Vec::new();
    let mut first = 0;
    for text in 0..starts.len().saturating_sub(1) {
        let is_last = text + 2 == starts.len();
        // With the next text the group would be further from its size than without.
        let next = starts.get(text + 2).copied().unwrap_or(tokens);
        if is_last || (next - starts[first]) + (starts[text + 1] - starts[first]) > 2 * rows {
            groups.push(first..text + 1);
            first = text + 1;
        }
    }
    groups
}

/// True where threads that claim these groups one by one end at about the same time.
fn is_even(groups: &[Range<usize>], starts: &[usize], threads: usize) -> bool {
    let tokens = starts.last().copied().unwrap_or(0);
    let mut busy = vec![0; threads.max(1)];
    for group in groups {
        if let Some(first_free) = busy.iter_mut().min() {
            *first_free += starts[group.end] - starts[group.start];
        }
    }
    let longest = busy.iter().copied().max().unwrap_or(0);
    (longest * threads) as f64 <= UNEVEN * tokens as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn starts(lengths: &[usize]) -> Vec<usize> {
        let mut out = vec![0];
        for &length in lengths {
            out.push(out[out.len() - 1] + length);
        }
        out
    }

    #[test]
    fn groups_are_all_texts_in_order_and_even_where_texts_are() {
        let some: [&[usize]; 6] = [&[], &[1], &[128; 16], &[10; 64], &[500, 1, 1], &[0, 0, 7]];
        for lengths in some {
            let starts = starts(lengths);
            for threads in 1..5 {
                let groups = group(&starts, threads);
                let texts: Vec<usize> = groups.iter().cloned().flatten().collect();
                assert_eq!(texts, (0..lengths.len()).collect::<Vec<_>>());
                assert!(groups.iter().all(|g| !g.is_empty()));
            }
        }
        for lengths in [&[128; 16][..], &[10; 64]] {
            let starts = starts(lengths);
            assert!(is_even(&group(&starts, 2), &starts, 2));
        }
        for lengths in [&[500, 1, 1][..], &[300]] {
            let starts = starts(lengths);
            assert!(!is_even(&group(&starts, 2), &starts, 2));
            assert!(is_even(&group(&starts, 1), &starts, 1));
        }
    }
}
