//! Packed: how weights lie in memory, and a row's way there and back.
//!
//! Layouts, where L is the level's lanes and N is padded with zero rows to a multiple of 2 L:
//! - F32, F16: panels of 2 L rows; in a panel, for each k, its 2 L rows' elements.
//! - BF16: the same for pairs of k, a row's two elements side by side (K padded to even), since
//!   a shift and a mask then make float32 vectors of them.
//! - Quantized kinds: tiles of L rows, along K in GGUF's blocks of 32 or super-blocks of 256. A
//!   block has a head, each of its numbers for all L rows: the half d; the half m or dmin if the
//!   kind has one; in super-blocks the scales of groups (of 16 for Q6_K, else of 32), then the
//!   mins, as bytes. Its groups of 32 follow: L words for each bit of an element (see `encode`).
//!
//! Nothing is rounded, and a weight takes as many bits as in the file, but for Q4_K and Q5_K: the
//! 6-bit scales and mins are bytes, so that it is 4.63 and 5.63 bits instead of 4.5 and 5.5.

use crate::float::{DType, bf16_to_f32, f16_to_f32};
use crate::simd::GROUP;

/// How weights are stored: a plain type, or one of GGUF's block formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(non_camel_case_types)]
pub enum Packed {
    /// float32
    F32,
    /// bfloat16
    Bf16,
    /// IEEE half
    F16,
    /// d (q - 8)
    Q4_0,
    /// d q + m
    Q4_1,
    /// d (q - 16)
    Q5_0,
    /// d q + m
    Q5_1,
    /// d q, signed
    Q8_0,
    /// d scale q - dmin min
    Q4_K,
    /// d scale q - dmin min
    Q5_K,
    /// d scale (q - 32), groups of 16
    Q6_K,
}

/// A quantized kind's block.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Groups of 32.
    pub groups: usize,
    /// Halves of a row's head: d, then m or dmin.
    pub halves: usize,
    /// Bytes of a row's head behind them.
    pub scales: usize,
    /// Of an element.
    pub bits: usize,
    /// Bytes of a row's block in the file.
    file_bytes: usize,
}

impl Shape {
    /// Elements of K.
    pub const fn elements(&self) -> usize {
        self.groups * GROUP
    }

    /// Bytes of a row's head.
    pub const fn head(&self) -> usize {
        2 * self.halves + self.scales
    }

    /// Bytes of a row's group.
    pub const fn group(&self) -> usize {
        self.bits * GROUP / 8
    }

    /// Bytes of a row's block.
    pub const fn block(&self) -> usize {
        self.head() + self.groups * self.group()
    }
}

impl Packed {
    /// From GGUF's name.
    pub fn parse(name: &str) -> Option<Packed> {
        Some(match name {
            "F32" => Packed::F32,
            "BF16" => Packed::Bf16,
            "F16" => Packed::F16,
            "Q4_0" => Packed::Q4_0,
            "Q4_1" => Packed::Q4_1,
            "Q5_0" => Packed::Q5_0,
            "Q5_1" => Packed::Q5_1,
            "Q8_0" => Packed::Q8_0,
            "Q4_K" => Packed::Q4_K,
            "Q5_K" => Packed::Q5_K,
            "Q6_K" => Packed::Q6_K,
            _ => return None,
        })
    }

    /// The element type, of a plain kind.
    pub const fn dtype(self) -> Option<DType> {
        match self {
            Packed::F32 => Some(DType::F32),
            Packed::Bf16 => Some(DType::Bf16),
            Packed::F16 => Some(DType::F16),
            _ => None,
        }
    }

    /// Elements of K that it takes whole: 1, 32 or 256.
    pub const fn elements(self) -> usize {
        match self.dtype() {
            Some(_) => 1,
            None => self.shape().elements(),
        }
    }

