//! Simd: the vector operations the kernels are written in.
//!
//! A kernel is written once, generic over [`Simd`], and compiled per level: `Level::run` enters a
//! function with the level's target features, into which the kernel and every method here are
//! inlined (`inline(always)`; an intrinsic that stayed a call would be correct but slow).
//!
//! Quantized weights meet int8 activations in tiles of `LANES` weight rows, 32 elements of K a
//! group: 8 vectors of 4 * LANES bytes; in vector j, lane r's bytes are row r's elements 4j..4j+4.
//! So a dot product broadcasts 4 activations to all lanes.
//!
//! Longer than other files: it is one trait, with its scalar form.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
pub(crate) mod scalar;

use crate::float::{e4m3_to_half, e5m2_to_half, f32_to_bf16};

pub use octavo_formats::blocks::GROUP;

/// Work that is compiled per level. `run` must be `inline(always)`.
pub trait Kernel {
    /// Its result.
    type Out;
    /// # Safety
    /// Each kernel states what its fields must satisfy.
    unsafe fn run<S: Simd>(self, s: S) -> Self::Out;
}

/// Vector operations. A value of the type is the proof that its instructions exist here.
///
/// # Safety
/// The pointer methods read or write `LANES` elements (or the number they state) at any alignment; the
/// caller vouches for that memory.
#[allow(missing_docs, clippy::missing_safety_doc)]
pub trait Simd: Copy {
    /// `LANES` float32.
    type V: Copy;
    const LANES: usize;
    /// Rows of activations a float tile holds in registers (a tile is `ROWS` x 2 vectors).
    const ROWS: usize;
    /// Rows of activations that share one unpacked group of weights.
    const INT_ROWS: usize;
    /// `LANES` 32-bit words.
    type I: Copy;

    fn splat(self, x: f32) -> Self::V;
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// a * b + c
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// To the nearest integer, ties to even.
    fn round(self, a: Self::V) -> Self::V;
    /// 2 to the power of an integral value in [-126, 127].
    fn pow2(self, a: Self::V) -> Self::V;
    /// For each lane, yes if a < b, else no.
    fn select_lt(self, a: Self::V, b: Self::V, yes: Self::V, no: Self::V) -> Self::V;
    fn sum(self, a: Self::V) -> f32;
    fn hmax(self, a: Self::V) -> f32;
    /// to[i] = sum(rows[i])
    #[inline(always)]
    unsafe fn sums(self, rows: [Self::V; 16], to: *mut f32) {
        for (i, row) in rows.into_iter().enumerate() {
            // SAFETY: 16 floats, the trait's contract.
            unsafe { *to.add(i) = self.sum(row) };
        }
    }
    /// to[i] = hmax(rows[i])
    #[inline(always)]
    unsafe fn hmaxes(self, rows: [Self::V; 16], to: *mut f32) {
        for (i, row) in rows.into_iter().enumerate() {
            // SAFETY: as above.
            unsafe { *to.add(i) = self.hmax(row) };
        }
    }

    unsafe fn load(self, p: *const f32) -> Self::V;
    unsafe fn store(self, p: *mut f32, a: Self::V);
    unsafe fn load_bf16(self, p: *const u16) -> Self::V;
    unsafe fn store_bf16(self, p: *mut u16, a: Self::V);
    unsafe fn load_f16(self, p: *const u16) -> Self::V;
    unsafe fn store_f16(self, p: *mut u16, a: Self::V);
    /// 2 * LANES bf16: those at even places, those at odd ones.
    unsafe fn load_bf16_pairs(self, p: *const u16) -> (Self::V, Self::V);
    /// Integral values in [-128, 127] as int8.
    unsafe fn store_i8(self, p: *mut i8, a: Self::V);

