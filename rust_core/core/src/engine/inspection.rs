//! The engine's state for callers, monitoring and tests.

use super::metrics::MetricsData;
use super::{EngineCore, Step};
use crate::error::{Error, Result};

/// Counts for monitoring and tests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)] // named in _core.pyi
pub struct Stats {
    pub num_running: usize,
    pub num_waiting: usize,
    pub num_free_blocks: usize,
    pub num_cached_blocks: usize,
    pub num_blocks: usize,
    pub num_preemptions: u64,
    pub num_in_flight: usize,
}

impl EngineCore {
    /// Prompt and output of an unfinished sample.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if there is no such sample.
    pub fn token_ids(&self, request_id: u64) -> Result<Vec<u32>> {
        let request = &self.scheduler.requests()[self.index(request_id)? as usize];
        Ok(request
            .prompt
            .tokens
            .iter()
            .chain(&request.outputs)
            .copied()
            .collect())
    }

    /// The blocks of an unfinished sample; none unless it is admitted.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if there is no such sample.
    pub fn block_ids(&self, request_id: u64) -> Result<Vec<u32>> {
        let request = &self.scheduler.requests()[self.index(request_id)? as usize];
        Ok(request
            .seat()
            .map_or(Vec::new(), |seat| seat.table.block_ids().to_vec()))
    }

    /// Samples that are not over.
    #[must_use]
    pub fn num_unfinished(&self) -> usize {
        self.scheduler.num_running() + self.scheduler.num_waiting()
    }

    /// True if a `schedule` or an `update` is owed.
    #[must_use]
    pub fn has_work(&self) -> bool {
        !self.steps.is_empty() || self.num_unfinished() > 0
    }

    /// See [`Stats`].
    #[must_use]
    pub fn stats(&self) -> Stats {
        let pool = self.scheduler.pool().lock();
        Stats {
            num_running: self.scheduler.num_running(),
            num_waiting: self.scheduler.num_waiting(),
            num_free_blocks: pool.num_free(),
            num_cached_blocks: pool.num_cached(),
            num_blocks: pool.num_blocks(),
            num_preemptions: self.preemptions_before + self.scheduler.num_preemptions,
            num_in_flight: self.steps.len(),
        }
    }

    /// The gauges, and the counters that the scheduler keeps.
    pub(super) fn publish(&self, metrics: &mut MetricsData) {
        let scheduler = &self.scheduler;
        metrics.num_requests_running = scheduler.num_running() as u64;
        metrics.num_requests_waiting = scheduler.num_waiting() as u64;
        let pool = scheduler.pool().lock();
        metrics.kv_cache_usage_perc = 1.0 - pool.num_free() as f64 / pool.num_blocks() as f64;
        metrics.num_preemptions = self.preemptions_before + scheduler.num_preemptions;
        metrics.prefix_cache_queries = scheduler.prefix_queries;
        metrics.prefix_cache_hits = scheduler.prefix_hits;
    }

    /// Checks every invariant. O(everything held).
    ///
    /// # Errors
    /// [`Error::Integrity`] naming the first one that is broken.
    pub fn check_integrity(&self) -> Result<()> {
        self.check_with(None, 0)
    }

    /// As `check_integrity`, with a further step that is being taken, from `first` on.
    pub(super) fn check_with(&self, taking: Option<&Step>, first: usize) -> Result<()> {
        let in_flight = self.steps.iter().filter(|step| !step.is_void);
        let entries = in_flight.flat_map(|step| &step.plan.entries);
        let rest = taking.iter().flat_map(|step| &step.plan.entries[first..]);
        self.scheduler.check_integrity(entries.chain(rest))?;
        for (index, sample) in self.samples.iter().enumerate() {
            let request = self.scheduler.requests().get(index);
            let id = request.map(|request| request.request_id);
            let lives = id.is_some_and(|id| self.scheduler.index_of(id) == Some(index as u32));
            if sample.is_some() != lives {
                return Err(Error::integrity(format!(
                    "sample {index} and request {id:?} disagree"
                )));
            }
        }
        Ok(())
    }

    fn index(&self, request_id: u64) -> Result<u32> {
        let index = self.scheduler.index_of(request_id);
        index.ok_or_else(|| Error::invalid(format!("request {request_id} is unknown or over")))
    }
}
