//! Attention of whole texts over one another's tokens, both directions, without a KV cache.
//!
//! An item is one text and one head. Its keys and values are packed once into the panels of
//! `linear::float`, whose tiles do both products; a tile of queries meets all keys at once, so that
//! the softmax needs one pass and no running state.

use crate::level::Level;
use crate::linear::float::panel_product_f32;
use crate::pool;
use crate::scratch::with_floats;
use crate::simd::{Kernel, Simd};
use crate::tensor::Shared;

/// Queries that meet the keys together: a tile's rows at the widest level.
const TILE_ROWS: usize = 12;
/// Lanes of a panel at the widest level.
const MAX_WIDTH: usize = 32;

/// The queries, keys and values of some texts.
#[derive(Clone, Copy)]
pub(crate) struct Heads {
    /// float32 [T, 3 H Dh]: queries, keys, values.
    pub qkv: *const f32,
    /// H
    pub num_heads: usize,
    /// Dh
    pub head_dim: usize,
    /// Of the scores.
    pub scale: f32,
    /// float32 [T, H Dh]
    pub out: *mut f32,
}

// SAFETY: it only names memory; items write disjoint parts of `out`.
unsafe impl Sync for Heads {}

/// Attention of every text, of rows `starts[i]..starts[i + 1]`, on the process's pool.
///
/// # Safety
/// The memory of these rows exists, and `out` does not overlap `qkv`.
pub(crate) unsafe fn attention(level: Level, heads: Heads, starts: &[usize]) {
    let texts = starts.len().saturating_sub(1);
    pool::run(texts * heads.num_heads, |i| {
        let (text, head) = (i / heads.num_heads, i % heads.num_heads);
        let (first, rows) = (starts[text], starts[text + 1] - starts[text]);
        with_floats(1, scratch_floats(rows, heads.head_dim), |scratch| {
            // SAFETY: the caller's; the scratch is of the size that the item asks for.
            unsafe {
                level.run(Item {
                    heads,
                    head,
                    first,
                    rows,
                    scratch: Shared(scratch),
                });
            }
        });
    });
}

/// Keys, values, a tile's queries, probabilities and sums, at any level's widths.
fn scratch_floats(rows: usize, dim: usize) -> usize {
    let (rows, dim) = (
        rows.next_multiple_of(MAX_WIDTH),
        dim.next_multiple_of(MAX_WIDTH),
    );
    2 * rows * dim + TILE_ROWS * (dim + rows + MAX_WIDTH)
}

struct Item {
    heads: Heads,
    head: usize,
    first: usize,
    rows: usize,
    scratch: Shared<f32>,
}

impl Kernel for Item {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let width = 2 * S::LANES;
        let (dim, rows) = (self.heads.head_dim, self.rows);
        let (even_dim, even_rows) = (dim.next_multiple_of(2), rows.next_multiple_of(2));
        let (whole_dim, whole_rows) = (dim.next_multiple_of(width), rows.next_multiple_of(width));
        let stride = 3 * self.heads.num_heads * dim;
        // SAFETY: `attention`'s contract and `scratch_floats`.
        unsafe {
            let q = self.heads.qkv.add(self.first * stride + self.head * dim);
            let (k, v) = (q.add(stride / 3), q.add(2 * (stride / 3)));
            let out_stride = stride / 3;
            let out = self
                .heads
                .out
                .add(self.first * out_stride + self.head * dim);
            // [key panel][even_dim][width], [dim panel][even_rows][width]
            let keys = self.scratch.at(0);
            let values = keys.add(whole_rows * even_dim);
            let queries = values.add(whole_dim * even_rows);
            let probs = queries.add(TILE_ROWS * even_dim);
            let sums = probs.add(TILE_ROWS * whole_rows);

            for j in 0..whole_rows {
                let to = keys.add(j / width * even_dim * width + j % width);
                for i in 0..even_dim {
                    let is_inside = j < rows && i < dim;
                    *to.add(i * width) = if is_inside {
                        *k.add(j * stride + i)
                    } else {
                        0.0
                    };
                }
            }
            for j in 0..even_rows {
                let mut i = 0;
                while i < whole_dim {
                    let row = if j < rows && i < dim {
                        s.load_first(v.add(j * stride + i), dim - i)
                    } else {
                        s.zero()
                    };
                    s.store(
                        values.add((i / width * even_rows + j) * width + i % width),
                        row,
                    );
                    i += S::LANES;
                }
            }
            let scale = self.heads.scale;
            let mut first = 0;
            while first < rows {
                let tile = (rows - first).min(TILE_ROWS);
                for r in 0..tile {
                    for i in 0..even_dim {
                        let q = q.add((first + r) * stride + i);
                        *queries.add(r * even_dim + i) = if i < dim { *q * scale } else { 0.0 };
                    }
                }
                for p in 0..whole_rows / width {
                    let panel = keys.add(p * even_dim * width);
                    panel_product_f32(s, queries, even_dim, tile, panel, even_dim / 2, sums);
                    for i in 0..2 * tile {
                        let (r, half) = (i / 2, i % 2);
                        let to = probs.add(r * whole_rows + p * width + half * S::LANES);
                        s.store(to, s.load(sums.add(i * S::LANES)));
                    }
                }
                let mut totals = [0.0; TILE_ROWS];
                for (r, total) in totals.iter_mut().enumerate().take(tile) {
                    *total = softmax(s, probs.add(r * whole_rows), rows, whole_rows);
                }
                for p in 0..whole_dim / width {
                    let panel = values.add(p * even_rows * width);
                    panel_product_f32(s, probs, whole_rows, tile, panel, even_rows / 2, sums);
                    for i in 0..2 * tile {
                        let (r, col) = (i / 2, p * width + i % 2 * S::LANES);
                        if col < dim {
                            let y = s.load(sums.add(i * S::LANES));
                            let y = s.mul(y, s.splat(1.0 / totals[r]));
                            let to = out.add((first + r) * out_stride + col);
                            s.store_first(to, y, dim - col);
                        }
                    }
                }
                first += tile;
            }
        }
    }
}

/// e to the scores less the largest of the first `len`; zero after them; returns the sum.
#[inline(always)]
unsafe fn softmax<S: Simd>(s: S, scores: *mut f32, len: usize, whole: usize) -> f32 {
    // SAFETY: the caller's: `whole` scores, a multiple of the lanes.
    unsafe {
        for i in len..whole {
            *scores.add(i) = f32::NEG_INFINITY;
        }
        let mut most = s.load(scores);
        let mut i = S::LANES;
        while i < whole {
            most = s.max(most, s.load(scores.add(i)));
            i += S::LANES;
        }
        let center = s.splat(s.hmax(most));
        let mut sum = s.zero();
        let mut i = 0;
        while i < whole {
            let p = s.exp(s.sub(s.load(scores.add(i)), center));
            s.store(scores.add(i), p);
            sum = s.add(sum, p);
            i += S::LANES;
        }
        s.sum(sum)
    }
}
