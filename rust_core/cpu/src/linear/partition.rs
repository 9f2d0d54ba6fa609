//! Partition of a product into tasks: columns of the weight times rows of x.

use std::ops::Range;

use crate::linear::float::ROW_BLOCK;
use crate::pool;

/// Up to so many rows are bound by memory, which reads one stretch a thread faster than pieces that
/// take turns: the hardware prefetches along a stretch and begins anew at each piece (bench/NOTES.md,
/// "Integer products on two Zen 5 cores").
const STREAM_ROWS: usize = 8;

/// Cut `units` columns of work times `rows` into tasks; more rows than `STREAM_ROWS` into several a
/// thread, so that a thread that loses its core does not hold up the rest.
pub(crate) fn split(units: usize, rows: usize, run: &(dyn Fn(Range<usize>, Range<usize>) + Sync)) {
    let threads = pool::free_threads();
    if threads == 1 {
        return run(0..units, 0..rows);
    }
    let (unit_step, row_step) = steps(units, rows, threads);
    let row_tasks = rows.div_ceil(row_step);
    pool::run(units.div_ceil(unit_step) * row_tasks, |task| {
        let (u, r) = (task / row_tasks * unit_step, task % row_tasks * row_step);
        run(u..(u + unit_step).min(units), r..(r + row_step).min(rows));
    });
}

/// Columns and rows of a task.
fn steps(units: usize, rows: usize, threads: usize) -> (usize, usize) {
    let per_thread = if rows <= STREAM_ROWS { 1 } else { 6 };
    let unit_step = units.div_ceil(threads * per_thread).max(1);
    let row_step = if units.div_ceil(unit_step) >= 3 * threads {
        rows
    } else {
        ROW_BLOCK.min(rows)
    };
    (unit_step, row_step)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The share of their time that threads compute, each taking the next task when it is free.
    fn balance(units: usize, rows: usize, threads: usize) -> f64 {
        let (unit_step, row_step) = steps(units, rows, threads);
        let mut busy = vec![0usize; threads];
        let mut work = 0;
        for u in (0..units).step_by(unit_step) {
            for r in (0..rows).step_by(row_step) {
                let task = unit_step.min(units - u) * row_step.min(rows - r);
                *busy.iter_mut().min().expect("threads") += task;
                work += task;
            }
        }
        assert_eq!(work, units * rows, "every unit of every row once");
        work as f64 / (threads * busy.iter().max().expect("threads")) as f64
    }

    /// Threads beyond what this machine has: the partition alone, since their speed cannot be.
    #[test]
    fn many_threads_have_equal_shares() {
        // Tiles of 16 columns of one row, panels of 32 of many: matrices of 3 to 8 billion weights.
        for n in [3072, 4096, 8192, 11_008, 14_336, 128_256] {
            for threads in [2, 4, 8, 16, 32, 64] {
                for rows in [1, 4, 8] {
                    let share = balance(n / 16, rows, threads);
                    assert!(share > 0.74, "{n}, {rows} rows, {threads} threads: {share}");
                }
                for rows in [64, 512, 2048] {
                    let share = balance(n / 32, rows, threads);
                    assert!(share > 0.74, "{n}, {rows} rows, {threads} threads: {share}");
                }
            }
        }
    }

    /// A small model's matrices have fewer tiles than a large machine has threads.
    #[test]
    fn no_task_is_empty() {
        for (units, rows, threads) in [(1, 1, 64), (36, 1, 64), (18, 3, 7), (1, 200, 16)] {
            let (unit_step, row_step) = steps(units, rows, threads);
            assert!(unit_step >= 1 && row_step >= 1 && row_step <= rows);
            assert!(balance(units, rows, threads) > 0.0);
        }
    }
}
