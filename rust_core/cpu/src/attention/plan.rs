//! A call's arguments and its work: items of one request and KV head, and their merges.

use std::ops::Range;

use crate::kv_cache::Cache;
use crate::tensor::{Rows, RowsMut};

/// Keys in a chunk.
pub(super) const CHUNK: usize = 64;
/// Keys a decode item takes at most.
const SPLIT: usize = 512;
/// Rows (query tokens times heads) of a prefill item.
pub(super) const TILE_ROWS: usize = 96;

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
    /// A query attends to no later key.
    pub causal: bool,
    /// [Hq]: a score of each head that every query's softmax has and no value belongs to; empty:
    /// none.
    pub sinks: &'a [f32],
    /// [Hq]: each head's slope of a bias by distance (ALiBi); empty: none.
    pub slopes: &'a [f32],
    /// Rows whose queries and results are each thread's own, ascending; may be empty.
    pub shares: &'a [Range<usize>],
    /// [T, Hq Dh]
    pub out: RowsMut,
}

/// One request's query rows of one KV head, and the range of keys they attend to.
#[derive(Clone, Copy)]
pub(super) struct Item {
    pub(super) request: usize,
    pub(super) kv_head: usize,
    /// First row of q, and how many.
    pub(super) row: usize,
    pub(super) tokens: usize,
    /// Position of the first.
    pub(super) position: usize,
    /// Range of keys.
    pub(super) low: usize,
    pub(super) high: usize,
    /// Index of the item's partial result, where it is one of several.
    pub(super) partial: Option<usize>,
}

impl Item {
    /// The item's chunks of at most `CHUNK` keys: the first key and the number of keys.
    #[inline(always)]
    pub(super) fn chunks(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let high = self.high;
        (self.low..high)
            .step_by(CHUNK)
            .map(move |key| (key, (high - key).min(CHUNK)))
    }
}

/// One decode token's KV head, whose result is merged from partial ones.
#[derive(Clone, Copy)]
pub(super) struct Merge {
    pub(super) row: usize,
    pub(super) kv_head: usize,
    pub(super) partial: usize,
    pub(super) parts: usize,
}

/// Ranges of tasks of `per_task` items, one for each range of `rows`: a task goes with the rows of its
/// first item.
pub(super) fn shares_of(
    items: &[Item],
    per_task: usize,
    rows: &[Range<usize>],
) -> Vec<Range<usize>> {
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
pub(super) fn plan(args: &AttentionArgs, group: usize) -> Result<(Vec<Item>, Vec<Merge>), String> {
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
        // Blocks before the window may have been given back; their ids are not checked.
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
