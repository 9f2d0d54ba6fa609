//! Block formats: a row of weights in blocks of 32 to 256, packed integers with shared scales.
//!
//! An element is `scale * (value(q) - offset) + minimum`, with scale and minimum shared by a group of
//! 32 elements, or half of one. Formats differ in the numbers of a block from which these come, in
//! what an integer stands for, and in the places of a block's bits.
//!
//! Longer than other files: a row a format, as tables are.

use crate::kinds::{TensorKind, named};

/// Elements of a group.
pub const GROUP: usize = 32;

/// The meaning of a block's integers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Codes {
    /// Itself; of 8 bits as a signed number.
    Integers,
    /// An entry of a table of integers.
    Table(&'static [i8; 16]),
    /// An entry of a table of floats.
    Floats(&'static [f32; 16]),
    /// The float8 e4m3 of these bits. Its NaNs are read as 480.
    E4m3,
}

/// The bytes of a block by which its factor d becomes a group's scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scales {
    /// None: d, or one of two for each half of a group.
    None,
    /// A signed byte for each group (1) or half of one (2).
    Bytes(usize),
    /// The same, then as many for minimums, times the second factor.
    Minimums(usize),
    /// A zero point, subtracted from every element; signed where elements have 8 bits.
    Zero,
    /// No factor but an exponent: the scale is 2 to the power of this byte less 128.
    Exponent,
}

/// The numbers of a block.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    /// Groups.
    pub groups: usize,
    /// Factors: d, then m, dmin, or the d of second halves.
    pub factors: usize,
    /// True where factors are float32; false: half-precision.
    pub single: bool,
    /// See there.
    pub scales: Scales,
    /// Bits of an element.
    pub bits: usize,
    /// Subtracted from every element.
    pub offset: u8,
    /// See there.
    pub codes: Codes,
    /// Bytes.
    pub bytes: usize,
}

impl Shape {
    /// Elements.
    pub const fn elements(&self) -> usize {
        self.groups * GROUP
    }

    /// Bytes of the factors.
    pub const fn factor_bytes(&self) -> usize {
        self.factors * if self.single { 4 } else { 2 }
    }

    /// Bytes of scales.
    pub const fn num_scales(&self) -> usize {
        match self.scales {
            Scales::None => 0,
            Scales::Bytes(each) => each * self.groups,
            Scales::Minimums(each) => 2 * each * self.groups,
            Scales::Zero | Scales::Exponent => 1,
        }
    }

    /// True where the halves of a group have scales of their own.
    pub const fn has_half_groups(&self) -> bool {
        match self.scales {
            Scales::Bytes(each) | Scales::Minimums(each) => each == 2,
            Scales::None => self.single && self.factors == 2,
            Scales::Zero | Scales::Exponent => false,
        }
    }

    /// True where elements have a minimum that is not their offset's.
    pub const fn has_minimums(&self) -> bool {
        match self.scales {
            Scales::None => !self.single && self.factors == 2,
            Scales::Minimums(_) | Scales::Zero => true,
            Scales::Bytes(_) | Scales::Exponent => false,
        }
    }

    /// Scale and minimum of half `half` of group `g`, from the block's numbers.
    #[inline(always)]
    pub fn scale(
        &self,
        [d, m]: [f32; 2],
        scales: impl Fn(usize) -> u8,
        g: usize,
        half: usize,
    ) -> (f32, f32) {
        let signed = |i| f32::from(scales(i).cast_signed());
        match self.scales {
            Scales::None if self.has_half_groups() => ([d, m][half], 0.0),
            Scales::None => (d, m),
            Scales::Bytes(each) => (d * signed(each * g + half % each), 0.0),
            Scales::Minimums(each) => {
                let i = each * g + half % each;
                (d * signed(i), -(m * signed(each * self.groups + i)))
            }
            Scales::Zero => (d, -(d * signed(0))),
            // 2^-128 and 2^-127 are subnormal.
            Scales::Exponent => match scales(0) {
                e @ 0..2 => (f32::from_bits(0x0020_0000 << e), 0.0),
                e => (f32::from_bits(u32::from(e - 1) << 23), 0.0),
            },
        }
    }

    /// `value(q) - offset`.
    #[inline(always)]
    pub fn value(&self, q: u8) -> f32 {
        match self.codes {
            Codes::Integers => f32::from(q.wrapping_sub(self.offset).cast_signed()),
            Codes::Table(table) => f32::from(table[usize::from(q & 15)]),
            Codes::Floats(table) => table[usize::from(q & 15)],
            Codes::E4m3 => e4m3(q),
        }
    }
}

