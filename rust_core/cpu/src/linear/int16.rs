//! Words: matrix products of float32 factors rounded to int16, twice as fast as float32's.
//!
//! Per `K_BLOCK` elements of K, each row of weights and each row of activations has a scale, its
//! largest magnitude over `LIMIT`; values are integers of 14 bits, so that the sum of `GROUP`
//! products is an exact int32. Those sums are added in float32. What is lost is the rounding of
//! the factors, at most 2^-14 of a block's largest value each: where the values of a block are of
//! ordinary spread, a third of what bfloat16 loses.
//!
//! Layouts: weights [panel][K rounded up to GROUP][2 LANES] int16, two k of a column side by side;
//! their scales [blocks of K][panel][2 LANES]; activations [M][stride], scales [M][blocks of K].

use std::ops::Range;

use crate::activation::Activation;
use crate::level::Level;
use crate::linear::Linear;
use crate::pool;
use crate::scratch::{AlignedBytes, with_floats};
use crate::simd::{Kernel, Simd};

/// Elements of K that share scales, and stay in a first-level cache of 48 KiB: 24 KiB of a panel
/// beside 9 KiB of a tile of activations.
const K_BLOCK: usize = 384;
/// Products in an integer sum.
const GROUP: usize = 32;
/// The largest rounded value: 32 * 8191^2 is below 2^31.
const LIMIT: f32 = 8191.0;
/// A tile's rows at most, and lanes of its two vectors.
const MAX_ROWS: usize = 12;
const MAX_WIDTH: usize = 32;

/// A weight [N, K]. See the module doc.
pub struct Words {
    level: Level,
    n: usize,
    k: usize,
    values: AlignedBytes,
    scales: AlignedBytes,
}

/// K as it is stored.
fn padded(k: usize) -> usize {
    k.next_multiple_of(GROUP)
}

/// The scale of values up to `most`, and its inverse; zeros where that would overflow.
#[inline(always)]
fn scale_of(most: f32) -> (f32, f32) {
    let scale = most / LIMIT;
    if scale > 1e-37 {
        (scale, 1.0 / scale)
    } else {
        (0.0, 0.0)
    }
}

impl Words {
    /// The same weight, rounded.
    pub fn new(linear: &Linear) -> Words {
        let (level, n, k) = (linear.level(), linear.n(), linear.k());
        let width = 2 * level.lanes();
        let (panels, k_padded) = (n.div_ceil(width), padded(k));
        let mut out = Words {
            level,
            n,
            k,
            values: AlignedBytes::zeroed(panels * width * k_padded * 2),
            scales: AlignedBytes::zeroed(panels * width * k.div_ceil(K_BLOCK) * 4),
        };
        let values = Shared(out.values.as_mut_ptr().cast::<i16>());
        let scales = Shared(out.scales.as_mut_ptr().cast::<f32>());
        pool::run(panels, |panel| {
            with_floats(1, k, |floats| {
                // SAFETY: the buffer holds K initialized floats.
                let row = unsafe { std::slice::from_raw_parts_mut(floats, k) };
                for column in 0..width.min(n - panel * width) {
                    linear.read_row(panel * width + column, 1.0, row);
                    for (b, block) in row.chunks(K_BLOCK).enumerate() {
                        let most = block.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                        let (scale, inverse) = scale_of(most);
                        // SAFETY: offsets are those of the layout; panels are disjoint memory.
                        unsafe {
                            *scales.at((b * panels + panel) * width + column) = scale;
                            for (i, &x) in block.iter().enumerate() {
                                let k = b * K_BLOCK + i;
                                let pair = panel * (k_padded / 2) + k / 2;
                                let to = values.at((pair * width + column) * 2 + k % 2);
                                *to = (x * inverse).round_ties_even() as i16;
                            }
                        }
                    }
                }
            });
        });
        out
    }

    /// Output features.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Input features.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Bytes it takes.
    pub fn nbytes(&self) -> usize {
        self.values.num_bytes() + self.scales.num_bytes()
    }

