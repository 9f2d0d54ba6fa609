//! DType: the element types of the tensors, and one number's conversion between them.

/// Element type of a float tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DType {
    /// 4 bytes.
    F32,
    /// The upper half of a float32.
    Bf16,
    /// IEEE half.
    F16,
}

impl DType {
    /// From the code the binding uses: 0, 1, 2 in the order above.
    pub fn from_code(code: u8) -> Option<DType> {
        [DType::F32, DType::Bf16, DType::F16]
            .get(usize::from(code))
            .copied()
    }

    /// Bytes of one element.
    pub fn size(self) -> usize {
        if self == DType::F32 { 4 } else { 2 }
    }
}

/// Exact.
#[inline(always)]
pub fn bf16_to_f32(h: u16) -> f32 {
    f32::from_bits(u32::from(h) << 16)
}

/// To nearest, ties to even; NaN stays NaN.
#[inline(always)]
pub fn f32_to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    if x.is_nan() {
        return (bits >> 16) as u16 | 0x40;
    }
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

/// Exact.
#[inline(always)]
pub fn f16_to_f32(h: u16) -> f32 {
    let sign = u32::from(h & 0x8000) << 16;
    let rest = u32::from(h & 0x7fff);
    let magnitude = if rest >= 0x7c00 {
        f32::from_bits(0x7f80_0000 | rest << 13)
    } else if rest >= 0x400 {
        f32::from_bits((rest << 13) + (112 << 23))
    } else {
        // Subnormal: a multiple of 2^-24.
        rest as f32 * (1.0 / 16_777_216.0)
    };
    f32::from_bits(magnitude.to_bits() | sign)
}

/// To nearest, ties to even; beyond 65504 infinity; NaN stays NaN.
#[inline(always)]
pub fn f32_to_f16(x: f32) -> u16 {
    let sign = (x.to_bits() >> 16) as u16 & 0x8000;
    let bits = x.to_bits() & 0x7fff_ffff;
    let magnitude = if bits > 0x7f80_0000 {
        0x7e00
    } else if bits >= 0x477f_f000 {
        0x7c00
    } else if bits >= 0x3880_0000 {
        let rounded = bits + 0xfff + (bits >> 13 & 1);
        ((rounded - (112 << 23)) >> 13) as u16
    } else {
        // Adding 0.5 leaves the value as a multiple of 2^-24 in the low bits, rounded to even.
        (f32::from_bits(bits) + 0.5).to_bits() as u16
    };
    sign | magnitude
}

/// The half whose number is that of a float8 e4m3, over 256. There are no infinities to keep.
#[inline(always)]
pub fn e4m3_to_half(byte: u8) -> u16 {
    u16::from(byte & 0x80) << 8 | u16::from(byte & 0x7f) << 7
}

/// The half whose number is that of a float8 e5m2.
#[inline(always)]
pub fn e5m2_to_half(byte: u8) -> u16 {
    u16::from(byte) << 8
}

/// A float8 e4m3, to nearest, ties to even.
///
/// `x`: at most 448 in magnitude.
#[inline(always)]
pub fn f32_to_e4m3(x: f32) -> u8 {
    // Subnormals are multiples of 2^-9, the last place of a sum with 2^14.
    round_to_byte::<20, 7>(x, 16_384.0)
}

/// A float8 e5m2, to nearest, ties to even.
///
/// `x`: at most 57344 in magnitude.
#[inline(always)]
pub fn f32_to_e5m2(x: f32) -> u8 {
    // Subnormals are multiples of 2^-16, the last place of a sum with 2^7.
    round_to_byte::<21, 15>(x, 128.0)
}

/// Of a float32's bits all but the last `DROP` of the mantissa, with an exponent that is `BIAS` for 1.
/// `sum`: a power of two whose last place is that of subnormals. Without branches, for whole vectors.
#[inline(always)]
fn round_to_byte<const DROP: u32, const BIAS: u32>(x: f32, sum: f32) -> u8 {
    let bits = x.to_bits() & 0x7fff_ffff;
    let up = bits + (1 << (DROP - 1)) - 1 + (bits >> DROP & 1);
    let normal = (up >> DROP).wrapping_sub((127 - BIAS) << (23 - DROP));
    let small = (f32::from_bits(bits) + sum).to_bits() - sum.to_bits();
    let is_small = bits < (128 - BIAS) << 23;
    let rounded = if is_small { small } else { normal };
    (rounded | x.to_bits() >> 24 & 0x80) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every byte's number is its own; the middle between two neighbours goes to the even one, and
    /// what is a little to either side to the nearer one.
    fn check_bytes(to_half: fn(u8) -> u16, unit: f32, round: fn(f32) -> u8, last: u8) {
        let value = |byte: u8| f16_to_f32(to_half(byte)) * unit;
        for byte in 0..last {
            let (x, next) = (value(byte), value(byte + 1));
            let middle = (x + next) / 2.0;
            let even = byte + (byte & 1);
            let step = (next - x) / 64.0;
            for (x, wanted) in [
                (x, byte),
                (next, byte + 1),
                (middle, even),
                (middle - step, byte),
                (middle + step, byte + 1),
            ] {
                assert_eq!(round(x), wanted, "{x}");
                assert_eq!(round(-x), wanted | 0x80, "-{x}");
            }
        }
    }

    #[test]
    fn floats_of_a_byte() {
        check_bytes(e4m3_to_half, 256.0, f32_to_e4m3, 0x7e);
        check_bytes(e5m2_to_half, 1.0, f32_to_e5m2, 0x7b);
        assert_eq!(f32_to_e4m3(448.0), 0x7e);
        assert_eq!(f32_to_e5m2(57_344.0), 0x7b);
    }

    #[test]
    fn f16_round_trips_every_value() {
        for h in 0..=u16::MAX {
            let x = f16_to_f32(h);
            if x.is_nan() {
                assert!(f16_to_f32(f32_to_f16(x)).is_nan());
            } else {
                assert_eq!(f32_to_f16(x), h, "{x}");
            }
        }
    }

    #[test]
    fn f16_rounds_to_nearest_even() {
        for (x, h) in [
            (1.0, 0x3c00),
            (1.0 + 1.0 / 2048.0, 0x3c00),
            (1.0 + 3.0 / 2048.0, 0x3c02),
            (65519.9, 0x7bff),
            (65520.0, 0x7c00),
            (3.0e-8, 0x0001),
            (2.9e-8, 0x0000),
            (-6.0e-5, 0x83ef),
        ] {
            assert_eq!(f32_to_f16(x), h, "{x}");
        }
    }

    #[test]
    fn bf16_rounds_to_nearest_even() {
        assert_eq!(f32_to_bf16(1.0), 0x3f80);
        assert_eq!(f32_to_bf16(f32::from_bits(0x3f80_8000)), 0x3f80);
        assert_eq!(f32_to_bf16(f32::from_bits(0x3f81_8000)), 0x3f82);
        assert_eq!(f32_to_bf16(f32::from_bits(0x3f80_8001)), 0x3f81);
        assert!(bf16_to_f32(f32_to_bf16(f32::from_bits(0x7f80_0001))).is_nan());
        assert_eq!(f32_to_bf16(f32::INFINITY), 0x7f80);
    }
}
