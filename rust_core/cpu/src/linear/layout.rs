//! Packed: the layout of weights in memory, and a row's conversion to it and back.
//!
//! Layouts, where L is the level's lanes and N is padded with zero rows to a multiple of 2 L:
//! - F32, F16: panels of 2 L rows; in a panel, for each k, its 2 L rows' elements.
//! - BF16: the same for pairs of k, a row's two elements side by side (K padded to even), since
//!   a shift and a mask then make float32 vectors of them.
//! - Quantized kinds: tiles of L rows, along K in the kind's blocks of 32 to 256. A block has a
//!   head, each of its numbers for all L rows: the factors, then the scales of groups or halves of
//!   them, then the mins, as bytes. Its groups of 32 follow: L words for each bit of an element (see
//!   `encode`).
//!
//! Nothing is rounded, and a weight takes as many bits as in a GGUF file, but that scales and mins of
//! 4 or 6 bits are bytes: Q4_K takes 4.63 bits instead of 4.5, Q2_K 3.13 instead of 2.63.

use octavo_formats::blocks::{BlockFormat, Scales, Shape};
use octavo_formats::floats::factor;

use crate::float::DType;
use crate::simd::GROUP;
use crate::tensor::load_one;

/// Storage of a weight: a plain type, or one of GGUF's block formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packed {
    /// One element after another.
    Plain(DType),
    /// Blocks of integers that share scales.
    Blocks(BlockFormat),
}

/// Bytes of one row's block in a tile.
#[derive(Clone, Copy)]
pub(super) struct BlockLayout {
    /// The head: factors, then scales.
    pub(super) head: usize,
    /// A group.
    pub(super) group: usize,
    /// The head and all groups.
    pub(super) block: usize,
}

impl BlockLayout {
    pub(super) const fn of(shape: Shape) -> BlockLayout {
        let head = shape.factor_bytes() + shape.num_scales();
        let group = shape.bits * GROUP / 8;
        BlockLayout {
            head,
            group,
            block: head + shape.groups * group,
        }
    }
}

impl Packed {
    /// From GGUF's name.
    pub fn parse(name: &str) -> Option<Packed> {
        Some(match name {
            "F32" => Packed::Plain(DType::F32),
            "BF16" => Packed::Plain(DType::Bf16),
            "F16" => Packed::Plain(DType::F16),
            _ => Packed::Blocks(BlockFormat::parse(name)?),
        })
    }

    /// The element type, of a plain kind.
    pub const fn dtype(self) -> Option<DType> {
        match self {
            Packed::Plain(dtype) => Some(dtype),
            Packed::Blocks(_) => None,
        }
    }

    /// The format of a quantized kind.
    ///
    /// # Panics
    /// For a plain one.
    pub(super) fn blocks(self) -> BlockFormat {
        match self {
            Packed::Plain(_) => unreachable!("a plain kind has no blocks"),
            Packed::Blocks(format) => format,
        }
    }

    /// Elements of K in a block: 1, or 32 to 256.
    pub const fn elements(self) -> usize {
        match self {
            Packed::Plain(_) => 1,
            Packed::Blocks(format) => format.shape().elements(),
        }
    }

    /// Bytes of a packed row of `k` elements.
    pub fn row_bytes(self, k: usize) -> usize {
        match self {
            Packed::Plain(DType::Bf16) => k.next_multiple_of(2) * 2,
            Packed::Plain(dtype) => k * dtype.size(),
            Packed::Blocks(format) => {
                let shape = format.shape();
                k / shape.elements() * BlockLayout::of(shape).block
            }
        }
    }