    /// The block of a quantized kind.
    ///
    /// # Panics
    /// For a plain one.
    pub const fn shape(self) -> Shape {
        let (groups, halves, scales, bits, file_bytes) = match self {
            Packed::Q4_0 => (1, 1, 0, 4, 18),
            Packed::Q4_1 => (1, 2, 0, 4, 20),
            Packed::Q5_0 => (1, 1, 0, 5, 22),
            Packed::Q5_1 => (1, 2, 0, 5, 24),
            Packed::Q8_0 => (1, 1, 0, 8, 34),
            Packed::Q4_K => (8, 2, 16, 4, 144),
            Packed::Q5_K => (8, 2, 16, 5, 176),
            Packed::Q6_K => (8, 1, 16, 6, 210),
            Packed::F32 | Packed::Bf16 | Packed::F16 => panic!("a plain kind has no blocks"),
        };
        Shape {
            groups,
            halves,
            scales,
            bits,
            file_bytes,
        }
    }

    /// Bytes of a row of `k` elements here.
    pub fn row_bytes(self, k: usize) -> usize {
        match self {
            Packed::F32 => k * 4,
            Packed::Bf16 => k.next_multiple_of(2) * 2,
            Packed::F16 => k * 2,
            _ => k / self.elements() * self.shape().block(),
        }
    }

    /// Bytes of a row of `k` elements in a file.
    pub fn file_row_bytes(self, k: usize) -> usize {
        match self.dtype() {
            Some(dtype) => k * dtype.size(),
            None => k / self.elements() * self.shape().file_bytes,
        }
    }

    /// Byte offset of an element of a plain kind, for panels `width` wide.
    fn plain_offset(self, row: usize, width: usize, k: usize, num_k: usize) -> usize {
        let (panel, column) = (row / width, row % width);
        match self {
            Packed::F32 => ((panel * num_k + k) * width + column) * 4,
            Packed::Bf16 => {
                let pairs = num_k.div_ceil(2);
                (((panel * pairs + k / 2) * width + column) * 2 + k % 2) * 2
            }
            _ => ((panel * num_k + k) * width + column) * 2,
        }
    }

    /// Set row `row` of `to`, a weight of rows of `k` elements for `lanes` lanes.
    ///
    /// # Safety
    /// `source` holds a row of the file; `to` the packed weight, whose row exists and whose panel
    /// nobody else touches.
    pub unsafe fn pack_row(
        self,
        source: *const u8,
        to: *mut u8,
        row: usize,
        k: usize,
        lanes: usize,
    ) {
        // SAFETY: the caller's; offsets are those of the layout.
        unsafe {
            if let Some(dtype) = self.dtype() {
                let size = dtype.size();
                for i in 0..k {
                    let to = to.add(self.plain_offset(row, 2 * lanes, i, k));
                    std::ptr::copy_nonoverlapping(source.add(i * size), to, size);
                }
                return;
            }
            let shape = self.shape();
            let (tile, lane) = (row / lanes, row % lanes);
            let blocks = k / shape.elements();
            for b in 0..blocks {
                let from = source.add(b * shape.file_bytes);
                let from = std::slice::from_raw_parts(from, shape.file_bytes);
                let to = to.add((tile * blocks + b) * shape.block() * lanes);
                let (halves, scales) = self.read_head(from);
                for (i, half) in halves[..shape.halves].iter().enumerate() {
                    let to = to.add((i * lanes + lane) * 2).cast::<u16>();
                    to.write_unaligned(half.to_le());
                }
                for (i, &scale) in scales[..shape.scales].iter().enumerate() {
                    *to.add((2 * shape.halves + i) * lanes + lane) = scale;
                }
                for g in 0..shape.groups {
                    let to = to.add((shape.head() + g * shape.group()) * lanes + 4 * lane);
                    let words = encode(&self.read_values(from, g), shape.bits);
                    for (i, word) in words[..shape.bits].iter().enumerate() {
                        let to = to.add(i * 4 * lanes).cast::<u32>();
                        to.write_unaligned(word.to_le());
                    }
                }
            }
        }
    }