    /// y [M, N] = f(x W^T + bias), on the process's pool. y's rows are `y_stride` floats apart.
    ///
    /// # Safety
    /// `x` was rounded for K columns; y holds M rows; bias, if any, N floats.
    pub unsafe fn forward(
        &self,
        x: Rounded,
        bias: Option<&[f32]>,
        activation: Option<Activation>,
        y: *mut f32,
        y_stride: usize,
    ) {
        assert!(x.k == self.k && bias.is_none_or(|b| b.len() == self.n) && y_stride >= self.n);
        let panels = self.n.div_ceil(2 * self.level.lanes());
        let y = Shared(y);
        crate::linear::split(panels, x.rows, &|panels, rows| {
            // SAFETY: the caller's; tasks write disjoint parts of y.
            unsafe {
                self.level.run(WordsTask {
                    weight: self,
                    x,
                    bias,
                    activation,
                    y: y.at(0),
                    y_stride,
                    panels,
                    rows,
                });
            }
        });
    }
}

/// Memory of which every task writes a part of its own.
#[derive(Clone, Copy)]
pub(crate) struct Shared<T>(pub *mut T);

impl<T> Shared<T> {
    /// # Safety
    /// The element, or one past the last, exists.
    #[inline(always)]
    pub unsafe fn at(self, i: usize) -> *mut T {
        // SAFETY: the caller's.
        unsafe { self.0.add(i) }
    }
}

// SAFETY: it only names memory; whoever writes it vouches that no other task does.
unsafe impl<T> Sync for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Send for Shared<T> {}

/// Activations [M, K] rounded to int16.
#[derive(Clone, Copy)]
pub struct Rounded {
    values: *const i16,
    scales: *const f32,
    rows: usize,
    k: usize,
}

// SAFETY: written by `round` before anybody reads; the buffer outlives the region.
unsafe impl Sync for Rounded {}
// SAFETY: as above.
unsafe impl Send for Rounded {}

impl Rounded {
    /// int16 from row to row: one line more than K, so that rows of 4 KiB do not all compete for
    /// the same places of the cache.
    fn stride(k: usize) -> usize {
        padded(k) + 32
    }

    /// Floats of buffer that `round` needs.
    pub fn floats(rows: usize, k: usize) -> usize {
        (rows * (k.div_ceil(K_BLOCK) + Self::stride(k) / 2)).next_multiple_of(16)
    }

    /// Round x [rows, k], rows `stride` floats apart, into `buffer`.
    ///
    /// # Safety
    /// x exists; `buffer`, of whole cache lines, holds `floats(rows, k)`.
    pub unsafe fn round(
        level: Level,
        x: *const f32,
        stride: usize,
        rows: usize,
        k: usize,
        buffer: *mut f32,
    ) -> Rounded {
        let out = Rounded {
            values: buffer.cast(),
            // SAFETY: `floats` counts the values first.
            scales: unsafe { buffer.add(rows * (Self::stride(k) / 2)) },
            rows,
            k,
        };
        let x = Shared(x.cast_mut());
        let step = (16_384 / k.max(1)).max(1);
        pool::run(rows.div_ceil(step), |task| {
            let rows = task * step..((task + 1) * step).min(rows);
            // SAFETY: the caller's; tasks write disjoint rows.
            unsafe {
                level.run(RoundTask {
                    x: x.at(0),
                    stride,
                    out,
                    rows,
                });
            }
        });
        out
    }
}

struct RoundTask {
    x: *const f32,
    stride: usize,
    out: Rounded,
    rows: Range<usize>,
}

impl Kernel for RoundTask {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let k = self.out.k;
        let blocks = k.div_ceil(K_BLOCK);
        for row in self.rows {
            // SAFETY: `Rounded::round`'s contract; a row of values ends with a line of padding.
            unsafe {
                let x = self.x.add(row * self.stride);
                let values = self.out.values.cast_mut().add(row * Rounded::stride(k));
                for b in 0..blocks {
                    let (start, end) = (b * K_BLOCK, ((b + 1) * K_BLOCK).min(k));
                    // Where a value is not finite, neither is the scale, nor any result.
                    let (mut most, mut nothing) = (s.zero(), s.zero());
                    let mut i = start;
                    while i < end {
                        let v = s.load_first(x.add(i), end - i);
                        most = s.max(most, s.max(v, s.sub(s.zero(), v)));
                        nothing = s.fma(v, s.zero(), nothing);
                        i += S::LANES;
                    }
                    let (scale, inverse) = scale_of(s.hmax(most));
                    let scale = scale + s.sum(nothing);
                    *self.out.scales.cast_mut().add(row * blocks + b) = scale;
                    let inverse = s.splat(inverse);
                    let mut i = start;
                    while i < end {
                        let v = s.mul(s.load_first(x.add(i), end - i), inverse);
                        s.store_i16(values.add(i), s.round(v));
                        i += S::LANES;
                    }
                }
                for i in k.next_multiple_of(S::LANES)..padded(k) {
                    *values.add(i) = 0;
                }
            }
        }
    }
}

