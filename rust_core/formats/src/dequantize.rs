//! Conversion of a tensor to float32.
//!
//! The arithmetic is the formats' own, one rounding per operation and no fused multiply-add, so that
//! results are bit-identical on every machine. O(elements), spread over all cores when it pays;
//! nothing is allocated.

use std::num::NonZero;
use std::thread;

use crate::blocks::{BlockFormat, Format, GROUP};
use crate::floats::{bf16, f16, factor};
use crate::grids::{self, Convert};
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
