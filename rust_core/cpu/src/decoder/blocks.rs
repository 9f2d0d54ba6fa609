//! Blocks: a step's rows, cut for the caches and the threads.

use std::ops::Range;

use crate::level::Level;
use crate::linear::int8::ROWS;
use crate::pool;

/// Rows that pass through a layer together: enough for the matrix products, few enough that
/// 2 * intermediate_size floats of each stay near the core.
const ROW_BLOCK: usize = 128;
/// The same of a thread that has them for itself, and a second-level cache for them.
const TASK_ROWS: usize = 64;
/// Fewer rows would be multiplied in another order, and more slowly, on the tile unit.
const MIN_BLOCK: usize = 32;

/// A step's rows, in blocks that pass through a layer together.
pub(super) struct Blocks {
    /// In order, and together all rows.
    pub(super) rows: Vec<Range<usize>>,
    /// Each thread's range of blocks; empty: all threads share every block.
    pub(super) shares: Vec<Range<usize>>,
    /// The same in rows.
    pub(super) row_shares: Vec<Range<usize>>,
}

impl Blocks {
    /// Blocks of a step of `tokens` rows, for the free threads of the pool.
    pub(super) fn new(level: Level, tokens: usize) -> Blocks {
        let min_rows = if level.has_amx() { MIN_BLOCK } else { ROWS };
        let threads = pool::free_threads();
        let rows = task_blocks(tokens, threads, min_rows);
        if rows.is_empty() {
            return Blocks {
                rows: shared_blocks(tokens).collect(),
                shares: Vec::new(),
                row_shares: Vec::new(),
            };
        }
        let shares: Vec<_> = (0..threads)
            .map(|i| i * rows.len() / threads..(i + 1) * rows.len() / threads)
            .collect();
        let row_shares = shares
            .iter()
            .filter(|share| !share.is_empty())
            .map(|share| rows[share.start].start..rows[share.end - 1].end)
            .collect();
        Blocks {
            rows,
            shares,
            row_shares,
        }
    }
}

/// Blocks of rows, all of which all threads share.
fn shared_blocks(tokens: usize) -> impl Iterator<Item = Range<usize>> {
    // A last block that is too small joins the one before.
    let count = ((tokens + ROW_BLOCK - MIN_BLOCK) / ROW_BLOCK).max(1);
    (0..count).map(move |i| {
        let end = if i + 1 == count {
            tokens
        } else {
            (i + 1) * ROW_BLOCK
        };
        i * ROW_BLOCK..end
    })
}

/// Blocks of rows, each for one thread; none where sharing rows is faster.
///
/// A thread that has rows for itself reads all weights for them, so the bandwidth T threads of r rows
/// need grows with T / r. r is such that two cores of a server have it, with 4-bit weights at the
/// speed of `linear::int8` (`cargo bench -p octavo-cpu --bench cpu`).
fn task_blocks(tokens: usize, threads: usize, min_rows: usize) -> Vec<Range<usize>> {
    let min_rows = min_rows.max(4 * threads);
    if threads < 2 || tokens < threads * min_rows {
        return Vec::new();
    }
    let count = tokens.div_ceil(TASK_ROWS * threads) * threads;
    // To the row, the larger blocks first: a thread with a group of rows more than the others, where
    // each has two or three, makes them wait for half of the step.
    let cut = |i: usize| (i * tokens).div_ceil(count);
    (0..count).map(|i| cut(i)..cut(i + 1)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn covers(blocks: &[Range<usize>], tokens: usize) -> bool {
        let mut at = 0;
        for block in blocks {
            if block.start != at || block.is_empty() {
                return false;
            }
            at = block.end;
        }
        at == tokens
    }

    #[test]
    fn blocks_are_all_rows_in_order() {
        for tokens in 1..700 {
            let shared: Vec<_> = shared_blocks(tokens).collect();
            assert!(covers(&shared, tokens));
            assert!(shared.len() == 1 || shared.iter().all(|b| b.len() >= MIN_BLOCK));
            for threads in 1..9 {
                let blocks = task_blocks(tokens, threads, ROWS);
                let enough = threads > 1 && tokens >= threads * ROWS.max(4 * threads);
                assert_eq!(blocks.is_empty(), !enough);
                if enough {
                    assert!(covers(&blocks, tokens));
                    // None is left idle, and none has two rows more than another.
                    assert!(blocks.len() >= threads);
                    let sizes = blocks.iter().map(Range::len);
                    let (least, most) = (sizes.clone().min(), sizes.max());
                    assert!(most <= least.map(|least| least + 1));
                    assert!(most <= Some(TASK_ROWS));
                }
            }
        }
    }
}
