//! Floats of files as float32, from their bytes.

use crate::blocks::Shape;

/// A block's factor from its bits.
#[inline]
pub fn factor(shape: Shape, bits: u32) -> f32 {
    if shape.single {
        f32::from_bits(bits)
    } else {
        f16((bits as u16).to_le_bytes())
    }
}

/// A half-precision float. Without branches, so that loops over it become vector code.
#[inline]
pub(crate) fn f16(bytes: [u8; 2]) -> f32 {
    const EXPONENT: u32 = 0x1f << 23;
    let half = u32::from(u16::from_le_bytes(bytes));
    let sign = (half & 0x8000) << 16;
    let magnitude = (half & 0x7fff) << 13;
    let exponent = magnitude & EXPONENT;
    // Biases differ by 127 - 15; an exponent of all ones stays one, hence the second step.
    let normal = magnitude + ((127 - 15) << 23);
    let infinite = normal + ((128 - 16) << 23);
    // Subnormal: an exact subtraction normalises it.
    let tiny = f32::from_bits(magnitude + (113 << 23)) - f32::from_bits(113 << 23);
    let bits = if exponent == EXPONENT {
        infinite
    } else if exponent == 0 {
        tiny.to_bits()
    } else {
        normal
    };
    f32::from_bits(bits | sign)
}

/// A bfloat16.
#[inline]
pub(crate) fn bf16(bytes: [u8; 2]) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16)
}
