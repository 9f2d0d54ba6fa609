//! Block formats: a row of weights in blocks of 32 or 256, packed integers with shared scales.
//!
//! An element is `scale * (q - offset) + minimum`, with scale and minimum shared by a group of 32
//! elements, or half of one. Formats differ in the numbers of a block from which these come, and in
//! the places of a block's bits.

use crate::kinds::{TensorKind, named};

/// Elements of a group.
pub const GROUP: usize = 32;

/// The numbers of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Groups.
    pub groups: usize,
    /// Half-precision numbers: d, then m or dmin.
    pub halves: usize,
    /// Scales as bytes; with two halves, as many of them scales as minimums.
    pub scales: usize,
    /// Bits of an element.
    pub bits: usize,
    /// Subtracted from every element. Elements of 8 bits are signed.
    pub offset: u8,
    /// Bytes.
    pub bytes: usize,
}

impl Shape {
    /// Elements.
    pub const fn elements(&self) -> usize {
        self.groups * GROUP
    }

    /// True where the halves of a group have scales of their own.
    pub const fn has_half_groups(&self) -> bool {
        self.scales == 2 * self.groups && self.halves == 1
    }

    /// Scale and minimum of half `half` of group `g`, from the block's numbers.
    #[inline(always)]
    pub fn scale(
        &self,
        [d, m]: [f32; 2],
        scales: impl Fn(usize) -> i8,
        g: usize,
        half: usize,
    ) -> (f32, f32) {
        let scales = |i| f32::from(scales(i));
        match (self.scales > 0, self.halves) {
            (false, 1) => (d, 0.0),
            (false, _) => (d, m),
            (true, 1) => (d * scales(2 * g + half), 0.0),
            (true, _) => (d * scales(g), -(m * scales(self.groups + g))),
        }
    }

    /// `q - offset`.
    #[inline(always)]
    pub fn integer(&self, q: u8) -> f32 {
        f32::from(q.wrapping_sub(self.offset).cast_signed())
    }
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
    ($d:tt $($name:ident: $halves:literal, $scales:literal, $bits:literal, $offset:literal;)*) => {
        /// A block format of GGUF.
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
                let (halves, scales, bits, offset) = match self {
                    $(BlockFormat::$name => ($halves, $scales, $bits, $offset),)*
                };
                let kind = self.kind();
                Shape {
                    groups: kind.block_len as usize / GROUP,
                    halves,
                    scales,
                    bits,
                    offset,
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

// halves, scales, bits, offset
blocks! {$
    Q4_0: 1, 0, 4, 8;
    Q4_1: 2, 0, 4, 0;
    Q5_0: 1, 0, 5, 16;
    Q5_1: 2, 0, 5, 0;
    Q8_0: 1, 0, 8, 0;
    Q4_K: 2, 16, 4, 0;
    Q5_K: 2, 16, 5, 0;
    Q6_K: 1, 16, 6, 32;
}

impl BlockFormat {
    /// The format that GGUF calls by this name.
    pub fn parse(name: &str) -> Option<BlockFormat> {
        Self::ALL.iter().copied().find(|f| f.kind().name == name)
    }

    /// A block's half-precision numbers; zero for one it does not have.
    #[inline(always)]
    pub fn read_halves(self, block: &[u8]) -> [u16; 2] {
        let half = |at: usize| u16::from_le_bytes([block[at], block[at + 1]]);
        match self {
            BlockFormat::Q6_K => [half(208), 0],
            _ if self.shape().halves == 1 => [half(0), 0],
            _ => [half(0), half(2)],
        }
    }

    /// A block's scales, then minimums, as bytes.
    #[inline(always)]
    pub fn read_scales(self, block: &[u8]) -> [u8; 16] {
        let mut scales = [0; 16];
        match self {
            BlockFormat::Q6_K => scales.copy_from_slice(&block[192..208]),
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
            _ => {}
        }
        scales
    }

    /// The integers of group `g` of a block.
    #[inline(always)]
    pub fn read_group(self, block: &[u8], g: usize) -> [u8; GROUP] {
        match self {
            BlockFormat::Q4_0 => nibbles(&block[2..18]),
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
            // Halves of 128 elements: four groups' nibbles in 64 bytes, high bits in 32.
            BlockFormat::Q6_K => {
                let (half, g) = (g / 4, g % 4);
                let low = &block[half * 64 + g % 2 * 32..][..32];
                let high = &block[128 + half * 32..][..32];
                std::array::from_fn(|i| low[i] >> (g / 2 * 4) & 15 | (high[i] >> (2 * g) & 3) << 4)
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

    #[test]
    fn a_block_is_its_numbers() {
        for format in BlockFormat::ALL {
            let shape = format.shape();
            // Eight pairs of 6-bit scales and minimums take 12 bytes.
            let scales = match (shape.scales, shape.halves) {
                (16, 2) => 12,
                (scales, _) => scales,
            };
            let elements = shape.elements() * shape.bits / 8;
            assert_eq!(
                2 * shape.halves + scales + elements,
                shape.bytes,
                "{format:?}"
            );
        }
    }

    #[test]
    fn every_bit_of_a_block_is_read_once() {
        for &format in BlockFormat::ALL {
            let shape = format.shape();
            let read = |block: &[u8]| {
                let mut bits = 0;
                for half in format.read_halves(block) {
                    bits += half.count_ones();
                }
                for scale in format.read_scales(block) {
                    bits += scale.count_ones();
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
}
