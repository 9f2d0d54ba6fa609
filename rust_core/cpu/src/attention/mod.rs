//! paged_attention: queries over the blocks of each request's KV cache.
//!
//! Work is cut into items of one request, one KV head and either one query token over a fixed
//! range of keys (decode) or a tile of query tokens over all of theirs (prefill). The query heads
//! of a KV head are rows of one item, so that its keys and values are read once for all of them.
//! An item goes through its keys in chunks with a running softmax; long decodes are cut into
//! `SPLIT` keys an item and merged afterwards, in order, so that results do not depend on the
//! number of threads.
//!
//! An item goes one of three ways. Decode reads keys and values in place, and gathers keys where they
//! can be transposed as vectors; prefill gathers a chunk into the panels of `linear::float`, whose
//! tiles then do both products. Processors with dot products of bfloat16 take pairs for either,
//! wherever the cache is bfloat16; decode of a few heads in place. Keys and values of a byte go the same ways as the numbers they
//! are; their scales are factors of scores and of probabilities.

mod bytes;
mod decode;
mod gather;
mod merge;
mod pairs;
mod plan;
mod prefill;
mod softmax;
mod task;

use crate::kv_cache::{Cache, MAX_HEAD_DIM};
use crate::level::Level;
use crate::pool;
use crate::scratch::with_floats;
use crate::simd::{Kernel, Simd};
use crate::tensor::Shared;

use self::merge::MergeTask;
use self::pairs::are_pairs;
pub use self::plan::AttentionArgs;
use self::plan::{plan, shares_of};
use self::task::{AttentionTask, scratch_floats};

/// See `kernels/reference.py`. Rows of no request are left as they are.
///
/// # Errors
/// When an index is out of range.
///
/// # Safety
/// Everything describes valid memory; `out` overlaps nothing else.
pub unsafe fn paged_attention(level: Level, args: AttentionArgs) -> Result<(), String> {
    let cache = &args.k_cache;
    let (dim, kv_heads) = (cache.head_dim, cache.num_kv_heads);
    assert!(args.q.rows == args.out.rows && args.q.cols == args.out.cols);
    let heads = args.q.cols.checked_div(dim).unwrap_or(0);
    if kv_heads == 0 || dim == 0 || !heads.is_multiple_of(kv_heads) || heads * dim != args.q.cols {
        return Err(format!(
            "{} columns are not heads of {dim} in {kv_heads} groups",
            args.q.cols
        ));
    }
    if dim > MAX_HEAD_DIM {
        return Err(format!("head_dim {dim} exceeds {MAX_HEAD_DIM}"));
    }
    for (name, values) in [("sinks", args.sinks), ("slopes", args.slopes)] {
        if !values.is_empty() && values.len() != heads {
            return Err(format!("{} {name} for {heads} heads", values.len()));
        }
    }
    let group = heads / kv_heads;
    let (items, merges) = plan(&args, group)?;
    let requests_alone = items.iter().all(|item| item.tokens == 1);
    let partial_floats = group * (dim + 2);
    let partials = merges.last().map_or(0, |m| m.partial + m.parts);
    let threads = pool::num_threads();
    // Heads of one request's keys lie together: a thread takes them all where there is enough to do.
    let per_task = if requests_alone && items.len() >= 8 * threads * kv_heads {
        kv_heads
    } else {
        1
    };
    let shares = shares_of(&items, per_task, args.shares);
    // Items of others between two tasks of a thread, where all claim from one share.
    let others = if shares.len() > 1 {
        0
    } else {
        (threads - 1) * per_task
    };
    with_floats(0, partials * partial_floats, |partial| {
        let partial = Shared(partial);
        pool::run_shares(&shares, |task| {
            let own = task * per_task..((task + 1) * per_task).min(items.len());
            with_floats(1, scratch_floats(group, dim), |scratch| {
                for i in own.clone() {
                    let item = items[i];
                    // Probably this thread's next.
                    let next = if i + 1 < own.end {
                        i + 1
                    } else {
                        i + 1 + others
                    };
                    // SAFETY: the caller's; `plan` checked every index; items write disjoint parts.
                    unsafe {
                        level.run_dots(AttentionTask {
                            args,
                            group,
                            item,
                            next: items.get(next).copied(),
                            scratch,
                            partial: partial.at(item.partial.unwrap_or(0) * partial_floats),
                        });
                    }
                }
            });
        });
        pool::run(merges.len(), |i| {
            // SAFETY: as above; all partial results are written by now.
            unsafe {
                level.run(MergeTask {
                    args,
                    group,
                    merge: merges[i],
                    partial: partial.at(merges[i].partial * partial_floats),
                });
            }
        });
    });
    Ok(())
}

/// True where attention over such a cache rounds queries to bfloat16, so that they may be stored so.
pub fn rounds_queries(level: Level, keys: &Cache, values: &Cache) -> bool {
    level.has_dots() && are_pairs(keys, values)
}

impl Kernel for AttentionTask<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        // SAFETY: `paged_attention`'s contract, `plan`'s checks and `scratch_floats`.
        unsafe {
            if self.has_pairs::<S>() {
                self.run_pairs(s);
            } else if self.item.tokens == 1 {
                self.run_decode(s);
            } else {
                self.run_prefill(s);
            }
        }
    }
}
