//! AmxTask: matrix products of several rows on the tile unit (AMX, "TMUL"), in bfloat16.
//!
//! A tile product multiplies 16 rows of 32 activations with 32 x 16 weights in 16 cycles, sixteen
//! times what fused multiply-adds do. Weights are unpacked to float32 panel by panel, whatever
//! their kind, then rounded to bfloat16; bfloat16 ones are read where they lie.
//!
//! A float32 factor is a sum of up to three bfloat16 *parts* of 8 bits each, the first the nearest
//! bfloat16, the next that of what is left. The products of parts i and j with i + j less than the
//! number of parts, added in float32, have the accuracy of the parts' bits: one part is bfloat16
//! arithmetic, two are 16 bits in three products, three float32's 24 bits in six. (Henry, Tang,
//! Heinecke: "Leveraging the bfloat16 artificial intelligence datatype for higher-precision
//! computations", ARITH 2019.)
//!
//! Layouts, STEP elements of K at a time, parts side by side, so that every operand is one stream:
//! x [rows / 16][steps][parts][16 rows][32 k], weights [steps][parts][16 pairs of k][32 columns][2].
//!
//! Cost: a task reads x once for every `PANEL_BYTES` of weights, and unpacks each weight once.

use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;

use octavo_formats::blocks::Format;
use octavo_formats::with_format;

use crate::float::DType;
use crate::level::Level;
use crate::linear::float::{Emit, K_BLOCK, Unpack};
use crate::linear::form::{Form, Out};
use crate::linear::layout::{Packed, View};
use crate::pool;
use crate::scratch::with_floats;
use crate::simd::{Kernel, Simd};
use crate::tensor::{Convert, Rows, RowsMut};

/// Fewer rows are faster as int8 or float32 vectors, since unpacking a panel costs the same for any
/// number of rows: compare levels amx and avx512 in `cargo bench -p octavo-cpu --bench cpu`.
pub(super) const MIN_ROWS: usize = 20;
/// Rows of a tile of x and columns of a tile of weights.
const TILE: usize = 16;
/// Elements of K that a tile product takes.
const STEP: usize = 32;
/// Columns of a panel: two tiles.
const PANEL: usize = 2 * TILE;
/// Unpacked panels of one task: half of a second-level cache of 2 MiB, the rest is x's.
const PANEL_BYTES: usize = 1 << 20;
/// Up to so many rows x stays in the first-level cache, so panels go one by one to stay there too.
const ONE_PANEL_ROWS: usize = 32;

/// bfloat16 parts of (x, weights): as many as their types have bits for, except that without
/// `exact` quantized weights are rounded to one and what they meet to two. One part for
/// both costs perplexity (bench/NOTES.md, "Integer products"), this does not.
fn parts(packed: Packed, x: DType, exact: bool) -> (usize, usize) {
    let of = |dtype| match dtype {
        DType::Bf16 => 1,
        DType::F16 => 2,
        DType::F32 => 3,
    };
    match packed.dtype() {
        None if !exact => (of(x).min(2), 1),
        weights => (of(x), of(weights.unwrap_or(DType::F32))),
    }
}

/// x as bfloat16 parts; see the module doc.
#[derive(Clone, Copy)]
pub(super) struct Activations {
    values: *const u16,
    num_parts: usize,
    /// Of the weights that they will meet.
    weight_parts: usize,
    /// Elements of a tile of rows, all steps and parts.
    tile: usize,
}

// SAFETY: written by `split` before anybody reads; the buffer outlives the region.
unsafe impl Sync for Activations {}
// SAFETY: as above.
unsafe impl Send for Activations {}

impl Activations {
    /// Address of a row's first elements.
    ///
    /// # Safety
    /// It exists.
    unsafe fn row(&self, row: usize) -> *const u16 {
        // SAFETY: the caller's.
        unsafe { self.values.add(row / TILE * self.tile + row % TILE * STEP) }
    }

    /// Floats of buffer that `split` needs: whole pairs of tiles.
    pub(super) fn floats(x: Rows, weight: View, exact: bool) -> usize {
        let (num_parts, _) = parts(weight.packed, x.dtype, exact);
        num_parts * x.rows.next_multiple_of(2 * TILE) * weight.k.next_multiple_of(STEP) / 2
    }