/// A float8 e4m3, NaNs left out.
#[inline(always)]
fn e4m3(q: u8) -> f32 {
    let bits = u32::from(q & 0x80) << 24 | u32::from(q & 0x7f) << 20;
    // As the bits of a float32 of the same exponent and mantissa it is 2^120 too small.
    f32::from_bits(bits) * f32::from_bits((127 + 120) << 23)
}

/// A block format as a type.
pub trait Format {
    /// As a value.
    const FORMAT: BlockFormat;
    /// The numbers of a block.
    const SHAPE: Shape = Self::FORMAT.shape();
}

/// `$d` is a dollar sign, for the macro that this one defines.
macro_rules! blocks {
    ($d:tt $(
        $name:ident: $factors:literal $factor:ident, $scales:expr, $bits:literal, $offset:literal,
        $codes:expr;
    )*) => {
        /// A block format: GGUF's, and those of `kinds::ROW_KINDS`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[allow(non_camel_case_types, missing_docs)]
        pub enum BlockFormat {
            $($name,)*
        }

        impl BlockFormat {
            /// All of them.
            pub const ALL: &[BlockFormat] = &[$(BlockFormat::$name,)*];

            /// The format's row of the table of kinds.
            pub const fn kind(self) -> TensorKind {
                match self {
                    $(BlockFormat::$name => const { named(stringify!($name)) },)*
                }
            }

            /// The numbers of a block.
            pub const fn shape(self) -> Shape {
                let (factors, single, scales, bits, offset, codes) = match self {
                    $(BlockFormat::$name => {
                        ($factors, is_single(stringify!($factor)), $scales, $bits, $offset, $codes)
                    })*
                };
                let kind = self.kind();
                Shape {
                    groups: kind.block_len as usize / GROUP,
                    factors,
                    single,
                    scales,
                    bits,
                    offset,
                    codes,
                    bytes: kind.block_bytes as usize,
                }
            }
        }

        $(
            /// See [`BlockFormat`].
            #[allow(non_camel_case_types)]
            pub struct $name;
            impl Format for $name {
                const FORMAT: BlockFormat = BlockFormat::$name;
            }
        )*

        /// `$d body` with the type `$d name` of a [`BlockFormat`].
        #[macro_export]
        macro_rules! with_format {
            ($d format:expr, $d name:ident => $d body:expr) => {
                match $d format {
                    $($d crate::blocks::BlockFormat::$name => {
                        type $d name = $d crate::blocks::$name;
                        $d body
                    })*
                }
            };
        }
    };
}

/// A factor's type by the table's word, f16 or f32.
const fn is_single(factor: &str) -> bool {
    matches!(factor.as_bytes(), b"f32")
}

/// llama.cpp's values of 4-bit codes, spaced as weights are.
pub const IQ4: [i8; 16] = [
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
];

/// Twice the 4-bit floats e2m1.
pub const E2M1: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// The values of NF4, quantiles of the normal distribution (QLoRA, appendix E).
pub const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

use Codes::{E4m3, Floats, Integers, Table};
use Scales::{Bytes, Exponent, Minimums, Zero};

// factors and their type, scales, bits, offset, codes
blocks! {$
    Q4_0: 1 f16, Scales::None, 4, 8, Integers;
    Q4_1: 2 f16, Scales::None, 4, 0, Integers;
    Q5_0: 1 f16, Scales::None, 5, 16, Integers;
    Q5_1: 2 f16, Scales::None, 5, 0, Integers;
    Q8_0: 1 f16, Scales::None, 8, 0, Integers;
    Q2_K: 2 f16, Minimums(2), 2, 0, Integers;
    Q3_K: 1 f16, Bytes(2), 3, 4, Integers;
    Q4_K: 2 f16, Minimums(1), 4, 0, Integers;
    Q5_K: 2 f16, Minimums(1), 5, 0, Integers;
    Q6_K: 1 f16, Bytes(2), 6, 32, Integers;
    IQ4_NL: 1 f16, Scales::None, 4, 0, Table(&IQ4);
    IQ4_XS: 1 f16, Bytes(1), 4, 0, Table(&IQ4);
    MXFP4: 0 f16, Exponent, 4, 0, Table(&E2M1);
    INT4_32: 1 f32, Zero, 4, 0, Integers;
    INT4_128: 1 f32, Zero, 4, 0, Integers;
    INT8_32: 1 f32, Zero, 8, 0, Integers;
    INT8_128: 1 f32, Zero, 8, 0, Integers;
    FP8_32: 1 f32, Scales::None, 8, 0, E4m3;
    FP8_128: 1 f32, Scales::None, 8, 0, E4m3;
    FP4_16: 2 f32, Scales::None, 4, 0, Table(&E2M1);
    NF4_64: 1 f32, Scales::None, 4, 0, Floats(&NF4);
}

