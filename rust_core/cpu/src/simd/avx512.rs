//! Avx512: AVX-512 F, BW, VL, DQ and VNNI, 16 lanes; with DOTS the dot products of bfloat16 as well.
//!
//! Longer than other files, since it is one trait's methods, in the order of `simd`.

use std::arch::x86_64::*;

use crate::simd::{Kernel, Simd};

/// Exists only inside [`run`], with `DOTS` inside [`run_dots`].
#[derive(Clone, Copy)]
pub(crate) struct Avx512<const DOTS: bool>(());

/// Run a kernel with the features on.
///
/// # Safety
/// The CPU has the features listed; the kernel's own contract.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(crate) unsafe fn run<K: Kernel>(kernel: K) -> K::Out {
    // SAFETY: the caller's.
    unsafe { kernel.run(Avx512::<false>(())) }
}

/// As `run`, on a CPU that has AVX-512 BF16.
///
/// # Safety
/// As there.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16")]
pub(crate) unsafe fn run_dots<K: Kernel>(kernel: K) -> K::Out {
    // SAFETY: the caller's.
    unsafe { kernel.run(Avx512::<true>(())) }
}

/// An intrinsic call in a method of `Avx512`.
macro_rules! isa {
    ($($body:tt)*) => {
        // SAFETY: a value of Avx512 exists only where its features do; memory is the trait's
        // contract.
        unsafe { $($body)* }
    };
}

const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