    /// Cut elements k (`low`) and k + 16 (`high`) of a group, at most 118, into bytes that `dot_nibbles`
    /// multiplies: a at `first`, b 16 after it, y at `second` and 16 after it, so that k's value is
    /// a + y / 256 and that of k + 16 is b + y / 16. Returns 256 (a + b) + 17 y.
    ///
    /// y = 16 h + l: l is the sixteenths of element k + 16, h those of element k less l / 256, and b
    /// takes off the whole steps that y / 16 adds too many, h: up to 9, hence the 118.
    #[inline(always)]
    unsafe fn store_nibble_parts(
        self,
        first: *mut i8,
        second: *mut i8,
        low: Self::V,
        high: Self::V,
    ) -> Self::V {
        let (sixteen, sixteenth) = (self.splat(16.0), self.splat(1.0 / 16.0));
        // In sixteenths; rounding what is 15/32 less is rounding down.
        let high = self.round(self.mul(high, sixteen));
        let whole = self.round(self.fma(high, sixteenth, self.splat(-15.0 / 32.0)));
        let l = self.sub(high, self.mul(whole, sixteen));
        let low = self.round(self.sub(self.mul(low, sixteen), self.mul(l, sixteenth)));
        // The 1/64 sends a half up, so that h is -8 and not 8.
        let a = self.round(self.fma(low, sixteenth, self.splat(1.0 / 64.0)));
        let h = self.sub(low, self.mul(a, sixteen));
        let b = self.sub(whole, h);
        let y = self.fma(h, sixteen, l);
        // SAFETY: the trait's contract.
        unsafe {
            self.store_i8(first, a);
            self.store_i8(first.add(GROUP / 2), b);
            self.store_i8(second, y);
            self.store_i8(second.add(GROUP / 2), y);
        }
        let firsts = self.add(a, b);
        self.fma(firsts, self.splat(256.0), self.mul(y, self.splat(17.0)))
    }

    /// int8 as floats.
    unsafe fn load_i8(self, p: *const i8) -> Self::V;
    /// LANES float8 e4m3, over 256.
    #[inline(always)]
    unsafe fn load_e4m3(self, p: *const u8) -> Self::V {
        // SAFETY: the trait's contract.
        unsafe { load_halves(self, p, e4m3_to_half) }
    }
    /// LANES float8 e5m2.
    #[inline(always)]
    unsafe fn load_e5m2(self, p: *const u8) -> Self::V {
        // SAFETY: the trait's contract.
        unsafe { load_halves(self, p, e5m2_to_half) }
    }
    /// Two vectors to the nearest bf16, ties either way: `a` to even places, `b` to odd ones.
    #[inline(always)]
    unsafe fn store_bf16_pairs(self, p: *mut u16, a: Self::V, b: Self::V) {
        let mut lanes = [[0.0f32; 16]; 2];
        // SAFETY: the trait's contract; lanes holds LANES <= 16.
        unsafe {
            self.store(lanes[0].as_mut_ptr(), a);
            self.store(lanes[1].as_mut_ptr(), b);
            for i in 0..2 * Self::LANES {
                p.add(i).write_unaligned(f32_to_bf16(lanes[i % 2][i / 2]));
            }
        }
    }

    /// Integral values within an int16's range.
    unsafe fn store_i16(self, p: *mut i16, a: Self::V);
    /// `sum` plus the products of each word's two int16 with those of x, as signed numbers.
    fn dot_pairs(self, sum: Self::I, w: Self::I, x: i32) -> Self::I;
    /// Words as signed numbers.
    fn to_floats(self, a: Self::I) -> Self::V;
    fn zero_words(self) -> Self::I;

