//! Int8Task: quantized weights times activations rounded to int8, in integer arithmetic.
//!
//! Activations get one scale per row and `SPAN` groups of 32, the largest magnitude over 127, so that
//! each group's dot product is an exact integer, in steps of that scale, times the weights' one. A
//! weight's minimum adds minimum * sum of the group's (rounded) activations, which is kept beside.
//!
//! Rounding to int8 alone would raise a model's perplexity (bench/NOTES.md, "Integer products"), so a
//! second part holds the first one's error. It is counted in 256ths of a step, with dot products of its
//! own: twice as many. But 4-bit integers lie in pairs in a byte, 16
//! times one and the other, elements k and k + 16 of a group; one product with that byte serves both,
//! half as many (`Simd::store_nibble_parts`), and gives both 4 bits more than int8.
//!
//! One part alone is for those who ask for it: `PARTS`, everywhere, is 1 or 2.
//!
//! Longer than other files: rounding, tiles and the two parts' sums share one layout.

use std::ops::Range;

use octavo_formats::blocks::{BlockFormat, Codes, Format, Shape};
use octavo_formats::with_format;

use crate::level::Level;
use crate::linear::form::Form;
use crate::linear::layout::View;
use crate::pool;
use crate::simd::{GROUP, Kernel, Simd};
use crate::tensor::{Rows, RowsMut, load_some, store_some};

/// Bytes of x in one block of rows: half a first-level cache, so that every tile of weights finds
/// them there; the weights of a task, read once a block, stay in the second level.
const BLOCK_BYTES: usize = 16 << 10;

/// The products of a group's integers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Product {
    /// Of 4 bits, two by two.
    Nibbles,
    /// Of 5 bits.
    Fives,
    /// Of 2, 3 and 6 bits, each half by itself.
    Halves,
    /// Of signed bytes.
    Bytes,
    /// Of a table's signed bytes, each half by itself.
    Entries,
}

impl Product {
    /// Those of a format; None: its elements are no integers.
    pub(super) const fn of(shape: Shape) -> Option<Product> {
        match (shape.codes, shape.bits) {
            (Codes::Integers, 4) => Some(Product::Nibbles),
            (Codes::Integers, 5) => Some(Product::Fives),
            (Codes::Integers, 8) => Some(Product::Bytes),
            (Codes::Integers, _) => Some(Product::Halves),
            (Codes::Table(_), _) => Some(Product::Entries),
            (Codes::Floats(_) | Codes::E4m3, _) => None,
        }
    }

    /// True if one part's products are of unsigned weights below 64, which AVX2 multiplies in half the
    /// time of int16's.
    pub(super) const fn is_narrow(self) -> bool {
        !matches!(self, Product::Bytes | Product::Entries)
    }
}

/// Distance of the prefetch of weights. A core's window of instructions holds too few groups of 4-bit
/// weights to keep the memory busy by itself; from this distance on one row reads as fast as a plain
/// sweep, and eight rows gain as well (`cargo bench -p octavo-cpu --bench cpu`; bench/NOTES.md, "One
/// row").
pub(super) const PREFETCH_BYTES: usize = 4096;

/// Rows of x that lie together, group by group, so that a tile finds all it needs of a group at
/// fixed distances from one address.
pub(crate) const ROWS: usize = 8;
/// Groups with one scale. Six save five sixths of a multiplication by it for each group, one of 15
/// instructions that the multipliers take for 4-bit weights.
const SPAN: usize = 6;
/// Steps of the first part in one of the second.
const PART: f32 = 256.0;
/// Largest value of the first part, in steps. With 4-bit weights up to 9 go to what the second part
/// adds too many.
const MOST: f32 = 127.0;
const MOST_NIBBLES: f32 = 118.0;

/// `$body` for every row $r below $rows. The compiler keeps a loop of this size rolled and its sums
/// in memory, which takes half as long again.
macro_rules! each_row {
    ($r:ident < $rows:ident, $body:block) => {
        each_row!(@ $r, $rows, $body, 0 1 2 3 4 5 6 7)
    };
    (@ $r:ident, $rows:ident, $body:block, $($i:literal)*) => {
        $(
            let $r = $i;
            if $r < $rows $body
        )*
    };
}
const _: () = assert!(ROWS == 8);

