//! Encoder: all layers of a BERT-like model in one call, for whole texts without a KV cache.
//!
//! Texts do not look at one another, so neighbours are grouped to about `GROUP_ROWS` rows, and one
//! thread takes a group through all layers: what is between two ops stays in its caches, and
//! threads meet once a step. Where the groups are too few to share the work out evenly, all
//! threads take part in the ops of one group after another.
//!
//! Which of both it is, and what else is in a step, has no influence on a text's result.

use std::ops::Range;

use crate::activation::{Activation, activation};
use crate::encoder_attention::{Heads, attention};
use crate::float::DType;
use crate::level::Level;
use crate::linear::Linear;
use crate::linear::int16::{Rounded, Shared, Words};
use crate::norm::{Norm, norm};
use crate::pool;
use crate::scratch::with_parts;
use crate::tensor::{Rows, RowsMut};

use std::sync::Arc;

/// Rows of a group, unless a text has more, and of a block that passes through an MLP: enough for
/// the products to read weights from the third-level cache, few enough that
/// `intermediate_size` floats of each stay in the second.
const GROUP_ROWS: usize = 128;
/// How much longer than an even share a thread may work before all threads share every op: they
/// gain about so much less than their number.
const UNEVEN: f64 = 1.25;

/// A weight as given, or rounded to int16.
pub enum Weight {
    /// Exact.
    Plain(Arc<Linear>),
    /// See `linear::int16`.
    Rounded(Words),
}

/// A projection and its bias.
pub struct Projection {
    /// [N, K]
    pub weight: Weight,
    /// [N]
    pub bias: Option<Vec<f32>>,
}

impl Projection {
    fn shape(&self) -> (usize, usize) {
        match &self.weight {
            Weight::Plain(w) => (w.n(), w.k()),
            Weight::Rounded(w) => (w.n(), w.k()),
        }
    }

    /// Operations of one row.
    pub fn ops_per_row(&self) -> usize {
        let (n, k) = self.shape();
        2 * n * k
    }

    /// Bytes of the weight.
    pub fn nbytes(&self) -> usize {
        match &self.weight {
            Weight::Plain(w) => w.nbytes(),
            Weight::Rounded(w) => w.nbytes(),
        }
    }

    fn check(&self, name: &str, n: usize, k: usize) -> Result<(), String> {
        if self.shape() != (n, k) || self.bias.as_ref().is_some_and(|b| b.len() != n) {
            let (found_n, found_k) = self.shape();
            return Err(format!("{name} is {found_n} x {found_k}, not {n} x {k}"));
        }
        Ok(())
    }

    /// y [rows, N] = f(x [rows, K] W^T + bias).
    ///
    /// # Safety
    /// Both exist and do not overlap; `rounded` holds `Rounded::floats(rows, K)`.
    unsafe fn forward(
        &self,
        level: Level,
        x: *const f32,
        rows: usize,
        f: Option<Activation>,
        y: *mut f32,
        rounded: *mut f32,
    ) {
        let (n, k) = self.shape();
        // SAFETY: the caller's; `check` compared the bias.
        unsafe {
            match &self.weight {
                Weight::Rounded(w) => {
                    let x = Rounded::round(level, x, k, rows, k, rounded);
                    w.forward(x, self.bias.as_deref(), f, y, n);
                }
                Weight::Plain(w) => {
                    let x = Rows::new(x.cast(), DType::F32, rows, k);
                    let out = RowsMut::new(y.cast(), DType::F32, rows, n);
                    w.forward(x, self.bias.as_deref().map(Rows::vector), out, true);
                    if let Some(f) = f {
                        let y = Rows::new(out.ptr, DType::F32, rows, n);
                        activation(level, f, false, y, out);
                    }
                }
            }
        }
    }
}

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
    rounded: *mut f32,
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
            let (f, _) = layer.up.shape();
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
        let f = self
            .layers
            .iter()
            .map(|l| l.up.shape().0)
            .max()
            .unwrap_or(0);
        let sizes = [
            rows * 3 * d,
            rows * d,
            block * d,
            block * d,
            block * f,
            Rounded::floats(block, d).max(Rounded::floats(block, f)),
        ];
        with_parts(3, sizes, |[qkv, attended, mid, delta, act, rounded]| {
            let b = Buffers {
                qkv,
                attended,
                mid,
                delta,
                act,
                rounded,
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
                let (x, y) = (hidden.add(start * d), b.qkv.add(start * 3 * d));
                layer.qkv.forward(level, x, rows, None, y, b.rounded);
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
                let (hidden, attended) = (hidden.add(start * d), b.attended.add(start * d));
                layer
                    .o
                    .forward(level, attended, rows, None, b.delta, b.rounded);
                self.norm(&layer.o_norm, b.delta, hidden, b.mid, rows);
                let f = Some(self.activation);
                layer.up.forward(level, b.mid, rows, f, b.act, b.rounded);
                layer
                    .down
                    .forward(level, b.act, rows, None, b.delta, b.rounded);
                self.norm(&layer.mlp_norm, b.delta, b.mid, hidden, rows);
            }
        }
    }

    /// y = norm(x + residual); the residual is overwritten.
    ///
    /// # Safety
    /// All hold `rows` rows, and none overlaps another.
    unsafe fn norm(
        &self,
        weights: &LayerNorm,
        x: *const f32,
        residual: *mut f32,
        y: *mut f32,
        rows: usize,
    ) {
        let of = |p: *mut f32| RowsMut::new(p.cast(), DType::F32, rows, self.size);
        let kind = Norm::Layer {
            bias: weights.bias.as_deref().map(Rows::vector),
        };
        // SAFETY: the caller's.
        unsafe {
            norm(
                self.level,
                Rows::new(x.cast(), DType::F32, rows, self.size),
                Some(of(residual)),
                Rows::vector(&weights.weight),
                kind,
                self.eps,
                of(y),
            );
        }
    }
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

/// Whether threads that claim these groups one by one end at about the same time.
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
