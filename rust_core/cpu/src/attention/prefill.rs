//! Many tokens' products with gathered keys.

use crate::linear::float::panel_product_f32;
use crate::simd::Simd;

use super::{AttentionTask, CHUNK, TILE_ROWS};

impl AttentionTask<'_> {
    /// scores[row][len, to whole panels], by way of `sums`' panels in the order of the keys' ones.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    pub(super) unsafe fn scores_from_panels<S: Simd>(
        &self,
        s: S,
        q: *const f32,
        dim_padded: usize,
        rows: usize,
        keys: *const f32,
        len: usize,
        scores: *mut f32,
    ) {
        let width = 2 * S::LANES;
        let scale = s.splat(self.score_scale());
        let pairs = self.args.k_cache.head_dim.div_ceil(2);
        // One panel's sums at a time: TILE_ROWS x 32 at most.
        let mut panel_sums = [0.0f32; TILE_ROWS * 32];
        let panel_sums = panel_sums.as_mut_ptr();
        for p in 0..len.div_ceil(width) {
            // SAFETY: the task's contract.
            unsafe {
                let panel = keys.add(p * dim_padded * width);
                panel_product_f32(s, q, dim_padded, rows, panel, pairs, panel_sums);
                for r in 0..rows {
                    let to = scores.add(r * CHUNK + p * width);
                    let from = panel_sums.add(r * width);
                    s.store(to, s.mul(s.load(from), scale));
                    let more = s.load(from.add(S::LANES));
                    s.store(to.add(S::LANES), s.mul(more, scale));
                }
            }
        }
    }
}
