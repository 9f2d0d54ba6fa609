//! Scalar: the vector operations in plain Rust, their definition.

use std::ops::Range;

use super::{GROUP, Simd};
use crate::float::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};

/// Plain Rust, 8 lanes, so that its packed layouts are AVX2's.
#[derive(Clone, Copy)]
pub(crate) struct Scalar;

const L: usize = 8;

#[inline(always)]
fn each<T>(f: impl Fn(usize) -> T) -> [T; L] {
    std::array::from_fn(f)
}

/// Elements `part` of one row's group times the activations, plus `start`.
#[inline(always)]
fn dot_row(w: &[[u32; L]; 8], row: usize, x: &[i8; GROUP], part: Range<usize>, start: i32) -> i32 {
    let product = |i: usize| {
        let weight = w[i / 4][row].to_le_bytes()[i % 4];
        i32::from(weight) * i32::from(x[i])
    };
    part.map(product).sum::<i32>() + start
}

/// Four bytes of lane r of vector j.
///
/// # Safety
/// `(j * L + r + 1) * 4` bytes are readable at p.
#[inline(always)]
unsafe fn word(p: *const u8, j: usize, r: usize) -> [u8; 4] {
    // SAFETY: by the contract above; any alignment.
    unsafe { p.add((j * L + r) * 4).cast::<[u8; 4]>().read_unaligned() }
}

