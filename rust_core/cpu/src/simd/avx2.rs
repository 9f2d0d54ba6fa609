//! Avx2: AVX2 with FMA and F16C, 8 lanes; with PAIRS dot products of int16 pairs in one instruction.
//!
//! Longer than other files, since it is one trait's methods, in the order of `simd`.

use std::arch::x86_64::*;

use crate::simd::{Kernel, Simd};

/// `PAIRS` of a machine without the instruction.
const NONE: u8 = 0;
/// With that of AVX-VNNI, and with AVX-512 VNNI's on 256 bits: the same one, encoded differently.
const AVX_VNNI: u8 = 1;
const AVX512_VNNI: u8 = 2;

/// Exists only inside [`run`], or one of the others with `PAIRS`.
#[derive(Clone, Copy)]
pub(crate) struct Avx2<const PAIRS: u8>(());

/// Run a kernel with the features on.
///
/// # Safety
/// The CPU has avx2, fma and f16c; the kernel's own contract.
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn run<K: Kernel>(kernel: K) -> K::Out {
    // SAFETY: the caller's.
    unsafe { kernel.run(Avx2::<NONE>(())) }
}

/// As `run`, on a CPU that has AVX-VNNI.
///
/// # Safety
/// As there.
#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
pub(crate) unsafe fn run_avx_vnni<K: Kernel>(kernel: K) -> K::Out {
    // SAFETY: the caller's.
    unsafe { kernel.run(Avx2::<AVX_VNNI>(())) }
}

/// As `run`, on a CPU that has AVX-512 VNNI and VL.
///
/// # Safety
/// As there.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512vl,avx512vnni")]
pub(crate) unsafe fn run_avx512_vnni<K: Kernel>(kernel: K) -> K::Out {
    // SAFETY: the caller's.
    unsafe { kernel.run(Avx2::<AVX512_VNNI>(())) }
}

/// An intrinsic call in a method of `Avx2`.
macro_rules! isa {
    ($($body:tt)*) => {
        // SAFETY: a value of Avx2 exists only where its features do; memory is the trait's contract.
        unsafe { $($body)* }
    };
}

/// Sums of pairs of 4-bit weights, four vectors, times 16 activations: at most 4 * 2 * 15 * 128.
/// A function, since a closure might stay a call.
///
/// # Safety
/// 16 activations are readable.
#[inline(always)]
unsafe fn four_pairs(w: &[__m256i], x: *const i8) -> __m256i {
    let x = x.cast::<i32>();
    isa! {
        let a = _mm256_maddubs_epi16(w[0], _mm256_set1_epi32(x.read_unaligned()));
        let b = _mm256_maddubs_epi16(w[1], _mm256_set1_epi32(x.add(1).read_unaligned()));
        let c = _mm256_maddubs_epi16(w[2], _mm256_set1_epi32(x.add(2).read_unaligned()));
        let d = _mm256_maddubs_epi16(w[3], _mm256_set1_epi32(x.add(3).read_unaligned()));
        _mm256_add_epi16(_mm256_add_epi16(a, b), _mm256_add_epi16(c, d))
    }
}

