//! FloatTask: float32 arithmetic over packed weights, for the plain kinds and the exact mode.
//!
//! A tile is ROWS rows of x by one panel (2 vectors) of weights, its sums in registers; K goes in
//! blocks whose panel slice stays in the first-level cache. Kinds other than F32 are unpacked into
//! such a slice once per row block; BF16, F16 and kinds that have no integer products are read directly
//! with few rows, since a matrix times a vector is as fast as the memory and the detour would cost.
//!
//! Longer than other files: a tile's loops, for each kind of weights, share their registers' layout.

use std::cell::Cell;
use std::ops::Range;

use octavo_formats::blocks::Format;
use octavo_formats::with_format;

use crate::float::DType;
use crate::linear::form::{Form, Out};
use crate::linear::int8::{PREFETCH_BYTES, Product};
use crate::linear::layout::{Packed, View};
use crate::simd::{Kernel, Simd};
use crate::tensor::{Rows, RowsMut, load_some, store_some};

/// Elements of K in one block: a panel slice is 16 KiB (32 with 16 lanes).
pub(crate) const K_BLOCK: usize = 256;
/// Rows of x in one block: their sums stay in the first-level cache.
pub(crate) const ROW_BLOCK: usize = 96;
/// Scratch of a task at any level: a panel slice and a block of sums.
pub(crate) const SCRATCH_FLOATS: usize = (K_BLOCK + ROW_BLOCK) * 32;
/// Up to so many rows weights are read without unpacking.
const DIRECT_ROWS: usize = 4;

/// Panels `panels` of the weight for rows `rows` of x.
pub(crate) struct FloatTask {
    /// The weight.
    pub weight: View,
    /// float32, stride even and at least K.
    pub x: Rows,
    /// [1, N]
    pub bias: Option<Rows>,
    /// [M, N]
    pub y: RowsMut,
    /// Range of panels.
    pub panels: Range<usize>,
    /// Range of rows.
    pub rows: Range<usize>,
    /// `SCRATCH_FLOATS` of this thread's own.
    pub scratch: *mut f32,
}

/// A panel's element type, as a tile reads two k of it.
trait Panel: Copy {
    /// # Safety
    /// The pair exists.
    unsafe fn load<S: Simd>(self, s: S, pair: usize) -> [S::V; 4];
}

/// For each k, 2 vectors of float32.
#[derive(Clone, Copy)]
struct F32Panel(*const f32);
#[derive(Clone, Copy)]
struct Bf16Panel(*const u16);
#[derive(Clone, Copy)]
struct F16Panel(*const u16);

impl Panel for F32Panel {
    #[inline(always)]
    unsafe fn load<S: Simd>(self, s: S, pair: usize) -> [S::V; 4] {
        // SAFETY: the caller's.
        unsafe {
            let p = self.0.add(pair * 4 * S::LANES);
            [
                s.load(p),
                s.load(p.add(S::LANES)),
                s.load(p.add(2 * S::LANES)),
                s.load(p.add(3 * S::LANES)),
            ]
        }
    }
}

impl Panel for Bf16Panel {
    #[inline(always)]
    unsafe fn load<S: Simd>(self, s: S, pair: usize) -> [S::V; 4] {
        // SAFETY: the caller's.
        unsafe {
            let p = self.0.add(pair * 4 * S::LANES);
            let (a, b) = s.load_bf16_pairs(p);
            let (c, d) = s.load_bf16_pairs(p.add(2 * S::LANES));
            [a, c, b, d]
        }
    }
}

impl Panel for F16Panel {
    #[inline(always)]
    unsafe fn load<S: Simd>(self, s: S, pair: usize) -> [S::V; 4] {
        // SAFETY: the caller's.
        unsafe {
            let p = self.0.add(pair * 4 * S::LANES);
            [
                s.load_f16(p),
                s.load_f16(p.add(S::LANES)),
                s.load_f16(p.add(2 * S::LANES)),
                s.load_f16(p.add(3 * S::LANES)),
            ]
        }
    }
}