impl Simd for Scalar {
    type V = [f32; L];
    const LANES: usize = L;
    const ROWS: usize = 4;
    const INT_ROWS: usize = 4;
    type I = [u32; L];

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        [x; L]
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        each(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        each(|i| a[i] - b[i])
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        each(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        each(|i| a[i] / b[i])
    }
    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // Two roundings: without the instruction a fused one is a library call per element.
        each(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        each(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        each(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn round(self, a: Self::V) -> Self::V {
        each(|i| a[i].round_ties_even())
    }
    #[inline(always)]
    fn pow2(self, a: Self::V) -> Self::V {
        each(|i| f32::from_bits(((a[i] as i32 + 127) as u32) << 23))
    }
    #[inline(always)]
    fn select_lt(self, a: Self::V, b: Self::V, yes: Self::V, no: Self::V) -> Self::V {
        each(|i| if a[i] < b[i] { yes[i] } else { no[i] })
    }
    #[inline(always)]
    fn sum(self, a: Self::V) -> f32 {
        ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]))
    }
    #[inline(always)]
    fn hmax(self, a: Self::V) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> Self::V {
        // SAFETY: the trait's contract.
        unsafe { p.cast::<Self::V>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, a: Self::V) {
        // SAFETY: the trait's contract.
        unsafe { p.cast::<Self::V>().write_unaligned(a) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> Self::V {
        // SAFETY: the trait's contract.
        let h = unsafe { p.cast::<[u16; L]>().read_unaligned() };
        each(|i| bf16_to_f32(h[i]))
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16, a: Self::V) {
        // SAFETY: the trait's contract.
        unsafe { p.cast::<[u16; L]>().write_unaligned(a.map(f32_to_bf16)) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> Self::V {
        // SAFETY: the trait's contract.
        let h = unsafe { p.cast::<[u16; L]>().read_unaligned() };
        each(|i| f16_to_f32(h[i]))
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16, a: Self::V) {
        // SAFETY: the trait's contract.
        unsafe { p.cast::<[u16; L]>().write_unaligned(a.map(f32_to_f16)) }
    }
    #[inline(always)]
    unsafe fn load_bf16_pairs(self, p: *const u16) -> (Self::V, Self::V) {
        // SAFETY: the trait's contract.
        let h = unsafe { p.cast::<[u16; 2 * L]>().read_unaligned() };
        (
            each(|i| bf16_to_f32(h[2 * i])),
            each(|i| bf16_to_f32(h[2 * i + 1])),
        )
    }
    #[inline(always)]
    unsafe fn store_i8(self, p: *mut i8, a: Self::V) {
        // SAFETY: the trait's contract.
        unsafe { p.cast::<[i8; L]>().write_unaligned(a.map(|x| x as i8)) }
    }

    #[inline(always)]
    unsafe fn load_i8(self, p: *const i8) -> Self::V {
        // SAFETY: the trait's contract.
        unsafe { p.cast::<[i8; L]>().read_unaligned() }.map(f32::from)
    }
    #[inline(always)]
    unsafe fn store_i16(self, p: *mut i16, a: Self::V) {
        // SAFETY: the trait's contract.
        unsafe { p.cast::<[i16; L]>().write_unaligned(a.map(|x| x as i16)) }
    }
    #[inline(always)]
    fn dot_pairs(self, sum: Self::I, w: Self::I, x: i32) -> Self::I {
        let halves = |word: i32| (word << 16 >> 16, word >> 16);
        let (x0, x1) = halves(x);
        each(|i| {
            let (w0, w1) = halves(w[i].cast_signed());
            let pair = (w0 * x0).wrapping_add(w1 * x1);
            sum[i].wrapping_add(pair.cast_unsigned())
        })
    }
    #[inline(always)]
    fn to_floats(self, a: Self::I) -> Self::V {
        a.map(|x| x.cast_signed() as f32)
    }
    #[inline(always)]
    fn zero_words(self) -> Self::I {
        [0; L]
    }
    #[inline(always)]
    unsafe fn load_words(self, p: *const u8) -> Self::I {
        // SAFETY: the trait's contract.
        each(|r| u32::from_le_bytes(unsafe { word(p, 0, r) }))
    }
    #[inline(always)]
    fn and(self, a: Self::I, mask: u32) -> Self::I {
        a.map(|x| x & mask)
    }
    #[inline(always)]
    fn or(self, a: Self::I, b: Self::I) -> Self::I {
        each(|i| a[i] | b[i])
    }
    #[inline(always)]
    fn shift_left<const N: i32>(self, a: Self::I) -> Self::I {
        a.map(|x| x << N)
    }
    #[inline(always)]
    fn shift_right<const N: i32>(self, a: Self::I) -> Self::I {
        a.map(|x| x >> N)
    }
    #[inline(always)]
    fn nibble<const SHIFT: i32>(self, a: Self::I) -> Self::V {
        a.map(|x| (x >> SHIFT & 15) as f32)
    }
    #[inline(always)]
    fn byte<const BYTE: i32>(self, a: Self::I) -> Self::V {
        a.map(|x| f32::from(x.to_le_bytes()[BYTE as usize] as i8))
    }
    #[inline(always)]
    unsafe fn dot<const BITS: usize>(self, w: [Self::I; 8], x: *const i8) -> Self::V {
        // SAFETY: the trait's contract: 32 activations.
        let x = unsafe { x.cast::<[i8; GROUP]>().read_unaligned() };
        each(|r| dot_row(&w, r, &x, 0..GROUP, 0) as f32)
    }
    #[inline(always)]
    unsafe fn dot_halves(self, w: [Self::I; 8], x: *const i8, start: [i32; 2]) -> [Self::V; 2] {
        // SAFETY: the trait's contract: 32 activations.
        let x = unsafe { x.cast::<[i8; GROUP]>().read_unaligned() };
        [
            each(|r| dot_row(&w, r, &x, 0..16, start[0]) as f32),
            each(|r| dot_row(&w, r, &x, 16..GROUP, start[1]) as f32),
        ]
    }
    #[inline(always)]
    unsafe fn dot_bytes<const R: usize>(
        self,
        w: *const u8,
        x: [*const i8; R],
        _surplus: [i32; R],
    ) -> [Self::V; R] {
        // SAFETY: the trait's contract: 256 weight bytes, 32 activations a row.
        unsafe {
            std::array::from_fn(|row| {
                let x = x[row].cast::<[i8; GROUP]>().read_unaligned();
                each(|r| {
                    let mut sum = 0i32;
                    for j in 0..8 {
                        let bytes = word(w, j, r);
                        for (b, byte) in bytes.into_iter().enumerate() {
                            sum += i32::from(byte as i8) * i32::from(x[4 * j + b]);
                        }
                    }
                    sum as f32
                })
            })
        }
    }
    #[inline(always)]
    unsafe fn dot_signed_halves(
        self,
        w: [Self::I; 8],
        x: *const i8,
        _surplus: [i32; 2],
    ) -> [Self::V; 2] {
        // SAFETY: the trait's contract: 32 activations.
        let x = unsafe { x.cast::<[i8; GROUP]>().read_unaligned() };
        let half = |r: usize, part: Range<usize>| {
            part.map(|i| {
                let weight = w[i / 4][r].to_le_bytes()[i % 4].cast_signed();
                i32::from(weight) * i32::from(x[i])
            })
            .sum::<i32>() as f32
        };
        [each(|r| half(r, 0..16)), each(|r| half(r, 16..GROUP))]
    }
    #[inline(always)]
    fn lookup(self, table: &[i8; 16], a: Self::I) -> Self::I {
        a.map(|word| {
            let bytes = word.to_le_bytes();
            u32::from_le_bytes(bytes.map(|b| table[usize::from(b & 15)].cast_unsigned()))
        })
    }
    #[inline(always)]
    fn lookup_nibble<const SHIFT: i32>(self, table: &[f32; 16], a: Self::I) -> Self::V {
        a.map(|x| table[(x >> SHIFT & 15) as usize])
    }
    #[inline(always)]
    fn small_e4m3<const BYTE: i32>(self, a: Self::I) -> Self::V {
        a.map(|x| {
            let byte = u32::from(x.to_le_bytes()[BYTE as usize]);
            f32::from_bits((byte & 0x80) << 24 | (byte & 0x7f) << 20)
        })
    }
}
