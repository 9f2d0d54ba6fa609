//! Form: a block format as the vector kernels read it, a group of a tile at a time.

use octavo_formats::blocks::Format;

use crate::linear::layout::BlockLayout;
use crate::simd::{GROUP, Simd};

/// A block format's reads in vectors.
pub(super) trait Form: Format {
    /// Sizes of a block.
    const LAYOUT: BlockLayout = BlockLayout::of(Self::SHAPE);

    /// The block's halves: d, and m or dmin (else zero).
    ///
    /// # Safety
    /// `block` is one of a tile of this kind, here and below.
    #[inline(always)]
    unsafe fn head<S: Simd>(s: S, block: *const u8) -> [S::V; 2] {
        // SAFETY: the caller's.
        unsafe {
            let d = s.load_f16(block.cast());
            if Self::SHAPE.halves == 1 {
                return [d, s.zero()];
            }
            [d, s.load_f16(block.add(2 * S::LANES).cast())]
        }
    }

    /// Scale and minimum of half `half` of group `g`: an element is scale * q + minimum, with the
    /// format's offset in the minimum. See [`octavo_formats::blocks::Shape::scale`].
    ///
    /// # Safety
    /// As `head`, which gave `d` and `m`.
    #[inline(always)]
    unsafe fn scale<S: Simd>(
        s: S,
        [d, m]: [S::V; 2],
        block: *const u8,
        g: usize,
        half: usize,
    ) -> [S::V; 2] {
        // SAFETY: the caller's.
        unsafe {
            let shape = Self::SHAPE;
            let scales = block.add(2 * shape.halves * S::LANES).cast::<i8>();
            let scale = |i: usize| s.load_i8(scales.add(i * S::LANES));
            let scaled = match (shape.scales > 0, shape.halves) {
                (false, _) => d,
                (true, 1) => s.mul(d, scale(2 * g + half)),
                (true, _) => s.mul(d, scale(g)),
            };
            let minimum = match (shape.scales > 0, shape.halves) {
                (true, 2) => s.sub(s.zero(), s.mul(m, scale(shape.groups + g))),
                _ if shape.offset > 0 => s.mul(scaled, s.splat(-f32::from(shape.offset))),
                _ => m,
            };
            [scaled, minimum]
        }
    }

    /// Address of group `g`.
    ///
    /// # Safety
    /// As `head`.
    #[inline(always)]
    unsafe fn group<S: Simd>(block: *const u8, g: usize) -> *const u8 {
        // SAFETY: the caller's.
        unsafe { block.add((Self::LAYOUT.head + g * Self::LAYOUT.group) * S::LANES) }
    }

    /// The group at `p`: byte b of vector j has elements 4j + b.
    ///
    /// # Safety
    /// As `head`.
    #[inline(always)]
    unsafe fn values<S: Simd>(s: S, p: *const u8) -> [S::I; 8] {
        // SAFETY: the caller's.
        unsafe {
            let bits = Self::SHAPE.bits;
            let first = s.load_words(p);
            let mut out = [first; 8];
            if bits == 8 {
                for (j, out) in out.iter_mut().enumerate() {
                    *out = s.load_words(p.add(4 * j * S::LANES));
                }
                return out;
            }
            let nibbles = p.add((bits - 4) * 4 * S::LANES);
            for j in 0..4 {
                let both = s.load_words(nibbles.add(4 * j * S::LANES));
                out[j] = s.and(both, 0x0f0f_0f0f);
                out[j + 4] = s.and(s.shift_right::<4>(both), 0x0f0f_0f0f);
            }
            // Fields move to bits 4 and 5 of their bytes; what crosses from byte to byte is masked.
            if bits == 5 {
                let up = [
                    s.shift_left::<4>(first),
                    s.shift_left::<3>(first),
                    s.shift_left::<2>(first),
                    s.shift_left::<1>(first),
                    first,
                    s.shift_right::<1>(first),
                    s.shift_right::<2>(first),
                    s.shift_right::<3>(first),
                ];
                for j in 0..8 {
                    out[j] = s.or(out[j], s.and(up[j], 0x1010_1010));
                }
            }
            if bits == 6 {
                let second = s.load_words(p.add(4 * S::LANES));
                let up = [
                    s.shift_left::<4>(first),
                    s.shift_left::<2>(first),
                    first,
                    s.shift_right::<2>(first),
                    s.shift_left::<4>(second),
                    s.shift_left::<2>(second),
                    second,
                    s.shift_right::<2>(second),
                ];
                for j in 0..8 {
                    out[j] = s.or(out[j], s.and(up[j], 0x3030_3030));
                }
            }
            out
        }
    }

    /// Put the weights of a block, as float32, into `out`.
    ///
    /// # Safety
    /// As `head`; `out` takes them all.
    #[inline(always)]
    unsafe fn weights<S: Simd, O: Out<S>>(s: S, block: *const u8, out: &O) {
        // SAFETY: the caller's.
        unsafe {
            let head = Self::head(s, block);
            for g in 0..Self::SHAPE.groups {
                let p = Self::group::<S>(block, g);
                let low = Self::scale(s, head, block, g, 0);
                let high = if Self::SHAPE.has_half_groups() {
                    Self::scale(s, head, block, g, 1)
                } else {
                    low
                };
                let k = g * GROUP;
                if Self::SHAPE.bits == 4 {
                    for j in 0..4 {
                        let w = s.load_words(p.add(4 * j * S::LANES));
                        let k = k + 4 * j;
                        let (a, b) = (s.nibble::<0>(w), s.nibble::<8>(w));
                        put(s, low, k, a, b, out);
                        let (a, b) = (s.nibble::<16>(w), s.nibble::<24>(w));
                        put(s, low, k + 2, a, b, out);
                        let (a, b) = (s.nibble::<4>(w), s.nibble::<12>(w));
                        put(s, high, k + 16, a, b, out);
                        let (a, b) = (s.nibble::<20>(w), s.nibble::<28>(w));
                        put(s, high, k + 18, a, b, out);
                    }
                    continue;
                }
                for (j, w) in Self::values(s, p).into_iter().enumerate() {
                    let scale = if j < 4 { low } else { high };
                    let k = k + 4 * j;
                    put(s, scale, k, s.byte::<0>(w), s.byte::<1>(w), out);
                    put(s, scale, k + 2, s.byte::<2>(w), s.byte::<3>(w), out);
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn put<S: Simd, O: Out<S>>(
    s: S,
    [scale, minimum]: [S::V; 2],
    k: usize,
    even: S::V,
    odd: S::V,
    out: &O,
) {
    // SAFETY: the caller's.
    unsafe {
        let (even, odd) = (s.fma(scale, even, minimum), s.fma(scale, odd, minimum));
        out.put(s, k, even, odd);
    }
}

/// A destination of a tile's weights.
pub(super) trait Out<S: Simd> {
    /// Write elements k, even, and k + 1.
    ///
    /// # Safety
    /// There is room for them.
    unsafe fn put(&self, s: S, k: usize, even: S::V, odd: S::V);
}

impl<F: Format> Form for F {}
