//! Int8Task: quantized weights times activations rounded to int8, in integer arithmetic.
//!
//! Activations get one scale per row and group of 32, the largest magnitude over 127, so that each
//! group's dot product is an exact integer times two scales. A W4 weight's minimum adds
//! minimum * sum of the group's (rounded) activations, which is kept beside the scale.

use std::ops::Range;

use super::level::Level;
use super::linear::{Packed, View};
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
    /// Per row and group: the scale; then for W4 the scale times the sum of the group's values,
    /// for W8 the bits of -128 times that sum as an integer.
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
    pub fn floats(rows: usize, k: usize) -> usize {
        rows * (k / GROUP * 2 + k / 4)
    }

    /// Round x into `buffer`.
    ///
    /// # Safety
    /// x describes valid memory with K a multiple of 32; `buffer` holds `floats(rows, K)`.
    pub unsafe fn quantize(level: Level, x: Rows, packed: Packed, buffer: *mut f32) -> Activations {
        let k = x.cols;
        let out = Activations {
            scales: buffer,
            // SAFETY: `floats` counts the scales first.
            values: unsafe { buffer.add(x.rows * (k / GROUP) * 2) }.cast(),
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
        for row in self.rows {
            // SAFETY: `Activations::quantize`'s contract.
            unsafe {
                let x = self.x.at(row, 0);
                let values = self.out.values.cast_mut().add(row * self.out.k);
                let scales = self.out.scales.cast_mut().add(row * groups * 2);
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
                    let mut sum = s.zero();
                    let mut i = 0;
                    while i < GROUP {
                        let v = load_some(s, at(i), self.x.dtype, S::LANES);
                        let q = s.round(s.mul(v, inverse));
                        let q = s.max(s.min(q, limit), s.splat(-127.0));
                        sum = s.add(sum, q);
                        s.store_i8(values.add(g * GROUP + i), q);
                        i += S::LANES;
                    }
                    *scales.add(2 * g) = scale;
                    let sum = s.sum(sum);
                    *scales.add(2 * g + 1) = if self.packed == Packed::W4 {
                        scale * sum
                    } else {
                        f32::from_bits((-128 * sum as i32) as u32)
                    };
                }
            }
        }
    }
}

/// Tiles `tiles` of the weight for rows `rows` of x.
pub struct Int8Task {
    /// W4 or W8.
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
        let row_bytes = self.weight.k + self.weight.k / GROUP * 2 * size_of::<f32>();
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
                                self.tile::<S, 8>(s, tile, r);
                                r += 8;
                            }
                            4.. => {
                                self.tile::<S, 4>(s, tile, r);
                                r += 4;
                            }
                            3 => {
                                self.tile::<S, 3>(s, tile, r);
                                r += 3;
                            }
                            2 => {
                                self.tile::<S, 2>(s, tile, r);
                                r += 2;
                            }
                            _ => {
                                self.tile::<S, 1>(s, tile, r);
                                r += 1;
                            }
                        }
                    }
                }
            }
            row = end;
        }
    }
}

impl Int8Task {
    /// R rows of x times one tile of weights.
    #[inline(always)]
    unsafe fn tile<S: Simd, const R: usize>(&self, s: S, tile: usize, row: usize) {
        let w = &self.weight;
        let groups = w.k / GROUP;
        let block = w.packed.row_bytes(GROUP) * S::LANES;
        // SAFETY: `Linear::forward`'s contract, and the layouts in `linear`'s doc.
        unsafe {
            let base = w.bytes.add(tile * groups * block);
            let x: [*const i8; R] = std::array::from_fn(|r| self.x.values.add((row + r) * w.k));
            let scales: [*const f32; R] =
                std::array::from_fn(|r| self.x.scales.add((row + r) * groups * 2));
            let mut acc = [s.zero(); R];
            // The next tile follows in memory, so the addresses ahead are worth asking for even
            // where they are another task's.
            let ahead = |p: *const u8| {
                if R <= PREFETCH_ROWS {
                    for line in (0..block).step_by(64) {
                        s.prefetch(p.wrapping_add(PREFETCH_BYTES + line));
                    }
                }
            };
            if w.packed == Packed::W4 {
                for g in 0..groups {
                    let p = base.add(g * block);
                    ahead(p);
                    let d = s.load_f16(p.cast());
                    let m = s.load_f16(p.add(2 * S::LANES).cast());
                    let nibbles = s.unpack_nibbles(p.add(4 * S::LANES));
                    for r in 0..R {
                        let dot = s.dot_nibbles(nibbles, x[r].add(g * GROUP));
                        let scale = s.splat(*scales[r].add(2 * g));
                        let sum = s.splat(*scales[r].add(2 * g + 1));
                        acc[r] = s.fma(dot, s.mul(d, scale), acc[r]);
                        acc[r] = s.fma(m, sum, acc[r]);
                    }
                }
            } else {
                for g in 0..groups {
                    let p = base.add(g * block);
                    ahead(p);
                    let d = s.load_f16(p.cast());
                    let surplus = scales.map(|x| (*x.add(2 * g + 1)).to_bits() as i32);
                    let x = x.map(|x| x.add(g * GROUP));
                    let dots = s.dot_bytes::<R>(p.add(2 * S::LANES), x, surplus);
                    for r in 0..R {
                        let scale = s.splat(*scales[r].add(2 * g));
                        acc[r] = s.fma(dots[r], s.mul(d, scale), acc[r]);
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
