//! Results of items: finished rows, or partial ones with their state, and the merge of those.

use crate::simd::{Kernel, Simd};
use crate::tensor::store_some;

use super::plan::{AttentionArgs, Merge};
use super::task::{AttentionTask, Buffers};

impl AttentionTask<'_> {
    /// Write the item's rows: divided by their totals, or as partial results with their state.
    ///
    /// # Safety
    /// The task's contract.
    #[inline(always)]
    pub(super) unsafe fn finish<S: Simd>(&self, s: S, b: &Buffers) {
        let dim = self.args.k_cache.head_dim;
        let out = &self.args.out;
        for r in 0..self.rows() {
            // SAFETY: the task's contract.
            unsafe {
                let (token, head) = (r / self.group, r % self.group);
                let head = self.item.kv_head * self.group + head;
                let mut total = *b.state.total.add(r);
                if self.item.partial.is_none() {
                    total += sink_of(&self.args, head, *b.state.high.add(r));
                }
                let inverse = s.splat(1.0 / total);
                let partial = self.partial.wrapping_add(r * (dim + 2));
                let mut i = 0;
                while i < dim {
                    let v = s.load(b.sums.at::<S>(r, i));
                    if self.item.partial.is_some() {
                        s.store_first(partial.add(2 + i), v, dim - i);
                    } else {
                        let to = out.at(self.item.row + token, head * dim + i);
                        store_some(s, to, out.dtype, s.mul(v, inverse), dim - i);
                    }
                    i += S::LANES;
                }
                if self.item.partial.is_some() {
                    *partial = *b.state.high.add(r);
                    *partial.add(1) = *b.state.total.add(r);
                }
            }
        }
    }
}

/// A head's sink in a row's sum of probabilities, relative to the row's largest score.
/// Beyond float32 it is infinite, and the row's result zero, as it should be.
#[inline(always)]
fn sink_of(args: &AttentionArgs, head: usize, high: f32) -> f32 {
    match args.sinks.get(head) {
        Some(sink) => (sink * std::f32::consts::LOG2_E - high).exp2(),
        None => 0.0,
    }
}

/// Combine the parts of one decode token's KV head.
pub(super) struct MergeTask<'a> {
    pub(super) args: AttentionArgs<'a>,
    pub(super) group: usize,
    pub(super) merge: Merge,
    pub(super) partial: *const f32,
}

impl Kernel for MergeTask<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let dim = self.args.k_cache.head_dim;
        let out = &self.args.out;
        let part_floats = self.group * (dim + 2);
        for r in 0..self.group {
            // SAFETY: `paged_attention` gave the parts' memory, and every part is written.
            unsafe {
                let part = |p: usize| self.partial.add(p * part_floats + r * (dim + 2));
                let mut high = f32::NEG_INFINITY;
                for p in 0..self.merge.parts {
                    high = high.max(*part(p));
                }
                let mut total = 0.0;
                for p in 0..self.merge.parts {
                    total += *part(p).add(1) * (*part(p) - high).exp2();
                }
                let head = self.merge.kv_head * self.group + r;
                total += sink_of(&self.args, head, high);
                let mut i = 0;
                while i < dim {
                    let mut acc = s.zero();
                    for p in 0..self.merge.parts {
                        let v = s.load_first(part(p).add(2 + i), dim - i);
                        acc = s.fma(v, s.splat((*part(p) - high).exp2() / total), acc);
                    }
                    let to = out.at(self.merge.row, head * dim + i);
                    store_some(s, to, out.dtype, acc, dim - i);
                    i += S::LANES;
                }
            }
        }
    }
}