/// sums[R][2 LANES] += R rows of x times `pairs` pairs of a panel.
///
/// # Safety
/// x: R rows of 2 * pairs floats, `stride` apart; sums: R * 2 * LANES floats.
#[inline(always)]
unsafe fn tile<S: Simd, P: Panel, const R: usize>(
    s: S,
    x: *const f32,
    stride: usize,
    panel: P,
    pairs: usize,
    sums: *mut f32,
) {
    // SAFETY: the caller's.
    unsafe {
        let mut acc = [[s.zero(); 2]; R];
        for (r, acc) in acc.iter_mut().enumerate() {
            acc[0] = s.load(sums.add(2 * r * S::LANES));
            acc[1] = s.load(sums.add((2 * r + 1) * S::LANES));
        }
        for pair in 0..pairs {
            let [a0, a1, b0, b1] = panel.load(s, pair);
            for (r, acc) in acc.iter_mut().enumerate() {
                let x0 = s.splat(*x.add(r * stride + 2 * pair));
                acc[0] = s.fma(x0, a0, acc[0]);
                acc[1] = s.fma(x0, a1, acc[1]);
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                let x1 = s.splat(*x.add(r * stride + 2 * pair + 1));
                acc[0] = s.fma(x1, b0, acc[0]);
                acc[1] = s.fma(x1, b1, acc[1]);
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            s.store(sums.add(2 * r * S::LANES), acc[0]);
            s.store(sums.add((2 * r + 1) * S::LANES), acc[1]);
        }
    }
}

/// `tile` for any number of rows: the largest tiles first.
///
/// # Safety
/// As `tile`, with `rows` in place of R.
#[inline(always)]
pub(crate) unsafe fn panel_tiles_f32<S: Simd>(
    s: S,
    x: *const f32,
    stride: usize,
    rows: usize,
    panel: *const f32,
    pairs: usize,
    sums: *mut f32,
) {
    // SAFETY: the caller's.
    unsafe { panel_tiles(s, x, stride, rows, F32Panel(panel), pairs, sums) }
}

/// `panel_tiles_f32` with sums that begin at zero.
///
/// # Safety
/// As there.
#[inline(always)]
pub(crate) unsafe fn panel_product_f32<S: Simd>(
    s: S,
    x: *const f32,
    stride: usize,
    rows: usize,
    panel: *const f32,
    pairs: usize,
    sums: *mut f32,
) {
    // SAFETY: the caller's.
    unsafe {
        for i in 0..2 * rows {
            s.store(sums.add(i * S::LANES), s.zero());
        }
        panel_tiles_f32(s, x, stride, rows, panel, pairs, sums);
    }
}

#[inline(always)]
unsafe fn panel_tiles<S: Simd, P: Panel>(
    s: S,
    x: *const f32,
    stride: usize,
    rows: usize,
    panel: P,
    pairs: usize,
    sums: *mut f32,
) {
    let mut r = 0;
    while r < rows {
        // SAFETY: the caller's; each tile takes at most the rows that are left.
        unsafe {
            let (x, sums) = (x.add(r * stride), sums.add(2 * r * S::LANES));
            match rows - r {
                left if left >= 12 && S::ROWS >= 12 => {
                    tile::<S, P, 12>(s, x, stride, panel, pairs, sums);
                    r += 12;
                }
                left if left >= 6 && S::ROWS >= 6 => {
                    tile::<S, P, 6>(s, x, stride, panel, pairs, sums);
                    r += 6;
                }
                left if left >= 4 => {
                    tile::<S, P, 4>(s, x, stride, panel, pairs, sums);
                    r += 4;
                }
                3 => {
                    tile::<S, P, 3>(s, x, stride, panel, pairs, sums);
                    r += 3;
                }
                2 => {
                    tile::<S, P, 2>(s, x, stride, panel, pairs, sums);
                    r += 2;
                }
                _ => {
                    tile::<S, P, 1>(s, x, stride, panel, pairs, sums);
                    r += 1;
                }
            }
        }
    }
}

impl Kernel for FloatTask {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let k = self.weight.k.next_multiple_of(2);
        // SAFETY: `Linear::forward`'s contract; scratch holds a slice and a block of sums.
        unsafe {
            let sums = self.scratch.add(K_BLOCK * 2 * S::LANES);
            for panel in self.panels.clone() {
                let mut row = self.rows.start;
                while row < self.rows.end {
                    let rows = (self.rows.end - row).min(ROW_BLOCK);
                    for i in 0..2 * rows {
                        s.store(sums.add(i * S::LANES), s.zero());
                    }
                    let mut k0 = 0;
                    while k0 < k {
                        let len = (k - k0).min(K_BLOCK);
                        self.block(s, panel, row, rows, k0, len, self.scratch, sums);
                        k0 += len;
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
                    row += rows;
                }
            }
        }
    }
}

impl FloatTask {
    /// sums += x[row.., k0..k0 + len] times that part of a panel.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    unsafe fn block<S: Simd>(
        &self,
        s: S,
        panel: usize,
        row: usize,
        rows: usize,
        k0: usize,
        len: usize,
        slice: *mut f32,
        sums: *mut f32,
    ) {
        let width = 2 * S::LANES;
        let w = &self.weight;
        let pairs = len / 2;
        // SAFETY: `Linear::forward`'s contract, and the layouts in `linear`'s doc.
        unsafe {
            let x = self.x.at(row, k0).cast::<f32>();
            let stride = self.x.stride;
            if rows <= DIRECT_ROWS && k0 + len <= w.k {
                if w.packed == Packed::Plain(DType::Bf16) {
                    let p = w.bf16_panel(panel, k0, width);
                    return panel_tiles(s, x, stride, rows, Bf16Panel(p), pairs, sums);
                }
                if w.packed == Packed::Plain(DType::F16) {
                    let p = w.bytes.cast::<u16>().add((panel * w.k + k0) * width);
                    return panel_tiles(s, x, stride, rows, F16Panel(p), pairs, sums);
                }
            }
            if rows <= DIRECT_ROWS
                && let Packed::Blocks(format) = w.packed
                && with_format!(format, F => {
                    if const { Product::of(F::SHAPE).is_none() } {
                        // Rows in excess repeat the last one.
                        let x = |r: usize| x.add(r.min(rows - 1) * stride);
                        if rows == 1 {
                            self.dots::<S, F, 1>(s, panel, [x(0)], k0..k0 + len, rows, sums);
                        } else {
                            let x = [x(0), x(1), x(2), x(3)];
                            self.dots::<S, F, DIRECT_ROWS>(s, panel, x, k0..k0 + len, rows, sums);
                        }
                        true
                    } else {
                        false
                    }
                })
            {
                return;
            }
            let weight = self.weight;
            let unpack = Unpack {
                weight,
                panel,
                k0,
                len,
                slice,
            };
            let panel = F32Panel(unpack.run(s));
            panel_tiles(s, x, stride, rows, panel, pairs, sums);
        }
    }
}