    /// Split x into `buffer`.
    ///
    /// # Safety
    /// `level` has AMX; x describes valid memory of K columns; `buffer` holds `floats(...)`.
    pub(super) unsafe fn split(
        level: Level,
        x: Rows,
        weight: View,
        exact: bool,
        buffer: *mut f32,
    ) -> Activations {
        let (num_parts, weight_parts) = parts(weight.packed, x.dtype, exact);
        let k = weight.k.next_multiple_of(STEP);
        let out = Activations {
            values: buffer.cast(),
            num_parts,
            weight_parts,
            tile: TILE * k * num_parts,
        };
        let whole = x.dtype == DType::F32 && k == weight.k;
        let step = (16_384 / k).max(1);
        pool::run(x.rows.div_ceil(step), |task| {
            with_floats(1, k, |floats| {
                for row in task * step..((task + 1) * step).min(x.rows) {
                    // SAFETY: the caller's; `floats` holds a row; tasks write disjoint rows.
                    unsafe {
                        let mut from = x.at(row, 0).cast::<f32>();
                        if !whole {
                            let line = RowsMut::new(floats.cast(), DType::F32, 1, k);
                            let x = Rows {
                                ptr: from.cast(),
                                rows: 1,
                                ..x
                            };
                            level.run(Convert {
                                x,
                                out: line,
                                rows: 0..1,
                            });
                            from = floats;
                        }
                        split_row(from, k, num_parts, out.row(row).cast_mut());
                    }
                }
            });
        });
        out
    }
}

/// The nearest bfloat16 as a float32, ties away from zero: two instructions. Finite values up to
/// bfloat16's largest, infinities and the NaNs that arithmetic makes stay what they are.
#[inline]
#[target_feature(enable = "avx512f")]
fn nearest(x: __m512) -> __m512 {
    let up = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000));
    _mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32(!0xffff)))
}

/// The parts of `n` floats of any alignment, a row of tiles from `to` on.
///
/// # Safety
/// The CPU has the features; `x` holds n floats, n a multiple of 32; the tiles exist.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn split_row(x: *const f32, n: usize, num_parts: usize, to: *mut u16) {
    let tile = TILE * STEP;
    for at in (0..n).step_by(TILE) {
        // SAFETY: the caller's.
        unsafe {
            let mut left = _mm512_loadu_ps(x.byte_add(at * 4));
            let to = to.add(at / STEP * num_parts * tile + at % STEP);
            for p in 0..num_parts {
                let near = nearest(left);
                let high = _mm512_srli_epi32::<16>(_mm512_castps_si512(near));
                _mm256_storeu_si256(to.add(p * tile).cast(), _mm512_cvtepi32_epi16(high));
                left = _mm512_sub_ps(left, near);
            }
        }
    }
}

/// The parts of `pairs` pairs of k of a panel.
///
/// # Safety
/// The CPU has the features; `panel` holds 2 * pairs rows of 32 floats; `to` the steps they begin.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn split_panel(panel: *const f32, pairs: usize, num_parts: usize, to: *mut u16) {
    let tiles = STEP * PANEL;
    for pair in 0..pairs {
        let (step, line) = (pair / TILE, pair % TILE);
        for half in 0..2 {
            // SAFETY: the caller's.
            unsafe {
                let p = panel.add(2 * pair * PANEL + half * TILE);
                let (mut even, mut odd) = (_mm512_loadu_ps(p), _mm512_loadu_ps(p.add(PANEL)));
                let to = to.add(step * num_parts * tiles + (line * PANEL + half * TILE) * 2);
                for part in 0..num_parts {
                    let (e, o) = (nearest(even), nearest(odd));
                    let low = _mm512_srli_epi32::<16>(_mm512_castps_si512(e));
                    let both = _mm512_or_si512(low, _mm512_castps_si512(o));
                    _mm512_storeu_si512(to.add(part * tiles).cast(), both);
                    (even, odd) = (_mm512_sub_ps(even, e), _mm512_sub_ps(odd, o));
                }
            }
        }
    }
}

/// `unpack` in one pass for quantized weights in one part: the way by float32
/// would take most of the time of a product of few rows. `to` holds K * 32 elements.
struct RoundPanel {
    weight: View,
    panel: usize,
    to: *mut u16,
}