/// `ROWS` rows' group as the dot products read it.
#[repr(C, align(64))]
struct Group {
    /// First parts.
    first: [[i8; GROUP]; ROWS],
    /// Factor of `PART` times the first part's dot product plus the second one's, the same in all
    /// groups of a span.
    scale: [f32; ROWS],
    /// `PART` times the sum of the rounded values in steps, in `Halves` with minimums of the first
    /// half. Else the integer that the first part's dot product starts from: -128 times the sum of all
    /// (`Bytes`) or of the first half (`Entries`), the offset times that (`Halves`).
    sum: [f32; ROWS],
    /// Second parts; for 4-bit weights 16 values, twice.
    second: [[i8; GROUP]; ROWS],
    /// `Bytes`: the integer for the second part, then `PART` times the sum of the rounded values.
    /// By halves: as `sum`, the other half; the integers for the second part's halves.
    more: [[f32; ROWS]; 3],
}

/// Rows rounded to int8 parts: [M / ROWS][K / 32] groups.
#[derive(Clone, Copy)]
pub(crate) struct Activations<const PARTS: usize> {
    groups: *mut Group,
    /// Of a row.
    num_groups: usize,
}

// SAFETY: written by `quantize`, by disjoint blocks of rows, before anybody reads; the buffer
// outlives the region.
unsafe impl<const PARTS: usize> Sync for Activations<PARTS> {}
// SAFETY: as above.
unsafe impl<const PARTS: usize> Send for Activations<PARTS> {}

impl<const PARTS: usize> Activations<PARTS> {
    /// Floats of buffer that `quantize` needs.
    pub(crate) fn floats(rows: usize, k: usize) -> usize {
        rows.div_ceil(ROWS) * (k / GROUP) * (size_of::<Group>() / size_of::<f32>())
    }

    /// Round x into `buffer`.
    ///
    /// # Safety
    /// x describes valid memory with K a multiple of 32; `buffer` holds `floats(...)` and begins
    /// on a cache line.
    pub(crate) unsafe fn quantize(
        level: Level,
        x: Rows,
        weights: BlockFormat,
        buffer: *mut f32,
    ) -> Self {
        let out = Activations {
            groups: buffer.cast(),
            num_groups: x.cols / GROUP,
        };
        let step = (16_384 / x.cols.max(1)).max(1).next_multiple_of(ROWS);
        pool::run(x.rows.div_ceil(step), |task| {
            let rows = task * step..((task + 1) * step).min(x.rows);
            // SAFETY: the caller's; tasks write disjoint blocks.
            unsafe {
                level.run(Quantize {
                    x,
                    out,
                    shape: weights.shape(),
                    rows,
                });
            }
        });
        out
    }

    /// # Safety
    /// The block and the group exist.
    unsafe fn group(&self, block: usize, g: usize) -> *mut Group {
        // SAFETY: the caller's.
        unsafe { self.groups.add(block * self.num_groups + g) }
    }
}

struct Quantize<const PARTS: usize> {
    x: Rows,
    out: Activations<PARTS>,
    /// Of the weights.
    shape: Shape,
    rows: Range<usize>,
}

impl<const PARTS: usize> Kernel for Quantize<PARTS> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let num_groups = self.out.num_groups;
        let nibbles = PARTS == 2 && Product::of(self.shape) == Some(Product::Nibbles);
        let most = if nibbles { MOST_NIBBLES } else { MOST };
        for row in self.rows.clone() {
            for first in (0..num_groups).step_by(SPAN) {
                let span = first..num_groups.min(first + SPAN);
                // SAFETY: `Activations::quantize`'s contract.
                unsafe {
                    let x = self.x.at(row, first * GROUP);
                    let (step, inverse) = self.step(s, x, span.len() * GROUP, most);
                    for g in span {
                        let x = self.x.at(row, g * GROUP);
                        let to = &mut *self.out.group(row / ROWS, g);
                        to.scale[row % ROWS] = step / part(PARTS);
                        if nibbles {
                            self.nibbles(s, x, inverse, to, row % ROWS);
                        } else {
                            self.bytes(s, x, inverse, to, row % ROWS);
                        }
                    }
                }
            }
        }
    }
}

