//! WideTask: quantized weights widened to int16 times activations rounded to int16, for several rows.
//!
//! AVX2 multiplies two int8 to 16 bits that soon overflow, and activations need two int8 parts (see
//! `int8`). One int16 holds both parts, and `Simd::dot_pairs` takes two instructions for 16 products
//! of any format. The integers of a panel are widened once for a block of rows and stay in the first-level
//! cache; what they add up to in a unit of `GROUP` elements, or half of it where halves have scales of
//! their own, is an exact int32: 32 * 128 * 32767 is below 2^31 (bench/NOTES.md, "Products of int16 at
//! AVX2").
//!
//! Activations get one scale per row and `CHUNK` elements, the largest magnitude over 32767.

use std::ops::Range;

use octavo_formats::blocks::{Codes, Format, Shape};
use octavo_formats::with_format;

use crate::level::Level;
use crate::linear::float::{Emit, ROW_BLOCK, SCRATCH_FLOATS};
use crate::linear::form::Form;
use crate::linear::layout::View;
use crate::pool;
use crate::simd::{GROUP, Kernel, Simd};
use crate::tensor::{Rows, RowsMut, load_some};

/// Fewer rows would not repay the widening (`bench/formats_cpu.py`).
pub(super) const MIN_ROWS: usize = 4;
/// Elements of K that are widened together, and share a scale of the activations: whole blocks of
/// every format.
const CHUNK: usize = 256;
/// int16 from row to row of a chunk: a constant, so that a tile finds its rows at fixed distances, and
/// a line more than the values, so that rows do not compete for the same places of the cache.
const STRIDE: usize = CHUNK + 32;
/// The largest rounded value.
const MOST: f32 = 32_767.0;
/// The smallest unit, and how many a chunk has of it.
const HALF: usize = GROUP / 2;
const MAX_UNITS: usize = CHUNK / HALF;
/// A tile's rows at most, and the lanes of its two vectors.
const MAX_ROWS: usize = 6;
const MAX_WIDTH: usize = 32;
/// Distance of the prefetch of weights.
const PREFETCH_BYTES: usize = 4096;

const _: () = assert!(
    // Values, scales, minimums, sums.
    CHUNK / 2 * MAX_WIDTH + 2 * MAX_UNITS * MAX_WIDTH + ROW_BLOCK * MAX_WIDTH <= SCRATCH_FLOATS
);

/// Elements that share a scale.
const fn unit(shape: Shape) -> usize {
    if shape.has_half_groups() { HALF } else { GROUP }
}

/// True if elements have something added to what is scaled.
const fn has_minimums(shape: Shape) -> bool {
    shape.has_minimums() || shape.offset > 0
}

/// Activations [M, K] rounded to int16.
#[derive(Clone, Copy)]
pub(super) struct Activations {
    /// [chunks][M][STRIDE]
    values: *mut i16,
    /// [M][K / CHUNK, rounded up]
    scales: *mut f32,
    /// Sums of the values [M][units].
    sums: *mut f32,
    /// Elements of a unit.
    unit: usize,
    /// Units of a row.
    num_units: usize,
    num_rows: usize,
    k: usize,
}

// SAFETY: written by `round` before anybody reads; the buffer outlives the region.
unsafe impl Sync for Activations {}
// SAFETY: as above.
unsafe impl Send for Activations {}

impl Activations {
    /// Floats of buffer that `round` needs.
    pub(super) fn floats(rows: usize, k: usize) -> usize {
        rows * (k.div_ceil(CHUNK) * (STRIDE / 2 + 1) + k / HALF)
    }

    /// Round x into `buffer`, for weights of this shape.
    ///
    /// # Safety
    /// x describes valid memory with K a multiple of 32; `buffer` holds `floats(...)`.
    pub(super) unsafe fn round(
        level: Level,
        x: Rows,
        shape: Shape,
        buffer: *mut f32,
    ) -> Activations {
        let k = x.cols;
        // SAFETY: `floats` counts these.
        let out = unsafe {
            let scales = buffer.add(x.rows * k.div_ceil(CHUNK) * (STRIDE / 2));
            Activations {
                values: buffer.cast(),
                scales,
                sums: scales.add(x.rows * k.div_ceil(CHUNK)),
                unit: unit(shape),
                num_units: k / unit(shape),
                num_rows: x.rows,
                k,
            }
        };
        let step = (16_384 / k.max(1)).max(1);
        pool::run(x.rows.div_ceil(step), |task| {
            let rows = task * step..((task + 1) * step).min(x.rows);
            // SAFETY: the caller's; tasks write disjoint rows.
            unsafe { level.run(RoundTask { x, out, rows }) };
        });
        out
    }
}

struct RoundTask {
    x: Rows,
    out: Activations,
    rows: Range<usize>,
}

