//! GGUF's block formats: their sizes, and their way to float32.
//!
//! A block holds 32 or 256 weights of one row: scales first (or last), then packed integers. The
//! arithmetic is the formats' own, one rounding per operation and no fused multiply-add, so that
//! results are bit-identical on every machine. O(elements), spread over all cores when it pays;
//! nothing is allocated.

use std::num::NonZero;
use std::thread;

/// A tensor's storage: how many elements make a block and how many bytes a block takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorKind {
    /// The number in the file.
    pub id: u32,
    /// As in `Q4_1`.
    pub name: &'static str,
    /// Elements of a block.
    pub block_len: u64,
    /// Bytes of a block.
    pub block_bytes: u64,
}

const fn kind(id: u32, name: &'static str, block_len: u64, block_bytes: u64) -> TensorKind {
    TensorKind {
        id,
        name,
        block_len,
        block_bytes,
    }
}

/// Every kind whose size is known; `dequantize` reads fewer.
pub const TENSOR_KINDS: &[TensorKind] = &[
    kind(0, "F32", 1, 4),
    kind(1, "F16", 1, 2),
    kind(2, "Q4_0", 32, 18),
    kind(3, "Q4_1", 32, 20),
    kind(6, "Q5_0", 32, 22),
    kind(7, "Q5_1", 32, 24),
    kind(8, "Q8_0", 32, 34),
    kind(10, "Q2_K", 256, 84),
    kind(11, "Q3_K", 256, 110),
    kind(12, "Q4_K", 256, 144),
    kind(13, "Q5_K", 256, 176),
    kind(14, "Q6_K", 256, 210),
    kind(16, "IQ2_XXS", 256, 66),
    kind(17, "IQ2_XS", 256, 74),
    kind(18, "IQ3_XXS", 256, 98),
    kind(19, "IQ1_S", 256, 50),
    kind(20, "IQ4_NL", 32, 18),
    kind(21, "IQ3_S", 256, 110),
    kind(22, "IQ2_S", 256, 82),
    kind(23, "IQ4_XS", 256, 136),
    kind(24, "I8", 1, 1),
    kind(25, "I16", 1, 2),
    kind(26, "I32", 1, 4),
    kind(27, "I64", 1, 8),
    kind(28, "F64", 1, 8),
    kind(29, "IQ1_M", 256, 56),
    kind(30, "BF16", 1, 2),
    kind(34, "TQ1_0", 256, 54),
    kind(35, "TQ2_0", 256, 66),
    kind(39, "MXFP4", 32, 17),
];

/// Below this many elements a thread costs more than it gains.
const MIN_ELEMENTS_PER_THREAD: usize = 1 << 17;

/// Write `data`, blocks of `kind`, into `out`.
///
/// # Errors
/// A kind that is not read, or lengths that do not agree.
pub fn dequantize(kind: TensorKind, data: &[u8], out: &mut [f32]) -> Result<(), String> {
    let convert = converter(kind.name)
        .ok_or_else(|| format!("{} cannot be converted to float32", kind.name))?;
    let block_len = kind.block_len as usize;
    let block_bytes = kind.block_bytes as usize;
    let num_blocks = data.len() / block_bytes;
    if !data.len().is_multiple_of(block_bytes) || out.len() != num_blocks * block_len {
        return Err(format!(
            "{} bytes of {} do not make {} elements",
            data.len(),
            kind.name,
            out.len()
        ));
    }
    let cores = thread::available_parallelism().map_or(1, NonZero::get);
    let num_threads = cores.min(out.len() / MIN_ELEMENTS_PER_THREAD).max(1);
    let blocks_each = num_blocks.div_ceil(num_threads).max(1);
    thread::scope(|scope| {
        let mut parts = data
            .chunks(blocks_each * block_bytes)
            .zip(out.chunks_mut(blocks_each * block_len));
        let own = parts.next();
        for (data, out) in parts {
            scope.spawn(move || convert(data, out));
        }
        if let Some((data, out)) = own {
            convert(data, out);
        }
    });
    Ok(())
}

/// Blocks to floats; lengths agree.
type Convert = fn(&[u8], &mut [f32]);

fn converter(kind: &str) -> Option<Convert> {
    Some(match kind {
        "F32" => |data, out| {
            blocks(data, out, |b, o: &mut [f32; 1]| {
                o[0] = f32::from_le_bytes(*b)
            })
        },
        "F16" => |data, out| blocks(data, out, |b, o: &mut [f32; 1]| o[0] = f16(*b)),
        "BF16" => |data, out| blocks(data, out, |b, o: &mut [f32; 1]| o[0] = bf16(*b)),
        "Q4_0" => |data, out| blocks(data, out, q4_0),
        "Q4_1" => |data, out| blocks(data, out, q4_1),
        "Q5_0" => |data, out| blocks(data, out, q5_0),
        "Q5_1" => |data, out| blocks(data, out, q5_1),
        "Q8_0" => |data, out| blocks(data, out, q8_0),
        "Q4_K" => |data, out| blocks(data, out, q4_k),
        "Q5_K" => |data, out| blocks(data, out, q5_k),
        "Q6_K" => |data, out| blocks(data, out, q6_k),
        _ => return None,
    })
}

#[inline]
fn blocks<const BYTES: usize, const LEN: usize>(
    data: &[u8],
    out: &mut [f32],
    convert: impl Fn(&[u8; BYTES], &mut [f32; LEN]),
) {
    for (block, out) in data.as_chunks().0.iter().zip(out.as_chunks_mut().0) {
        convert(block, out);
    }
}

