//! MaskBatch: the masks of a step's constrained rows, filled on several threads.

use std::sync::OnceLock;
use std::thread::available_parallelism;

use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use super::constraint::Constraint;

/// Fewer masks than this take less time than other threads take to wake up.
const MIN_SHARED: usize = 4;
/// More threads than this gain nothing: masks of 256 rows are a few milliseconds of work.
const MAX_THREADS: usize = 8;

/// One row, with its sample's constraint while its mask is filled.
#[derive(Debug)]
pub struct MaskItem {
    /// The sample's.
    pub index: u32,
    /// Of the step's samples.
    pub row: i32,
    /// The sample gets it back.
    pub constraint: Box<Constraint>,
}

/// See the module's page.
#[derive(Debug)]
pub struct MaskBatch {
    /// In the order of rows.
    pub items: Vec<MaskItem>,
}

impl MaskBatch {
    /// Writes a mask of `num_words` per item to `out`, in order. Returns the items' rows, -1 for a row in
    /// which every token may come.
    pub fn fill(&mut self, out: &mut [u32], num_words: usize) -> Vec<i32> {
        let fill = |(item, words): (&mut MaskItem, &mut [u32])| {
            if item.constraint.fill_mask(words) {
                item.row
            } else {
                -1
            }
        };
        match pool().filter(|_| self.items.len() >= MIN_SHARED) {
            Some(pool) => pool.install(|| {
                let words = out.par_chunks_mut(num_words);
                self.items.par_iter_mut().zip(words).map(fill).collect()
            }),
            None => {
                let words = out.chunks_mut(num_words);
                self.items.iter_mut().zip(words).map(fill).collect()
            }
        }
    }
}

/// Half of the cores: the others have the model, or what waits for it, to run. None: there is no second.
fn pool() -> Option<&'static ThreadPool> {
    static POOL: OnceLock<Option<ThreadPool>> = OnceLock::new();
    POOL.get_or_init(|| {
        let num_cores = available_parallelism().map_or(1, usize::from);
        let num_threads = (num_cores / 2).min(MAX_THREADS);
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
