//! Conversion of a tensor to float32.
//!
//! The arithmetic is the formats' own, one rounding per operation and no fused multiply-add, so that
//! results are bit-identical on every machine. O(elements), spread over all cores when it pays;
//! nothing is allocated.

use std::num::NonZero;
use std::thread;

use crate::blocks::{BlockFormat, Format, GROUP, Shape};
use crate::grids;
use crate::kinds::TensorKind;

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
pub(crate) type Convert = fn(&[u8], &mut [f32]);

fn converter(kind: &str) -> Option<Convert> {
    Some(match kind {
        "F32" => |data, out| elements(data, out, f32::from_le_bytes),
        "F16" => |data, out| elements(data, out, f16),
        "BF16" => |data, out| elements(data, out, bf16),
        _ => match BlockFormat::parse(kind) {
            Some(format) => with_format!(format, F => blocks::<F>),
            None => grids::converter(kind)?,
        },
    })
}

#[inline]
fn elements<const BYTES: usize>(data: &[u8], out: &mut [f32], convert: fn([u8; BYTES]) -> f32) {
    for (bytes, out) in data.as_chunks().0.iter().zip(out) {
        *out = convert(*bytes);
    }
}

fn blocks<F: Format>(data: &[u8], out: &mut [f32]) {
    let shape = const { F::SHAPE };
    let blocks = data.chunks_exact(shape.bytes);
    for (block, out) in blocks.zip(out.chunks_exact_mut(shape.elements())) {
        let factors = F::FORMAT
            .read_factors(block)
            .map(|bits| factor(shape, bits));
        let scales = F::FORMAT.read_scales(block);
        for (g, out) in out.as_chunks_mut::<GROUP>().0.iter_mut().enumerate() {
            let values = F::FORMAT.read_group(block, g);
            let out = out.as_chunks_mut::<{ GROUP / 2 }>().0;
            let values = values.as_chunks::<{ GROUP / 2 }>().0;
            for (half, (out, values)) in out.iter_mut().zip(values).enumerate() {
                let (scale, minimum) = shape.scale(factors, |i| scales[i], g, half);
                for (out, &q) in out.iter_mut().zip(values) {
                    *out = scale * shape.value(q);
                    if shape.has_minimums() {
                        *out += minimum;
                    }
                }
            }
        }
    }
}

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

#[inline]
fn bf16(bytes: [u8; 2]) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16)
}
