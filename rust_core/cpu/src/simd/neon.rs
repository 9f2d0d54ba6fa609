//! Neon: two 4-lane vectors as one of 8 lanes, so that packed layouts are the same as AVX2's; with
//! `INTS` the dot products of four bytes, with `BF16` those of pairs of bfloat16.
//!
//! Stable Rust has no names for these dot products: they are inline assembly.
//!
//! Longer than other files, since it is one trait's methods, in the order of `simd`.

use std::arch::aarch64::*;
use std::arch::asm;

use crate::float::{f16_to_f32, f32_to_bf16, f32_to_f16};
use crate::simd::{Kernel, Simd};

/// `INTS` of a machine without dot products of bytes.
const NONE: u8 = 0;
/// With those of signed bytes, and with those of unsigned and signed ones besides.
const DOTPROD: u8 = 1;
const I8MM: u8 = 2;

/// Exists only inside [`run`], or one of the others with `INTS` and `BF16`.
#[derive(Clone, Copy)]
pub(crate) struct Neon<const INTS: u8, const BF16: bool>(());

/// Run a kernel with the features on.
///
/// # Safety
/// The CPU has neon; the kernel's own contract.
#[target_feature(enable = "neon")]
pub(crate) unsafe fn run<K: Kernel>(kernel: K) -> K::Out {
    // SAFETY: the caller's.
    unsafe { kernel.run(Neon::<NONE, false>(())) }
}

/// As `run`, on a CPU that has dotprod.
///
/// # Safety
/// As there.
#[target_feature(enable = "neon,dotprod")]
pub(crate) unsafe fn run_dotprod<K: Kernel>(kernel: K) -> K::Out {
    // SAFETY: the caller's.
    unsafe { kernel.run(Neon::<DOTPROD, false>(())) }
}

/// As `run`, on a CPU that has dotprod and i8mm.
///
/// # Safety
/// As there.
#[target_feature(enable = "neon,dotprod,i8mm")]
pub(crate) unsafe fn run_i8mm<K: Kernel>(kernel: K) -> K::Out {
    // SAFETY: the caller's.
    unsafe { kernel.run(Neon::<I8MM, false>(())) }
}