impl FloatTask {
    /// sums += R rows, of which `rows` count, times the blocks of `ks` of a panel.
    ///
    /// # Safety
    /// As `block`; `x` has the rows' addresses.
    #[inline(always)]
    unsafe fn dots<S: Simd, F: Form, const R: usize>(
        &self,
        s: S,
        panel: usize,
        x: [*const f32; R],
        ks: Range<usize>,
        rows: usize,
        sums: *mut f32,
    ) {
        let elements = F::SHAPE.elements();
        let bytes = F::LAYOUT.block * S::LANES;
        for half in 0..2 {
            // SAFETY: the caller's, and the layouts in `linear`'s doc.
            unsafe {
                let first = (2 * panel + half) * (self.weight.k / elements) + ks.start / elements;
                let block = self.weight.bytes.add(first * bytes);
                let mut dots = Dots::<S, R>::new(s, x);
                for b in 0..ks.len() / elements {
                    for line in (0..bytes).step_by(64) {
                        s.prefetch(block.wrapping_add(b * bytes + PREFETCH_BYTES + line));
                    }
                    F::weights(s, block.add(b * bytes), &dots);
                    dots.x = dots.x.map(|x| x.add(elements));
                }
                for r in 0..rows {
                    let sum = sums.add((2 * r + half) * S::LANES);
                    let more = s.add(dots.even[r].get(), dots.odd[r].get());
                    s.store(sum, s.add(s.load(sum), more));
                }
            }
        }
    }
}

/// Sums of a tile's weights times R rows of x, those of even and odd elements of K.
struct Dots<S: Simd, const R: usize> {
    x: [*const f32; R],
    even: [Cell<S::V>; R],
    odd: [Cell<S::V>; R],
}

impl<S: Simd, const R: usize> Dots<S, R> {
    #[inline(always)]
    fn new(s: S, x: [*const f32; R]) -> Self {
        let zeros = || std::array::from_fn(|_| Cell::new(s.zero()));
        Dots {
            x,
            even: zeros(),
            odd: zeros(),
        }
    }
}

impl<S: Simd, const R: usize> Out<S> for Dots<S, R> {
    #[inline(always)]
    unsafe fn put(&self, s: S, k: usize, even: S::V, odd: S::V) {
        for r in 0..R {
            // SAFETY: the caller's: rows of x as long as the weights.
            let [a, b] = unsafe { [s.splat(*self.x[r].add(k)), s.splat(*self.x[r].add(k + 1))] };
            self.even[r].set(s.fma(a, even, self.even[r].get()));
            self.odd[r].set(s.fma(b, odd, self.odd[r].get()));
        }
    }
}

