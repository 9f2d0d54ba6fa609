//! MaskBatch: the masks of a step's constrained rows, filled on several threads.

use std::sync::OnceLock;
use std::thread::available_parallelism;

use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use super::constraint::Constraint;

/// Fewer masks than this take less time than other threads take to wake up.
const MIN_SHARED: usize = 4;
/// More threads than this gain nothing: masks of 256 rows are some ten milliseconds of one thread's work.
const MAX_THREADS: usize = 16;

/// One row, with its sample's constraint while its mask is filled.
#[derive(Debug)]
pub struct MaskItem {
    /// The sample's.
    pub index: u32,
    /// Of the step's samples.
    pub row: i32,
    /// The sample gets it back.
    pub constraint: Box<Constraint>,
    /// The token before, which it has not taken yet.
    pub token: Option<u32>,
    /// The forced continuation is of interest.
    pub may_force: bool,
}

/// See the module's page.
#[derive(Debug)]
pub struct MaskBatch {
    /// In the order of rows.
    pub items: Vec<MaskItem>,
}

impl MaskBatch {
    /// Writes a mask of `num_words` per item to `out`, in order, and to `rows` the row it is of: -1 where
    /// every token may come. What the samples' next `accept` finds is found here.
    pub fn fill(&mut self, rows: &mut [i32], out: &mut [u32], num_words: usize) {
        let fill = |((item, row), words): ((&mut MaskItem, &mut i32), &mut [u32])| {
            let is_over = item
                .token
                .is_some_and(|token| !item.constraint.advance(token, item.may_force));
            let is_masked = !is_over && item.constraint.fill_mask(words);
            *row = if is_masked { item.row } else { -1 };
        };
        match pool().filter(|_| self.items.len() >= MIN_SHARED) {
            Some(pool) => pool.install(|| {
                let items = self.items.par_iter_mut().zip(rows);
                items.zip(out.par_chunks_mut(num_words)).for_each(fill);
            }),
            None => {
                let items = self.items.iter_mut().zip(rows);
                items.zip(out.chunks_mut(num_words)).for_each(fill);
            }
        }
    }
}

/// Half of the cores, since others have what waits for the model to run; but of two both, where it is
/// the model that waits, being computed there itself. None: there is no second.
fn pool() -> Option<&'static ThreadPool> {
    static POOL: OnceLock<Option<ThreadPool>> = OnceLock::new();
    POOL.get_or_init(|| {
        let num_cores = available_parallelism().map_or(1, usize::from);
        let num_threads = num_cores.min((num_cores / 2).clamp(2, MAX_THREADS));
        if num_threads < 2 {
            return None;
        }
        ThreadPoolBuilder::new()
            .num_threads(num_threads)
            .thread_name(|index| format!("octavo-mask-{index}"))
            .build()
            .ok()
    })
    .as_ref()
}
