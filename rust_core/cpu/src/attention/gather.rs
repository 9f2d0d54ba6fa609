//! Keys and values of a chunk, gathered from their blocks into panels, and scores from them.

use crate::float::DType;
use crate::kv_cache::{Cache, CacheType};
use crate::linear::float::panel_product_f32;
use crate::simd::Simd;
use crate::tensor::{load_one, load_some};

use super::bytes::widen_row;
use super::plan::{CHUNK, TILE_ROWS};
use super::task::{AttentionTask, Buffers};

impl AttentionTask<'_> {
    /// Addresses of keys `first..first + 16` of a chunk; the last one's again for those beyond `len`.
    #[inline(always)]
    pub(super) unsafe fn sixteen_keys(
        &self,
        b: &Buffers,
        key: usize,
        first: usize,
        len: usize,
    ) -> [*const u16; 16] {
        if self.has_scales() {
            let dim = self.args.k_cache.head_dim;
            // SAFETY: `widen` has left a chunk's rows there.
            let row = |j: usize| unsafe { b.wide.add((first + j).min(len - 1) * dim).cast_const() };
            return std::array::from_fn(row);
        }
        let mut walk = Walk::START;
        let mut rows = [std::ptr::null(); 16];
        for (j, row) in rows.iter_mut().enumerate() {
            if first + j < len {
                // SAFETY: the task's contract.
                unsafe { walk.to(self, &self.args.k_cache, key + first + j) };
            }
            *row = walk.at.cast::<u16>();
        }
        rows
    }

    /// True where keys can be transposed as vectors. A decode's products with keys that lie as columns
    /// need no sums across lanes: worth the transpose even for one row.
    #[inline(always)]
    pub(super) fn transposes<S: Simd>(&self) -> bool {
        let cache = &self.args.k_cache;
        let is_bf16 = cache.dtype == CacheType::Float(DType::Bf16);
        S::TRANSPOSES && is_bf16 && cache.head_dim.is_multiple_of(32)
    }

    /// A chunk's keys into b.keys, as panels [key panel][dim][2 LANES keys]. Elements beyond `len` are
    /// finite, or a key's.
    #[inline(always)]
    pub(super) unsafe fn gather_keys<S: Simd>(&self, s: S, b: &Buffers, key: usize, len: usize) {
        let width = 2 * S::LANES;
        let cache = &self.args.k_cache;
        let dim = cache.head_dim;
        // SAFETY: the task's contract.
        unsafe {
            if self.transposes::<S>() {
                for first in (0..len).step_by(16) {
                    let rows = self.sixteen_keys(b, key, first, len);
                    let to = b.keys.add(first / width * b.dim * width + first % width);
                    for i in (0..dim).step_by(32) {
                        s.transpose_bf16(shifted(rows, i), to.add(i * width), width);
                    }
                }
                return;
            }
            if len < CHUNK {
                for i in 0..CHUNK * b.dim / S::LANES {
                    s.store(b.keys.add(i * S::LANES), s.zero());
                }
            } else if !dim.is_multiple_of(2) {
                for p in 0..CHUNK / width {
                    let row = b.keys.add((p * b.dim + dim) * width);
                    s.store(row, s.zero());
                    s.store(row.add(S::LANES), s.zero());
                }
            }
            for j in 0..len {
                let (k, _) = self.locate(cache, key + j);
                let to = b.keys.add(j / width * b.dim * width + j % width);
                match cache.dtype {
                    CacheType::Float(DType::F32) => {
                        for i in 0..dim {
                            *to.add(i * width) = k.cast::<f32>().add(i).read_unaligned();
                        }
                    }
                    CacheType::Float(dtype) => {
                        for i in 0..dim {
                            *to.add(i * width) = load_one(k.add(i * dtype.size()), dtype);
                        }
                    }
                    CacheType::Scaled(byte) => {
                        let row = b.wide.cast::<f32>();
                        widen_row(s, byte, k, dim, row);
                        for i in 0..dim {
                            *to.add(i * width) = *row.add(i);
                        }
                    }
                }
            }
        }
    }

    /// A chunk's values into b.values, as panels [dim panel][CHUNK][2 LANES dims], with a zero partner
    /// for an odd last one.
    #[inline(always)]
    pub(super) unsafe fn gather_values<S: Simd>(&self, s: S, b: &Buffers, key: usize, len: usize) {
        let width = 2 * S::LANES;
        let cache = &self.args.v_cache;
        let dim = cache.head_dim;
        // SAFETY: the task's contract.
        unsafe {
            if len < CHUNK {
                // The tiles take keys in pairs: the odd one's values must be zeros.
                for p in 0..b.dim / width {
                    let row = b.values.add((p * CHUNK + len) * width);
                    s.store(row, s.zero());
                    s.store(row.add(S::LANES), s.zero());
                }
            }
            for j in 0..len {
                let (v, _) = self.locate(cache, key + j);
                let put = |i: usize, row| {
                    s.store(
                        b.values.add((i / width * CHUNK + j) * width + i % width),
                        row,
                    );
                };
                match cache.dtype {
                    CacheType::Float(dtype) => {
                        let mut i = 0;
                        while i < dim {
                            put(i, load_some(s, v.add(i * dtype.size()), dtype, dim - i));
                            i += S::LANES;
                        }
                    }
                    CacheType::Scaled(byte) => {
                        let row = b.wide.cast::<f32>();
                        widen_row(s, byte, v, dim, row);
                        for i in (0..dim).step_by(S::LANES) {
                            put(i, s.load(row.add(i)));
                        }
                    }
                }
            }
        }
    }

    /// b.scores[row][len, to whole panels] of b.q and the panels b.keys.
    ///
    /// # Safety
    /// The task's contract.
    #[inline(always)]
    pub(super) unsafe fn scores_from_panels<S: Simd>(&self, s: S, b: &Buffers, len: usize) {
        let rows = self.rows();
        let width = 2 * S::LANES;
        let scale = s.splat(self.score_scale());
        let pairs = self.args.k_cache.head_dim.div_ceil(2);
        // One panel's sums at a time: TILE_ROWS x 32 at most.
        let mut panel_sums = [0.0f32; TILE_ROWS * 32];
        let panel_sums = panel_sums.as_mut_ptr();
        for p in 0..len.div_ceil(width) {
            // SAFETY: the task's contract.
            unsafe {
                let panel = b.keys.add(p * b.dim * width);
                panel_product_f32(s, b.q, b.dim, rows, panel, pairs, panel_sums);
                for r in 0..rows {
                    let to = b.scores.add(r * CHUNK + p * width);
                    let from = panel_sums.add(r * width);
                    s.store(to, s.mul(s.load(from), scale));
                    let more = s.load(from.add(S::LANES));
                    s.store(to.add(S::LANES), s.mul(more, scale));
                }
            }
        }
    }
}

/// A walk along the rows of a cache, with one look-up a block.
pub(super) struct Walk {
    pub(super) at: *const u8,
    /// Rows left in its block.
    pub(super) left: usize,
}

impl Walk {
    pub(super) const START: Walk = Walk {
        at: std::ptr::null(),
        left: 0,
    };

    /// Advance to `key`'s row; the keys of a walk follow each other.
    ///
    /// # Safety
    /// The task's contract; the key is one of its item's.
    #[inline(always)]
    pub(super) unsafe fn to(&mut self, task: &AttentionTask, cache: &Cache, key: usize) {
        if self.left == 0 {
            // SAFETY: the caller's.
            (self.at, self.left) = unsafe { task.locate(cache, key) };
        } else {
            let row_bytes = cache.head_dim * cache.dtype.size();
            self.at = self.at.wrapping_add(row_bytes);
        }
        self.left -= 1;
    }
}

/// All rows from element `by` on.
///
/// # Safety
/// It exists.
#[inline(always)]
pub(super) unsafe fn shifted(mut rows: [*const u16; 16], by: usize) -> [*const u16; 16] {
    for row in &mut rows {
        // SAFETY: the caller's.
        *row = unsafe { row.add(by) };
    }
    rows
}
