//! Neon: two 4-lane vectors as one of 8 lanes, so that packed layouts are the same as AVX2's.

use std::arch::aarch64::*;

use crate::float::{f16_to_f32, f32_to_bf16, f32_to_f16};
use crate::simd::{Kernel, Simd};

/// Exists only inside [`run`].
#[derive(Clone, Copy)]
pub(crate) struct Neon(());

/// Run a kernel with the features on.
///
/// # Safety
/// The CPU has neon; the kernel's own contract.
#[target_feature(enable = "neon")]
pub(crate) unsafe fn run<K: Kernel>(kernel: K) -> K::Out {
    // SAFETY: the caller's.
    unsafe { kernel.run(Neon(())) }
}

/// An intrinsic call in a method of `Neon`.
macro_rules! isa {
    ($($body:tt)*) => {
        // SAFETY: a value of Neon exists only where its features do; memory is the trait's contract.
        unsafe { $($body)* }
    };
}

type V = (float32x4_t, float32x4_t);

// Helpers instead of closures, which would not inherit `inline(always)`.

/// Products of 4 rows of 4 weights with the 4 activations (twice in x), summed per row.
#[inline(always)]
fn fold(w: int8x16_t, x: int8x8_t) -> int32x4_t {
    isa! {
        let a = vpaddlq_s16(vmull_s8(vget_low_s8(w), x));
        let b = vpaddlq_s16(vmull_s8(vget_high_s8(w), x));
        vpaddq_s32(a, b)
    }
}

/// The same for 8 rows, added to their sums.
#[inline(always)]
fn dot4(low: int8x16_t, high: int8x16_t, x: int8x8_t, sum: &mut (int32x4_t, int32x4_t)) {
    isa! {
        sum.0 = vaddq_s32(sum.0, fold(low, x));
        sum.1 = vaddq_s32(sum.1, fold(high, x));
    }
}

#[inline(always)]
fn to_floats<const R: usize>(sums: [(int32x4_t, int32x4_t); R]) -> [V; R] {
    isa! {
        let mut out = [(vdupq_n_f32(0.0), vdupq_n_f32(0.0)); R];
        for r in 0..R {
            out[r] = (vcvtq_f32_s32(sums[r].0), vcvtq_f32_s32(sums[r].1));
        }
        out
    }
}

#[inline(always)]
fn pow2_half(x: float32x4_t) -> float32x4_t {
    isa!(vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(
        vcvtnq_s32_f32(x),
        vdupq_n_s32(127),
    ))))
}

/// Four words' bits SHIFT..SHIFT+4.
#[inline(always)]
fn nibble_half<const SHIFT: i32>(words: uint32x4_t) -> float32x4_t {
    isa! {
        let down = vshlq_u32(words, vdupq_n_s32(-SHIFT));
        vcvtq_f32_u32(vandq_u32(down, vdupq_n_u32(15)))
    }
}

/// Four words' byte BYTE, signed.
#[inline(always)]
fn byte_half<const BYTE: i32>(words: uint32x4_t) -> float32x4_t {
    isa! {
        let up = vshlq_s32(vreinterpretq_s32_u32(words), vdupq_n_s32(24 - 8 * BYTE));
        vcvtq_f32_s32(vshrq_n_s32::<24>(up))
    }
}

#[inline(always)]
fn lookup_half(table: &[i8; 16], words: uint32x4_t) -> uint32x4_t {
    isa! {
        let bytes = vqtbl1q_s8(vld1q_s8(table.as_ptr()), vreinterpretq_u8_u32(words));
        vreinterpretq_u32_s8(bytes)
    }
}

/// The floats that four words' bits SHIFT..SHIFT+4 choose.
#[inline(always)]
fn lookup_nibble_half<const SHIFT: i32>(table: &[f32; 16], words: uint32x4_t) -> float32x4_t {
    isa! {
        let down = vshlq_u32(words, vdupq_n_s32(-SHIFT));
        let index = vandq_u32(down, vdupq_n_u32(15));
        // Its four bytes in the table's 64.
        let bytes = vmlaq_u32(vdupq_n_u32(0x0302_0100), index, vdupq_n_u32(0x0404_0404));
        let table = vld1q_u8_x4(table.as_ptr().cast());
        vreinterpretq_f32_u8(vqtbl4q_u8(table, vreinterpretq_u8_u32(bytes)))
    }
}