impl Kernel for RoundPanel {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let w = self.weight;
        // SAFETY: the panel exists; offsets are those of the layout.
        unsafe {
            with_format!(w.packed.blocks(), F => {
                let elements = F::SHAPE.elements();
                let blocks = w.k / elements;
                for half in 0..2 {
                    let first = (2 * self.panel + half) * blocks;
                    for b in 0..blocks {
                        let to = self.to.add((b * elements * 2 + 2 * half) * S::LANES);
                        let block = w.bytes.add((first + b) * F::LAYOUT.block * S::LANES);
                        F::weights(s, block, &Pairs(to));
                    }
                }
            });
        }
    }
}

/// bfloat16 [K / 2][2 LANES][2], at one of the halves.
struct Pairs(*mut u16);

impl<S: Simd> Out<S> for Pairs {
    #[inline(always)]
    unsafe fn put(&self, s: S, k: usize, even: S::V, odd: S::V) {
        // SAFETY: the caller's.
        unsafe { s.store_bf16_pairs(self.0.add(k * 2 * S::LANES), even, odd) }
    }
}

/// Operand of `ldtilecfg`: all eight tiles of 16 rows of 64 bytes.
#[repr(C, align(64))]
struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static ALL_TILES: TileConfig = TileConfig {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// One instruction of a step: `x0` to `x2` load that part of both tiles of x, `w0` to `w2` that of both
/// tiles of weights, `m` adds the four products of the parts that are loaded.
macro_rules! step {
    (x0) => { step!(@x "") };
    (x1) => { step!(@x " + 1024") };
    (x2) => { step!(@x " + 2048") };
    (w0) => { step!(@w "" "64") };
    (w1) => { step!(@w " + 2048" "2112") };
    (w2) => { step!(@w " + 4096" "4160") };
    (m) => {
        "tdpbf16ps tmm0, tmm4, tmm6\ntdpbf16ps tmm1, tmm4, tmm7\n\
         tdpbf16ps tmm2, tmm5, tmm6\ntdpbf16ps tmm3, tmm5, tmm7\n"
    };
    (@x $part:literal) => {
        concat!(
            "tileloadd tmm4, [{x} + 1*{row}", $part, "]\n",
            "tileloadd tmm5, [{x2} + 1*{row}", $part, "]\n",
        )
    };
    (@w $first:literal $second:literal) => {
        concat!(
            "tileloadd tmm6, [{w} + 1*{line}", $first, "]\n",
            "tileloadd tmm7, [{w} + 1*{line} + ", $second, "]\n",
        )
    };
}

/// A product with these instructions a step; the smallest products come first.
macro_rules! multiply {
    ($args:ident, $($step:ident)+) => {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            concat!($(step!($step)),+),
            "add {x}, {x_step}",
            "add {x2}, {x_step}",
            "add {w}, {w_step}",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{sums} + 1*{line}], tmm0",
            "tilestored [{sums} + 1*{line} + 64], tmm1",
            "tilestored [{sums} + 1*{line} + 2048], tmm2",
            "tilestored [{sums} + 1*{line} + 2112], tmm3",
            x = inout(reg) $args.x => _,
            x2 = inout(reg) $args.x.add($args.tile) => _,
            w = inout(reg) $args.weights => _,
            steps = inout(reg) $args.steps => _,
            x_step = in(reg) $args.x_parts * TILE * STEP * 2,
            w_step = in(reg) $args.weight_parts * STEP * PANEL * 2,
            row = in(reg) STEP * 2,
            line = in(reg) PANEL * 4,
            sums = in(reg) $args.sums,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    };
}

/// Two tiles of rows times a panel.
struct Multiply {
    /// Their first step; the second tile is `tile` elements after it.
    x: *const u16,
    tile: usize,
    x_parts: usize,
    weights: *const u16,
    weight_parts: usize,
    /// At least one.
    steps: usize,
    /// float32 [32][32]
    sums: *mut f32,
}

impl Multiply {
    /// # Safety
    /// The tiles are configured as in `ALL_TILES`; the operands are of the module doc's layouts.
    unsafe fn run(self) {
        // SAFETY: the caller's; only tile registers, `sums` and the operands change.
        unsafe {
            match (self.x_parts, self.weight_parts) {
                (1, 1) => multiply!(self, x0 w0 m),
                (1, 2) => multiply!(self, x0 w1 m w0 m),
                (1, _) => multiply!(self, x0 w2 m w1 m w0 m),
                (2, 1) => multiply!(self, w0 x1 m x0 m),
                (2, 2) => multiply!(self, x0 w1 m w0 m x1 m),
                (2, _) => multiply!(self, x0 w2 m x1 w1 m w0 m x0 m w1 m),
                (_, 1) => multiply!(self, w0 x2 m x1 m x0 m),
                (_, 2) => multiply!(self, w0 x2 m x1 m w1 m x0 m w0 m),
                (_, _) => multiply!(self, w0 x2 m x1 m w1 m x0 m w2 m w0 m),
            }
        }
    }
}

