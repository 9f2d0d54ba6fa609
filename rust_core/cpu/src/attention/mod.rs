//! paged_attention: queries over the blocks of each request's KV cache.
//!
//! Work is cut into items of one request, one KV head and either one query token over a fixed
//! range of keys (decode) or a tile of query tokens over all of theirs (prefill). The query heads
//! of a KV head are rows of one item, so that its keys and values are read once for all of them.
//! An item goes through its keys in chunks with a running softmax; long decodes are cut into
//! `SPLIT` keys an item and merged afterwards, in order, so that results do not depend on the
//! number of threads.
//!
//! Decode reads keys and values where they lie; prefill first gathers a chunk into the panels of
//! `linear::float`, whose tiles then do both products. Where keys can be transposed as vectors decode
//! gathers them as well.

mod decode;
mod gather;
mod merge;
mod pairs;
mod plan;
mod prefill;
mod softmax;

use std::ops::Range;

use crate::level::Level;
use crate::linear::float::panel_tiles_f32;
use crate::pool;
use crate::rope::{Cache, MAX_HEAD_DIM};
use crate::scratch::with_floats;
use crate::simd::{Kernel, Simd};
use crate::tensor::{Rows, RowsMut, load_some};

use self::merge::MergeTask;
use self::pairs::are_pairs;
use self::plan::{Item, plan, shares_of};
use self::softmax::State;

/// Keys in a chunk.
const CHUNK: usize = 64;
/// Keys a decode item takes at most.
const SPLIT: usize = 512;
/// Rows (query tokens times heads) of a prefill item.
const TILE_ROWS: usize = 96;
/// Rows whose state is reckoned together.
const STATE_ROWS: usize = 16;