impl<const PAIRS: u8> Simd for Avx2<PAIRS> {
    type V = __m256;
    const LANES: usize = 8;
    const ROWS: usize = 6;
    const INT_ROWS: usize = 4;
    type I = __m256i;

    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        isa!(_mm_prefetch::<_MM_HINT_T0>(p.cast()))
    }
    #[inline(always)]
    fn prefetch_far(self, p: *const u8) {
        isa!(_mm_prefetch::<_MM_HINT_T1>(p.cast()))
    }
    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        isa!(_mm256_set1_ps(x))
    }
    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        isa!(_mm256_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        isa!(_mm256_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        isa!(_mm256_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        isa!(_mm256_div_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        isa!(_mm256_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        isa!(_mm256_max_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: __m256, b: __m256) -> __m256 {
        isa!(_mm256_min_ps(a, b))
    }
    #[inline(always)]
    fn round(self, a: __m256) -> __m256 {
        isa!(_mm256_round_ps::<
            { _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC },
        >(a))
    }
    #[inline(always)]
    fn pow2(self, a: __m256) -> __m256 {
        isa!(_mm256_castsi256_ps(_mm256_slli_epi32::<23>(
            _mm256_add_epi32(_mm256_cvtps_epi32(a), _mm256_set1_epi32(127))
        )))
    }
    #[inline(always)]
    fn select_lt(self, a: __m256, b: __m256, yes: __m256, no: __m256) -> __m256 {
        isa!(_mm256_blendv_ps(no, yes, _mm256_cmp_ps::<_CMP_LT_OQ>(a, b)))
    }
    #[inline(always)]
    fn sum(self, a: __m256) -> f32 {
        isa! {
            let half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
            _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)))
        }
    }
    #[inline(always)]
    fn hmax(self, a: __m256) -> f32 {
        isa! {
            let half = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let pair = _mm_max_ps(half, _mm_movehl_ps(half, half));
            _mm_cvtss_f32(_mm_max_ss(pair, _mm_movehdup_ps(pair)))
        }
    }
    #[inline(always)]
    unsafe fn sums(self, rows: [__m256; 16], to: *mut f32) {
        // SAFETY: the trait's contract.
        unsafe {
            for half in 0..2 {
                let sums = self.of_each(&rows[8 * half..], |a, b| self.add(a, b));
                self.store(to.add(8 * half), sums);
            }
        }
    }
    #[inline(always)]
    unsafe fn hmaxes(self, rows: [__m256; 16], to: *mut f32) {
        // SAFETY: the trait's contract.
        unsafe {
            for half in 0..2 {
                let most = self.of_each(&rows[8 * half..], |a, b| self.max(a, b));
                self.store(to.add(8 * half), most);
            }
        }
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m256 {
        isa!(_mm256_loadu_ps(p))
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, a: __m256) {
        isa!(_mm256_storeu_ps(p, a))
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> __m256 {
        isa!(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(
            _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()))
        )))
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16, a: __m256) {
        isa! {
            let bits = _mm256_castps_si256(a);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
            let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
            let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(a, a));
            let kept = _mm256_srli_epi32::<16>(_mm256_blendv_epi8(up, quiet, nan));
            let packed = _mm_packus_epi32(
                _mm256_castsi256_si128(kept),
                _mm256_extracti128_si256::<1>(kept),
            );
            _mm_storeu_si128(p.cast(), packed);
        }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> __m256 {
        isa!(_mm256_cvtph_ps(_mm_loadu_si128(p.cast())))
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16, a: __m256) {
        isa!(_mm_storeu_si128(
            p.cast(),
            _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(a)
        ))
    }
    #[inline(always)]
    unsafe fn load_bf16_pairs(self, p: *const u16) -> (__m256, __m256) {
        isa! {
            let both = _mm256_loadu_si256(p.cast());
            (
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(both)),
                _mm256_and_ps(
                    _mm256_castsi256_ps(both),
                    _mm256_castsi256_ps(_mm256_set1_epi32(0xffff_0000u32 as i32)),
                ),
            )
        }
    }
    #[inline(always)]
    unsafe fn store_i8(self, p: *mut i8, a: __m256) {
        isa! {
            let wide = _mm256_cvtps_epi32(a);
            let half = _mm_packs_epi32(
                _mm256_castsi256_si128(wide),
                _mm256_extracti128_si256::<1>(wide),
            );
            _mm_storel_epi64(p.cast(), _mm_packs_epi16(half, half));
        }
    }

    #[inline(always)]
    unsafe fn load_i8(self, p: *const i8) -> __m256 {
        isa!(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(
            p.cast()
        ))))
    }
    #[inline(always)]
    unsafe fn load_e4m3(self, p: *const u8) -> __m256 {
        isa! {
            // The sign is in the two highest bits, the second of which is no part of it.
            let wide = _mm_slli_epi16::<7>(_mm_cvtepi8_epi16(_mm_loadl_epi64(p.cast())));
            _mm256_cvtph_ps(_mm_and_si128(wide, _mm_set1_epi16(!0x4000)))
        }
    }
    #[inline(always)]
    unsafe fn load_e5m2(self, p: *const u8) -> __m256 {
        isa! {
            let bytes = _mm_loadl_epi64(p.cast());
            _mm256_cvtph_ps(_mm_unpacklo_epi8(_mm_setzero_si128(), bytes))
        }
    }
    #[inline(always)]
    unsafe fn store_i16(self, p: *mut i16, a: __m256) {
        isa! {
            let words = _mm256_cvtps_epi32(a);
            let low = _mm256_castsi256_si128(words);
            let high = _mm256_extracti128_si256::<1>(words);
            _mm_storeu_si128(p.cast(), _mm_packs_epi32(low, high));
        }
    }
    #[inline(always)]
    fn dot_pairs(self, sum: __m256i, w: __m256i, x: i32) -> __m256i {
        isa! {
            let x = _mm256_set1_epi32(x);
            match PAIRS {
                AVX_VNNI => _mm256_dpwssd_avx_epi32(sum, w, x),
                AVX512_VNNI => _mm256_dpwssd_epi32(sum, w, x),
                _ => _mm256_add_epi32(sum, _mm256_madd_epi16(w, x)),
            }
        }
    }
    #[inline(always)]
    fn to_floats(self, a: __m256i) -> __m256 {
        isa!(_mm256_cvtepi32_ps(a))
    }
    #[inline(always)]
    fn zero_words(self) -> __m256i {
        isa!(_mm256_setzero_si256())
    }
    #[inline(always)]
    unsafe fn load_words(self, p: *const u8) -> __m256i {
        isa!(_mm256_loadu_si256(p.cast()))
    }
    #[inline(always)]
    fn and(self, a: __m256i, mask: u32) -> __m256i {
        isa!(_mm256_and_si256(a, _mm256_set1_epi32(mask.cast_signed())))
    }
    #[inline(always)]
    fn or(self, a: __m256i, b: __m256i) -> __m256i {
        isa!(_mm256_or_si256(a, b))
    }
    #[inline(always)]
    fn shift_left<const N: i32>(self, a: __m256i) -> __m256i {
        isa!(_mm256_slli_epi32::<N>(a))
    }
    #[inline(always)]
    fn shift_right<const N: i32>(self, a: __m256i) -> __m256i {
        isa!(_mm256_srli_epi32::<N>(a))
    }
    #[inline(always)]
    fn nibble<const SHIFT: i32>(self, a: __m256i) -> __m256 {
        isa! {
            let words = _mm256_srli_epi32::<SHIFT>(a);
            _mm256_cvtepi32_ps(_mm256_and_si256(words, _mm256_set1_epi32(15)))
        }
    }
    #[inline(always)]
    fn byte<const BYTE: i32>(self, a: __m256i) -> __m256 {
        isa! {
            let up = _mm256_sll_epi32(a, _mm_cvtsi32_si128(24 - 8 * BYTE));
            _mm256_cvtepi32_ps(_mm256_srai_epi32::<24>(up))
        }
    }
    #[inline(always)]
    unsafe fn dot<const BITS: usize>(self, w: [__m256i; 8], x: *const i8) -> __m256 {
        isa! {
            let x = x.cast::<i32>();
            let pair = |j: usize| {
                _mm256_maddubs_epi16(w[j], _mm256_set1_epi32(x.add(j).read_unaligned()))
            };
            // Two chains, so that one's latency hides behind the other.
            let mut a = pair(0);
            let mut b = pair(1);
            for j in 1..4 {
                a = _mm256_add_epi16(a, pair(2 * j));
                b = _mm256_add_epi16(b, pair(2 * j + 1));
            }
            let ones = _mm256_set1_epi16(1);
            // A pair of nibbles is at most 2 * 15 * 127, and eight of them still fit 16 bits; of
            // 5 bits four do.
            let sum = if BITS == 4 {
                _mm256_madd_epi16(_mm256_add_epi16(a, b), ones)
            } else {
                _mm256_add_epi32(_mm256_madd_epi16(a, ones), _mm256_madd_epi16(b, ones))
            };
            _mm256_cvtepi32_ps(sum)
        }
    }
    /// The default's numbers in fewer instructions: sums of 16 bits as long as they fit, and one
    /// conversion, of integers below 2^24.
    #[inline(always)]
    unsafe fn dot_nibbles(
        self,
        w: [__m256i; 8],
        _packed: *const u8,
        first: *const i8,
        second: *const i8,
    ) -> __m256 {
        isa! {
            // Eight pairs of the first part fit 16 bits, since it is at most 127, and four of the second.
            let whole = _mm256_add_epi16(four_pairs(&w[..4], first), four_pairs(&w[4..], first.add(16)));
            let sum = _mm256_add_epi32(
                _mm256_madd_epi16(whole, _mm256_set1_epi16(256)),
                _mm256_madd_epi16(four_pairs(&w[..4], second), _mm256_set1_epi16(1)),
            );
            // What the second part gives element k + 16 counts 16 times.
            let high = _mm256_madd_epi16(four_pairs(&w[4..], second.add(16)), _mm256_set1_epi16(16));
            _mm256_cvtepi32_ps(_mm256_add_epi32(sum, high))
        }
    }
    #[inline(always)]
    unsafe fn dot_halves(self, w: [__m256i; 8], x: *const i8, start: [i32; 2]) -> [__m256; 2] {
        isa! {
            let x = x.cast::<i32>();
            let pair = |j: usize| {
                _mm256_maddubs_epi16(w[j], _mm256_set1_epi32(x.add(j).read_unaligned()))
            };
            let ones = _mm256_set1_epi16(1);
            // A pair is at most 2 * 63 * 127: two fit 16 bits.
            let two = |j| _mm256_madd_epi16(_mm256_add_epi16(pair(j), pair(j + 1)), ones);
            let mut out = [_mm256_setzero_ps(); 2];
            for half in 0..2 {
                let sum = _mm256_add_epi32(two(4 * half), two(4 * half + 2));
                let start = _mm256_set1_epi32(start[half]);
                out[half] = _mm256_cvtepi32_ps(_mm256_add_epi32(sum, start));
            }
            out
        }
    }
    #[inline(always)]
    unsafe fn dot_bytes<const R: usize>(
        self,
        w: *const u8,
        x: [*const i8; R],
        _surplus: [i32; R],
    ) -> [__m256; R] {
        isa! {
            let ones = _mm256_set1_epi16(1);
            let mut sums = [_mm256_setzero_si256(); R];
            for j in 0..8 {
                let weight = _mm256_loadu_si256(w.add(32 * j).cast());
                // |w| is at most 128 as an unsigned byte, its sign goes to x: a pair fits 16 bits.
                let magnitude = _mm256_abs_epi8(weight);
                for r in 0..R {
                    let four = x[r].cast::<i32>().add(j).read_unaligned();
                    let signed = _mm256_sign_epi8(_mm256_set1_epi32(four), weight);
                    let pair = _mm256_maddubs_epi16(magnitude, signed);
                    sums[r] = _mm256_add_epi32(sums[r], _mm256_madd_epi16(pair, ones));
                }
            }
            let mut out = [_mm256_setzero_ps(); R];
            for r in 0..R {
                out[r] = _mm256_cvtepi32_ps(sums[r]);
            }
            out
        }
    }
    #[inline(always)]
    unsafe fn dot_signed_halves(
        self,
        w: [__m256i; 8],
        x: *const i8,
        _surplus: [i32; 2],
    ) -> [__m256; 2] {
        isa! {
            let x = x.cast::<i32>();
            let ones = _mm256_set1_epi16(1);
            // As in `dot_bytes`: a pair fits 16 bits.
            let pair = |j: usize| {
                let four = _mm256_set1_epi32(x.add(j).read_unaligned());
                let signed = _mm256_sign_epi8(four, w[j]);
                _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(w[j]), signed), ones)
            };
            let two = |j| _mm256_add_epi32(pair(j), pair(j + 1));
            let low = _mm256_add_epi32(two(0), two(2));
            let high = _mm256_add_epi32(two(4), two(6));
            [_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high)]
        }
    }
    const WIDENS: bool = true;

    #[inline(always)]
    fn widen(self, a: __m256i) -> [__m256i; 2] {
        // A place with its highest bit set makes a zero.
        const FIRST: [u8; 16] = [
            0, 128, 1, 128, 4, 128, 5, 128, 8, 128, 9, 128, 12, 128, 13, 128,
        ];
        const LAST: [u8; 16] = [
            2, 128, 3, 128, 6, 128, 7, 128, 10, 128, 11, 128, 14, 128, 15, 128,
        ];
        isa! {
            let first = _mm256_broadcastsi128_si256(_mm_loadu_si128(FIRST.as_ptr().cast()));
            let last = _mm256_broadcastsi128_si256(_mm_loadu_si128(LAST.as_ptr().cast()));
            [_mm256_shuffle_epi8(a, first), _mm256_shuffle_epi8(a, last)]
        }
    }
    #[inline(always)]
    fn widen_signed(self, a: __m256i) -> [__m256i; 2] {
        // Each byte is the high one of its 16 bits before it moves down.
        const FIRST: [u8; 16] = [
            128, 0, 128, 1, 128, 4, 128, 5, 128, 8, 128, 9, 128, 12, 128, 13,
        ];
        const LAST: [u8; 16] = [
            128, 2, 128, 3, 128, 6, 128, 7, 128, 10, 128, 11, 128, 14, 128, 15,
        ];
        isa! {
            let first = _mm256_broadcastsi128_si256(_mm_loadu_si128(FIRST.as_ptr().cast()));
            let last = _mm256_broadcastsi128_si256(_mm_loadu_si128(LAST.as_ptr().cast()));
            [
                _mm256_srai_epi16::<8>(_mm256_shuffle_epi8(a, first)),
                _mm256_srai_epi16::<8>(_mm256_shuffle_epi8(a, last)),
            ]
        }
    }
    #[inline(always)]
    unsafe fn store_words(self, p: *mut u8, a: __m256i) {
        isa!(_mm256_storeu_si256(p.cast(), a))
    }

    #[inline(always)]
    fn lookup(self, table: &[i8; 16], a: __m256i) -> __m256i {
        isa! {
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
            _mm256_shuffle_epi8(table, a)
        }
    }
    #[inline(always)]
    fn lookup_nibble<const SHIFT: i32>(self, table: &[f32; 16], a: __m256i) -> __m256 {
        isa! {
            let down = _mm256_srl_epi32(a, _mm_cvtsi32_si128(SHIFT));
            // An index's low three bits choose in each half, its fourth one, moved to the sign, between
            // them.
            let low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table.as_ptr()), down);
            let high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table.as_ptr().add(8)), down);
            _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32::<28>(down)))
        }
    }
    #[inline(always)]
    fn small_e4m3<const BYTE: i32>(self, a: __m256i) -> __m256 {
        isa! {
            let up = _mm256_sll_epi32(a, _mm_cvtsi32_si128(24 - 8 * BYTE));
            let mask = _mm256_set1_epi32(0x87f0_0000u32.cast_signed());
            _mm256_castsi256_ps(_mm256_and_si256(_mm256_srai_epi32::<4>(up), mask))
        }
    }
}

impl<const PAIRS: u8> Avx2<PAIRS> {
    /// Lane i: all lanes of row i of eight together, by an operation that has no order. Each round
    /// halves the vectors, exchanging within 4 lanes, then 4 lanes.
    #[inline(always)]
    fn of_each(self, rows: &[__m256], op: impl Fn(__m256, __m256) -> __m256) -> __m256 {
        isa! {
            let mut a = [_mm256_setzero_ps(); 4];
            for i in 0..4 {
                let (x, y) = (rows[2 * i], rows[2 * i + 1]);
                a[i] = op(_mm256_unpacklo_ps(x, y), _mm256_unpackhi_ps(x, y));
            }
            let mut b = [_mm256_setzero_ps(); 2];
            for i in 0..2 {
                let x = _mm256_castps_pd(a[2 * i]);
                let y = _mm256_castps_pd(a[2 * i + 1]);
                b[i] = op(
                    _mm256_castpd_ps(_mm256_unpacklo_pd(x, y)),
                    _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)),
                );
            }
            op(
                _mm256_permute2f128_ps::<0x20>(b[0], b[1]),
                _mm256_permute2f128_ps::<0x31>(b[0], b[1]),
            )
        }
    }
}