impl<const DOTS: bool> Simd for Avx512<DOTS> {
    type V = __m512;
    const LANES: usize = 16;
    const ROWS: usize = 12;
    const INT_ROWS: usize = 8;
    type I = __m512i;

    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        isa!(_mm_prefetch::<_MM_HINT_T0>(p.cast()))
    }
    #[inline(always)]
    fn prefetch_far(self, p: *const u8) {
        isa!(_mm_prefetch::<_MM_HINT_T1>(p.cast()))
    }
    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        isa!(_mm512_set1_ps(x))
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        isa!(_mm512_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        isa!(_mm512_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        isa!(_mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        isa!(_mm512_div_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        isa!(_mm512_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        isa!(_mm512_max_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        isa!(_mm512_min_ps(a, b))
    }
    #[inline(always)]
    fn round(self, a: __m512) -> __m512 {
        isa!(_mm512_roundscale_ps::<NEAREST>(a))
    }
    #[inline(always)]
    fn pow2(self, a: __m512) -> __m512 {
        isa!(_mm512_castsi512_ps(_mm512_slli_epi32::<23>(
            _mm512_add_epi32(_mm512_cvtps_epi32(a), _mm512_set1_epi32(127))
        )))
    }
    #[inline(always)]
    fn select_lt(self, a: __m512, b: __m512, yes: __m512, no: __m512) -> __m512 {
        isa!(_mm512_mask_blend_ps(
            _mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b),
            no,
            yes
        ))
    }
    #[inline(always)]
    fn sum(self, a: __m512) -> f32 {
        isa!(_mm512_reduce_add_ps(a))
    }
    #[inline(always)]
    fn hmax(self, a: __m512) -> f32 {
        isa!(_mm512_reduce_max_ps(a))
    }

    #[inline(always)]
    unsafe fn sums(self, rows: [__m512; 16], to: *mut f32) {
        // SAFETY: the trait's contract.
        unsafe { self.store(to, self.of_each(rows, |a, b| self.add(a, b))) }
    }
    #[inline(always)]
    unsafe fn hmaxes(self, rows: [__m512; 16], to: *mut f32) {
        // SAFETY: the trait's contract.
        unsafe { self.store(to, self.of_each(rows, |a, b| self.max(a, b))) }
    }
    #[inline(always)]
    fn exp2(self, a: __m512) -> __m512 {
        isa! {
            // Far below what is still a float.
            let x = _mm512_max_ps(a, _mm512_set1_ps(-200.0));
            let n = self.round(x);
            _mm512_scalef_ps(self.exp2_fraction(_mm512_sub_ps(x, n)), n)
        }
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m512 {
        isa!(_mm512_loadu_ps(p))
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, a: __m512) {
        isa!(_mm512_storeu_ps(p, a))
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> __m512 {
        isa!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(
            _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()))
        )))
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16, a: __m512) {
        if DOTS {
            return isa! {
                let half = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(a));
                _mm256_storeu_si256(p.cast(), half);
            };
        }
        isa! {
            let bits = _mm512_castps_si512(a);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
            let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x0040_0000));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(a, a);
            let kept = _mm512_srli_epi32::<16>(_mm512_mask_blend_epi32(nan, up, quiet));
            _mm256_storeu_si256(p.cast(), _mm512_cvtepi32_epi16(kept));
        }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> __m512 {
        isa!(_mm512_cvtph_ps(_mm256_loadu_si256(p.cast())))
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16, a: __m512) {
        isa!(_mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<NEAREST>(a)))
    }
    #[inline(always)]
    unsafe fn load_bf16_pairs(self, p: *const u16) -> (__m512, __m512) {
        isa! {
            let both = _mm512_loadu_si512(p.cast());
            (
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(both)),
                _mm512_castsi512_ps(_mm512_and_si512(
                    both,
                    _mm512_set1_epi32(0xffff_0000u32 as i32),
                )),
            )
        }
    }
    #[inline(always)]
    unsafe fn store_i8(self, p: *mut i8, a: __m512) {
        isa!(_mm_storeu_si128(
            p.cast(),
            _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(a))
        ))
    }

    /// The same in integers, a third of the instructions.
    #[inline(always)]
    unsafe fn store_nibble_parts(
        self,
        first: *mut i8,
        second: *mut i8,
        low: __m512,
        high: __m512,
    ) -> __m512 {
        isa! {
            let high = _mm512_cvtps_epi32(_mm512_mul_ps(high, _mm512_set1_ps(16.0)));
            let l = _mm512_and_si512(high, _mm512_set1_epi32(15));
            let whole = _mm512_srai_epi32::<4>(high);
            let low = _mm512_mul_ps(low, _mm512_set1_ps(16.0));
            let sixteenth = _mm512_set1_ps(1.0 / 16.0);
            let low = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(l), sixteenth, low);
            let low = _mm512_cvtps_epi32(low);
            let a = _mm512_srai_epi32::<4>(_mm512_add_epi32(low, _mm512_set1_epi32(8)));
            let h = _mm512_sub_epi32(low, _mm512_slli_epi32::<4>(a));
            let b = _mm512_sub_epi32(whole, h);
            let y = _mm512_add_epi32(_mm512_slli_epi32::<4>(h), l);
            _mm_storeu_si128(first.cast(), _mm512_cvtepi32_epi8(a));
            _mm_storeu_si128(first.add(16).cast(), _mm512_cvtepi32_epi8(b));
            let bytes = _mm512_cvtepi32_epi8(y);
            _mm_storeu_si128(second.cast(), bytes);
            _mm_storeu_si128(second.add(16).cast(), bytes);
            let firsts = _mm512_slli_epi32::<8>(_mm512_add_epi32(a, b));
            let seconds = _mm512_add_epi32(_mm512_slli_epi32::<4>(y), y);
            _mm512_cvtepi32_ps(_mm512_add_epi32(firsts, seconds))
        }
    }
    #[inline(always)]
    unsafe fn load_i8(self, p: *const i8) -> __m512 {
        isa!(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(
            p.cast()
        ))))
    }
    #[inline(always)]
    unsafe fn load_e4m3(self, p: *const u8) -> __m512 {
        isa! {
            // The sign is in the two highest bits, the second of which is no part of it.
            let wide = _mm256_slli_epi16::<7>(_mm256_cvtepi8_epi16(_mm_loadu_si128(p.cast())));
            _mm512_cvtph_ps(_mm256_and_si256(wide, _mm256_set1_epi16(!0x4000)))
        }
    }
    #[inline(always)]
    unsafe fn load_e5m2(self, p: *const u8) -> __m512 {
        isa! {
            let bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128(p.cast()));
            _mm512_cvtph_ps(_mm256_slli_epi16::<8>(bytes))
        }
    }
    /// Ties away from zero: two instructions. Finite values up to bfloat16's largest, infinities
    /// and the NaNs that arithmetic makes stay what they are.
    #[inline(always)]
    unsafe fn store_bf16_pairs(self, p: *mut u16, a: __m512, b: __m512) {
        isa! {
            let half = _mm512_set1_epi32(0x8000);
            let a = _mm512_add_epi32(_mm512_castps_si512(a), half);
            let b = _mm512_add_epi32(_mm512_castps_si512(b), half);
            // b & mask | a
            let both = _mm512_ternarylogic_epi32::<0xea>(
                b,
                _mm512_set1_epi32(!0xffff),
                _mm512_srli_epi32::<16>(a),
            );
            _mm512_storeu_si512(p.cast(), both);
        }
    }
    const DOTS_BF16: bool = DOTS;
    #[inline(always)]
    fn dot_bf16(self, sum: __m512, a: __m512i, b: u32) -> __m512 {
        isa! {
            self.dot_bf16_words(sum, a, _mm512_set1_epi32(b.cast_signed()))
        }
    }
    #[inline(always)]
    fn dot_bf16_words(self, sum: __m512, a: __m512i, b: __m512i) -> __m512 {
        isa! {
            let (a, b) = (
                std::mem::transmute::<__m512i, __m512bh>(a),
                std::mem::transmute::<__m512i, __m512bh>(b),
            );
            _mm512_dpbf16_ps(sum, a, b)
        }
    }
    #[inline(always)]
    fn interleave_words(self, a: __m512i, b: __m512i) -> [__m512i; 2] {
        isa! {
            // Place 2 i is a's element i, the next one b's, which begin at 32.
            let low = _mm512_loadu_si512(PAIRS[0].as_ptr().cast());
            let high = _mm512_loadu_si512(PAIRS[1].as_ptr().cast());
            [_mm512_permutex2var_epi16(a, low, b), _mm512_permutex2var_epi16(a, high, b)]
        }
    }
    #[inline(always)]
    unsafe fn store_words(self, p: *mut u8, a: __m512i) {
        isa!(_mm512_storeu_si512(p.cast(), a))
    }
    const TRANSPOSES: bool = true;
    #[inline(always)]
    unsafe fn transpose_bf16(self, rows: [*const u16; 16], to: *mut f32, stride: usize) {
        isa! {
            let odd = _mm512_set1_epi32(!0xffff);
            for (p, pair) in self.pairs_of(rows).into_iter().enumerate() {
                let to = to.add(2 * p * stride);
                _mm512_storeu_si512(to.cast(), _mm512_slli_epi32::<16>(pair));
                _mm512_storeu_si512(to.add(stride).cast(), _mm512_and_si512(pair, odd));
            }
        }
    }
    #[inline(always)]
    unsafe fn transpose_pairs(self, rows: [*const u16; 16], to: *mut u32, stride: usize) {
        isa! {
            for (p, pair) in self.pairs_of(rows).into_iter().enumerate() {
                _mm512_storeu_si512(to.add(p * stride).cast(), pair);
            }
        }
    }
    #[inline(always)]
    unsafe fn store_i16(self, p: *mut i16, a: __m512) {
        isa!(_mm256_storeu_si256(
            p.cast(),
            _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(a))
        ))
    }
    #[inline(always)]
    fn dot_pairs(self, sum: __m512i, w: __m512i, x: i32) -> __m512i {
        isa!(_mm512_dpwssd_epi32(sum, w, _mm512_set1_epi32(x)))
    }
    #[inline(always)]
    fn to_floats(self, a: __m512i) -> __m512 {
        isa!(_mm512_cvtepi32_ps(a))
    }
    #[inline(always)]
    fn zero_words(self) -> __m512i {
        isa!(_mm512_setzero_si512())
    }
    #[inline(always)]
    unsafe fn load_words(self, p: *const u8) -> __m512i {
        isa!(_mm512_loadu_si512(p.cast()))
    }
    #[inline(always)]
    fn and(self, a: __m512i, mask: u32) -> __m512i {
        isa!(_mm512_and_si512(a, _mm512_set1_epi32(mask.cast_signed())))
    }
    #[inline(always)]
    fn or(self, a: __m512i, b: __m512i) -> __m512i {
        isa!(_mm512_or_si512(a, b))
    }
    #[inline(always)]
    fn shift_left<const N: i32>(self, a: __m512i) -> __m512i {
        isa!(_mm512_sll_epi32(a, _mm_cvtsi32_si128(N)))
    }
    #[inline(always)]
    fn shift_right<const N: i32>(self, a: __m512i) -> __m512i {
        isa!(_mm512_srl_epi32(a, _mm_cvtsi32_si128(N)))
    }
    #[inline(always)]
    fn nibble<const SHIFT: i32>(self, a: __m512i) -> __m512 {
        isa! {
            let numbers = _mm512_setr_ps(
                0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.,
            );
            // An index's low four bits choose: no need to clear the others.
            let down = _mm512_srl_epi32(a, _mm_cvtsi32_si128(SHIFT));
            _mm512_permutexvar_ps(down, numbers)
        }
    }
    #[inline(always)]
    fn byte<const BYTE: i32>(self, a: __m512i) -> __m512 {
        isa! {
            let up = _mm512_sll_epi32(a, _mm_cvtsi32_si128(24 - 8 * BYTE));
            _mm512_cvtepi32_ps(_mm512_srai_epi32::<24>(up))
        }
    }
    #[inline(always)]
    unsafe fn dot<const BITS: usize>(self, w: [__m512i; 8], x: *const i8) -> __m512 {
        isa! {
            let x = x.cast::<i32>();
            let four = |j: usize| _mm512_set1_epi32(x.add(j).read_unaligned());
            let zero = _mm512_setzero_si512();
            // Two chains, so that one's latency hides behind the other.
            let (mut a, mut b) = (zero, zero);
            for j in 0..4 {
                a = _mm512_dpbusd_epi32(a, w[2 * j], four(2 * j));
                b = _mm512_dpbusd_epi32(b, w[2 * j + 1], four(2 * j + 1));
            }
            _mm512_cvtepi32_ps(_mm512_add_epi32(a, b))
        }
    }
    #[inline(always)]
    unsafe fn dot_nibbles(
        self,
        w: [__m512i; 8],
        packed: *const u8,
        first: *const i8,
        second: *const i8,
    ) -> __m512 {
        isa! {
            let (first, second) = (first.cast::<i32>(), second.cast::<i32>());
            let four = |p: *const i32, j: usize| _mm512_set1_epi32(p.add(j).read_unaligned());
            let zero = _mm512_setzero_si512();
            let (mut a, mut b, mut c) = (zero, zero, zero);
            for j in 0..4 {
                a = _mm512_dpbusd_epi32(a, w[2 * j], four(first, 2 * j));
                b = _mm512_dpbusd_epi32(b, w[2 * j + 1], four(first, 2 * j + 1));
                let both = _mm512_loadu_si512(packed.add(64 * j).cast());
                c = _mm512_dpbusd_epi32(c, both, four(second, j));
            }
            let whole = _mm512_slli_epi32::<8>(_mm512_add_epi32(a, b));
            _mm512_cvtepi32_ps(_mm512_add_epi32(whole, c))
        }
    }
    #[inline(always)]
    unsafe fn dot_halves(self, w: [__m512i; 8], x: *const i8, start: [i32; 2]) -> [__m512; 2] {
        isa! {
            let x = x.cast::<i32>();
            let four = |j: usize| _mm512_set1_epi32(x.add(j).read_unaligned());
            let mut a = _mm512_set1_epi32(start[0]);
            let mut b = _mm512_set1_epi32(start[1]);
            for j in 0..4 {
                a = _mm512_dpbusd_epi32(a, w[j], four(j));
                b = _mm512_dpbusd_epi32(b, w[4 + j], four(4 + j));
            }
            [_mm512_cvtepi32_ps(a), _mm512_cvtepi32_ps(b)]
        }
    }
    #[inline(always)]
    unsafe fn dot_bytes<const R: usize>(
        self,
        w: *const u8,
        x: [*const i8; R],
        surplus: [i32; R],
    ) -> [__m512; R] {
        isa! {
            // Weights plus 128 are unsigned; what that adds is taken off at the start.
            let offset = _mm512_set1_epi8(-128);
            let mut sums = surplus.map(|s| _mm512_set1_epi32(s));
            for j in 0..8 {
                let weight = _mm512_xor_si512(_mm512_loadu_si512(w.add(64 * j).cast()), offset);
                for r in 0..R {
                    let four = x[r].cast::<i32>().add(j).read_unaligned();
                    sums[r] = _mm512_dpbusd_epi32(sums[r], weight, _mm512_set1_epi32(four));
                }
            }
            let mut out = [_mm512_setzero_ps(); R];
            for r in 0..R {
                out[r] = _mm512_cvtepi32_ps(sums[r]);
            }
            out
        }
    }
    #[inline(always)]
    unsafe fn dot_signed_halves(
        self,
        w: [__m512i; 8],
        x: *const i8,
        surplus: [i32; 2],
    ) -> [__m512; 2] {
        isa! {
            let offset = _mm512_set1_epi8(-128);
            let mut unsigned = w;
            for j in 0..8 {
                unsigned[j] = _mm512_xor_si512(w[j], offset);
            }
            self.dot_halves(unsigned, x, surplus)
        }
    }
    #[inline(always)]
    fn lookup(self, table: &[i8; 16], a: __m512i) -> __m512i {
        isa! {
            let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
            _mm512_shuffle_epi8(table, a)
        }
    }
    #[inline(always)]
    fn lookup_nibble<const SHIFT: i32>(self, table: &[f32; 16], a: __m512i) -> __m512 {
        isa! {
            // An index's low four bits choose: no need to clear the others.
            let down = _mm512_srl_epi32(a, _mm_cvtsi32_si128(SHIFT));
            _mm512_permutexvar_ps(down, _mm512_loadu_ps(table.as_ptr()))
        }
    }
    #[inline(always)]
    fn small_e4m3<const BYTE: i32>(self, a: __m512i) -> __m512 {
        isa! {
            let up = _mm512_sll_epi32(a, _mm_cvtsi32_si128(24 - 8 * BYTE));
            let mask = _mm512_set1_epi32(0x87f0_0000u32.cast_signed());
            _mm512_castsi512_ps(_mm512_and_si512(_mm512_srai_epi32::<4>(up), mask))
        }
    }
}