/// Panels `panels` of the weight for rows `rows` of x.
pub(super) struct AmxTask {
    /// One that has AMX.
    pub level: Level,
    /// The weight, packed for it.
    pub weight: View,
    /// x, split.
    pub x: Activations,
    /// [1, N]
    pub bias: Option<Rows>,
    /// [M, N]
    pub y: RowsMut,
    /// Range of panels.
    pub panels: Range<usize>,
    /// Range of rows; the first a multiple of 32.
    pub rows: Range<usize>,
}

impl AmxTask {
    /// # Safety
    /// `Linear::forward`'s contract, and `x` is the split of its x.
    pub(super) unsafe fn run(&self) {
        let steps = self.weight.k.div_ceil(STEP);
        // Elements of a panel's parts.
        let size = steps * STEP * PANEL * self.x.weight_parts;
        let direct =
            self.weight.packed == Packed::Plain(DType::Bf16) && self.weight.k.is_multiple_of(STEP);
        let group = if self.rows.len() <= ONE_PANEL_ROWS {
            1
        } else {
            (PANEL_BYTES / (2 * size)).clamp(1, self.panels.len().max(1))
        };
        let unpacked = if direct { 0 } else { group * size };
        let floats = PANEL * PANEL + K_BLOCK * PANEL + unpacked / 2;
        with_floats(1, floats, |sums| {
            // SAFETY: the caller's; the scratch is cut into disjoint parts of these sizes; the
            // tiles are configured before they are used and released after.
            unsafe {
                let slice = sums.add(PANEL * PANEL);
                let panels = slice.add(K_BLOCK * PANEL).cast::<u16>();
                asm!("ldtilecfg [{}]", in(reg) &raw const ALL_TILES, options(nostack, readonly));
                let mut first = self.panels.start;
                while first < self.panels.end {
                    let end = (first + group).min(self.panels.end);
                    if !direct {
                        for panel in first..end {
                            self.unpack(panel, slice, panels.add((panel - first) * size));
                        }
                    }
                    for row in self.rows.clone().step_by(2 * TILE) {
                        let rows = (self.rows.end - row).min(2 * TILE);
                        for panel in first..end {
                            let weights = if direct {
                                self.weight.bytes.cast::<u16>().add(panel * size)
                            } else {
                                panels.add((panel - first) * size).cast_const()
                            };
                            let product = Multiply {
                                x: self.x.row(row),
                                tile: self.x.tile,
                                x_parts: self.x.num_parts,
                                weights,
                                weight_parts: self.x.weight_parts,
                                steps,
                                sums,
                            };
                            product.run();
                            self.level.run(Emit {
                                n: self.weight.n,
                                bias: self.bias,
                                y: self.y,
                                panel,
                                row,
                                rows,
                                sums,
                            });
                        }
                    }
                    first = end;
                }
                asm!("tilerelease", options(nomem, nostack));
            }
        });
    }

    /// One panel's parts, zeros after K.
    ///
    /// # Safety
    /// As `run`; slice holds K_BLOCK rows of a panel, `to` the parts.
    unsafe fn unpack(&self, panel: usize, slice: *mut f32, to: *mut u16) {
        let (weight, num_parts) = (self.weight, self.x.weight_parts);
        let k = weight.k.next_multiple_of(2);
        // SAFETY: the caller's.
        unsafe {
            if num_parts == 1 && weight.packed.dtype().is_none() {
                return self.level.run(RoundPanel { weight, panel, to });
            }
            let padded = k.next_multiple_of(STEP);
            if padded > k {
                let last = STEP * PANEL * num_parts;
                std::ptr::write_bytes(to.add(padded / STEP * last - last), 0, last);
            }
            for k0 in (0..k).step_by(K_BLOCK) {
                let len = (k - k0).min(K_BLOCK);
                let from = self.level.run(Unpack {
                    weight,
                    panel,
                    k0,
                    len,
                    slice,
                });
                split_panel(from, len / 2, num_parts, to.add(k0 * PANEL * num_parts));
            }
        }
    }
}