struct WordsTask<'a> {
    weight: &'a Words,
    x: Rounded,
    bias: Option<&'a [f32]>,
    activation: Option<Activation>,
    y: *mut f32,
    y_stride: usize,
    panels: Range<usize>,
    rows: Range<usize>,
}

impl Kernel for WordsTask<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        for panel in self.panels.clone() {
            for block in 0..self.x.k.div_ceil(K_BLOCK).max(1) {
                let mut row = self.rows.start;
                while row < self.rows.end {
                    // SAFETY: `Words::forward`'s contract; a tile takes at most what is left.
                    row += unsafe {
                        match self.rows.end - row {
                            12.. if S::ROWS >= 12 => self.tile::<S, 12>(s, panel, block, row),
                            6.. if S::ROWS >= 6 => self.tile::<S, 6>(s, panel, block, row),
                            4.. => self.tile::<S, 4>(s, panel, block, row),
                            3 => self.tile::<S, 3>(s, panel, block, row),
                            2 => self.tile::<S, 2>(s, panel, block, row),
                            _ => self.tile::<S, 1>(s, panel, block, row),
                        }
                    };
                }
            }
        }
    }
}

impl WordsTask<'_> {
    /// R rows of a panel and block of K, added to y; returns R.
    #[inline(always)]
    unsafe fn tile<S: Simd, const R: usize>(
        &self,
        s: S,
        panel: usize,
        block: usize,
        row: usize,
    ) -> usize {
        let (w, x) = (self.weight, &self.x);
        let width = 2 * S::LANES;
        let (k_padded, stride) = (padded(w.k), Rounded::stride(w.k));
        let start = block * K_BLOCK;
        let groups = (k_padded - start).min(K_BLOCK) / GROUP;
        let blocks = w.k.div_ceil(K_BLOCK);
        let mut sums = [0.0f32; MAX_ROWS * MAX_WIDTH];
        let sums = sums.as_mut_ptr();
        // SAFETY: `Words::forward`'s contract, and the layouts of the module doc.
        unsafe {
            let mut weights = w
                .values
                .as_ptr()
                .add((panel * k_padded + start) * width * 2);
            let mut values = x.values.add(row * stride + start);
            for _ in 0..groups {
                let mut acc = [[s.zero_words(); 2]; R];
                for _ in 0..GROUP / 2 {
                    let w0 = s.load_words(weights);
                    let w1 = s.load_words(weights.add(4 * S::LANES));
                    for (r, acc) in acc.iter_mut().enumerate() {
                        let pair = values.add(r * stride).cast::<i32>().read_unaligned();
                        acc[0] = s.dot_pairs(acc[0], w0, pair);
                        acc[1] = s.dot_pairs(acc[1], w1, pair);
                    }
                    weights = weights.add(8 * S::LANES);
                    values = values.add(2);
                }
                for (r, acc) in acc.into_iter().enumerate() {
                    for (half, acc) in acc.into_iter().enumerate() {
                        let sum = sums.add((2 * r + half) * S::LANES);
                        s.store(sum, s.add(s.load(sum), s.to_floats(acc)));
                    }
                }
            }
            let is_last = block + 1 >= blocks;
            let scales = w.scales.as_ptr().cast::<f32>();
            let panels = w.n.div_ceil(width);
            for half in 0..2 {
                let col = panel * width + half * S::LANES;
                let valid = w.n.saturating_sub(col);
                if valid == 0 {
                    break;
                }
                let zero = s.zero();
                let scale = if blocks == 0 {
                    zero
                } else {
                    s.load(scales.add((block * panels + panel) * width + half * S::LANES))
                };
                let bias = self
                    .bias
                    .map_or(zero, |b| s.load_first(b.as_ptr().add(col), valid));
                for r in 0..R {
                    let y = self.y.add((row + r) * self.y_stride + col);
                    let before = if block == 0 {
                        bias
                    } else {
                        s.load_first(y, valid)
                    };
                    let x_scale = if blocks == 0 {
                        zero
                    } else {
                        s.splat(*x.scales.add((row + r) * blocks + block))
                    };
                    let sum = s.load(sums.add((2 * r + half) * S::LANES));
                    let v = s.fma(sum, s.mul(scale, x_scale), before);
                    let v = match self.activation {
                        Some(f) if is_last => f.apply(s, v),
                        _ => v,
                    };
                    s.store_first(y, v, valid);
                }
            }
        }
        R
    }
}