/// As `run`, on a CPU that has bf16.
///
/// # Safety
/// As there.
#[target_feature(enable = "neon,bf16")]
pub(crate) unsafe fn run_bf16<K: Kernel>(kernel: K) -> K::Out {
    // SAFETY: the caller's.
    unsafe { kernel.run(Neon::<NONE, true>(())) }
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

/// `sum` plus, in each lane, the dot product of that lane of `w` with lane `LANE` of `x`.
macro_rules! dot_instruction {
    ($name:ident, $extension:literal, $instruction:literal, $doc:literal) => {
        #[doc = $doc]
        #[inline(always)]
        fn $name<const LANE: u8>(sum: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
            let mut out = sum;
            // SAFETY: it touches these registers alone; callers are of a type that has it.
            unsafe {
                asm!(
                    concat!(".arch_extension ", $extension),
                    concat!($instruction, " {out:v}.4s, {w:v}.16b, {x:v}.4b[{lane}]"),
                    out = inout(vreg) out,
                    w = in(vreg) w,
                    x = in(vreg) x,
                    lane = const LANE,
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
            out
        }
    };
}

dot_instruction!(
    sdot,
    "dotprod",
    "sdot",
    "Dot products of four signed bytes."
);
dot_instruction!(
    usdot,
    "i8mm",
    "usdot",
    "Dot products of four unsigned bytes with signed ones."
);

/// `sum` plus, in each lane, the dot product of two bfloat16.
#[inline(always)]
fn bfdot(sum: float32x4_t, a: uint32x4_t, b: uint32x4_t) -> float32x4_t {
    let mut out = sum;
    // SAFETY: it touches these registers alone; callers are of a type that has it.
    unsafe {
        asm!(
            ".arch_extension bf16",
            "bfdot {out:v}.4s, {a:v}.8h, {b:v}.8h",
            out = inout(vreg) out,
            a = in(vreg) a,
            b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    out
}

/// The products of `fold` for 8 rows and activations 4 LANE.. of x, added to their sums.
#[inline(always)]
fn dot4<const INTS: u8, const LANE: i32, const ELEMENT: u8>(
    w: (int8x16_t, int8x16_t),
    x: int8x16_t,
    sum: (int32x4_t, int32x4_t),
) -> (int32x4_t, int32x4_t) {
    if INTS != NONE {
        return (
            sdot::<ELEMENT>(sum.0, w.0, x),
            sdot::<ELEMENT>(sum.1, w.1, x),
        );
    }
    isa! {
        let four = vreinterpret_s8_s32(vdup_laneq_s32::<LANE>(vreinterpretq_s32_s8(x)));
        (vaddq_s32(sum.0, fold(w.0, four)), vaddq_s32(sum.1, fold(w.1, four)))
    }
}

/// The halfwords of a and b in turns.
#[inline(always)]
fn in_turns(a: uint32x4_t, b: uint32x4_t) -> (uint32x4_t, uint32x4_t) {
    isa! {
        let (a, b) = (vreinterpretq_u16_u32(a), vreinterpretq_u16_u32(b));
        (
            vreinterpretq_u32_u16(vzip1q_u16(a, b)),
            vreinterpretq_u32_u16(vzip2q_u16(a, b)),
        )
    }
}

/// Four pairs of bfloat16 from float32, `a` in front.
#[inline(always)]
fn bf16_pair(a: float32x4_t, b: float32x4_t) -> uint32x4_t {
    isa! {
        let half = vdupq_n_u32(0x8000);
        let a = vaddq_u32(vreinterpretq_u32_f32(a), half);
        let b = vaddq_u32(vreinterpretq_u32_f32(b), half);
        vsriq_n_u32::<16>(b, a)
    }
}

/// Both halves of a vector as signed bytes.
#[inline(always)]
fn bytes(w: (uint32x4_t, uint32x4_t)) -> (int8x16_t, int8x16_t) {
    isa!((vreinterpretq_s8_u32(w.0), vreinterpretq_s8_u32(w.1)))
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

/// Four vectors of signed weights times 16 activations, added to `start`.
///
/// # Safety
/// 16 activations are readable.
#[inline(always)]
unsafe fn dot16<const INTS: u8>(
    w: &[(uint32x4_t, uint32x4_t)],
    x: *const i8,
    start: i32,
) -> (int32x4_t, int32x4_t) {
    isa! {
        let start = vdupq_n_s32(start);
        let x = vld1q_s8(x);
        let sum = dot4::<INTS, 0, 0>(bytes(w[0]), x, (start, start));
        let sum = dot4::<INTS, 1, 1>(bytes(w[1]), x, sum);
        let sum = dot4::<INTS, 2, 2>(bytes(w[2]), x, sum);
        dot4::<INTS, 3, 3>(bytes(w[3]), x, sum)
    }
}

/// Four vectors of unsigned bytes at `w` times 16 activations.
///
/// # Safety
/// 128 bytes and 16 activations are readable; the CPU has i8mm.
#[inline(always)]
unsafe fn dot16_unsigned(w: *const u8, x: *const i8) -> (int32x4_t, int32x4_t) {
    isa! {
        let w = w.cast::<i8>();
        let x = vld1q_s8(x);
        let zero = vdupq_n_s32(0);
        let mut sum = (zero, zero);
        sum.0 = usdot::<0>(sum.0, vld1q_s8(w), x);
        sum.1 = usdot::<0>(sum.1, vld1q_s8(w.add(16)), x);
        sum.0 = usdot::<1>(sum.0, vld1q_s8(w.add(32)), x);
        sum.1 = usdot::<1>(sum.1, vld1q_s8(w.add(48)), x);
        sum.0 = usdot::<2>(sum.0, vld1q_s8(w.add(64)), x);
        sum.1 = usdot::<2>(sum.1, vld1q_s8(w.add(80)), x);
        sum.0 = usdot::<3>(sum.0, vld1q_s8(w.add(96)), x);
        sum.1 = usdot::<3>(sum.1, vld1q_s8(w.add(112)), x);
        sum
    }
}

impl<const INTS: u8, const BF16: bool> Simd for Neon<INTS, BF16> {
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
    unsafe fn sums(self, rows: [V; 16], to: *mut f32) {
        isa! {
            for (i, four) in rows.as_chunks::<4>().0.iter().enumerate() {
                let [a, b, c, d] = four.map(|row| vaddq_f32(row.0, row.1));
                let sums = vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d));
                vst1q_f32(to.add(4 * i), sums);
            }
        }
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
            let sum = dot16::<INTS>(&w[..4], x, 0);
            let more = dot16::<INTS>(&w[4..], x.add(16), 0);
            let sum = (vaddq_s32(sum.0, more.0), vaddq_s32(sum.1, more.1));
            (vcvtq_f32_s32(sum.0), vcvtq_f32_s32(sum.1))
        }
    }
    /// The default's numbers in integers, which stay below 2^24.
    #[inline(always)]
    unsafe fn dot_nibbles(
        self,
        w: [Self::I; 8],
        packed: *const u8,
        first: *const i8,
        second: *const i8,
    ) -> V {
        isa! {
            let low = dot16::<INTS>(&w[..4], first, 0);
            let high = dot16::<INTS>(&w[4..], first.add(16), 0);
            let firsts = (vaddq_s32(low.0, high.0), vaddq_s32(low.1, high.1));
            let seconds = if INTS == I8MM {
                dot16_unsigned(packed, second)
            } else {
                let low = dot16::<INTS>(&w[..4], second, 0);
                let high = dot16::<INTS>(&w[4..], second.add(16), 0);
                (
                    vaddq_s32(low.0, vshlq_n_s32::<4>(high.0)),
                    vaddq_s32(low.1, vshlq_n_s32::<4>(high.1)),
                )
            };
            (
                vcvtq_f32_s32(vaddq_s32(vshlq_n_s32::<8>(firsts.0), seconds.0)),
                vcvtq_f32_s32(vaddq_s32(vshlq_n_s32::<8>(firsts.1), seconds.1)),
            )
        }
    }
    #[inline(always)]
    unsafe fn dot_halves(self, w: [Self::I; 8], x: *const i8, start: [i32; 2]) -> [V; 2] {
        isa! {
            let sums = [
                dot16::<INTS>(&w[..4], x, start[0]),
                dot16::<INTS>(&w[4..], x.add(16), start[1]),
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
            let mut sums = [(vdupq_n_s32(0), vdupq_n_s32(0)); R];
            for half in 0..2 {
                let w = w.add(128 * half);
                let mut four = [self.load_words(w); 4];
                for (j, four) in four.iter_mut().enumerate() {
                    *four = self.load_words(w.add(32 * j));
                }
                for r in 0..R {
                    let x = vld1q_s8(x[r].add(16 * half));
                    sums[r] = dot4::<INTS, 0, 0>(bytes(four[0]), x, sums[r]);
                    sums[r] = dot4::<INTS, 1, 1>(bytes(four[1]), x, sums[r]);
                    sums[r] = dot4::<INTS, 2, 2>(bytes(four[2]), x, sums[r]);
                    sums[r] = dot4::<INTS, 3, 3>(bytes(four[3]), x, sums[r]);
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
    /// Ties away from zero. Finite values up to bfloat16's largest, infinities and the NaNs that
    /// arithmetic makes stay what they are.
    #[inline(always)]
    unsafe fn store_bf16_pairs(self, p: *mut u16, a: V, b: V) {
        isa! {
            vst1q_u32(p.cast(), bf16_pair(a.0, b.0));
            vst1q_u32(p.cast::<u32>().add(4), bf16_pair(a.1, b.1));
        }
    }
    const DOTS_BF16: bool = BF16;
    #[inline(always)]
    fn dot_bf16(self, sum: V, a: Self::I, b: u32) -> V {
        let b = isa!(vdupq_n_u32(b));
        (bfdot(sum.0, a.0, b), bfdot(sum.1, a.1, b))
    }
    #[inline(always)]
    fn dot_bf16_words(self, sum: V, a: Self::I, b: Self::I) -> V {
        (bfdot(sum.0, a.0, b.0), bfdot(sum.1, a.1, b.1))
    }
    #[inline(always)]
    fn interleave_words(self, a: Self::I, b: Self::I) -> [Self::I; 2] {
        [in_turns(a.0, b.0), in_turns(a.1, b.1)]
    }
    #[inline(always)]
    unsafe fn store_words(self, p: *mut u8, a: Self::I) {
        isa! {
            vst1q_u8(p, vreinterpretq_u8_u32(a.0));
            vst1q_u8(p.add(16), vreinterpretq_u8_u32(a.1));
        }
    }
    #[inline(always)]
    unsafe fn transpose_pairs(self, rows: [*const u16; 16], to: *mut u32, stride: usize) {
        isa! {
            for pair in (0..16).step_by(4) {
                for first in (0..16).step_by(4) {
                    let at = |row: usize| vld1q_u32(rows[first + row].cast::<u32>().add(pair));
                    let (a, b, c, d) = (at(0), at(1), at(2), at(3));
                    // Pairs 0 and 2, 1 and 3 of two rows in turns.
                    let (even, odd) = (vtrn1q_u32(a, b), vtrn2q_u32(a, b));
                    let (even2, odd2) = (vtrn1q_u32(c, d), vtrn2q_u32(c, d));
                    let [even, odd, even2, odd2] =
                        [even, odd, even2, odd2].map(|v| vreinterpretq_u64_u32(v));
                    let columns = [
                        vtrn1q_u64(even, even2),
                        vtrn1q_u64(odd, odd2),
                        vtrn2q_u64(even, even2),
                        vtrn2q_u64(odd, odd2),
                    ];
                    for (i, column) in columns.into_iter().enumerate() {
                        let to = to.add((pair + i) * stride + first);
                        vst1q_u32(to, vreinterpretq_u32_u64(column));
                    }
                }
            }
        }
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
