//! The running softmax over chunks of keys.

use std::ops::Range;

use crate::simd::Simd;

use super::{AttentionTask, CHUNK, STATE_ROWS};

/// Of each row: its largest score, the sum of its probabilities relative to that, and what the last
/// chunk has shrunk earlier sums by.
#[derive(Clone, Copy)]
pub(super) struct State {
    pub(super) high: *mut f32,
    pub(super) total: *mut f32,
    pub(super) shrink: *mut f32,
}

impl AttentionTask<'_> {
    /// What products of queries and keys are multiplied by: exponentials are of 2, which saves a
    /// multiplication and a half of the range's reduction each; a cap comes first. Queries stay what
    /// they are, which no factor but a power of two would leave them.
    #[inline(always)]
    pub(super) fn score_scale(&self) -> f32 {
        if self.args.softcap > 0.0 {
            self.args.scale
        } else {
            self.args.scale * std::f32::consts::LOG2_E
        }
    }

    /// Keys of a chunk that row r sees, as offsets in it.
    #[inline(always)]
    pub(super) fn visible(&self, r: usize, key: usize, len: usize) -> (usize, usize) {
        let position = self.item.position + r / self.group;
        let end = if self.args.causal {
            (position + 1).saturating_sub(key).min(len)
        } else {
            len
        };
        let begin = match self.args.sliding_window {
            0 => 0,
            window => (position + 1).saturating_sub(window + key).min(end),
        };
        (begin, end)
    }

    /// The probabilities of at most STATE_ROWS rows, relative to their running maxima, as bfloat16 or
    /// float32 in place of the first half or all of a row of `probs`; zero for keys a row does not see.
    ///
    /// The rows' maxima and sums are taken together: one row after the other would wait for its own.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    pub(super) unsafe fn softmax<S: Simd>(
        &self,
        s: S,
        scores: *mut f32,
        rows: Range<usize>,
        key: usize,
        len: usize,
        probs: *mut f32,
        state: State,
        as_bf16: bool,
    ) {
        let whole = len.next_multiple_of(2 * S::LANES);
        let first = rows.start;
        // SAFETY: rows are CHUNK long, which is a multiple of every level's vectors, and states are
        // of whole STATE_ROWS.
        unsafe {
            let mut most = [s.splat(f32::NEG_INFINITY); STATE_ROWS];
            for (r, most) in rows.clone().zip(&mut most) {
                let scores = scores.add(r * CHUNK);
                self.cap(s, scores, whole);
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
                // A row that has seen nothing: its probabilities are zeros, of which none is NaN.
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
                    if as_bf16 {
                        s.store_bf16(probs.cast::<u16>().add(i), p);
                    } else {
                        s.store(probs.add(i), p);
                    }
                    *sum = s.add(*sum, p);
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

    /// Scores' soft cap, and what `score_scale` leaves to it.
    #[inline(always)]
    pub(super) unsafe fn cap<S: Simd>(&self, s: S, scores: *mut f32, len: usize) {
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