/// A half-precision float. Without branches, so that loops over it become vector code.
#[inline]
fn f16(bytes: [u8; 2]) -> f32 {
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

#[inline]
fn bf16(bytes: [u8; 2]) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16)
}

/// The half-precision float at byte `at` of a block.
#[inline]
fn scale<const N: usize>(block: &[u8; N], at: usize) -> f32 {
    f16([block[at], block[at + 1]])
}

#[inline]
fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = scale(block, 0);
    let (low, high) = out.split_at_mut(16);
    for ((q, low), high) in block[2..].iter().zip(low).zip(high) {
        *low = d * f32::from((q & 15) as i8 - 8);
        *high = d * f32::from((q >> 4) as i8 - 8);
    }
}

#[inline]
fn q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (d, m) = (scale(block, 0), scale(block, 2));
    let (low, high) = out.split_at_mut(16);
    for ((q, low), high) in block[4..].iter().zip(low).zip(high) {
        *low = d * f32::from(q & 15) + m;
        *high = d * f32::from(q >> 4) + m;
    }
}

/// The 5-bit integers of a block: four low bits in `packed`, the fifth ones in `top`, in order.
#[inline]
fn five_bits(packed: &[u8], top: &[u8]) -> [u8; 32] {
    let top = u32::from_le_bytes([top[0], top[1], top[2], top[3]]);
    let mut q = [0; 32];
    for j in 0..16 {
        q[j] = packed[j] & 15 | ((top >> j & 1) << 4) as u8;
        q[j + 16] = packed[j] >> 4 | ((top >> (j + 16) & 1) << 4) as u8;
    }
    q
}

#[inline]
fn q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let d = scale(block, 0);
    for (q, out) in five_bits(&block[6..], &block[2..6]).iter().zip(out) {
        *out = d * f32::from(*q as i8 - 16);
    }
}

#[inline]
fn q5_1(block: &[u8; 24], out: &mut [f32; 32]) {
    let (d, m) = (scale(block, 0), scale(block, 2));
    for (q, out) in five_bits(&block[8..], &block[4..8]).iter().zip(out) {
        *out = d * f32::from(*q) + m;
    }
}

#[inline]
fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let d = scale(block, 0);
    for (q, out) in block[2..].iter().zip(out) {
        *out = d * f32::from(*q as i8);
    }
}

/// The 6-bit scale and minimum of sub-block `j` of eight, packed into twelve bytes: the first four
/// pairs whole, the last four split between spare high bits.
#[inline]
fn scale_and_min(packed: &[u8], j: usize) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        (
            packed[j + 4] & 15 | (packed[j - 4] >> 6) << 4,
            packed[j + 4] >> 4 | (packed[j] >> 6) << 4,
        )
    };
    (f32::from(scale), f32::from(min))
}

#[inline]
fn q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    let (d, dmin) = (scale(block, 0), scale(block, 2));
    let scales = &block[4..16];
    for (pair, (q, out)) in block[16..]
        .as_chunks::<32>()
        .0
        .iter()
        .zip(out.as_chunks_mut::<64>().0)
        .enumerate()
    {
        let (scale_low, min_low) = scale_and_min(scales, 2 * pair);
        let (scale_high, min_high) = scale_and_min(scales, 2 * pair + 1);
        let (d_low, m_low) = (d * scale_low, dmin * min_low);
        let (d_high, m_high) = (d * scale_high, dmin * min_high);
        let (low, high) = out.split_at_mut(32);
        for ((q, low), high) in q.iter().zip(low).zip(high) {
            *low = d_low * f32::from(q & 15) - m_low;
            *high = d_high * f32::from(q >> 4) - m_high;
        }
    }
}

#[inline]
fn q5_k(block: &[u8; 176], out: &mut [f32; 256]) {
    let (d, dmin) = (scale(block, 0), scale(block, 2));
    let scales = &block[4..16];
    let top = &block[16..48];
    for (pair, (q, out)) in block[48..]
        .as_chunks::<32>()
        .0
        .iter()
        .zip(out.as_chunks_mut::<64>().0)
        .enumerate()
    {
        let (scale_low, min_low) = scale_and_min(scales, 2 * pair);
        let (scale_high, min_high) = scale_and_min(scales, 2 * pair + 1);
        let (d_low, m_low) = (d * scale_low, dmin * min_low);
        let (d_high, m_high) = (d * scale_high, dmin * min_high);
        let (low, high) = out.split_at_mut(32);
        for (((q, top), low), high) in q.iter().zip(top).zip(low).zip(high) {
            let top = top >> (2 * pair);
            *low = d_low * f32::from(q & 15 | (top & 1) << 4) - m_low;
            *high = d_high * f32::from(q >> 4 | (top >> 1 & 1) << 4) - m_high;
        }
    }
}

#[inline]
fn q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let d = scale(block, 208);
    for (half, out) in out.as_chunks_mut::<128>().0.iter_mut().enumerate() {
        let low = &block[64 * half..64 * half + 64];
        let top = &block[128 + 32 * half..160 + 32 * half];
        let scales = &block[192 + 8 * half..200 + 8 * half];
        // Four rows of 32: the low nibbles of both quarters, then their high ones.
        for (row, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            let low = &low[32 * (row % 2)..][..32];
            let nibble = 4 * (row / 2);
            let scale_of = |part: usize| d * f32::from(scales[2 * row + part] as i8);
            for (part, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
                let d = scale_of(part);
                let low = &low[16 * part..][..16];
                let top = &top[16 * part..][..16];
                for ((q, top), out) in low.iter().zip(top).zip(out) {
                    let q = (q >> nibble) & 15 | (top >> (2 * row) & 3) << 4;
                    *out = d * f32::from(q as i8 - 32);
                }
            }
        }
    }
}