    /// Row `row` of `from`, packed as by `pack_row`, as float32 times `scale`.
    ///
    /// # Safety
    /// `from` holds the packed weight, of rows of `out.len()` elements, and the row exists.
    pub unsafe fn read_row(
        self,
        from: *const u8,
        row: usize,
        lanes: usize,
        scale: f32,
        out: &mut [f32],
    ) {
        let k = out.len();
        // SAFETY: the caller's; offsets are those of the layout.
        unsafe {
            let half = |p: *const u8| u16::from_le(p.cast::<u16>().read_unaligned());
            if self.dtype().is_some() {
                for (i, y) in out.iter_mut().enumerate() {
                    let p = from.add(self.plain_offset(row, 2 * lanes, i, k));
                    *y = scale
                        * match self {
                            Packed::F32 => p.cast::<f32>().read_unaligned(),
                            Packed::Bf16 => bf16_to_f32(half(p)),
                            _ => f16_to_f32(half(p)),
                        };
                }
                return;
            }
            let shape = self.shape();
            let (tile, lane) = (row / lanes, row % lanes);
            let blocks = k / shape.elements();
            for (b, out) in out.chunks_exact_mut(shape.elements()).enumerate() {
                let p = from.add((tile * blocks + b) * shape.block() * lanes);
                let number = |i: usize| f16_to_f32(half(p.add((i * lanes + lane) * 2)));
                let byte =
                    |i: usize| f32::from(*p.add((2 * shape.halves + i) * lanes + lane) as i8);
                for (g, out) in out.chunks_exact_mut(GROUP).enumerate() {
                    let p = p.add((shape.head() + g * shape.group()) * lanes + 4 * lane);
                    let mut words = [0; 8];
                    for (i, word) in words[..shape.bits].iter_mut().enumerate() {
                        *word = u32::from_le(p.add(i * 4 * lanes).cast::<u32>().read_unaligned());
                    }
                    let values = decode(&words, shape.bits);
                    for (half, out) in out.chunks_exact_mut(GROUP / 2).enumerate() {
                        let (d, offset, m) = match self {
                            Packed::Q4_0 => (number(0), 8.0, 0.0),
                            Packed::Q5_0 => (number(0), 16.0, 0.0),
                            Packed::Q8_0 => (number(0), 0.0, 0.0),
                            Packed::Q4_K | Packed::Q5_K => {
                                (number(0) * byte(g), 0.0, -number(1) * byte(8 + g))
                            }
                            Packed::Q6_K => (number(0) * byte(2 * g + half), 32.0, 0.0),
                            _ => (number(0), 0.0, number(1)),
                        };
                        for (y, &q) in out.iter_mut().zip(&values[half * 16..]) {
                            let q = if shape.bits == 8 {
                                f32::from(q as i8)
                            } else {
                                f32::from(q)
                            };
                            *y = (d * (q - offset) + m) * scale;
                        }
                    }
                }
            }
        }
    }

    /// A file block's halves and its scales, then mins, as bytes.
    fn read_head(self, block: &[u8]) -> ([u16; 2], [u8; 16]) {
        let half = |at: usize| u16::from_le_bytes([block[at], block[at + 1]]);
        let mut scales = [0; 16];
        match self {
            Packed::Q4_0 | Packed::Q5_0 | Packed::Q8_0 => ([half(0), 0], scales),
            Packed::Q6_K => {
                scales.copy_from_slice(&block[192..208]);
                ([half(208), 0], scales)
            }
            Packed::Q4_K | Packed::Q5_K => {
                // Six bits each: four pairs whole, the high bits of four more in their spare ones.
                let s = &block[4..16];
                for i in 0..4 {
                    scales[i] = s[i] & 63;
                    scales[8 + i] = s[4 + i] & 63;
                    scales[4 + i] = s[8 + i] & 15 | s[i] >> 6 << 4;
                    scales[12 + i] = s[8 + i] >> 4 | s[4 + i] >> 6 << 4;
                }
                ([half(0), half(2)], scales)
            }
            _ => ([half(0), half(2)], scales),
        }
    }