/// Four words' byte BYTE, a float8 e4m3 over 2^120.
#[inline(always)]
fn e4m3_half<const BYTE: i32>(words: uint32x4_t) -> float32x4_t {
    isa! {
        let up = vshlq_s32(vreinterpretq_s32_u32(words), vdupq_n_s32(24 - 8 * BYTE));
        let down = vreinterpretq_u32_s32(vshrq_n_s32::<4>(up));
        vreinterpretq_f32_u32(vandq_u32(down, vdupq_n_u32(0x87f0_0000)))
    }
}

/// Four words plus the products of their weights' pairs of int16 with x's.
#[inline(always)]
fn dot_pairs_half(sum: uint32x4_t, w: uint32x4_t, x: i32) -> uint32x4_t {
    isa! {
        let x = vreinterpret_s16_s32(vdup_n_s32(x));
        let w = vreinterpretq_s16_u32(w);
        let low = vmull_s16(vget_low_s16(w), x);
        let high = vmull_s16(vget_high_s16(w), x);
        vaddq_u32(sum, vreinterpretq_u32_s32(vpaddq_s32(low, high)))
    }
}

/// Four vectors of unsigned weights, below 128, times 16 activations, added to `start`.
///
/// # Safety
/// 16 activations are readable.
#[inline(always)]
unsafe fn dot16(
    w: &[(uint32x4_t, uint32x4_t)],
    x: *const i8,
    start: i32,
) -> (int32x4_t, int32x4_t) {
    isa! {
        let start = vdupq_n_s32(start);
        let mut sum = (start, start);
        for (j, w) in w.iter().enumerate() {
            let four = x.cast::<i32>().add(j).read_unaligned();
            let (a, b) = (vreinterpretq_s8_u32(w.0), vreinterpretq_s8_u32(w.1));
            dot4(a, b, vreinterpret_s8_s32(vdup_n_s32(four)), &mut sum);
        }
        sum
    }
}

impl Simd for Neon {
    type V = V;
    const LANES: usize = 8;
    const ROWS: usize = 6;
    const INT_ROWS: usize = 4;
    type I = (uint32x4_t, uint32x4_t);