/// Elements of two rows of 32, in turns.
const PAIRS: [[u16; 32]; 2] = {
    let mut pairs = [[0; 32]; 2];
    let mut i = 0;
    while i < 32 {
        let half = i as u16 / 2 + (i as u16 % 2) * 32;
        pairs[0][i] = half;
        pairs[1][i] = half + 16;
        i += 1;
    }
    pairs
};

impl<const DOTS: bool> Avx512<DOTS> {
    /// Lane i: all lanes of row i together, by an operation that has no order. Each round halves the
    /// vectors, exchanging within 4 lanes, then 4 lanes.
    #[inline(always)]
    fn of_each(self, rows: [__m512; 16], op: impl Fn(__m512, __m512) -> __m512) -> __m512 {
        isa! {
            let mut a = rows;
            for i in 0..8 {
                let (x, y) = (a[2 * i], a[2 * i + 1]);
                a[i] = op(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
            }
            for i in 0..4 {
                let x = _mm512_castps_pd(a[2 * i]);
                let y = _mm512_castps_pd(a[2 * i + 1]);
                a[i] = op(
                    _mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
                    _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)),
                );
            }
            for count in [2, 1] {
                for i in 0..count {
                    let (x, y) = (a[2 * i], a[2 * i + 1]);
                    a[i] = op(
                        _mm512_shuffle_f32x4::<0x88>(x, y),
                        _mm512_shuffle_f32x4::<0xdd>(x, y),
                    );
                }
            }
            a[0]
        }
    }

    /// 16 pairs of bf16 of each of 16 rows, as columns.
    #[inline(always)]
    unsafe fn pairs_of(self, rows: [*const u16; 16]) -> [__m512i; 16] {
        isa! {
            // A lane is a pair of elements. Three rounds of exchanges within 4 lanes and of 4 lanes
            // bring pair p of all rows into vector p.
            let mut a = [_mm512_setzero_si512(); 16];
            let mut b = a;
            for i in 0..16 {
                a[i] = _mm512_loadu_si512(rows[i].cast());
            }
            for i in 0..8 {
                b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
                b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
            }
            for i in 0..4 {
                a[4 * i] = _mm512_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
                a[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
                a[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
                a[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
            }
            // a[4 i + c]: pairs c, 4 + c, 8 + c and 12 + c of rows 4 i to 4 i + 3.
            for c in 0..4 {
                let low = _mm512_shuffle_i32x4::<0x88>(a[c], a[4 + c]);
                let high = _mm512_shuffle_i32x4::<0xdd>(a[c], a[4 + c]);
                let low2 = _mm512_shuffle_i32x4::<0x88>(a[8 + c], a[12 + c]);
                let high2 = _mm512_shuffle_i32x4::<0xdd>(a[8 + c], a[12 + c]);
                b[c] = _mm512_shuffle_i32x4::<0x88>(low, low2);
                b[8 + c] = _mm512_shuffle_i32x4::<0xdd>(low, low2);
                b[4 + c] = _mm512_shuffle_i32x4::<0x88>(high, high2);
                b[12 + c] = _mm512_shuffle_i32x4::<0xdd>(high, high2);
            }
            b
        }
    }
}