impl BlockFormat {
    /// The format of this name.
    pub fn parse(name: &str) -> Option<BlockFormat> {
        Self::ALL.iter().copied().find(|f| f.kind().name == name)
    }

    /// The bits of a block's factors; zero for one it does not have.
    #[inline(always)]
    pub fn read_factors(self, block: &[u8]) -> [u32; 2] {
        let shape = self.shape();
        let first = match self {
            BlockFormat::Q2_K => 80,
            BlockFormat::Q3_K => 108,
            BlockFormat::Q6_K => 208,
            _ => 0,
        };
        let factor = |i: usize| {
            if i >= shape.factors {
                0
            } else if shape.single {
                let at = first + 4 * i;
                u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
            } else {
                let at = first + 2 * i;
                u32::from(u16::from_le_bytes([block[at], block[at + 1]]))
            }
        };
        [factor(0), factor(1)]
    }

    /// A block's scales, then minimums, as bytes.
    #[inline(always)]
    pub fn read_scales(self, block: &[u8]) -> [u8; 32] {
        let mut scales = [0; 32];
        match self {
            BlockFormat::Q6_K => scales[..16].copy_from_slice(&block[192..208]),
            BlockFormat::Q2_K => {
                for (i, &both) in block[..16].iter().enumerate() {
                    scales[i] = both & 15;
                    scales[16 + i] = both >> 4;
                }
            }
            BlockFormat::Q3_K => {
                // Six bits each: the low four of 8 and 8 in a byte, the high two of four.
                let s = &block[96..108];
                for (i, scale) in scales[..16].iter_mut().enumerate() {
                    let low = s[i % 8] >> (i / 8 * 4) & 15;
                    let high = s[8 + i % 4] >> (i / 4 * 2) & 3;
                    *scale = (low | high << 4).wrapping_sub(32);
                }
            }
            BlockFormat::Q4_K | BlockFormat::Q5_K => {
                // Six bits each: four pairs whole, the high bits of four more in their spare ones.
                let s = &block[4..16];
                for i in 0..4 {
                    scales[i] = s[i] & 63;
                    scales[8 + i] = s[4 + i] & 63;
                    scales[4 + i] = s[8 + i] & 15 | s[i] >> 6 << 4;
                    scales[12 + i] = s[8 + i] >> 4 | s[4 + i] >> 6 << 4;
                }
            }
            BlockFormat::IQ4_XS => {
                for (i, scale) in scales[..8].iter_mut().enumerate() {
                    let low = block[4 + i / 2] >> (i % 2 * 4) & 15;
                    let high = block[2 + i / 4] >> (i % 4 * 2) & 3;
                    *scale = (low | high << 4).wrapping_sub(32);
                }
            }
            BlockFormat::MXFP4 => scales[0] = block[0],
            _ if self.shape().scales == Zero => scales[0] = block[4],
            _ => {}
        }
        scales
    }