impl Kernel for RoundTask {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let Activations {
            values,
            scales,
            sums,
            unit,
            num_units,
            num_rows,
            k,
        } = self.out;
        for row in self.rows.clone() {
            for (c, start) in (0..k).step_by(CHUNK).enumerate() {
                let end = k.min(start + CHUNK);
                // SAFETY: `Activations::round`'s contract.
                unsafe {
                    let to = values.add((c * num_rows + row) * STRIDE);
                    let mut high = s.zero();
                    for i in (start..end).step_by(S::LANES) {
                        let v = self.load(s, row, i);
                        high = s.max(high, s.max(v, s.sub(s.zero(), v)));
                    }
                    let high = s.hmax(high);
                    // Zero, or so small that its inverse overflows.
                    let inverse = s.splat(if high > 1e-33 { MOST / high } else { 0.0 });
                    *scales.add(row * k.div_ceil(CHUNK) + c) = high * (1.0 / MOST);
                    for at in (start..end).step_by(unit) {
                        let mut sum = s.zero();
                        for i in (at..at + unit).step_by(S::LANES) {
                            let v = s.round(s.mul(self.load(s, row, i), inverse));
                            sum = s.add(sum, v);
                            s.store_i16(to.add(i - start), v);
                        }
                        *sums.add(row * num_units + at / unit) = s.sum(sum);
                    }
                }
            }
        }
    }
}

impl RoundTask {
    #[inline(always)]
    unsafe fn load<S: Simd>(&self, s: S, row: usize, i: usize) -> S::V {
        // SAFETY: the caller's: LANES elements from i on.
        unsafe { load_some(s, self.x.at(row, i), self.x.dtype, S::LANES) }
    }
}

/// Panels `panels` of the weight for rows `rows` of x.
pub(super) struct WideTask {
    /// Of a kind that has a `Product`.
    pub(super) weight: View,
    /// [M, K]
    pub(super) x: Activations,
    /// [1, N]
    pub(super) bias: Option<Rows>,
    /// [M, N]
    pub(super) y: RowsMut,
    /// Range of panels.
    pub(super) panels: Range<usize>,
    /// Range of rows.
    pub(super) rows: Range<usize>,
    /// `SCRATCH_FLOATS` of this thread's own.
    pub(super) scratch: *mut f32,
}

/// A chunk of a panel, widened.
#[derive(Clone, Copy)]
struct Widened {
    /// int16 [CHUNK / 2][2 LANES][2]: two elements of a column side by side.
    values: *mut u8,
    /// [MAX_UNITS][2 LANES]
    scales: *mut f32,
    /// The same of minimums.
    minimums: *mut f32,
}

impl Kernel for WideTask {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        if const { !S::WIDENS } {
            unreachable!("not of this level");
        }
        let width = 2 * S::LANES;
        // SAFETY: `Linear::forward`'s contract; scratch holds all parts.
        unsafe {
            let scales = self.scratch.add(CHUNK / 2 * width);
            let minimums = scales.add(MAX_UNITS * width);
            let sums = minimums.add(MAX_UNITS * width);
            let widened = Widened {
                values: self.scratch.cast(),
                scales,
                minimums,
            };
            for panel in self.panels.clone() {
                for row in self.rows.clone().step_by(ROW_BLOCK) {
                    let rows = (self.rows.end - row).min(ROW_BLOCK);
                    for i in 0..2 * rows {
                        s.store(sums.add(i * S::LANES), s.zero());
                    }
                    for k0 in (0..self.weight.k).step_by(CHUNK) {
                        self.chunk(s, panel, k0, row..row + rows, widened, sums);
                    }
                    let emit = Emit {
                        n: self.weight.n,
                        bias: self.bias,
                        y: self.y,
                        panel,
                        row,
                        rows,
                        sums,
                    };
                    emit.run(s);
                }
            }
        }
    }
}

impl WideTask {
    /// sums [rows][2 LANES] += rows `rows` of x times a panel's elements from `k0` on.
    #[inline(always)]
    unsafe fn chunk<S: Simd>(
        &self,
        s: S,
        panel: usize,
        k0: usize,
        rows: Range<usize>,
        widened: Widened,
        sums: *mut f32,
    ) {
        let w = &self.weight;
        let len = (w.k - k0).min(CHUNK);
        // SAFETY: `Linear::forward`'s contract, and the layouts in `layout`'s doc.
        unsafe {
            with_format!(w.packed.blocks(), F => {
                let elements = F::SHAPE.elements();
                let bytes = F::LAYOUT.block * S::LANES;
                for half in 0..2 {
                    let first = (2 * panel + half) * (w.k / elements) + k0 / elements;
                    let first = w.bytes.add(first * bytes);
                    widen::<S, F>(s, first, len / elements, half, widened);
                }
            });
            let mut row = rows.start;
            while row < rows.end {
                let sums = sums.add((row - rows.start) * 2 * S::LANES);
                row += match rows.end - row {
                    6.. => self.tile::<S, 6>(s, row, k0, widened, sums),
                    4.. => self.tile::<S, 4>(s, row, k0, widened, sums),
                    2.. => self.tile::<S, 2>(s, row, k0, widened, sums),
                    _ => self.tile::<S, 1>(s, row, k0, widened, sums),
                };
            }
        }
    }