/// Part of a panel as float32 [len][2 LANES].
pub(crate) struct Unpack {
    /// The weight.
    pub weight: View,
    /// Index of the panel.
    pub panel: usize,
    /// The first element of K, a multiple of `K_BLOCK`.
    pub k0: usize,
    /// Number of elements, even; the last of an odd K comes with a zero.
    pub len: usize,
    /// Room for them.
    pub slice: *mut f32,
}

impl Kernel for Unpack {
    /// Their address: in the slice, or in the weight itself.
    type Out = *const f32;
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) -> *const f32 {
        let width = 2 * S::LANES;
        let Unpack {
            weight: w,
            panel,
            k0,
            len,
            slice,
        } = self;
        // SAFETY: the layouts in `linear`'s doc.
        unsafe {
            match w.packed {
                Packed::Plain(DType::F32) => {
                    let p = w.bytes.cast::<f32>().add((panel * w.k + k0) * width);
                    if k0 + len <= w.k {
                        return p;
                    }
                    std::ptr::copy_nonoverlapping(p, slice, (len - 1) * width);
                    for i in (len - 1) * width..len * width {
                        *slice.add(i) = 0.0;
                    }
                }
                Packed::Plain(DType::Bf16) => {
                    let p = w.bf16_panel(panel, k0, width);
                    for pair in 0..len / 2 {
                        let v = Bf16Panel(p).load(s, pair);
                        for (i, v) in v.into_iter().enumerate() {
                            s.store(slice.add((4 * pair + i) * S::LANES), v);
                        }
                    }
                }
                Packed::Plain(DType::F16) => {
                    let p = w.bytes.cast::<u16>().add((panel * w.k + k0) * width);
                    for i in 0..2 * len {
                        let inside = k0 + i / 2 < w.k;
                        let v = if inside {
                            s.load_f16(p.add(i * S::LANES))
                        } else {
                            s.zero()
                        };
                        s.store(slice.add(i * S::LANES), v);
                    }
                }
                Packed::Blocks(format) => with_format!(format, F => {
                    let elements = F::SHAPE.elements();
                    let bytes = F::LAYOUT.block * S::LANES;
                    for half in 0..2 {
                        let tile = 2 * panel + half;
                        let first = tile * (w.k / elements) + k0 / elements;
                        for b in 0..len / elements {
                            let to = slice.add(b * elements * width + half * S::LANES);
                            F::weights(s, w.bytes.add((first + b) * bytes), &Slice(to));
                        }
                    }
                }),
            }
        }
        slice
    }
}

/// Sums [rows][2 LANES] plus bias, as y's elements.
pub(crate) struct Emit {
    /// Columns of y.
    pub n: usize,
    /// [1, N]
    pub bias: Option<Rows>,
    /// [M, N]
    pub y: RowsMut,
    /// Index of the panel.
    pub panel: usize,
    /// The first row.
    pub row: usize,
    /// Number of rows.
    pub rows: usize,
    /// Sums to write.
    pub sums: *const f32,
}

impl Kernel for Emit {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        for half in 0..2 {
            let col = (2 * self.panel + half) * S::LANES;
            let valid = self.n.saturating_sub(col).min(S::LANES);
            if valid == 0 {
                return;
            }
            // SAFETY: `Linear::forward`'s contract.
            unsafe {
                let bias = match self.bias {
                    Some(b) => load_some(s, b.at(0, col), b.dtype, valid),
                    None => s.zero(),
                };
                for r in 0..self.rows {
                    let v = s.load(self.sums.add((2 * r + half) * S::LANES));
                    let to = self.y.at(self.row + r, col);
                    store_some(s, to, self.y.dtype, s.add(v, bias), valid);
                }
            }
        }
    }
}

/// float32 [K][2 LANES], at one of the halves.
struct Slice(*mut f32);

impl<S: Simd> Out<S> for Slice {
    #[inline(always)]
    unsafe fn put(&self, s: S, k: usize, even: S::V, odd: S::V) {
        // SAFETY: the caller's.
        unsafe {
            s.store(self.0.add(k * 2 * S::LANES), even);
            s.store(self.0.add((k + 1) * 2 * S::LANES), odd);
        }
    }
}