    unsafe fn load_words(self, p: *const u8) -> Self::I;
    fn and(self, a: Self::I, mask: u32) -> Self::I;
    fn or(self, a: Self::I, b: Self::I) -> Self::I;
    /// 0 < N < 32, zeros come in; so below.
    fn shift_left<const N: i32>(self, a: Self::I) -> Self::I;
    fn shift_right<const N: i32>(self, a: Self::I) -> Self::I;
    /// Bits SHIFT..SHIFT+4 as floats.
    fn nibble<const SHIFT: i32>(self, a: Self::I) -> Self::V;
    /// Byte BYTE as a signed number.
    fn byte<const BYTE: i32>(self, a: Self::I) -> Self::V;
    /// Dot products of one group, BITS (4 or 5) bits unsigned, with 32 activations.
    unsafe fn dot<const BITS: usize>(self, w: [Self::I; 8], x: *const i8) -> Self::V;
    /// 256 times the dot product of one group of 4-bit weights with `first`, plus the product of
    /// the group's bytes, low + 16 high, at `packed` with the 16 values that `second` holds twice.
    #[inline(always)]
    unsafe fn dot_nibbles(
        self,
        w: [Self::I; 8],
        _packed: *const u8,
        first: *const i8,
        second: *const i8,
    ) -> Self::V {
        // SAFETY: the trait's contract.
        unsafe {
            let first = self.dot::<4>(w, first);
            let [low, high] = self.dot_halves(w, second, [0, 0]);
            let second = self.fma(high, self.splat(16.0), low);
            self.fma(first, self.splat(256.0), second)
        }
    }
    /// `start` plus the dot products of a group's halves, 6 bits unsigned.
    unsafe fn dot_halves(self, w: [Self::I; 8], x: *const i8, start: [i32; 2]) -> [Self::V; 2];
    /// Dot products of one group of signed bytes with R rows of 32 activations, each in
    /// [-127, 127]. `surplus`: -128 times the sum of each row's, for instruction sets that have to
    /// make weights unsigned.
    unsafe fn dot_bytes<const R: usize>(
        self,
        w: *const u8,
        x: [*const i8; R],
        surplus: [i32; R],
    ) -> [Self::V; R];

    /// The dot products of a group's halves, signed bytes, with activations in [-127, 127].
    /// `surplus`: -128 times the sum of each half's, for instruction sets that have to make weights
    /// unsigned.
    unsafe fn dot_signed_halves(
        self,
        w: [Self::I; 8],
        x: *const i8,
        surplus: [i32; 2],
    ) -> [Self::V; 2];
    /// Each byte's entry of a table; bytes are below 16.
    fn lookup(self, table: &[i8; 16], a: Self::I) -> Self::I;
    /// The entries that bits SHIFT..SHIFT+4 choose.
    fn lookup_nibble<const SHIFT: i32>(self, table: &[f32; 16], a: Self::I) -> Self::V;
    /// Byte BYTE, a float8 e4m3, times 2^-120: sign, exponent and mantissa where a float32 has them.
    fn small_e4m3<const BYTE: i32>(self, a: Self::I) -> Self::V;

    /// True if the next two and `store_words` exist, and products of int16 beat those of int8 parts.
    const WIDENS: bool = false;

    /// Bytes 0 and 1 of each word as int16, and bytes 2 and 3.
    fn widen(self, _a: Self::I) -> [Self::I; 2] {
        unreachable!("not of this level")
    }
    /// The same of signed bytes.
    fn widen_signed(self, _a: Self::I) -> [Self::I; 2] {
        unreachable!("not of this level")
    }
    unsafe fn store_words(self, _p: *mut u8, _a: Self::I) {
        unreachable!("not of this level")
    }

    /// True if `transpose_bf16` exists.
    const TRANSPOSES: bool = false;

    /// 32 bf16 of each of 16 rows as columns: element i of row j goes to `to[i * stride + j]`.
    unsafe fn transpose_bf16(self, _rows: [*const u16; 16], _to: *mut f32, _stride: usize) {
        unreachable!("not of this level")
    }

    /// True if the next five exist: for each word, dot products of pairs of bf16, rounded once in a
    /// while between them.
    const DOTS_BF16: bool = false;

    /// `sum` plus the products of each word's two bf16 with those of b.
    fn dot_bf16(self, _sum: Self::V, _a: Self::I, _b: u32) -> Self::V {
        unreachable!("not of this level")
    }

    /// `sum` plus the products of each word's two bf16 with those of b's word.
    fn dot_bf16_words(self, _sum: Self::V, _a: Self::I, _b: Self::I) -> Self::V {
        unreachable!("not of this level")
    }

