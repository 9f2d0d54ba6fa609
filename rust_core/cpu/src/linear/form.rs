//! Form: a quantized kind as the vector kernels read it, a group of a tile at a time.
//!
//! Every kind's weight is scale * q + minimum with q an integer, the two the same for 32 elements
//! of K, or for 16; which numbers of a block they are made of is all that kinds differ in.

use crate::linear::layout::{Packed, Shape};
use crate::simd::Simd;

/// Compile-time name of a quantized kind.
pub trait Form {
    /// Which.
    const PACKED: Packed;
    /// Its block.
    const SHAPE: Shape = Self::PACKED.shape();

    /// What a block's groups share: d, and m or dmin (else zero).
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

    /// Scale and minimum of half `half` of group `g`. Q8_0's minimum is zero.
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
            let bytes = block.add(2 * Self::SHAPE.halves * S::LANES).cast::<i8>();
            match Self::PACKED {
                Packed::Q4_0 => [d, s.mul(d, s.splat(-8.0))],
                Packed::Q5_0 => [d, s.mul(d, s.splat(-16.0))],
                Packed::Q4_K | Packed::Q5_K => {
                    let min = s.load_i8(bytes.add((8 + g) * S::LANES));
                    let d = s.mul(d, s.load_i8(bytes.add(g * S::LANES)));
                    [d, s.sub(s.zero(), s.mul(m, min))]
                }
                Packed::Q6_K => {
                    let d = s.mul(d, s.load_i8(bytes.add((2 * g + half) * S::LANES)));
                    [d, s.mul(d, s.splat(-32.0))]
                }
                _ => [d, m],
            }
        }
    }

    /// Where group `g` begins.
    ///
    /// # Safety
    /// As `head`.
    #[inline(always)]
    unsafe fn group<S: Simd>(block: *const u8, g: usize) -> *const u8 {
        // SAFETY: the caller's.
        unsafe { block.add((Self::SHAPE.head() + g * Self::SHAPE.group()) * S::LANES) }
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

    /// Give `out` the weights of a block, as float32.
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
                let high = if matches!(Self::PACKED, Packed::Q6_K) {
                    Self::scale(s, head, block, g, 1)
                } else {
                    low
                };
                let k = g * crate::simd::GROUP;
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

/// Takes a tile's weights of elements k, even, and k + 1.
pub trait Out<S: Simd> {
    /// # Safety
    /// There is room for them.
    unsafe fn put(&self, s: S, k: usize, even: S::V, odd: S::V);
}

macro_rules! forms {
    ($($name:ident)*) => {
        $(
            /// See `Packed`.
            #[allow(non_camel_case_types)]
            pub struct $name;
            impl Form for $name {
                const PACKED: Packed = Packed::$name;
            }
        )*
    };
}

forms!(Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q4_K Q5_K Q6_K);

/// `$body` with the type `$form` that stands for a quantized kind.
macro_rules! with_form {
    (@each $packed:expr, $form:ident, $body:expr, $($name:ident)*) => {
        match $packed {
            $($crate::linear::layout::Packed::$name => {
                type $form = $crate::linear::form::$name;
                $body
            })*
            _ => unreachable!("a plain kind"),
        }
    };
    ($packed:expr, $form:ident => $body:expr) => {
        $crate::linear::form::with_form!(
            @each $packed, $form, $body, Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q4_K Q5_K Q6_K
        )
    };
}
pub(super) use with_form;
