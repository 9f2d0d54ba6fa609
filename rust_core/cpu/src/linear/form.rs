//! Form: a block format as the vector kernels read it, a group of a tile at a time.

use octavo_formats::blocks::{Codes, Format, Scales};

use crate::linear::layout::BlockLayout;
use crate::simd::{GROUP, Simd};

/// A block format's reads in vectors.
pub(super) trait Form: Format {
    /// Sizes of a block.
    const LAYOUT: BlockLayout = BlockLayout::of(Self::SHAPE);

    /// The block's factors, zero for one it does not have; of an exponent the power of two, and of
    /// float8 times what their vectors lack.
    ///
    /// # Safety
    /// `block` is one of a tile of this kind, here and below.
    #[inline(always)]
    unsafe fn head<S: Simd>(s: S, block: *const u8) -> [S::V; 2] {
        let shape = Self::SHAPE;
        // SAFETY: the caller's.
        unsafe {
            if shape.scales == Scales::Exponent {
                // No smaller than a normal number.
                let exponent = s.max(s.load_i8(block.cast()), s.splat(-126.0));
                return [s.pow2(exponent), s.zero()];
            }
            // Helpers instead of closures, which would not always be inlined.
            let first = factor::<S, Self>(s, block, 0);
            let second = if shape.factors == 2 {
                factor::<S, Self>(s, block, 1)
            } else {
                s.zero()
            };
            if shape.codes == Codes::E4m3 {
                let small = f32::from_bits((127 + 120) << 23);
                return [s.mul(first, s.splat(small)), second];
            }
            [first, second]
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
            let scales = block.add(shape.factor_bytes() * S::LANES).cast::<i8>();
            let scale = |i: usize| s.load_i8(scales.add(i * S::LANES));
            let (scaled, minimum) = match shape.scales {
                Scales::None if shape.has_half_groups() => ([d, m][half], s.zero()),
                Scales::None | Scales::Exponent => (d, m),
                Scales::Bytes(each) => (s.mul(d, scale(each * g + half % each)), s.zero()),
                Scales::Minimums(each) => {
                    let i = each * g + half % each;
                    let least = s.mul(m, scale(each * shape.groups + i));
                    (s.mul(d, scale(i)), s.sub(s.zero(), least))
                }
                Scales::Zero => (d, s.sub(s.zero(), s.mul(d, scale(0)))),
            };
            if shape.offset > 0 {
                let offset = s.splat(-f32::from(shape.offset));
                return [scaled, s.mul(scaled, offset)];
            }
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

    /// The group at `p`: byte b of vector j has elements 4j + b, those of a table looked up.
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
            if bits < 4 {
                return small_values(s, p, bits);
            }
            let nibbles = p.add((bits - 4) * 4 * S::LANES);
            for j in 0..4 {
                let both = s.load_words(nibbles.add(4 * j * S::LANES));
                out[j] = s.and(both, 0x0f0f_0f0f);
                out[j + 4] = s.and(s.shift_right::<4>(both), 0x0f0f_0f0f);
            }
            if let Codes::Table(table) = Self::SHAPE.codes {
                for out in &mut out {
                    *out = s.lookup(table, *out);
                }
                return out;
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
                match Self::SHAPE.codes {
                    Codes::Integers if Self::SHAPE.bits == 4 => {
                        nibbles(s, p, [low, high], k, &Numbers, out);
                        continue;
                    }
                    Codes::Floats(table) => {
                        nibbles(s, p, [low, high], k, &Entries(table), out);
                        continue;
                    }
                    Codes::E4m3 => {
                        for j in 0..8 {
                            let w = s.load_words(p.add(4 * j * S::LANES));
                            let (a, b) = (s.small_e4m3::<0>(w), s.small_e4m3::<1>(w));
                            put(s, low, k + 4 * j, a, b, out);
                            let (a, b) = (s.small_e4m3::<2>(w), s.small_e4m3::<3>(w));
                            put(s, low, k + 4 * j + 2, a, b, out);
                        }
                        continue;
                    }
                    Codes::Integers | Codes::Table(_) => {}
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

/// Factor `i` of a block.
///
/// # Safety
/// As `Form::head`.
#[inline(always)]
unsafe fn factor<S: Simd, F: Form + ?Sized>(s: S, block: *const u8, i: usize) -> S::V {
    let shape = F::SHAPE;
    // SAFETY: the caller's.
    unsafe {
        let p = block.add(i * (shape.factor_bytes() / shape.factors) * S::LANES);
        if shape.single {
            s.load(p.cast())
        } else {
            s.load_f16(p.cast())
        }
    }
}

/// The group at `p` of 2 or 3 bits: see `Form::values`.
///
/// # Safety
/// As there.
#[inline(always)]
unsafe fn small_values<S: Simd>(s: S, p: *const u8, bits: usize) -> [S::I; 8] {
    // SAFETY: the caller's.
    unsafe {
        let high = s.load_words(p);
        let low = p.add((bits - 2) * 4 * S::LANES);
        let [a, b] = [s.load_words(low), s.load_words(low.add(4 * S::LANES))];
        let mut out = [
            a,
            s.shift_right::<2>(a),
            s.shift_right::<4>(a),
            s.shift_right::<6>(a),
            b,
            s.shift_right::<2>(b),
            s.shift_right::<4>(b),
            s.shift_right::<6>(b),
        ];
        for out in &mut out {
            *out = s.and(*out, 0x0303_0303);
        }
        if bits == 3 {
            let up = [
                s.shift_left::<2>(high),
                s.shift_left::<1>(high),
                high,
                s.shift_right::<1>(high),
                s.shift_right::<2>(high),
                s.shift_right::<3>(high),
                s.shift_right::<4>(high),
                s.shift_right::<5>(high),
            ];
            for j in 0..8 {
                out[j] = s.or(out[j], s.and(up[j], 0x0404_0404));
            }
        }
        out
    }
}

/// The value of a nibble.
trait Nibble {
    fn of<const SHIFT: i32, S: Simd>(&self, s: S, w: S::I) -> S::V;
}

/// Itself.
struct Numbers;

impl Nibble for Numbers {
    #[inline(always)]
    fn of<const SHIFT: i32, S: Simd>(&self, s: S, w: S::I) -> S::V {
        s.nibble::<SHIFT>(w)
    }
}

/// An entry of a table.
struct Entries<'a>(&'a [f32; 16]);

impl Nibble for Entries<'_> {
    #[inline(always)]
    fn of<const SHIFT: i32, S: Simd>(&self, s: S, w: S::I) -> S::V {
        s.lookup_nibble::<SHIFT>(self.0, w)
    }
}

/// Put the group of nibbles at `p`, from element `k` on.
///
/// # Safety
/// As `Form::weights`.
#[inline(always)]
unsafe fn nibbles<S: Simd, N: Nibble, O: Out<S>>(
    s: S,
    p: *const u8,
    [low, high]: [[S::V; 2]; 2],
    k: usize,
    nibble: &N,
    out: &O,
) {
    // SAFETY: the caller's.
    unsafe {
        for j in 0..4 {
            let w = s.load_words(p.add(4 * j * S::LANES));
            let k = k + 4 * j;
            let (a, b) = (nibble.of::<0, S>(s, w), nibble.of::<8, S>(s, w));
            put(s, low, k, a, b, out);
            let (a, b) = (nibble.of::<16, S>(s, w), nibble.of::<24, S>(s, w));
            put(s, low, k + 2, a, b, out);
            let (a, b) = (nibble.of::<4, S>(s, w), nibble.of::<12, S>(s, w));
            put(s, high, k + 16, a, b, out);
            let (a, b) = (nibble.of::<20, S>(s, w), nibble.of::<28, S>(s, w));
            put(s, high, k + 18, a, b, out);
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