    /// 2 LANES bf16 of a and of b in turns: the first LANES pairs, the others.
    fn interleave_words(self, _a: Self::I, _b: Self::I) -> [Self::I; 2] {
        unreachable!("not of this level")
    }

    /// 16 pairs of bf16 of each of 16 rows as columns: pair i of row j goes to `to[i * stride + j]`.
    unsafe fn transpose_pairs(self, _rows: [*const u16; 16], _to: *mut u32, _stride: usize) {
        unreachable!("not of this level")
    }

    /// `interleave_words` of 2 LANES bf16 at a and b, stored.
    #[inline(always)]
    unsafe fn interleave_bf16(self, a: *const u16, b: *const u16, to: *mut u32) {
        // SAFETY: the trait's contract.
        unsafe {
            let (a, b) = (self.load_words(a.cast()), self.load_words(b.cast()));
            let [first, last] = self.interleave_words(a, b);
            self.store_words(to.cast(), first);
            self.store_words(to.add(Self::LANES).cast(), last);
        }
    }

    /// Ask for the cache line at any address, valid or not.
    #[inline(always)]
    fn prefetch(self, _p: *const u8) {}

    /// The same into the second-level cache: more of such requests can be under way at once, where
    /// no hardware prefetch helps (bench/NOTES.md, "Decode at 8k of context").
    #[inline(always)]
    fn prefetch_far(self, _p: *const u8) {}

    #[inline(always)]
    fn zero(self) -> Self::V {
        self.splat(0.0)
    }

    /// The first n elements (n <= LANES), zero in the rest.
    #[inline(always)]
    unsafe fn load_first(self, p: *const f32, n: usize) -> Self::V {
        let mut lanes = [0.0f32; 16];
        // SAFETY: the caller vouches for n elements at p; lanes holds LANES <= 16.
        unsafe {
            if n >= Self::LANES {
                return self.load(p);
            }
            std::ptr::copy_nonoverlapping(p, lanes.as_mut_ptr(), n);
            self.load(lanes.as_ptr())
        }
    }

    /// Store the first n lanes.
    #[inline(always)]
    unsafe fn store_first(self, p: *mut f32, a: Self::V, n: usize) {
        let mut lanes = [0.0f32; 16];
        // SAFETY: the caller vouches for n elements at p; lanes holds LANES <= 16.
        unsafe {
            if n >= Self::LANES {
                return self.store(p, a);
            }
            self.store(lanes.as_mut_ptr(), a);
            std::ptr::copy_nonoverlapping(lanes.as_ptr(), p, n);
        }
    }

    /// e to the a; relative error below 2e-7, 0 below -87.3, capped near 2^127.
    #[inline(always)]
    fn exp(self, a: Self::V) -> Self::V {
        let low = self.splat(-87.3);
        let x = self.min(self.max(a, low), self.splat(88.0));
        let (power, part) = self.exp_parts(x);
        let y = self.mul(self.add(part, self.splat(1.0)), power);
        self.select_lt(a, low, self.zero(), y)
    }

    /// (p, y), p a power of two, with e to the a = p (1 + y), for a in [-87.3, 88]; y in
    /// [-0.3, 0.42], its relative error below 2e-7 however small it is.
    #[inline(always)]
    fn exp_parts(self, a: Self::V) -> (Self::V, Self::V) {
        let n = self.round(self.mul(a, self.splat(std::f32::consts::LOG2_E)));
        // ln 2 in two parts, so that n * ln 2 loses nothing.
        let r = self.fma(n, self.splat(-0.693_359_4), a);
        let r = self.fma(n, self.splat(2.121_944_4e-4), r);
        let mut p = self.splat(1.987_569_1e-4);
        for c in [
            1.398_199_9e-3,
            8.333_452e-3,
            4.166_579_6e-2,
            0.166_666_65,
            0.5,
        ] {
            p = self.fma(p, r, self.splat(c));
        }
        (self.pow2(n), self.fma(p, self.mul(r, r), r))
    }