    /// The integers of group `g` of a block.
    #[inline(always)]
    pub fn read_group(self, block: &[u8], g: usize) -> [u8; GROUP] {
        match self {
            BlockFormat::Q4_0 | BlockFormat::IQ4_NL => nibbles(&block[2..18]),
            BlockFormat::IQ4_XS => nibbles(&block[8 + 16 * g..][..16]),
            BlockFormat::MXFP4 => nibbles(&block[1..17]),
            BlockFormat::Q4_1 => nibbles(&block[4..20]),
            BlockFormat::Q5_0 => with_high_bits(nibbles(&block[6..22]), &block[2..6]),
            BlockFormat::Q5_1 => with_high_bits(nibbles(&block[8..24]), &block[4..8]),
            BlockFormat::Q8_0 => std::array::from_fn(|i| block[2 + i]),
            // Two groups' nibbles share 32 bytes; a byte has one high bit of each group.
            BlockFormat::Q4_K => {
                let low = &block[16 + g / 2 * 32..][..32];
                std::array::from_fn(|i| low[i] >> (g % 2 * 4) & 15)
            }
            BlockFormat::Q5_K => {
                let low = &block[48 + g / 2 * 32..][..32];
                let high = &block[16..48];
                std::array::from_fn(|i| low[i] >> (g % 2 * 4) & 15 | (high[i] >> g & 1) << 4)
            }
            // Halves of 128 elements: four groups' pairs of bits in 32 bytes; a byte of high bits has one
            // of each group.
            BlockFormat::Q2_K => {
                let low = &block[16 + g / 4 * 32..][..32];
                std::array::from_fn(|i| low[i] >> (g % 4 * 2) & 3)
            }
            BlockFormat::Q3_K => {
                let low = &block[32 + g / 4 * 32..][..32];
                std::array::from_fn(|i| low[i] >> (g % 4 * 2) & 3 | (block[i] >> g & 1) << 2)
            }
            // Halves of 128 elements: four groups' nibbles in 64 bytes, high bits in 32.
            BlockFormat::Q6_K => {
                let (half, g) = (g / 4, g % 4);
                let low = &block[half * 64 + g % 2 * 32..][..32];
                let high = &block[128 + half * 32..][..32];
                std::array::from_fn(|i| low[i] >> (g / 2 * 4) & 15 | (high[i] >> (2 * g) & 3) << 4)
            }
            BlockFormat::INT4_32
            | BlockFormat::INT4_128
            | BlockFormat::INT8_32
            | BlockFormat::INT8_128
            | BlockFormat::FP8_32
            | BlockFormat::FP8_128
            | BlockFormat::FP4_16
            | BlockFormat::NF4_64 => {
                let shape = self.shape();
                let first = shape.factor_bytes() + shape.num_scales() + g * GROUP;
                std::array::from_fn(|i| block[first + i])
            }
        }
    }
}

/// Elements i and 16 + i share byte i.
#[inline(always)]
fn nibbles(packed: &[u8]) -> [u8; GROUP] {
    std::array::from_fn(|i| packed[i % 16] >> (i / 16 * 4) & 15)
}

/// Elements with their fifth bits, which are in order.
#[inline(always)]
fn with_high_bits(mut low: [u8; GROUP], high: &[u8]) -> [u8; GROUP] {
    let high = u32::from_le_bytes([high[0], high[1], high[2], high[3]]);
    for (i, q) in low.iter_mut().enumerate() {
        *q |= ((high >> i & 1) << 4) as u8;
    }
    low
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes of a block's scales in a file, where some have six bits or four.
    fn bytes_of_scales(format: BlockFormat) -> usize {
        match format {
            BlockFormat::Q2_K => 16,
            BlockFormat::Q3_K | BlockFormat::Q4_K | BlockFormat::Q5_K => 12,
            BlockFormat::IQ4_XS => 6,
            _ => format.shape().num_scales(),
        }
    }

    #[test]
    fn a_block_is_its_numbers() {
        for &format in BlockFormat::ALL {
            let shape = format.shape();
            // What is no file's has a byte for each element.
            let bits = if shape.single { 8 } else { shape.bits };
            let elements = shape.elements() * bits / 8;
            assert_eq!(
                shape.factor_bytes() + bytes_of_scales(format) + elements,
                shape.bytes,
                "{format:?}"
            );
        }
    }

    #[test]
    fn every_bit_of_a_block_is_read_once() {
        for &format in BlockFormat::ALL {
            let shape = format.shape();
            // Six bits around zero are stored 32 higher.
            let raised = match format {
                BlockFormat::Q3_K | BlockFormat::IQ4_XS => 32,
                _ => 0,
            };
            let read = |block: &[u8]| {
                let mut bits = 0;
                for factor in format.read_factors(block) {
                    bits += factor.count_ones();
                }
                for scale in &format.read_scales(block)[..shape.num_scales()] {
                    bits += scale.wrapping_add(raised).count_ones();
                }
                for g in 0..shape.groups {
                    for q in format.read_group(block, g) {
                        bits += q.count_ones();
                    }
                }
                bits
            };
            let mut block = vec![0u8; shape.bytes];
            for at in 0..8 * shape.bytes {
                block[at / 8] = 1 << (at % 8);
                assert_eq!(read(&block), 1, "{format:?}: bit {at}");
                block[at / 8] = 0;
            }
        }
    }

    #[test]
    fn bytes_are_floats() {
        for q in 0..=255u8 {
            let exponent = i32::from(q >> 3 & 15);
            let mantissa = f32::from(q & 7) / 8.0;
            let magnitude = match exponent {
                0 => mantissa * 2f32.powi(-6),
                _ => (1.0 + mantissa) * 2f32.powi(exponent - 7),
            };
            assert_eq!(e4m3(q).abs(), magnitude, "{q}");
            assert_eq!(e4m3(q).is_sign_negative(), q > 127, "{q}");
        }
    }
}
