//! The running softmax over chunks of keys.

use std::ops::Range;

use crate::simd::Simd;

use super::plan::CHUNK;
use super::task::{AttentionTask, Buffers, STATE_ROWS};

impl AttentionTask<'_> {
    /// Factor of the products of queries and keys. Exponentials are powers of 2, which saves a
    /// multiplication and half of the range reduction each, so the factor includes log2(e) unless a
    /// cap follows. Scaling the queries in its place would round them.
    #[inline(always)]
    pub(super) fn score_scale(&self) -> f32 {
        if self.args.softcap > 0.0 {
            self.args.scale
        } else {
            self.args.scale * std::f32::consts::LOG2_E
        }
    }

    /// Keys of a chunk that row r attends to, as offsets in it.
    #[inline(always)]
    fn visible(&self, r: usize, key: usize, len: usize) -> (usize, usize) {
        let position = self.item.position + r / self.group;
        let end = match (self.args.causal, self.args.sliding_window) {
            (true, _) => (position + 1).saturating_sub(key).min(len),
            (false, 0) => len,
            (false, window) => (position + window).saturating_sub(key).min(len),
        };
        let begin = match self.args.sliding_window {
            0 => 0,
            window => (position + 1).saturating_sub(window + key).min(end),
        };
        (begin, end)
    }

    /// One chunk's step of the running softmax: `b.scores` become probabilities relative to the rows'
    /// running maxima, in `b.probs`, and earlier sums are scaled to these maxima.
    ///
    /// # Safety
    /// The task's contract.
    #[inline(always)]
    pub(super) unsafe fn softmax<S: Simd, const BF16: bool>(
        &self,
        s: S,
        b: &Buffers,
        key: usize,
        len: usize,
    ) {
        let rows = self.rows();
        // SAFETY: the caller's.
        unsafe {
            if self.has_scales() {
                self.gather_scales(&self.args.v_cache, b, key, len);
            }
            for first in (0..rows).step_by(STATE_ROWS) {
                let end = rows.min(first + STATE_ROWS);
                self.softmax_rows::<S, BF16>(s, b, first..end, key, len);
            }
            for r in 0..rows {
                let shrink = *b.state.shrink.add(r);
                if shrink != 1.0 {
                    let shrink = s.splat(shrink);
                    for i in (0..b.dim).step_by(S::LANES) {
                        let at = b.sums.at::<S>(r, i);
                        s.store(at, s.mul(s.load(at), shrink));
                    }
                }
            }
        }
    }

    /// Probabilities and state of at most STATE_ROWS rows, as bfloat16 in the first half of a row of
    /// `b.probs` or float32 in all of it; zero for keys a row does not attend to. Of a cache with scales
    /// times the values' scales.
    ///
    /// The rows' maxima and sums are taken together: one row after the other would wait for its own.
    #[inline(always)]
    unsafe fn softmax_rows<S: Simd, const BF16: bool>(
        &self,
        s: S,
        b: &Buffers,
        rows: Range<usize>,
        key: usize,
        len: usize,
    ) {
        let Buffers {
            scores,
            probs,
            state,
            ..
        } = *b;
        let whole = len.next_multiple_of(2 * S::LANES);
        let (first, has_scales) = (rows.start, self.has_scales());
        // SAFETY: rows are CHUNK long, which is a multiple of every level's vectors, and states are
        // of whole STATE_ROWS.
        unsafe {
            let mut most = [s.splat(f32::NEG_INFINITY); STATE_ROWS];
            for (r, most) in rows.clone().zip(&mut most) {
                let scores = scores.add(r * CHUNK);
                self.cap(s, scores, whole);
                self.lean(scores, r, key, whole);
                let (from, to) = self.visible(r, key, len);
                for i in (0..from).chain(to..whole) {
                    *scores.add(i) = f32::NEG_INFINITY;
                }
                for i in (0..whole).step_by(S::LANES) {
                    *most = s.max(*most, s.load(scores.add(i)));
                }
            }
            let mut centers = [0.0f32; STATE_ROWS];
            s.hmaxes(most, centers.as_mut_ptr());
            for i in (0..STATE_ROWS).step_by(S::LANES) {
                let before = s.load(state.high.add(first + i));
                let now = s.max(before, s.load(centers.as_ptr().add(i)));
                s.store(state.high.add(first + i), now);
                // A row without keys so far: its probabilities are zeros, none of them NaN.
                let center = s.max(now, s.splat(f32::MIN));
                s.store(centers.as_mut_ptr().add(i), center);
                s.store(state.shrink.add(first + i), s.exp2(s.sub(before, center)));
            }
            let mut sums = [s.zero(); STATE_ROWS];
            for ((r, sum), center) in rows.zip(&mut sums).zip(centers) {
                let (scores, probs) = (scores.add(r * CHUNK), probs.add(r * CHUNK));
                let center = s.splat(center);
                for i in (0..whole).step_by(S::LANES) {
                    let p = s.exp2(s.sub(s.load(scores.add(i)), center));
                    *sum = s.add(*sum, p);
                    let p = if has_scales {
                        s.mul(p, s.load(b.scales.add(i)))
                    } else {
                        p
                    };
                    if BF16 {
                        s.store_bf16(probs.cast::<u16>().add(i), p);
                    } else {
                        s.store(probs.add(i), p);
                    }
                }
            }
            let mut added = [0.0f32; STATE_ROWS];
            s.sums(sums, added.as_mut_ptr());
            for i in (0..STATE_ROWS).step_by(S::LANES) {
                let total = state.total.add(first + i);
                let shrink = s.load(state.shrink.add(first + i));
                s.store(
                    total,
                    s.fma(s.load(total), shrink, s.load(added.as_ptr().add(i))),
                );
            }
        }
    }

    /// Bias by distance: a head's slope times how far before the query a key is.
    #[inline(always)]
    unsafe fn lean(&self, scores: *mut f32, r: usize, key: usize, len: usize) {
        let head = self.item.kv_head * self.group + r % self.group;
        let Some(slope) = self.args.slopes.get(head) else {
            return;
        };
        let slope = slope * std::f32::consts::LOG2_E;
        let position = self.item.position + r / self.group;
        for i in 0..len {
            // SAFETY: the caller's.
            unsafe { *scores.add(i) += slope * ((key + i) as f32 - position as f32) };
        }
    }

    /// Soft cap of the scores, and log2(e), which `score_scale` then leaves out.
    #[inline(always)]
    unsafe fn cap<S: Simd>(&self, s: S, scores: *mut f32, len: usize) {
        if self.args.softcap > 0.0 {
            let inverse = s.splat(1.0 / self.args.softcap);
            let cap = s.splat(self.args.softcap * std::f32::consts::LOG2_E);
            for i in (0..len).step_by(S::LANES) {
                // SAFETY: the caller's.
                unsafe {
                    let x = s.mul(s.load(scores.add(i)), inverse);
                    s.store(scores.add(i), s.mul(cap, s.tanh(x)));
                }
            }
        }
    }
}
