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

use std::ops::Range;

use crate::float::DType;
use crate::level::Level;
use crate::linear::float::{panel_product_f32, panel_tiles_f32};
use crate::pool;
use crate::rope::{Cache, MAX_HEAD_DIM};
use crate::scratch::with_floats;
use crate::simd::{Kernel, Simd};
use crate::tensor::{Rows, RowsMut, load_one, load_some, store_some};

/// Keys in a chunk.
const CHUNK: usize = 64;
/// Keys a decode item takes at most.
const SPLIT: usize = 512;
/// What stands beside the last of an odd number of values.
static NOTHING: [u16; MAX_HEAD_DIM] = [0; MAX_HEAD_DIM];
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

#[derive(Clone, Copy)]
struct Item {
    request: usize,
    kv_head: usize,
    /// First row of q, and how many.
    row: usize,
    tokens: usize,
    /// Position of the first.
    position: usize,
    /// Keys.
    low: usize,
    high: usize,
    /// Where the item's unfinished result goes, if it is one of several.
    partial: Option<usize>,
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

fn are_pairs(keys: &Cache, values: &Cache) -> bool {
    let are_bf16 = keys.data.dtype == DType::Bf16 && values.data.dtype == DType::Bf16;
    are_bf16 && keys.head_dim.is_multiple_of(32)
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

#[derive(Clone, Copy)]
struct Merge {
    row: usize,
    kv_head: usize,
    partial: usize,
    parts: usize,
}

/// Tasks of `per_task` items, by whose rows they begin with.
fn shares_of(items: &[Item], per_task: usize, rows: &[Range<usize>]) -> Vec<Range<usize>> {
    let count = items.len().div_ceil(per_task);
    let mut from = 0;
    let mut shares: Vec<_> = rows
        .iter()
        .map(|rows| {
            let of_others = (from..count).find(|task| items[task * per_task].row >= rows.end);
            let share = from..of_others.unwrap_or(count);
            from = share.end;
            share
        })
        .collect();
    match shares.last_mut() {
        Some(last) => last.end = count,
        None => shares.push(0..count),
    }
    shares
}

/// Check every index and cut the work into items, in the order of their rows.
fn plan(args: &AttentionArgs, group: usize) -> Result<(Vec<Item>, Vec<Merge>), String> {
    let cache = &args.k_cache;
    let requests = args.slots.len();
    assert!(args.seq_lens.len() == requests && args.query_start_loc.len() == requests + 1);
    let table_rows = args
        .block_table
        .len()
        .checked_div(args.max_blocks)
        .unwrap_or(0);
    let mut items = Vec::with_capacity(requests * cache.num_kv_heads);
    let mut merges = Vec::new();
    let mut partials = 0;
    let tile = (TILE_ROWS / group).max(1);
    for request in 0..requests {
        let (start, end) = (
            args.query_start_loc[request],
            args.query_start_loc[request + 1],
        );
        let (seq_len, slot) = (args.seq_lens[request], args.slots[request]);
        if start == end || seq_len == 0 {
            continue;
        }
        if start < 0 || end < start || end as usize > args.q.rows || end - start > seq_len {
            return Err(format!(
                "request {request}: query rows {start}..{end} with seq_len {seq_len}"
            ));
        }
        let (start, end, seq_len) = (start as usize, end as usize, seq_len as usize);
        let blocks = seq_len.div_ceil(cache.block_size);
        if slot < 0 || slot as usize >= table_rows || blocks > args.max_blocks {
            return Err(format!(
                "request {request}: slot {slot} with {blocks} blocks is outside the block table"
            ));
        }
        let past = seq_len - (end - start);
        let first_key = |position: usize| match args.sliding_window {
            0 => 0,
            window => (position + 1).saturating_sub(window),
        };
        let table = &args.block_table[slot as usize * args.max_blocks..][..blocks];
        // Blocks before the window may have been given back; their ids are not looked at.
        let used = first_key(past) / cache.block_size;
        if let Some(id) = table[used..]
            .iter()
            .find(|&&id| id < 0 || id as usize >= cache.num_blocks)
        {
            return Err(format!(
                "request {request}: block {id} of {}",
                cache.num_blocks
            ));
        }
        for row in (start..end).step_by(if end - start == 1 { 1 } else { tile }) {
            for kv_head in 0..cache.num_kv_heads {
                let tokens = (end - row).min(tile);
                let position = past + row - start;
                let low = first_key(position);
                let high = if args.causal {
                    position + tokens
                } else {
                    seq_len
                };
                let item = Item {
                    request,
                    kv_head,
                    row,
                    tokens,
                    position,
                    low,
                    high,
                    partial: None,
                };
                if end - start > 1 || high - low <= SPLIT {
                    items.push(item);
                    continue;
                }
                let parts = (high - low).div_ceil(SPLIT);
                for part in 0..parts {
                    let low = low + part * SPLIT;
                    items.push(Item {
                        low,
                        high: high.min(low + SPLIT),
                        partial: Some(partials + part),
                        ..item
                    });
                }
                merges.push(Merge {
                    row,
                    kv_head,
                    partial: partials,
                    parts,
                });
                partials += parts;
            }
        }
    }
    Ok((items, merges))
}

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
    /// What products of queries and keys are multiplied by: exponentials are of 2, which saves a
    /// multiplication and a half of the range's reduction each; a cap comes first. Queries stay what
    /// they are, which no factor but a power of two would leave them.
    #[inline(always)]
    fn score_scale(&self) -> f32 {
        if self.args.softcap > 0.0 {
            self.args.scale
        } else {
            self.args.scale * std::f32::consts::LOG2_E
        }
    }

    /// Keys of a chunk that row r sees, as offsets in it.
    #[inline(always)]
    fn visible(&self, r: usize, key: usize, len: usize) -> (usize, usize) {
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

    /// scores[row][key] of the one token's heads.
    #[inline(always)]
    unsafe fn scores_in_place<S: Simd>(
        &self,
        s: S,
        q: *const f32,
        q_stride: usize,
        key: usize,
        len: usize,
        scores: *mut f32,
    ) {
        let mut done = 0;
        while done < len {
            // SAFETY: the task's contract.
            unsafe {
                let (at, run) = self.locate(&self.args.k_cache, key + done);
                let run = run.min(len - done);
                let mut r = 0;
                while r < self.group {
                    let (q, to) = (q.add(r * q_stride), scores.add(r * CHUNK + done));
                    match self.group - r {
                        4.. => {
                            self.dots::<S, 4>(s, q, q_stride, at, run, to);
                            r += 4;
                        }
                        3 => {
                            self.dots::<S, 3>(s, q, q_stride, at, run, to);
                            r += 3;
                        }
                        2 => {
                            self.dots::<S, 2>(s, q, q_stride, at, run, to);
                            r += 2;
                        }
                        _ => {
                            self.dots::<S, 1>(s, q, q_stride, at, run, to);
                            r += 1;
                        }
                    }
                }
                done += run;
            }
        }
    }

    /// R rows of q with `run` keys that lie one after another.
    #[inline(always)]
    unsafe fn dots<S: Simd, const R: usize>(
        &self,
        s: S,
        q: *const f32,
        q_stride: usize,
        keys: *const u8,
        run: usize,
        scores: *mut f32,
    ) {
        let (dim, dtype) = (self.args.k_cache.head_dim, self.args.k_cache.data.dtype);
        for j in 0..run {
            // SAFETY: the task's contract; q's rows are zero from dim to the vector's end.
            unsafe {
                let key = keys.add(j * dim * dtype.size());
                let mut sums = [s.zero(); R];
                let mut i = 0;
                while i < dim {
                    let k = load_some(s, key.add(i * dtype.size()), dtype, dim - i);
                    for (r, sum) in sums.iter_mut().enumerate() {
                        *sum = s.fma(k, s.load(q.add(r * q_stride + i)), *sum);
                    }
                    i += S::LANES;
                }
                for (r, sum) in sums.into_iter().enumerate() {
                    *scores.add(r * CHUNK + j) = self.score_scale() * s.sum(sum);
                }
            }
        }
    }

    /// sums[row] += probabilities times values, of the one token's heads.
    #[inline(always)]
    unsafe fn values_in_place<S: Simd>(
        &self,
        s: S,
        probs: *const f32,
        stride: usize,
        key: usize,
        len: usize,
        sums: *mut f32,
    ) {
        let mut done = 0;
        while done < len {
            // SAFETY: the task's contract.
            unsafe {
                let (at, run) = self.locate(&self.args.v_cache, key + done);
                let run = run.min(len - done);
                let mut r = 0;
                while r < self.group {
                    let (probs, to) = (probs.add(r * CHUNK + done), sums.add(r * stride));
                    match self.group - r {
                        3.. => {
                            self.weigh::<S, 3>(s, probs, at, run, to, stride);
                            r += 3;
                        }
                        2 => {
                            self.weigh::<S, 2>(s, probs, at, run, to, stride);
                            r += 2;
                        }
                        _ => {
                            self.weigh::<S, 1>(s, probs, at, run, to, stride);
                            r += 1;
                        }
                    }
                }
                done += run;
            }
        }
    }

    /// The same for R rows and `run` values that lie one after another.
    #[inline(always)]
    unsafe fn weigh<S: Simd, const R: usize>(
        &self,
        s: S,
        probs: *const f32,
        values: *const u8,
        run: usize,
        sums: *mut f32,
        stride: usize,
    ) {
        let (dim, dtype) = (self.args.v_cache.head_dim, self.args.v_cache.data.dtype);
        let size = dtype.size();
        // SAFETY: the task's contract; sums' rows are whole vectors.
        unsafe {
            let mut i = 0;
            while i + 4 * S::LANES <= dim {
                let mut acc = [[s.zero(); 4]; R];
                for (r, acc) in acc.iter_mut().enumerate() {
                    for (v, acc) in acc.iter_mut().enumerate() {
                        *acc = s.load(sums.add(r * stride + i + v * S::LANES));
                    }
                }
                for j in 0..run {
                    let at = values.add((j * dim + i) * size);
                    let row = [
                        load_some(s, at, dtype, S::LANES),
                        load_some(s, at.add(S::LANES * size), dtype, S::LANES),
                        load_some(s, at.add(2 * S::LANES * size), dtype, S::LANES),
                        load_some(s, at.add(3 * S::LANES * size), dtype, S::LANES),
                    ];
                    for (r, acc) in acc.iter_mut().enumerate() {
                        let p = s.splat(*probs.add(r * CHUNK + j));
                        for (acc, &v) in acc.iter_mut().zip(&row) {
                            *acc = s.fma(p, v, *acc);
                        }
                    }
                }
                for (r, acc) in acc.iter().enumerate() {
                    for (v, &acc) in acc.iter().enumerate() {
                        s.store(sums.add(r * stride + i + v * S::LANES), acc);
                    }
                }
                i += 4 * S::LANES;
            }
            while i < dim {
                for r in 0..R {
                    let to = sums.add(r * stride + i);
                    let mut acc = s.load(to);
                    for j in 0..run {
                        let v = load_some(s, values.add((j * dim + i) * size), dtype, dim - i);
                        acc = s.fma(s.splat(*probs.add(r * CHUNK + j)), v, acc);
                    }
                    s.store(to, acc);
                }
                i += S::LANES;
            }
        }
    }

    /// Whether both products can be of bfloat16 pairs, as keys and values are kept: queries and
    /// probabilities are rounded to it, sums stay float32. Then decode and prefill are one.
    #[inline(always)]
    fn has_pairs<S: Simd>(&self) -> bool {
        S::DOTS_BF16 && are_pairs(&self.args.k_cache, &self.args.v_cache)
    }

    /// scores[row][len, to whole panels] of q [rows][dim]; `keys`: memory for the chunk, as panels
    /// [key panel][dim / 2][2 LANES keys].
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    unsafe fn scores_of_pairs<S: Simd>(
        &self,
        s: S,
        q: *const u16,
        rows: usize,
        key: usize,
        len: usize,
        keys: *mut u32,
        scores: *mut f32,
    ) {
        let width = 2 * S::LANES;
        let dim = self.args.k_cache.head_dim;
        // SAFETY: the task's contract.
        unsafe {
            for first in (0..len).step_by(16) {
                let to = keys.add(first / width * (dim / 2) * width + first % width);
                let rows = self.sixteen_keys(key, first, len);
                for i in (0..dim).step_by(32) {
                    s.transpose_pairs(shifted(rows, i), to.add(i / 2 * width), width);
                }
            }
            for p in 0..len.div_ceil(width) {
                let panel = keys.add(p * (dim / 2) * width);
                let to = scores.add(p * width);
                let scale = Some(s.splat(self.score_scale()));
                pair_tiles(s, q.cast(), dim / 2, rows, panel, dim / 2, to, CHUNK, scale);
            }
        }
    }

    /// sums[dim panel][row][2 LANES] += probabilities, bfloat16, times values; `values`: memory for
    /// the chunk, as panels [dim panel][CHUNK / 2][2 LANES dims].
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    unsafe fn add_values_of_pairs<S: Simd>(
        &self,
        s: S,
        probs: *mut f32,
        rows: usize,
        key: usize,
        len: usize,
        values: *mut u32,
        sums: *mut f32,
    ) {
        let width = 2 * S::LANES;
        let dim = self.args.v_cache.head_dim;
        // SAFETY: the task's contract.
        unsafe {
            let mut walk = Walk::START;
            let mut take = |j: usize| {
                if j >= len {
                    return NOTHING.as_ptr();
                }
                walk.to(self, &self.args.v_cache, key + j);
                walk.at.cast::<u16>()
            };
            for j in (0..len).step_by(2) {
                let (a, b) = (take(j), take(j + 1));
                for i in (0..dim).step_by(width) {
                    let to = values.add((i / width * (CHUNK / 2) + j / 2) * width);
                    s.interleave_bf16(a.add(i), b.add(i), to);
                }
            }
            for p in 0..dim / width {
                let panel = values.add(p * (CHUNK / 2) * width);
                let to = sums.add(p * width * rows);
                let pairs = len.div_ceil(2);
                pair_tiles(s, probs.cast(), CHUNK, rows, panel, pairs, to, width, None);
            }
        }
    }

    /// Where keys `first..first + 16` of a chunk are; the last one's again for those beyond `len`.
    #[inline(always)]
    unsafe fn sixteen_keys(&self, key: usize, first: usize, len: usize) -> [*const u16; 16] {
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

    /// Whether keys can be transposed as vectors. A decode's products with keys that lie as columns
    /// need no sums across lanes: worth the transposing even for one row.
    #[inline(always)]
    fn transposes<S: Simd>(&self) -> bool {
        let cache = &self.args.k_cache;
        S::TRANSPOSES && cache.data.dtype == DType::Bf16 && cache.head_dim.is_multiple_of(32)
    }

    /// A chunk's keys as panels [key panel][dim][2 LANES keys]; what lies beyond `len` is finite, or
    /// a key's.
    #[inline(always)]
    unsafe fn gather_keys<S: Simd>(
        &self,
        s: S,
        key: usize,
        len: usize,
        keys: *mut f32,
        dim_padded: usize,
    ) {
        let width = 2 * S::LANES;
        let cache = &self.args.k_cache;
        let (dim, dtype) = (cache.head_dim, cache.data.dtype);
        // SAFETY: the task's contract.
        unsafe {
            if self.transposes::<S>() {
                for first in (0..len).step_by(16) {
                    let rows = self.sixteen_keys(key, first, len);
                    let to = keys.add(first / width * dim_padded * width + first % width);
                    for i in (0..dim).step_by(32) {
                        s.transpose_bf16(shifted(rows, i), to.add(i * width), width);
                    }
                }
                return;
            }
            if len < CHUNK {
                for i in 0..CHUNK * dim_padded / S::LANES {
                    s.store(keys.add(i * S::LANES), s.zero());
                }
            } else if !dim.is_multiple_of(2) {
                for p in 0..CHUNK / width {
                    let row = keys.add((p * dim_padded + dim) * width);
                    s.store(row, s.zero());
                    s.store(row.add(S::LANES), s.zero());
                }
            }
            for j in 0..len {
                let (k, _) = self.locate(cache, key + j);
                let to = keys.add(j / width * dim_padded * width + j % width);
                if dtype == DType::F32 {
                    for i in 0..dim {
                        *to.add(i * width) = k.cast::<f32>().add(i).read_unaligned();
                    }
                } else {
                    for i in 0..dim {
                        *to.add(i * width) = load_one(k.add(i * dtype.size()), dtype);
                    }
                }
            }
        }
    }

    /// A chunk's values as panels [dim panel][CHUNK][2 LANES dims], zeros where there is none.
    #[inline(always)]
    unsafe fn gather_values<S: Simd>(
        &self,
        s: S,
        key: usize,
        len: usize,
        values: *mut f32,
        dim_padded: usize,
    ) {
        let width = 2 * S::LANES;
        let cache = &self.args.v_cache;
        let (dim, dtype) = (cache.head_dim, cache.data.dtype);
        // SAFETY: the task's contract.
        unsafe {
            if len < CHUNK {
                // The tiles take keys in pairs: the odd one's values must be zeros.
                for p in 0..dim_padded / width {
                    let row = values.add((p * CHUNK + len) * width);
                    s.store(row, s.zero());
                    s.store(row.add(S::LANES), s.zero());
                }
            }
            for j in 0..len {
                let (v, _) = self.locate(cache, key + j);
                let mut i = 0;
                while i < dim {
                    let row = load_some(s, v.add(i * dtype.size()), dtype, dim - i);
                    s.store(values.add((i / width * CHUNK + j) * width + i % width), row);
                    i += S::LANES;
                }
            }
        }
    }

    /// scores[row][len, to whole panels], by way of `sums`' panels in the order of the keys' ones.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    unsafe fn scores_from_panels<S: Simd>(
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

    /// The probabilities of at most STATE_ROWS rows, relative to their running maxima, as bfloat16 or
    /// float32 in place of the first half or all of a row of `probs`; zero for keys a row does not see.
    ///
    /// The rows' maxima and sums are taken together: one row after the other would wait for its own.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    unsafe fn softmax<S: Simd>(
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

    /// Write the item's rows: divided by their totals, or unfinished with their state.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    unsafe fn finish<S: Simd>(
        &self,
        s: S,
        rows: usize,
        dim_padded: usize,
        in_place: bool,
        sums: *const f32,
        state: State,
    ) {
        let dim = self.args.k_cache.head_dim;
        let width = 2 * S::LANES;
        let out = &self.args.out;
        for r in 0..rows {
            // SAFETY: the task's contract.
            unsafe {
                let (token, head) = (r / self.group, r % self.group);
                let head = self.item.kv_head * self.group + head;
                let inverse = s.splat(1.0 / *state.total.add(r));
                let unfinished = self.partial.wrapping_add(r * (dim + 2));
                let mut i = 0;
                while i < dim {
                    let at = if in_place {
                        r * dim_padded + i
                    } else {
                        i / width * (width * rows) + r * width + i % width
                    };
                    let v = s.load(sums.add(at));
                    if self.item.partial.is_some() {
                        s.store_first(unfinished.add(2 + i), v, dim - i);
                    } else {
                        let to = out.at(self.item.row + token, head * dim + i);
                        store_some(s, to, out.dtype, s.mul(v, inverse), dim - i);
                    }
                    i += S::LANES;
                }
                if self.item.partial.is_some() {
                    *unfinished = *state.high.add(r);
                    *unfinished.add(1) = *state.total.add(r);
                }
            }
        }
    }
}

/// Of each row: its largest score, the sum of its probabilities relative to that, and what the last
/// chunk has shrunk earlier sums by.
#[derive(Clone, Copy)]
struct State {
    high: *mut f32,
    total: *mut f32,
    shrink: *mut f32,
}

/// A way along the rows of a cache, which are looked up a block at a time.
struct Walk {
    at: *const u8,
    /// Rows behind it in its block.
    left: usize,
}

impl Walk {
    const START: Walk = Walk {
        at: std::ptr::null(),
        left: 0,
    };

    /// On to `key`'s row; the keys of a walk follow each other.
    ///
    /// # Safety
    /// The task's contract; it sees the key.
    #[inline(always)]
    unsafe fn to(&mut self, task: &AttentionTask, cache: &Cache, key: usize) {
        if self.left == 0 {
            // SAFETY: the caller's.
            (self.at, self.left) = unsafe { task.locate(cache, key) };
        } else {
            let row_bytes = cache.head_dim * cache.data.dtype.size();
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
unsafe fn shifted(mut rows: [*const u16; 16], by: usize) -> [*const u16; 16] {
    for row in &mut rows {
        // SAFETY: the caller's.
        *row = unsafe { row.add(by) };
    }
    rows
}

/// sums[row][2 LANES], `to_stride` apart, of rows of x [rows][pairs], `stride` pairs apart, times a
/// panel [pairs][2 LANES]; added to what is there, or in its place and times `scale`.
///
/// # Safety
/// All of it exists; `to` overlaps nothing.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn pair_tiles<S: Simd>(
    s: S,
    x: *const u32,
    stride: usize,
    rows: usize,
    panel: *const u32,
    pairs: usize,
    to: *mut f32,
    to_stride: usize,
    scale: Option<S::V>,
) {
    let mut r = 0;
    while r < rows {
        // SAFETY: the caller's; each tile takes at most the rows that are left.
        unsafe {
            let (x, to) = (x.add(r * stride), to.add(r * to_stride));
            r += match rows - r {
                12.. => pair_tile::<S, 12>(s, x, stride, panel, pairs, to, to_stride, scale),
                6.. => pair_tile::<S, 6>(s, x, stride, panel, pairs, to, to_stride, scale),
                4.. => pair_tile::<S, 4>(s, x, stride, panel, pairs, to, to_stride, scale),
                3 => pair_tile::<S, 3>(s, x, stride, panel, pairs, to, to_stride, scale),
                2 => pair_tile::<S, 2>(s, x, stride, panel, pairs, to, to_stride, scale),
                _ => pair_tile::<S, 1>(s, x, stride, panel, pairs, to, to_stride, scale),
            };
        }
    }
}

/// R rows of `pair_tiles`, their sums in registers; returns R.
///
/// # Safety
/// As there.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn pair_tile<S: Simd, const R: usize>(
    s: S,
    x: *const u32,
    stride: usize,
    panel: *const u32,
    pairs: usize,
    to: *mut f32,
    to_stride: usize,
    scale: Option<S::V>,
) -> usize {
    // SAFETY: the caller's.
    unsafe {
        let mut acc = [[s.zero(); 2]; R];
        if scale.is_none() {
            for (r, acc) in acc.iter_mut().enumerate() {
                acc[0] = s.load(to.add(r * to_stride));
                acc[1] = s.load(to.add(r * to_stride + S::LANES));
            }
        }
        for pair in 0..pairs {
            let at = panel.add(pair * 2 * S::LANES);
            let a = s.load_words(at.cast());
            let b = s.load_words(at.add(S::LANES).cast());
            for (r, acc) in acc.iter_mut().enumerate() {
                let x = *x.add(r * stride + pair);
                acc[0] = s.dot_bf16(acc[0], a, x);
                acc[1] = s.dot_bf16(acc[1], b, x);
            }
        }
        if let Some(scale) = scale {
            for acc in acc.as_flattened_mut() {
                *acc = s.mul(*acc, scale);
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            s.store(to.add(r * to_stride), acc[0]);
            s.store(to.add(r * to_stride + S::LANES), acc[1]);
        }
    }
    R
}

/// Combine the parts of one decode token's KV head.
struct MergeTask<'a> {
    args: AttentionArgs<'a>,
    group: usize,
    merge: Merge,
    partial: *const f32,
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