    /// The 32 integers of group `g` of a file block.
    fn read_values(self, block: &[u8], g: usize) -> [u8; GROUP] {
        let mut out = [0; GROUP];
        // Elements i and 16 + i share a byte.
        let mut pairs = |at: usize| {
            for i in 0..16 {
                out[i] = block[at + i] & 15;
                out[16 + i] = block[at + i] >> 4;
            }
        };
        match self {
            Packed::Q4_0 => pairs(2),
            Packed::Q4_1 => pairs(4),
            Packed::Q5_0 | Packed::Q5_1 => {
                let at = if self == Packed::Q5_0 { 2 } else { 4 };
                pairs(at + 4);
                for (i, q) in out.iter_mut().enumerate() {
                    *q |= (block[at + i / 8] >> (i % 8) & 1) << 4;
                }
            }
            Packed::Q8_0 => out.copy_from_slice(&block[2..34]),
            Packed::Q4_K => {
                let low = &block[16 + g / 2 * 32..][..32];
                for (q, low) in out.iter_mut().zip(low) {
                    *q = low >> (g % 2 * 4) & 15;
                }
            }
            Packed::Q5_K => {
                let low = &block[48 + g / 2 * 32..][..32];
                for ((q, low), high) in out.iter_mut().zip(low).zip(&block[16..48]) {
                    *q = low >> (g % 2 * 4) & 15 | (high >> g & 1) << 4;
                }
            }
            _ => {
                // Halves of 128 elements: four groups' nibbles in 64 bytes, high bits in 32.
                let (half, g) = (g / 4, g % 4);
                let low = &block[half * 64 + g % 2 * 32..][..32];
                let high = &block[128 + half * 32..][..32];
                for ((q, low), high) in out.iter_mut().zip(low).zip(high) {
                    *q = low >> (g / 2 * 4) & 15 | (high >> (2 * g) & 3) << 4;
                }
            }
        }
        out
    }
}

/// 32 integers as words of 32 bits, one for each bit of an element; byte b of a word belongs to
/// elements 4j + b:
/// - 8 bits: word j has the whole bytes of j.
/// - fewer: first what is above four bits, 1 or 2 a field, j from the low fields up (2: words of
///   four j each); then word j has element 4j + b's low four bits low and 16 + 4j + b's high.
fn encode(values: &[u8; GROUP], bits: usize) -> [u32; 8] {
    let mut words = [0; 8];
    let word = |j: usize| u32::from_le_bytes([0, 1, 2, 3].map(|b| values[4 * j + b]));
    if bits == 8 {
        for (j, w) in words.iter_mut().enumerate() {
            *w = word(j);
        }
        return words;
    }
    let extra = bits - 4;
    for j in 0..8 {
        let (at, shift) = (j * extra / 8, j * extra % 8);
        if extra > 0 {
            words[at] |= (word(j) >> 4 & 0x0303_0303) << shift;
        }
    }
    for j in 0..4 {
        words[extra + j] = word(j) & 0x0f0f_0f0f | (word(4 + j) & 0x0f0f_0f0f) << 4;
    }
    words
}

/// The inverse of `encode`.
fn decode(words: &[u32; 8], bits: usize) -> [u8; GROUP] {
    let mut out = [0; GROUP];
    for j in 0..8 {
        let word = if bits == 8 {
            words[j]
        } else {
            let extra = bits - 4;
            let low = words[extra + j % 4] >> (j / 4 * 4) & 0x0f0f_0f0f;
            let (at, shift) = (j * extra / 8, j * extra % 8);
            let field = u32::from(extra > 0) * 0x0101_0101 * ((1 << extra) - 1);
            low | (words[at] >> shift & field) << 4
        };
        out[4 * j..4 * j + 4].copy_from_slice(&word.to_le_bytes());
    }
    out
}

/// Packed rows of one kind as the kernels see them.
#[derive(Clone, Copy)]
pub struct View {
    /// The packed bytes.
    pub bytes: *const u8,
    /// Their layout.
    pub packed: Packed,
    /// Rows, without padding.
    pub n: usize,
    /// Columns, without padding.
    pub k: usize,
}

impl View {
    /// Where a panel's element `k0`, even, begins in bfloat16 weights, for panels `width` wide.
    ///
    /// # Safety
    /// The element exists.
    pub unsafe fn bf16_panel(&self, panel: usize, k0: usize, width: usize) -> *const u16 {
        let pairs = panel * self.k.div_ceil(2) + k0 / 2;
        // SAFETY: the caller's.
        unsafe { self.bytes.cast::<u16>().add(pairs * 2 * width) }
    }
}

// SAFETY: a View's bytes are read only, and outlive the region that uses it.
unsafe impl Sync for View {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_survive_every_width() {
        for bits in [4, 5, 6, 8] {
            let values = std::array::from_fn(|i| ((i * 37 + 11) % (1 << bits)) as u8);
            assert_eq!(decode(&encode(&values, bits), bits), values, "{bits} bits");
        }
    }
}
