//! Prefill: products of several tokens with gathered keys and values.

use crate::linear::float::{panel_product_f32, panel_tiles_f32};
use crate::simd::Simd;

use super::task::{AttentionTask, Buffers};
use super::{CHUNK, TILE_ROWS};

impl AttentionTask<'_> {
    /// An item of several tokens: a chunk's keys and values are gathered into panels, whose tiles do
    /// both products.
    ///
    /// # Safety
    /// The task's contract.
    #[inline(always)]
    pub(super) unsafe fn run_prefill<S: Simd>(&self, s: S) {
        let rows = self.rows();
        let dim = self.args.v_cache.head_dim;
        let width = 2 * S::LANES;
        // SAFETY: the caller's.
        unsafe {
            let b = self.buffers::<S>();
            self.begin::<S, false>(s, &b);
            for (key, len) in self.item.chunks() {
                self.gather_keys(s, &b, key, len);
                self.scores_from_panels(s, &b, len);
                self.softmax::<S, false>(s, &b, key, len);
                self.gather_values(s, &b, key, len);
                for p in 0..dim.div_ceil(width) {
                    let panel = b.values.add(p * CHUNK * width);
                    let sums = b.sums.ptr.add(p * b.sums.panel);
                    let pairs = len.div_ceil(2);
                    panel_tiles_f32(s, b.probs, CHUNK, rows, panel, pairs, sums);
                }
            }
            self.finish(s, &b);
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