    /// Bytes of a row of `k` elements in a file.
    pub fn file_row_bytes(self, k: usize) -> usize {
        match self {
            Packed::Plain(dtype) => k * dtype.size(),
            Packed::Blocks(format) => {
                let shape = format.shape();
                k / shape.elements() * shape.bytes
            }
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
            match self {
                Packed::Plain(dtype) => {
                    let size = dtype.size();
                    for i in 0..k {
                        let to = to.add(plain_offset(dtype, row, 2 * lanes, i, k));
                        std::ptr::copy_nonoverlapping(source.add(i * size), to, size);
                    }
                }
                Packed::Blocks(format) => {
                    let shape = format.shape();
                    let layout = BlockLayout::of(shape);
                    let (tile, lane) = (row / lanes, row % lanes);
                    let blocks = k / shape.elements();
                    for b in 0..blocks {
                        let from = source.add(b * shape.bytes);
                        let from = std::slice::from_raw_parts(from, shape.bytes);
                        let to = to.add((tile * blocks + b) * layout.block * lanes);
                        pack_block(format, from, to, lane, lanes);
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
            match self {
                Packed::Plain(dtype) => {
                    for (i, y) in out.iter_mut().enumerate() {
                        let p = from.add(plain_offset(dtype, row, 2 * lanes, i, k));
                        *y = scale * load_one(p, dtype);
                    }
                }
                Packed::Blocks(format) => {
                    let shape = format.shape();
                    let block = BlockLayout::of(shape).block * lanes;
                    let (tile, lane) = (row / lanes, row % lanes);
                    let first = from.add(tile * (k / shape.elements()) * block);
                    for (b, out) in out.chunks_exact_mut(shape.elements()).enumerate() {
                        read_block(shape, first.add(b * block), lane, lanes, scale, out);
                    }
                }
            }
        }
    }
}

/// Byte offset of an element of a plain kind, for panels `width` wide.
fn plain_offset(dtype: DType, row: usize, width: usize, k: usize, num_k: usize) -> usize {
    let (panel, column) = (row / width, row % width);
    match dtype {
        DType::Bf16 => {
            let pairs = num_k.div_ceil(2);
            (((panel * pairs + k / 2) * width + column) * 2 + k % 2) * 2
        }
        _ => ((panel * num_k + k) * width + column) * dtype.size(),
    }
}

/// Set lane `lane` of the block at `to` from a file's block.
///
/// # Safety
/// `to` is a block of a tile of this format.
unsafe fn pack_block(format: BlockFormat, from: &[u8], to: *mut u8, lane: usize, lanes: usize) {
    let shape = format.shape();
    let layout = BlockLayout::of(shape);
    let (factors, scales) = (format.read_factors(from), format.read_scales(from));
    let size = shape.factor_bytes() / shape.factors.max(1);
    // SAFETY: the caller's; offsets are those of the layout.
    unsafe {
        for (i, bits) in factors[..shape.factors].iter().enumerate() {
            let bytes = bits.to_le_bytes();
            let to = to.add((i * lanes + lane) * size);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, size);
        }
        for (i, &scale) in scales[..shape.num_scales()].iter().enumerate() {
            *to.add((shape.factor_bytes() + i) * lanes + lane) = flipped(shape, scale);
        }
        for g in 0..shape.groups {
            let to = to.add((layout.head + g * layout.group) * lanes + 4 * lane);
            let words = encode(&format.read_group(from, g), shape.bits);
            for (i, word) in words[..shape.bits].iter().enumerate() {
                let to = to.add(i * 4 * lanes).cast::<u32>();
                to.write_unaligned(word.to_le());
            }
        }
    }
}

/// A scale as a block has it, and back: exponents less 128, which vectors read as signed numbers.
fn flipped(shape: Shape, scale: u8) -> u8 {
    if shape.scales == Scales::Exponent {
        scale ^ 0x80
    } else {
        scale
    }
}

/// Lane `lane` of the block at `from` as float32 times `scale`.
///
/// # Safety
/// `from` is a block of a tile of this shape.
unsafe fn read_block(
    shape: Shape,
    from: *const u8,
    lane: usize,
    lanes: usize,
    scale: f32,
    out: &mut [f32],
) {
    let layout = BlockLayout::of(shape);
    // SAFETY: the caller's; offsets are those of the layout.
    unsafe {
        let mut factors = [0.0; 2];
        for (i, to) in factors[..shape.factors].iter_mut().enumerate() {
            let mut bytes = [0; 4];
            let size = shape.factor_bytes() / shape.factors;
            let p = from.add((i * lanes + lane) * size);
            std::ptr::copy_nonoverlapping(p, bytes.as_mut_ptr(), size);
            *to = factor(shape, u32::from_le_bytes(bytes));
        }
        let byte = |i: usize| flipped(shape, *from.add((shape.factor_bytes() + i) * lanes + lane));
        for (g, out) in out.chunks_exact_mut(GROUP).enumerate() {
            let p = from.add((layout.head + g * layout.group) * lanes + 4 * lane);
            let mut words = [0; 8];
            for (i, word) in words[..shape.bits].iter_mut().enumerate() {
                *word = u32::from_le(p.add(i * 4 * lanes).cast::<u32>().read_unaligned());
            }
            let values = decode(&words, shape.bits);
            for (half, out) in out.chunks_exact_mut(GROUP / 2).enumerate() {
                let (d, m) = shape.scale(factors, byte, g, half);
                for (y, &q) in out.iter_mut().zip(&values[half * 16..]) {
                    *y = (d * shape.value(q) + m) * scale;
                }
            }
        }
    }
}

/// 32 integers as words of 32 bits, one for each bit of an element; byte b of a word belongs to
/// elements 4j + b:
/// - 8 bits: word j has the whole bytes of j.
/// - 4 to 6: first what is above four bits, 1 or 2 a field, j from the low fields up (2: words of
///   four j each); then word j has element 4j + b's low four bits low and 16 + 4j + b's high.
/// - 2 and 3: first the third bits in the same way, then words of four j each, 2 bits a field.
fn encode(values: &[u8; GROUP], bits: usize) -> [u32; 8] {
    let mut words = [0; 8];
    let word = |j: usize| u32::from_le_bytes([0, 1, 2, 3].map(|b| values[4 * j + b]));
    if bits == 8 {
        for (j, w) in words.iter_mut().enumerate() {
            *w = word(j);
        }
        return words;
    }
    let low = low_bits(bits);
    let extra = bits - low;
    for j in 0..8 {
        let (at, shift) = (j * extra / 8, j * extra % 8);
        if extra > 0 {
            words[at] |= (word(j) >> low & 0x0303_0303) << shift;
        }
        let (at, shift) = low_field(bits, j);
        words[extra + at] |= (word(j) & field(low)) << shift;
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
            let extra = bits - low_bits(bits);
            let (at, shift) = low_field(bits, j);
            let low = words[extra + at] >> shift & field(low_bits(bits));
            let (at, shift) = (j * extra / 8, j * extra % 8);
            low | (words[at] >> shift & field(extra)) << low_bits(bits)
        };
        out[4 * j..4 * j + 4].copy_from_slice(&word.to_le_bytes());
    }
    out
}

/// Bits of an element that lie together.
fn low_bits(bits: usize) -> usize {
    if bits < 4 { 2 } else { 4 }
}

/// Word and shift of the low bits of elements 4j to 4j + 3.
fn low_field(bits: usize, j: usize) -> (usize, usize) {
    if bits < 4 {
        (j / 4, j % 4 * 2)
    } else {
        (j % 4, j / 4 * 4)
    }
}

/// The lowest `bits`, at most 4, of every byte.
fn field(bits: usize) -> u32 {
    0x0101_0101 * ((1 << bits) - 1)
}

/// Packed rows of one kind as the kernels see them.
#[derive(Clone, Copy)]
pub(crate) struct View {
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
    /// Address of a panel's element `k0`, even, in bfloat16 weights, for panels `width` wide.
    ///
    /// # Safety
    /// The element exists.
    pub(crate) unsafe fn bf16_panel(&self, panel: usize, k0: usize, width: usize) -> *const u16 {
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
        for bits in [2, 3, 4, 5, 6, 8] {
            let values = std::array::from_fn(|i| ((i * 37 + 11) % (1 << bits)) as u8);
            assert_eq!(decode(&encode(&values, bits), bits), values, "{bits} bits");
        }
    }
}