/// The op's inputs and output.
#[derive(Clone, Copy)]
pub struct AttentionArgs<'a> {
    /// [T, Hq Dh]
    pub q: Rows,
    /// Keys.
    pub k_cache: Cache,
    /// Values.
    pub v_cache: Cache,
    /// [table_rows, max_blocks]
    pub block_table: &'a [i32],
    /// Columns of block_table.
    pub max_blocks: usize,
    /// [R]
    pub slots: &'a [i32],
    /// [R]
    pub seq_lens: &'a [i32],
    /// [R + 1]
    pub query_start_loc: &'a [i32],
    /// Of the scores.
    pub scale: f32,
    /// 0: none.
    pub sliding_window: usize,
    /// 0: none.
    pub softcap: f32,
    /// A query sees nothing behind itself.
    pub causal: bool,
    /// Rows whose queries lie near each thread, ascending, and whose results it wants; may be empty.
    pub shares: &'a [Range<usize>],
    /// [T, Hq Dh]
    pub out: RowsMut,
}

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
        let partial = Partial(partial);
        pool::run_shares(&shares, |task| {
            let own = task * per_task..((task + 1) * per_task).min(items.len());
            with_floats(1, scratch_floats(group, dim), |scratch| {
                for i in own.clone() {
                    let item = items[i];
                    // What this thread will probably take next.
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

/// Whether attention over such a cache rounds queries to bfloat16: they may as well come so.
pub fn rounds_queries(level: Level, keys: &Cache, values: &Cache) -> bool {
    level.has_dots() && are_pairs(keys, values)
}

/// Memory for unfinished results, written in disjoint parts.
struct Partial(*mut f32);

impl Partial {
    /// # Safety
    /// `offset` is inside.
    unsafe fn at(&self, offset: usize) -> *mut f32 {
        // SAFETY: the caller's.
        unsafe { self.0.add(offset) }
    }
}

// SAFETY: every item writes a part of its own.
unsafe impl Sync for Partial {}

/// Sizes of an item's buffers, the same at every level: rows and vectors are rounded up.
struct Layout {
    rows: usize,
    dim: usize,
}

fn layout(group: usize, dim: usize) -> Layout {
    Layout {
        rows: TILE_ROWS.max(group).next_multiple_of(STATE_ROWS),
        dim: dim.next_multiple_of(32),
    }
}

fn scratch_floats(group: usize, dim: usize) -> usize {
    let l = layout(group, dim);
    // q, sums, probabilities, scores, state, and a chunk of keys and of values.
    l.rows * (2 * l.dim + 2 * CHUNK + 3) + 2 * CHUNK * l.dim
}

struct AttentionTask<'a> {
    args: AttentionArgs<'a>,
    group: usize,
    item: Item,
    next: Option<Item>,
    scratch: *mut f32,
    partial: *mut f32,
}

impl Kernel for AttentionTask<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let a = &self.args;
        let dim = a.k_cache.head_dim;
        let l = layout(self.group, dim);
        let rows = self.item.tokens * self.group;
        let decode = self.item.tokens == 1;
        let pairs = self.has_pairs::<S>();
        // Decode keeps a row's sums together, panels keep a panel's.
        let in_place = decode && !pairs;
        let width = 2 * S::LANES;
        // SAFETY: `paged_attention`'s contract, `plan`'s checks and `scratch_floats`.
        unsafe {
            let q = self.scratch;
            let sums = q.add(l.rows * l.dim);
            let scores = sums.add(l.rows * l.dim);
            let probs = scores.add(l.rows * CHUNK);
            let state = State {
                high: probs.add(l.rows * CHUNK),
                total: probs.add(l.rows * (CHUNK + 1)),
                shrink: probs.add(l.rows * (CHUNK + 2)),
            };
            let keys = state.shrink.add(l.rows);
            let values = keys.add(CHUNK * l.dim);

            for r in 0..rows {
                let (token, head) = (r / self.group, r % self.group);
                let head = self.item.kv_head * self.group + head;
                let from = a.q.at(self.item.row + token, head * dim);
                let mut i = 0;
                while i < l.dim {
                    let left = dim.saturating_sub(i);
                    let at = from.wrapping_add(i * a.q.dtype.size());
                    let v = load_some(s, at, a.q.dtype, left);
                    if pairs {
                        s.store_bf16(q.cast::<u16>().add(r * l.dim + i), v);
                    } else {
                        s.store(q.add(r * l.dim + i), v);
                    }
                    i += S::LANES;
                }
            }
            for r in 0..l.rows {
                *state.high.add(r) = f32::NEG_INFINITY;
                *state.total.add(r) = 0.0;
            }
            for i in 0..rows * l.dim / S::LANES {
                s.store(sums.add(i * S::LANES), s.zero());
            }

            let mut key = self.item.low;
            while key < self.item.high {
                let len = (self.item.high - key).min(CHUNK);
                if decode {
                    self.ask_for(s, &a.v_cache, &self.item, key, len);
                }
                if pairs {
                    self.scores_of_pairs(s, q.cast(), rows, key, len, keys.cast(), scores);
                } else if decode && !self.transposes::<S>() {
                    self.scores_in_place(s, q, l.dim, key, len, scores);
                } else {
                    self.gather_keys(s, key, len, keys, l.dim);
                    self.scores_from_panels(s, q, l.dim, rows, keys, len, scores);
                }
                if decode {
                    let left = self.item.high - key - len;
                    if left > 0 {
                        self.ask_for(s, &a.k_cache, &self.item, key + len, left.min(CHUNK));
                    } else if let Some(next) = self.next.filter(|next| next.tokens == 1) {
                        let len = (next.high - next.low).min(CHUNK);
                        self.ask_for(s, &a.k_cache, &next, next.low, len);
                    }
                }
                for first in (0..rows).step_by(STATE_ROWS) {
                    let end = rows.min(first + STATE_ROWS);
                    self.softmax(s, scores, first..end, key, len, probs, state, pairs);
                }
                for r in 0..rows {
                    let shrink = *state.shrink.add(r);
                    if shrink != 1.0 {
                        let shrink = s.splat(shrink);
                        for i in (0..l.dim).step_by(S::LANES) {
                            let at = if in_place {
                                r * l.dim + i
                            } else {
                                i / width * (width * rows) + r * width + i % width
                            };
                            s.store(sums.add(at), s.mul(s.load(sums.add(at)), shrink));
                        }
                    }
                }
                if pairs {
                    self.add_values_of_pairs(s, probs, rows, key, len, values.cast(), sums);
                } else if decode {
                    self.values_in_place(s, probs, l.dim, key, len, sums);
                } else {
                    self.gather_values(s, key, len, values, l.dim);
                    for p in 0..dim.div_ceil(width) {
                        panel_tiles_f32(
                            s,
                            probs,
                            CHUNK,
                            rows,
                            values.add(p * CHUNK * width),
                            len.div_ceil(2),
                            sums.add(p * width * rows),
                        );
                    }
                }
                key += len;
            }
            self.finish(s, rows, l.dim, in_place, sums, state);
        }
    }
}

impl AttentionTask<'_> {
    /// Address of a key's row and how many follow it in its block.
    #[inline(always)]
    unsafe fn locate(&self, cache: &Cache, key: usize) -> (*const u8, usize) {
        // SAFETY: the caller's.
        unsafe { self.locate_of(&self.item, cache, key) }
    }

    /// The same of any item.
    #[inline(always)]
    unsafe fn locate_of(&self, item: &Item, cache: &Cache, key: usize) -> (*const u8, usize) {
        let (index, offset) = (key / cache.block_size, key % cache.block_size);
        let slot = self.args.slots[item.request] as usize;
        let block = self.args.block_table[slot * self.args.max_blocks + index] as usize;
        // SAFETY: `plan` checked the table's entries.
        let at = unsafe { cache.at(block, item.kv_head, offset) };
        (at.cast_const(), cache.block_size - offset)
    }

    /// Ask for rows that will be needed soon: blocks lie anywhere in memory, so that what the
    /// processor fetches ahead by itself ends with each of them.
    #[inline(always)]
    unsafe fn ask_for<S: Simd>(&self, s: S, cache: &Cache, item: &Item, key: usize, len: usize) {
        let row = cache.head_dim * cache.data.dtype.size();
        let mut done = 0;
        while done < len {
            // SAFETY: the task's contract.
            let (at, run) = unsafe { self.locate_of(item, cache, key + done) };
            let run = run.min(len - done);
            for line in (0..run * row).step_by(64) {
                s.prefetch(at.wrapping_add(line));
            }
            done += run;
        }
    }
}
