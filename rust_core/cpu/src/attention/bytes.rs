//! Keys and values of a byte an element: their numbers as floats, and their scales as factors.

use crate::kv_cache::{Byte, Cache, CacheType, E4m3, E5m2, Elements, Int8};
use crate::simd::Simd;

use super::plan::CHUNK;
use super::task::{AttentionTask, Buffers};

impl AttentionTask<'_> {
    /// True where keys and values are of a byte, with a scale a row.
    #[inline(always)]
    pub(super) fn has_scales(&self) -> bool {
        matches!(self.args.k_cache.dtype, CacheType::Scaled(_))
    }

    /// A chunk's scales into `b.scales`, zeros behind its end.
    ///
    /// # Safety
    /// The task's contract; the cache has scales.
    #[inline(always)]
    pub(super) unsafe fn gather_scales(&self, cache: &Cache, b: &Buffers, key: usize, len: usize) {
        let unit = match cache.dtype {
            CacheType::Scaled(byte) => byte.unit(),
            CacheType::Float(_) => 1.0,
        };
        let mut done = 0;
        while done < len {
            // SAFETY: the caller's.
            unsafe {
                let (from, run) = self.locate_scales(cache, key + done);
                let run = run.min(len - done);
                for i in 0..run {
                    *b.scales.add(done + i) = from.add(i).read_unaligned() * unit;
                }
                done += run;
            }
        }
        for i in len..CHUNK {
            // SAFETY: the scales are of a whole chunk.
            unsafe { *b.scales.add(i) = 0.0 };
        }
    }

    /// Scores of a chunk's keys times the keys' scales, where there are any.
    ///
    /// # Safety
    /// The task's contract.
    #[inline(always)]
    pub(super) unsafe fn scale_scores<S: Simd>(&self, s: S, b: &Buffers, key: usize, len: usize) {
        if !self.has_scales() {
            return;
        }
        // SAFETY: the caller's; rows of scores and the scales are whole vectors.
        unsafe {
            self.gather_scales(&self.args.k_cache, b, key, len);
            for i in (0..len).step_by(S::LANES) {
                let scale = s.load(b.scales.add(i));
                for r in 0..self.rows() {
                    let at = b.scores.add(r * CHUNK + i);
                    s.store(at, s.mul(s.load(at), scale));
                }
            }
        }
    }

    /// The numbers of a chunk of keys or values of a byte into `b.wide`, as bfloat16, which they all
    /// are exactly; nothing where the cache is of floats.
    ///
    /// # Safety
    /// The task's contract; head_dim is a multiple of the vectors.
    #[inline(always)]
    pub(super) unsafe fn widen<S: Simd>(
        &self,
        s: S,
        cache: &Cache,
        b: &Buffers,
        key: usize,
        len: usize,
    ) {
        // SAFETY: the caller's.
        unsafe {
            match cache.dtype {
                CacheType::Float(_) => {}
                CacheType::Scaled(Byte::Int8) => self.widen_as(s, Int8, cache, b, key, len),
                CacheType::Scaled(Byte::E4m3) => self.widen_as(s, E4m3, cache, b, key, len),
                CacheType::Scaled(Byte::E5m2) => self.widen_as(s, E5m2, cache, b, key, len),
            }
        }
    }

    /// The same for one type.
    #[inline(always)]
    unsafe fn widen_as<S: Simd, E: Elements>(
        &self,
        s: S,
        elements: E,
        cache: &Cache,
        b: &Buffers,
        key: usize,
        len: usize,
    ) {
        let dim = cache.head_dim;
        let mut done = 0;
        while done < len {
            // SAFETY: the caller's; the rows of a head follow one another to its block's end.
            unsafe {
                let (from, run) = self.locate(cache, key + done);
                let run = run.min(len - done);
                let to = b.wide.add(done * dim);
                for i in (0..run * dim).step_by(S::LANES) {
                    s.store_bf16(to.add(i), elements.load(s, from.add(i), S::LANES));
                }
                done += run;
            }
        }
    }
}

/// The numbers of a row of bytes, to whole vectors.
///
/// # Safety
/// The row has `dim` bytes, `to` as many floats, to whole vectors.
#[inline(always)]
pub(super) unsafe fn widen_row<S: Simd>(
    s: S,
    byte: Byte,
    row: *const u8,
    dim: usize,
    to: *mut f32,
) {
    // SAFETY: the caller's.
    unsafe {
        match byte {
            Byte::Int8 => widen_row_as(s, Int8, row, dim, to),
            Byte::E4m3 => widen_row_as(s, E4m3, row, dim, to),
            Byte::E5m2 => widen_row_as(s, E5m2, row, dim, to),
        }
    }
}

#[inline(always)]
unsafe fn widen_row_as<S: Simd, E: Elements>(
    s: S,
    elements: E,
    row: *const u8,
    dim: usize,
    to: *mut f32,
) {
    for i in (0..dim).step_by(S::LANES) {
        // SAFETY: the caller's.
        unsafe { s.store(to.add(i), elements.load(s, row.add(i), dim - i)) };
    }
}
