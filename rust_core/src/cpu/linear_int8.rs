//! Int8Task: quantized weights times activations rounded to int8, in integer arithmetic.
//!
//! Activations get one scale per row and group of 32, the largest magnitude over 127, so that each
//! group's dot product is an exact integer times two scales. A weight's minimum adds
//! minimum * sum of the group's (rounded) activations, which is kept beside the scale.

use std::ops::Range;

use super::level::Level;
use super::linear::View;
use super::linear_form::{Form, with_form};
use super::linear_layout::{Packed, Shape};
use super::pool;
use super::simd::{GROUP, Kernel, Simd};
use super::tensor::{Rows, RowsMut, load_some, store_some};

/// Bytes of x in one block of rows: half a first-level cache, so that every tile of weights finds
/// them there; the weights of a task, read once a block, stay in the second level.
const BLOCK_BYTES: usize = 16 << 10;

/// How far ahead of a tile's reads weights are asked for. A core's window of instructions holds too
/// few groups of 4-bit weights to keep the memory busy by itself: one row read 33 GB/s on two
/// AVX-512 cores without, 41 with 1 KiB, 47 with 2, 52 with 4, where a plain sweep reads 48 to 55.
const PREFETCH_BYTES: usize = 4096;
/// Up to so many rows; with more the arithmetic takes longer than the memory.
const PREFETCH_ROWS: usize = 2;

/// Rows rounded to int8.
#[derive(Clone, Copy)]
pub struct Activations {
    /// Per row and group `words(shape)` of them: the scale; then the scale times the sum of the
    /// group's values; or as bits of integers, for 8-bit weights -128 times the sum, for 6-bit
    /// ones -32 times the sums of both halves.
    scales: *const f32,
    /// [M, K]
    values: *const i8,
    k: usize,
}

// SAFETY: written by `quantize` before anybody reads; the buffer outlives the region.
unsafe impl Sync for Activations {}
// SAFETY: as above.
unsafe impl Send for Activations {}

impl Activations {
    /// Floats of buffer that `quantize` needs.
    pub fn floats(rows: usize, k: usize, packed: Packed) -> usize {
        rows * (k / GROUP * words(packed.shape()) + k / 4)
    }

    /// Round x into `buffer`.
    ///
    /// # Safety
    /// x describes valid memory with K a multiple of 32; `buffer` holds `floats(...)`.
    pub unsafe fn quantize(level: Level, x: Rows, packed: Packed, buffer: *mut f32) -> Activations {
        let k = x.cols;
        let out = Activations {
            scales: buffer,
            // SAFETY: `floats` counts the scales first.
            values: unsafe { buffer.add(x.rows * (k / GROUP) * words(packed.shape())) }.cast(),
            k,
        };
        let step = (16_384 / k.max(1)).max(1);
        pool::run(x.rows.div_ceil(step), |task| {
            let rows = task * step..((task + 1) * step).min(x.rows);
            // SAFETY: the caller's; tasks write disjoint rows.
            unsafe {
                level.run(Quantize {
                    x,
                    out,
                    packed,
                    rows,
                });
            }
        });
        out
    }
}

/// Floats beside a row's group of activations.
const fn words(shape: Shape) -> usize {
    if shape.bits == 6 { 3 } else { 2 }
}

struct Quantize {
    x: Rows,
    out: Activations,
    packed: Packed,
    rows: Range<usize>,
}

impl Kernel for Quantize {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let groups = self.out.k / GROUP;
        let size = self.x.dtype.size();
        let bits = self.packed.shape().bits;
        let words = words(self.packed.shape());
        for row in self.rows {
            // SAFETY: `Activations::quantize`'s contract.
            unsafe {
                let x = self.x.at(row, 0);
                let values = self.out.values.cast_mut().add(row * self.out.k);
                let scales = self.out.scales.cast_mut().add(row * groups * words);
                for g in 0..groups {
                    let at = |i: usize| x.add((g * GROUP + i) * size);
                    let mut high = s.zero();
                    let mut i = 0;
                    while i < GROUP {
                        let v = load_some(s, at(i), self.x.dtype, S::LANES);
                        high = s.max(high, s.max(v, s.sub(s.zero(), v)));
                        i += S::LANES;
                    }
                    let scale = s.hmax(high) / 127.0;
                    // Zero, or so small that its inverse overflows.
                    let inverse = if scale > 1e-37 { 1.0 / scale } else { 0.0 };
                    let (inverse, limit) = (s.splat(inverse), s.splat(127.0));
                    let mut sums = [s.zero(); 2];
                    let mut i = 0;
                    while i < GROUP {
                        let v = load_some(s, at(i), self.x.dtype, S::LANES);
                        let q = s.round(s.mul(v, inverse));
                        let q = s.max(s.min(q, limit), s.splat(-127.0));
                        sums[2 * i / GROUP] = s.add(sums[2 * i / GROUP], q);
                        s.store_i8(values.add(g * GROUP + i), q);
                        i += S::LANES;
                    }
                    let scales = scales.add(g * words);
                    let integer = |x: f32| f32::from_bits((x as i32).cast_unsigned());
                    *scales = scale;
                    if bits == 6 {
                        *scales.add(1) = integer(-32.0 * s.sum(sums[0]));
                        *scales.add(2) = integer(-32.0 * s.sum(sums[1]));
                    } else {
                        let sum = s.sum(s.add(sums[0], sums[1]));
                        *scales.add(1) = if bits == 8 {
                            integer(-128.0 * sum)
                        } else {
                            scale * sum
                        };
                    }
                }
            }
        }
    }
}