    /// `chunk` for R rows; returns R.
    #[inline(always)]
    unsafe fn tile<S: Simd, const R: usize>(
        &self,
        s: S,
        row: usize,
        k0: usize,
        widened: Widened,
        sums: *mut f32,
    ) -> usize {
        let x = &self.x;
        let (chunk, width) = (k0 / CHUNK, 2 * S::LANES);
        let has_minimums = has_minimums(self.weight.packed.blocks().shape());
        let units = (x.k - k0).min(CHUNK) / x.unit;
        let mut scaled = [0.0f32; MAX_ROWS * MAX_WIDTH];
        let scaled = scaled.as_mut_ptr();
        // SAFETY: the caller's.
        unsafe {
            let mut weights = widened.values.cast_const();
            let mut values = x.values.cast_const();
            values = values.add((chunk * x.num_rows + row) * STRIDE);
            let sums_of_x = x.sums.cast_const().add(row * x.num_units + k0 / x.unit);
            for u in 0..units {
                let mut acc = [[s.zero_words(); 2]; R];
                for _ in 0..x.unit / 2 {
                    let w0 = s.load_words(weights);
                    let w1 = s.load_words(weights.add(4 * S::LANES));
                    for (r, acc) in acc.iter_mut().enumerate() {
                        let pair = values.add(r * STRIDE).cast::<i32>().read_unaligned();
                        acc[0] = s.dot_pairs(acc[0], w0, pair);
                        acc[1] = s.dot_pairs(acc[1], w1, pair);
                    }
                    weights = weights.add(4 * width);
                    values = values.add(2);
                }
                let [d, m] = [widened.scales, widened.minimums].map(|p| p.add(u * width));
                let [d0, d1] = [s.load(d), s.load(d.add(S::LANES))];
                if has_minimums {
                    let [m0, m1] = [s.load(m), s.load(m.add(S::LANES))];
                    for (r, acc) in acc.into_iter().enumerate() {
                        let sum = s.splat(*sums_of_x.add(r * x.num_units + u));
                        let to = scaled.add(2 * r * S::LANES);
                        let v = s.fma(s.to_floats(acc[0]), d0, s.load(to));
                        s.store(to, s.fma(m0, sum, v));
                        let to = to.add(S::LANES);
                        let v = s.fma(s.to_floats(acc[1]), d1, s.load(to));
                        s.store(to, s.fma(m1, sum, v));
                    }
                } else {
                    for (r, acc) in acc.into_iter().enumerate() {
                        let to = scaled.add(2 * r * S::LANES);
                        s.store(to, s.fma(s.to_floats(acc[0]), d0, s.load(to)));
                        let to = to.add(S::LANES);
                        s.store(to, s.fma(s.to_floats(acc[1]), d1, s.load(to)));
                    }
                }
            }
            for r in 0..R {
                let scale = *x.scales.add((row + r) * x.k.div_ceil(CHUNK) + chunk);
                for half in 0..2 {
                    let at = (2 * r + half) * S::LANES;
                    let v = s.fma(s.load(scaled.add(at)), s.splat(scale), s.load(sums.add(at)));
                    s.store(sums.add(at), v);
                }
            }
        }
        R
    }
}

/// Widen `blocks` blocks of a tile, half `half` of a panel.
///
/// # Safety
/// The blocks, of a tile of this kind, exist.
#[inline(always)]
unsafe fn widen<S: Simd, F: Form>(s: S, first: *const u8, blocks: usize, half: usize, to: Widened) {
    if const { crate::linear::int8::Product::of(F::SHAPE).is_none() } {
        unreachable!("no integers");
    }
    let (shape, width) = (F::SHAPE, 2 * S::LANES);
    let halves = GROUP / unit(shape);
    let bytes = F::LAYOUT.block * S::LANES;
    // SAFETY: the caller's; a chunk has room for its units.
    unsafe {
        for b in 0..blocks {
            let block = first.add(b * bytes);
            for line in (0..bytes).step_by(64) {
                s.prefetch(block.wrapping_add(PREFETCH_BYTES + line));
            }
            let head = F::head(s, block);
            for i in 0..shape.groups {
                let g = b * shape.groups + i;
                for h in 0..halves {
                    let [d, m] = F::scale(s, head, block, i, h);
                    let at = (g * halves + h) * width + half * S::LANES;
                    s.store(to.scales.add(at), d);
                    if const { has_minimums(F::SHAPE) } {
                        s.store(to.minimums.add(at), m);
                    }
                }
                let values = F::values(s, F::group::<S>(block, i));
                for (j, v) in values.into_iter().enumerate() {
                    let pair = g * GROUP / 2 + 2 * j;
                    let to = to.values.add((pair * width + half * S::LANES) * 4);
                    let [even, odd] = if const { is_signed(F::SHAPE) } {
                        s.widen_signed(v)
                    } else {
                        s.widen(v)
                    };
                    s.store_words(to, even);
                    s.store_words(to.add(4 * width), odd);
                }
            }
        }
    }
}

/// True if elements are signed bytes.
const fn is_signed(shape: Shape) -> bool {
    shape.bits == 8 || matches!(shape.codes, Codes::Table(_))
}