    /// 2 to the a, for a up to 127; relative error below 3e-7, 0 below -126.
    #[inline(always)]
    fn exp2(self, a: Self::V) -> Self::V {
        let low = self.splat(-126.0);
        let x = self.max(a, low);
        let n = self.round(x);
        let y = self.mul(self.exp2_fraction(self.sub(x, n)), self.pow2(n));
        self.select_lt(a, low, self.zero(), y)
    }

    /// 2 to the a, for a in [-1/2, 1/2].
    #[inline(always)]
    fn exp2_fraction(self, a: Self::V) -> Self::V {
        let mut p = self.splat(EXP2[5]);
        for c in [EXP2[4], EXP2[3], EXP2[2], EXP2[1], EXP2[0]] {
            p = self.fma(p, a, self.splat(c));
        }
        p
    }

    /// Hyperbolic tangent; relative error below 3e-7.
    ///
    /// (e^2a - 1) / (e^2a + 1), its numerator put together without e^2a, which would lose a's
    /// last bits near 0: a soft cap multiplies what is lost there.
    #[inline(always)]
    fn tanh(self, a: Self::V) -> Self::V {
        // 1 in float32 from 9.01 on.
        let x = self.min(
            self.max(self.add(a, a), self.splat(-20.0)),
            self.splat(20.0),
        );
        let (power, part) = self.exp_parts(x);
        let less_one = self.fma(part, power, self.sub(power, self.splat(1.0)));
        self.div(less_one, self.add(less_one, self.splat(2.0)))
    }

    /// 1 / (1 + e^-a)
    #[inline(always)]
    fn sigmoid(self, a: Self::V) -> Self::V {
        let one = self.splat(1.0);
        // Twice as fast as `exp`, and as exact where the sum is not 1 or too large to matter.
        let x = self.min(
            self.mul(a, self.splat(-std::f32::consts::LOG2_E)),
            self.splat(127.0),
        );
        self.div(one, self.add(one, self.exp2(x)))
    }

    /// The error function; absolute error below 5e-7 (Abramowitz and Stegun 7.1.26).
    #[inline(always)]
    fn erf(self, a: Self::V) -> Self::V {
        let zero = self.zero();
        let one = self.splat(1.0);
        let x = self.max(a, self.sub(zero, a));
        let t = self.div(one, self.fma(self.splat(0.327_591_1), x, one));
        let mut p = self.splat(1.061_405_4);
        for c in [-1.453_152_1, 1.421_413_8, -0.284_496_72, 0.254_829_6] {
            p = self.fma(p, t, self.splat(c));
        }
        let e = self.exp(self.sub(zero, self.mul(x, x)));
        let y = self.sub(one, self.mul(self.mul(p, t), e));
        self.select_lt(a, zero, self.sub(zero, y), y)
    }
}

/// LANES bytes at p as floats, by way of halves.
///
/// # Safety
/// They exist.
#[inline(always)]
unsafe fn load_halves<S: Simd>(s: S, p: *const u8, half: impl Fn(u8) -> u16) -> S::V {
    let mut halves = [0u16; 16];
    for (i, to) in halves.iter_mut().enumerate().take(S::LANES) {
        // SAFETY: the caller's.
        *to = half(unsafe { *p.add(i) });
    }
    // SAFETY: it holds LANES.
    unsafe { s.load_f16(halves.as_ptr()) }
}