impl<const PARTS: usize> Quantize<PARTS> {
    /// A step for `len` values at x, and its inverse.
    #[inline(always)]
    unsafe fn step<S: Simd>(&self, s: S, x: *const u8, len: usize, most: f32) -> (f32, S::V) {
        let mut high = s.zero();
        for i in (0..len).step_by(S::LANES) {
            // SAFETY: the caller's.
            let v = unsafe { self.load(s, x, i) };
            high = s.max(high, s.max(v, s.sub(s.zero(), v)));
        }
        let high = s.hmax(high);
        // Zero, or so small that its inverse overflows.
        let inverse = if high > 1e-35 { most / high } else { 0.0 };
        (high * (1.0 / most), s.splat(inverse))
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(&self, s: S, x: *const u8, i: usize) -> S::V {
        // SAFETY: the caller's.
        unsafe { load_some(s, x.add(i * self.x.dtype.size()), self.x.dtype, S::LANES) }
    }

    /// For all products but `Nibbles` in two parts.
    #[inline(always)]
    unsafe fn bytes<S: Simd>(&self, s: S, x: *const u8, inverse: S::V, to: &mut Group, r: usize) {
        // SAFETY: the caller's: a group to read.
        unsafe {
            let (low, high) = (s.splat(-MOST), s.splat(MOST));
            // By halves of the group.
            let (mut firsts, mut seconds) = ([s.zero(); 2], [s.zero(); 2]);
            for i in (0..GROUP).step_by(S::LANES) {
                let half = 2 * i / GROUP;
                let v = s.mul(self.load(s, x, i), inverse);
                let first = s.max(s.min(s.round(v), high), low);
                let second = if PARTS == 2 {
                    let rest = s.round(s.mul(s.sub(v, first), s.splat(PART)));
                    s.max(s.min(rest, high), low)
                } else {
                    s.zero()
                };
                firsts[half] = s.add(firsts[half], first);
                seconds[half] = s.add(seconds[half], second);
                s.store_i8(to.first[r].as_mut_ptr().add(i), first);
                s.store_i8(to.second[r].as_mut_ptr().add(i), second);
            }
            let [a, b] = [s.sum(firsts[0]), s.sum(firsts[1])];
            let [c, d] = [s.sum(seconds[0]), s.sum(seconds[1])];
            let rounded = |first: f32, second: f32| part(PARTS) * first + second;
            // By halves; what is taken off every element.
            let mut halves = |offset: f32| {
                to.sum[r] = integer(-offset * a);
                to.more[0][r] = integer(-offset * b);
                to.more[1][r] = integer(-offset * c);
                to.more[2][r] = integer(-offset * d);
            };
            match Product::of(self.shape) {
                Some(Product::Bytes) => {
                    to.sum[r] = integer(-128.0 * (a + b));
                    to.more[0][r] = integer(-128.0 * (c + d));
                    to.more[1][r] = rounded(a + b, c + d);
                }
                Some(Product::Entries) => halves(128.0),
                Some(Product::Halves) if !self.shape.has_minimums() => {
                    halves(f32::from(self.shape.offset));
                }
                Some(Product::Halves) => {
                    to.sum[r] = rounded(a, c);
                    to.more[0][r] = rounded(b, d);
                }
                _ => to.sum[r] = rounded(a + b, c + d),
            }
        }
    }

    /// For 4-bit weights.
    #[inline(always)]
    unsafe fn nibbles<S: Simd>(&self, s: S, x: *const u8, inverse: S::V, to: &mut Group, r: usize) {
        // SAFETY: the caller's: a group to read.
        unsafe {
            let (first, second) = (to.first[r].as_mut_ptr(), to.second[r].as_mut_ptr());
            let mut sum = s.zero();
            for i in (0..GROUP / 2).step_by(S::LANES) {
                let low = s.mul(self.load(s, x, i), inverse);
                let high = s.mul(self.load(s, x, i + GROUP / 2), inverse);
                sum = s.add(
                    sum,
                    s.store_nibble_parts(first.add(i), second.add(i), low, high),
                );
            }
            to.sum[r] = s.sum(sum);
        }
    }
}

/// The first part's weight in what the parts add up to.
const fn part(parts: usize) -> f32 {
    if parts == 2 { PART } else { 1.0 }
}

/// An integral float's integer, in a float's place.
#[inline(always)]
fn integer(x: f32) -> f32 {
    f32::from_bits((x as i32).cast_unsigned())
}

/// Tiles `tiles` of the weight for rows `rows` of x.
pub(crate) struct Int8Task<const PARTS: usize> {
    /// Of a kind that has a `Product`.
    pub weight: View,
    /// [M, K]
    pub x: Activations<PARTS>,
    /// [1, N]
    pub bias: Option<Rows>,
    /// [M, N]
    pub y: RowsMut,
    /// Range of tiles.
    pub tiles: Range<usize>,
    /// Range of rows; the first a multiple of `ROWS`.
    pub rows: Range<usize>,
}

impl<const PARTS: usize> Kernel for Int8Task<PARTS> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        // SAFETY: the caller's.
        unsafe {
            with_format!(self.weight.packed.blocks(), F => {
                if const { Product::of(F::SHAPE).is_some() } {
                    self.tiles::<S, F>(s);
                }
            });
        }
    }
}