    #[inline(always)]
    fn splat(self, x: f32) -> V {
        isa!((vdupq_n_f32(x), vdupq_n_f32(x)))
    }
    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        isa!((vaddq_f32(a.0, b.0), vaddq_f32(a.1, b.1)))
    }
    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        isa!((vsubq_f32(a.0, b.0), vsubq_f32(a.1, b.1)))
    }
    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        isa!((vmulq_f32(a.0, b.0), vmulq_f32(a.1, b.1)))
    }
    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        isa!((vdivq_f32(a.0, b.0), vdivq_f32(a.1, b.1)))
    }
    #[inline(always)]
    fn fma(self, a: V, b: V, c: V) -> V {
        isa!((vfmaq_f32(c.0, a.0, b.0), vfmaq_f32(c.1, a.1, b.1)))
    }
    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        isa!((vmaxq_f32(a.0, b.0), vmaxq_f32(a.1, b.1)))
    }
    #[inline(always)]
    fn min(self, a: V, b: V) -> V {
        isa!((vminq_f32(a.0, b.0), vminq_f32(a.1, b.1)))
    }
    #[inline(always)]
    fn round(self, a: V) -> V {
        isa!((vrndnq_f32(a.0), vrndnq_f32(a.1)))
    }
    #[inline(always)]
    fn pow2(self, a: V) -> V {
        (pow2_half(a.0), pow2_half(a.1))
    }
    #[inline(always)]
    fn select_lt(self, a: V, b: V, yes: V, no: V) -> V {
        isa!((
            vbslq_f32(vcltq_f32(a.0, b.0), yes.0, no.0),
            vbslq_f32(vcltq_f32(a.1, b.1), yes.1, no.1)
        ))
    }
    #[inline(always)]
    fn sum(self, a: V) -> f32 {
        isa!(vaddvq_f32(vaddq_f32(a.0, a.1)))
    }
    #[inline(always)]
    fn hmax(self, a: V) -> f32 {
        isa!(vmaxvq_f32(vmaxq_f32(a.0, a.1)))
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> V {
        isa!((vld1q_f32(p), vld1q_f32(p.add(4))))
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, a: V) {
        isa! {
            vst1q_f32(p, a.0);
            vst1q_f32(p.add(4), a.1);
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> V {
        isa! {
            let h = vld1q_u16(p);
            (
                vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_low_u16(h))),
                vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_high_u16(h))),
            )
        }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16, a: V) {
        let mut lanes = [0.0f32; 8];
        isa! {
            self.store(lanes.as_mut_ptr(), a);
            p.cast::<[u16; 8]>().write_unaligned(lanes.map(f32_to_bf16));
        }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> V {
        // The half-precision intrinsics are not in stable Rust.
        isa! {
            let lanes = p.cast::<[u16; 8]>().read_unaligned().map(f16_to_f32);
            self.load(lanes.as_ptr())
        }
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16, a: V) {
        let mut lanes = [0.0f32; 8];
        isa! {
            self.store(lanes.as_mut_ptr(), a);
            p.cast::<[u16; 8]>().write_unaligned(lanes.map(f32_to_f16));
        }
    }
    #[inline(always)]
    unsafe fn load_bf16_pairs(self, p: *const u16) -> (V, V) {
        isa! {
            let a = vreinterpretq_u32_u16(vld1q_u16(p));
            let b = vreinterpretq_u32_u16(vld1q_u16(p.add(8)));
            let mask = vdupq_n_u32(0xffff_0000);
            (
                (
                    vreinterpretq_f32_u32(vshlq_n_u32::<16>(a)),
                    vreinterpretq_f32_u32(vshlq_n_u32::<16>(b)),
                ),
                (
                    vreinterpretq_f32_u32(vandq_u32(a, mask)),
                    vreinterpretq_f32_u32(vandq_u32(b, mask)),
                ),
            )
        }
    }
    #[inline(always)]
    unsafe fn store_i8(self, p: *mut i8, a: V) {
        isa! {
            let half = vcombine_s16(
                vqmovn_s32(vcvtnq_s32_f32(a.0)),
                vqmovn_s32(vcvtnq_s32_f32(a.1)),
            );
            vst1_s8(p, vqmovn_s16(half));
        }
    }

    #[inline(always)]
    unsafe fn load_i8(self, p: *const i8) -> V {
        isa! {
            let wide = vmovl_s8(vld1_s8(p));
            (
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))),
                vcvtq_f32_s32(vmovl_s16(vget_high_s16(wide))),
            )
        }
    }
    #[inline(always)]
    unsafe fn store_i16(self, p: *mut i16, a: V) {
        isa!(vst1q_s16(
            p,
            vcombine_s16(
                vqmovn_s32(vcvtnq_s32_f32(a.0)),
                vqmovn_s32(vcvtnq_s32_f32(a.1)),
            )
        ))
    }
    #[inline(always)]
    fn dot_pairs(self, sum: Self::I, w: Self::I, x: i32) -> Self::I {
        (dot_pairs_half(sum.0, w.0, x), dot_pairs_half(sum.1, w.1, x))
    }
    #[inline(always)]
    fn to_floats(self, a: Self::I) -> V {
        isa!((
            vcvtq_f32_s32(vreinterpretq_s32_u32(a.0)),
            vcvtq_f32_s32(vreinterpretq_s32_u32(a.1)),
        ))
    }
    #[inline(always)]
    fn zero_words(self) -> Self::I {
        isa!((vdupq_n_u32(0), vdupq_n_u32(0)))
    }
    #[inline(always)]
    unsafe fn load_words(self, p: *const u8) -> Self::I {
        isa!((
            vreinterpretq_u32_u8(vld1q_u8(p)),
            vreinterpretq_u32_u8(vld1q_u8(p.add(16)))
        ))
    }
    #[inline(always)]
    fn and(self, a: Self::I, mask: u32) -> Self::I {
        isa!((
            vandq_u32(a.0, vdupq_n_u32(mask)),
            vandq_u32(a.1, vdupq_n_u32(mask))
        ))
    }
    #[inline(always)]
    fn or(self, a: Self::I, b: Self::I) -> Self::I {
        isa!((vorrq_u32(a.0, b.0), vorrq_u32(a.1, b.1)))
    }
    #[inline(always)]
    fn shift_left<const N: i32>(self, a: Self::I) -> Self::I {
        isa!((
            vshlq_u32(a.0, vdupq_n_s32(N)),
            vshlq_u32(a.1, vdupq_n_s32(N))
        ))
    }
    #[inline(always)]
    fn shift_right<const N: i32>(self, a: Self::I) -> Self::I {
        isa!((
            vshlq_u32(a.0, vdupq_n_s32(-N)),
            vshlq_u32(a.1, vdupq_n_s32(-N))
        ))
    }
    #[inline(always)]
    fn nibble<const SHIFT: i32>(self, a: Self::I) -> V {
        (nibble_half::<SHIFT>(a.0), nibble_half::<SHIFT>(a.1))
    }
    #[inline(always)]
    fn byte<const BYTE: i32>(self, a: Self::I) -> V {
        (byte_half::<BYTE>(a.0), byte_half::<BYTE>(a.1))
    }
    #[inline(always)]
    unsafe fn dot<const BITS: usize>(self, w: [Self::I; 8], x: *const i8) -> V {
        isa! {
            let sum = dot16(&w[..4], x, 0);
            let more = dot16(&w[4..], x.add(16), 0);
            let sum = (vaddq_s32(sum.0, more.0), vaddq_s32(sum.1, more.1));
            (vcvtq_f32_s32(sum.0), vcvtq_f32_s32(sum.1))
        }
    }
    #[inline(always)]
    unsafe fn dot_halves(self, w: [Self::I; 8], x: *const i8, start: [i32; 2]) -> [V; 2] {
        isa! {
            let sums = [
                dot16(&w[..4], x, start[0]),
                dot16(&w[4..], x.add(16), start[1]),
            ];
            to_floats(sums)
        }
    }
    #[inline(always)]
    unsafe fn dot_bytes<const R: usize>(
        self,
        w: *const u8,
        x: [*const i8; R],
        _surplus: [i32; R],
    ) -> [V; R] {
        isa! {
            let zero = vdupq_n_s32(0);
            let mut sums = [(zero, zero); R];
            for j in 0..8 {
                let a = vreinterpretq_s8_u8(vld1q_u8(w.add(32 * j)));
                let b = vreinterpretq_s8_u8(vld1q_u8(w.add(32 * j + 16)));
                for r in 0..R {
                    let four = x[r].cast::<i32>().add(j).read_unaligned();
                    dot4(a, b, vreinterpret_s8_s32(vdup_n_s32(four)), &mut sums[r]);
                }
            }
            to_floats(sums)
        }
    }
    /// Signed weights are what `dot16` takes anyway.
    #[inline(always)]
    unsafe fn dot_signed_halves(self, w: [Self::I; 8], x: *const i8, _surplus: [i32; 2]) -> [V; 2] {
        isa!(self.dot_halves(w, x, [0, 0]))
    }
    #[inline(always)]
    fn lookup(self, table: &[i8; 16], a: Self::I) -> Self::I {
        (lookup_half(table, a.0), lookup_half(table, a.1))
    }
    #[inline(always)]
    fn lookup_nibble<const SHIFT: i32>(self, table: &[f32; 16], a: Self::I) -> V {
        (
            lookup_nibble_half::<SHIFT>(table, a.0),
            lookup_nibble_half::<SHIFT>(table, a.1),
        )
    }
    #[inline(always)]
    fn small_e4m3<const BYTE: i32>(self, a: Self::I) -> V {
        (e4m3_half::<BYTE>(a.0), e4m3_half::<BYTE>(a.1))
    }
}