/// Tiles `tiles` of the weight for rows `rows` of x.
pub struct Int8Task {
    /// Of a quantized kind.
    pub weight: View,
    /// [M, K]
    pub x: Activations,
    /// [1, N]
    pub bias: Option<Rows>,
    /// [M, N]
    pub y: RowsMut,
    /// Which tiles.
    pub tiles: Range<usize>,
    /// Which rows.
    pub rows: Range<usize>,
}

impl Kernel for Int8Task {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        // SAFETY: the caller's.
        unsafe { with_form!(self.weight.packed, F => self.tiles::<S, F>(s)) }
    }
}

impl Int8Task {
    #[inline(always)]
    unsafe fn tiles<S: Simd, F: Form>(&self, s: S) {
        let words = words(F::SHAPE);
        let row_bytes = self.weight.k + self.weight.k / GROUP * words * size_of::<f32>();
        let block = (BLOCK_BYTES / row_bytes.max(1)).max(8) / 8 * 8;
        let mut row = self.rows.start;
        while row < self.rows.end {
            let end = (row + block).min(self.rows.end);
            for tile in self.tiles.clone() {
                let mut r = row;
                while r < end {
                    // SAFETY: `Linear::forward`'s contract; each tile takes rows that are left.
                    unsafe {
                        match end - r {
                            left if left >= 8 && S::INT_ROWS >= 8 => {
                                self.tile::<S, F, 8>(s, tile, r);
                                r += 8;
                            }
                            4.. => {
                                self.tile::<S, F, 4>(s, tile, r);
                                r += 4;
                            }
                            3 => {
                                self.tile::<S, F, 3>(s, tile, r);
                                r += 3;
                            }
                            2 => {
                                self.tile::<S, F, 2>(s, tile, r);
                                r += 2;
                            }
                            _ => {
                                self.tile::<S, F, 1>(s, tile, r);
                                r += 1;
                            }
                        }
                    }
                }
            }
            row = end;
        }
    }

    /// R rows of x times one tile of weights.
    #[inline(always)]
    unsafe fn tile<S: Simd, F: Form, const R: usize>(&self, s: S, tile: usize, row: usize) {
        let w = &self.weight;
        let shape = F::SHAPE;
        let words = words(shape);
        let blocks = w.k / shape.elements();
        let bytes = shape.block() * S::LANES;
        // SAFETY: `Linear::forward`'s contract, and the layouts in `linear_layout`'s doc.
        unsafe {
            let base = w.bytes.add(tile * blocks * bytes);
            let x: [*const i8; R] = std::array::from_fn(|r| self.x.values.add((row + r) * w.k));
            let scales: [*const f32; R] =
                std::array::from_fn(|r| self.x.scales.add((row + r) * (w.k / GROUP) * words));
            let mut acc = [s.zero(); R];
            // The next tile follows in memory, so the addresses ahead are worth asking for even
            // where they are another task's.
            let ahead = |p: *const u8, bytes: usize| {
                if R <= PREFETCH_ROWS {
                    for line in (0..bytes).step_by(64) {
                        s.prefetch(p.wrapping_add(PREFETCH_BYTES + line));
                    }
                }
            };
            for b in 0..blocks {
                let block = base.add(b * bytes);
                ahead(block, shape.head() * S::LANES);
                let head = F::head(s, block);
                for i in 0..shape.groups {
                    let g = b * shape.groups + i;
                    let p = F::group::<S>(block, i);
                    ahead(p, shape.group() * S::LANES);
                    let [d, m] = F::scale(s, head, block, i, 0);
                    let x = x.map(|x| x.add(g * GROUP));
                    let scales = scales.map(|x| x.add(g * words));
                    let integer = |r: usize, i: usize| (*scales[r].add(i)).to_bits().cast_signed();
                    if shape.bits == 8 {
                        let surplus = std::array::from_fn(|r| integer(r, 1));
                        let dots = s.dot_bytes::<R>(p, x, surplus);
                        for r in 0..R {
                            let scale = s.splat(*scales[r]);
                            acc[r] = s.fma(dots[r], s.mul(d, scale), acc[r]);
                        }
                        continue;
                    }
                    let values = F::values(s, p);
                    if shape.bits == 6 {
                        let [high, _] = F::scale(s, head, block, i, 1);
                        for r in 0..R {
                            let start = [integer(r, 1), integer(r, 2)];
                            let [a, b] = s.dot_halves(values, x[r], start);
                            let dot = s.fma(a, d, s.mul(b, high));
                            acc[r] = s.fma(dot, s.splat(*scales[r]), acc[r]);
                        }
                        continue;
                    }
                    for r in 0..R {
                        let dot = if shape.bits == 4 {
                            s.dot::<4>(values, x[r])
                        } else {
                            s.dot::<5>(values, x[r])
                        };
                        let scale = s.splat(*scales[r]);
                        let sum = s.splat(*scales[r].add(1));
                        acc[r] = s.fma(dot, s.mul(d, scale), acc[r]);
                        acc[r] = s.fma(m, sum, acc[r]);
                    }
                }
            }
            let col = tile * S::LANES;
            let valid = w.n.saturating_sub(col).min(S::LANES);
            let bias = match self.bias {
                Some(b) => load_some(s, b.at(0, col), b.dtype, valid),
                None => s.zero(),
            };
            for (r, acc) in acc.into_iter().enumerate() {
                let to = self.y.at(row + r, col);
                store_some(s, to, self.y.dtype, s.add(acc, bias), valid);
            }
        }
    }
}