impl<const PARTS: usize> Int8Task<PARTS> {
    #[inline(always)]
    unsafe fn tiles<S: Simd, F: Form>(&self, s: S) {
        let group_bytes = size_of::<[[i8; GROUP]; ROWS]>() + 2 * size_of::<[f32; ROWS]>();
        let block_bytes = self.x.num_groups * group_bytes;
        let block = (BLOCK_BYTES / block_bytes.max(1)).max(1) * ROWS;
        let mut row = self.rows.start;
        while row < self.rows.end {
            let end = (row + block).min(self.rows.end);
            for tile in self.tiles.clone() {
                let mut r = row;
                while r < end {
                    // SAFETY: `Linear::forward`'s contract; each tile takes rows that are left, of
                    // one block.
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

    /// R rows of x, of one block, times one tile of weights.
    #[inline(always)]
    unsafe fn tile<S: Simd, F: Form, const R: usize>(&self, s: S, tile: usize, row: usize) {
        let w = &self.weight;
        let (shape, layout) = (F::SHAPE, F::LAYOUT);
        let blocks = w.k / shape.elements();
        let bytes = layout.block * S::LANES;
        // SAFETY: `Linear::forward`'s contract, and the layouts in `layout`'s doc.
        unsafe {
            let base = w.bytes.add(tile * blocks * bytes);
            let mut x = self.x.group(row / ROWS, 0).cast_const();
            let (mut acc, mut span) = ([s.zero(); R], [s.zero(); R]);
            let mut left = SPAN;
            // The next tile follows in memory, so the addresses ahead are worth a prefetch even where
            // they are another task's.
            let ahead = |p: *const u8, bytes: usize| {
                for line in (0..bytes).step_by(64) {
                    s.prefetch(p.wrapping_add(PREFETCH_BYTES + line));
                }
            };
            for b in 0..blocks {
                let block = base.add(b * bytes);
                ahead(block, layout.head * S::LANES);
                let head = F::head(s, block);
                for i in 0..shape.groups {
                    let p = F::group::<S>(block, i);
                    ahead(p, layout.group * S::LANES);
                    let low = F::scale(s, head, block, i, 0);
                    let high = if shape.has_half_groups() {
                        F::scale(s, head, block, i, 1)
                    } else {
                        low
                    };
                    group::<S, F, R, PARTS>(s, p, [low, high], &*x, row % ROWS, &mut span);
                    left -= 1;
                    if left == 0 || (b + 1 == blocks && i + 1 == shape.groups) {
                        each_row!(r < R, {
                            let scale = s.splat((*x).scale[row % ROWS + r]);
                            acc[r] = s.fma(span[r], scale, acc[r]);
                            span[r] = s.zero();
                        });
                        left = SPAN;
                    }
                    x = x.add(1);
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

/// acc[R] += rows `at..at + R` of a group, in steps of their scales, times a group of weights.
///
/// # Safety
/// `p` is a group of the form, followed by scale and minimum of its halves.
#[inline(always)]
unsafe fn group<S: Simd, F: Form, const R: usize, const PARTS: usize>(
    s: S,
    p: *const u8,
    [[d, m], [high, high_m]]: [[S::V; 2]; 2],
    x: &Group,
    at: usize,
    acc: &mut [S::V; R],
) {
    let shape = F::SHAPE;
    let product = Product::of(shape);
    let part = s.splat(PART);
    // SAFETY: the caller's; a row's parts have GROUP values.
    unsafe {
        if product == Some(Product::Bytes) {
            let first = s.dot_bytes::<R>(p, rows(&x.first, at), starts(&x.sum, at));
            let second = if PARTS == 2 {
                s.dot_bytes::<R>(p, rows(&x.second, at), starts(&x.more[0], at))
            } else {
                [s.zero(); R]
            };
            each_row!(r < R, {
                let dot = if PARTS == 2 {
                    s.fma(first[r], part, second[r])
                } else {
                    first[r]
                };
                acc[r] = s.fma(dot, d, acc[r]);
                if shape.has_minimums() {
                    acc[r] = s.fma(m, s.splat(x.more[1][at + r]), acc[r]);
                }
            });
            return;
        }
        let values = F::values(s, p);
        let first: [*const i8; R] = rows(&x.first, at);
        let second: [*const i8; R] = rows(&x.second, at);
        if matches!(product, Some(Product::Halves | Product::Entries)) {
            let minimums = shape.has_minimums();
            let start = |sums: &[f32; ROWS]| if minimums { [0; R] } else { starts(sums, at) };
            let (a, b) = (start(&x.sum), start(&x.more[0]));
            let (c, e) = (start(&x.more[1]), start(&x.more[2]));
            each_row!(r < R, {
                let signed = product == Some(Product::Entries);
                let first = if signed {
                    s.dot_signed_halves(values, first[r], [a[r], b[r]])
                } else {
                    s.dot_halves(values, first[r], [a[r], b[r]])
                };
                let second = if PARTS == 1 {
                    [s.zero(); 2]
                } else if signed {
                    s.dot_signed_halves(values, second[r], [c[r], e[r]])
                } else {
                    s.dot_halves(values, second[r], [c[r], e[r]])
                };
                if shape.has_half_groups() {
                    let [x, y] = if PARTS == 2 {
                        [
                            s.fma(first[0], part, second[0]),
                            s.fma(first[1], part, second[1]),
                        ]
                    } else {
                        first
                    };
                    let dot = s.fma(y, high, s.mul(x, d));
                    acc[r] = s.add(dot, acc[r]);
                } else {
                    let whole = s.add(first[0], first[1]);
                    let dot = if PARTS == 2 {
                        s.fma(whole, part, s.add(second[0], second[1]))
                    } else {
                        whole
                    };
                    acc[r] = s.fma(dot, d, acc[r]);
                }
                if minimums {
                    acc[r] = s.fma(m, s.splat(x.sum[at + r]), acc[r]);
                    acc[r] = s.fma(high_m, s.splat(x.more[0][at + r]), acc[r]);
                }
            });
            return;
        }
        each_row!(r < R, {
            let dot = match (product, PARTS) {
                (Some(Product::Nibbles), 2) => s.dot_nibbles(values, p, first[r], second[r]),
                (Some(Product::Nibbles), _) => s.dot::<4>(values, first[r]),
                (_, 2) => {
                    let second = s.dot::<5>(values, second[r]);
                    s.fma(s.dot::<5>(values, first[r]), part, second)
                }
                _ => s.dot::<5>(values, first[r]),
            };
            acc[r] = s.fma(dot, d, acc[r]);
            acc[r] = s.fma(m, s.splat(x.sum[at + r]), acc[r]);
        });
    }
}

/// Addresses of rows `at..at + R`.
#[inline(always)]
fn rows<const R: usize>(part: &[[i8; GROUP]; ROWS], at: usize) -> [*const i8; R] {
    let mut out = [std::ptr::null(); R];
    for (r, out) in out.iter_mut().enumerate() {
        *out = part[at + r].as_ptr();
    }
    out
}

/// Their integers.
#[inline(always)]
fn starts<const R: usize>(sums: &[f32; ROWS], at: usize) -> [i32; R] {
    let mut out = [0; R];
    for (r, out) in out.iter_mut().enumerate() {
        *out = sums[at + r].to_bits().cast_signed();
    }
    out
}