/// 2 to the a on [-1/2, 1/2], by powers of a; the last four are fitted to the least relative error,
/// 1e-7.
const EXP2: [f32; 6] = [
    1.0,
    std::f32::consts::LN_2,
    0.240_222_81,
    5.550_56e-2,
    9.669_71e-3,
    1.330_026_7e-3,
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::level::Level;

    fn at_every_level<K: Kernel<Out = ()> + Copy>(kernel: K) {
        for level in Level::available() {
            // SAFETY: the kernels below need nothing.
            unsafe {
                level.run(kernel);
                level.run_dots(kernel);
            }
        }
    }

    #[derive(Clone, Copy)]
    struct PowersOfTwo;

    impl Kernel for PowersOfTwo {
        type Out = ();
        #[inline(always)]
        unsafe fn run<S: Simd>(self, s: S) {
            let of = |x: f32| s.hmax(s.exp2(s.splat(x)));
            for i in -125i16..127 {
                assert_eq!(of(f32::from(i)), 2f32.powi(i32::from(i)), "{i}");
                for part in [0.013, 0.25, 0.499, 0.5, 0.501, 0.75, 0.987] {
                    let x = f32::from(i) + part;
                    let error = f64::from(of(x)) / f64::from(x).exp2() - 1.0;
                    assert!(error.abs() < 3e-7, "{x}: {error}");
                }
            }
            for x in [-150.0, -1e9, f32::MIN, f32::NEG_INFINITY] {
                assert_eq!(of(x), 0.0, "{x}");
            }
        }
    }

    #[test]
    fn powers_of_two() {
        at_every_level(PowersOfTwo);
    }

    /// The largest error of a function from `low` to `high` against float64's, relative to that.
    fn error(of: impl Fn(f32) -> f32, exact: fn(f64) -> f64, low: f32, high: f32) -> f64 {
        let steps = 20_000u16;
        (0..=steps)
            .map(|i| low + (high - low) * (f32::from(i) / f32::from(steps)))
            .map(|x| (x, exact(f64::from(x))))
            .map(|(x, expected)| match expected {
                0.0 => f64::from(of(x)).abs(),
                _ => (f64::from(of(x)) / expected - 1.0).abs(),
            })
            .fold(0.0, f64::max)
    }

    #[derive(Clone, Copy)]
    struct ExpAndTanh;

    impl Kernel for ExpAndTanh {
        type Out = ();
        #[inline(always)]
        unsafe fn run<S: Simd>(self, s: S) {
            let exp = |x: f32| s.hmax(s.exp(s.splat(x)));
            let tanh = |x: f32| s.hmax(s.tanh(s.splat(x)));
            for size in [1e-30, 1e-6, 1e-3, 0.1, 1.0, 10.0, 87.0] {
                let error_of_exp = error(exp, f64::exp, -size, size);
                assert!(error_of_exp < 2e-7, "{size}: {error_of_exp}");
                let error_of_tanh = error(tanh, f64::tanh, -size, size);
                assert!(error_of_tanh < 3e-7, "{size}: {error_of_tanh}");
            }
            for x in [1e9, f32::INFINITY] {
                assert_eq!((tanh(-x), tanh(x)), (-1.0, 1.0), "{x}");
                assert_eq!(exp(-x), 0.0, "{x}");
            }
        }
    }

    #[test]
    fn exp_and_tanh() {
        at_every_level(ExpAndTanh);
    }

    #[derive(Clone, Copy)]
    struct SixteenRows;

    impl Kernel for SixteenRows {
        type Out = ();
        #[inline(always)]
        unsafe fn run<S: Simd>(self, s: S) {
            let value = |row: usize, lane: usize| ((7 * row + 5 * lane) % 31) as f32 - 15.0;
            let mut rows = [s.zero(); 16];
            for (r, row) in rows.iter_mut().enumerate() {
                let lanes: Vec<_> = (0..S::LANES).map(|lane| value(r, lane)).collect();
                // SAFETY: it has LANES elements.
                *row = unsafe { s.load(lanes.as_ptr()) };
            }
            let (mut sums, mut most) = ([0.0; 16], [0.0; 16]);
            // SAFETY: 16 floats each.
            unsafe {
                s.sums(rows, sums.as_mut_ptr());
                s.hmaxes(rows, most.as_mut_ptr());
            }
            for r in 0..16 {
                let lanes = (0..S::LANES).map(|lane| value(r, lane));
                assert_eq!(sums[r], lanes.clone().sum::<f32>(), "row {r}");
                assert_eq!(most[r], lanes.fold(f32::MIN, f32::max), "row {r}");
            }
        }
    }

    #[test]
    fn sixteen_rows_at_once() {
        at_every_level(SixteenRows);
    }
}
