//! Prefill: products of several tokens with gathered keys and values.

use crate::linear::float::panel_tiles_f32;
use crate::simd::Simd;

use super::plan::CHUNK;
use super::task::AttentionTask;

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
                self.scale_scores(s, &b, key, len);
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
}
