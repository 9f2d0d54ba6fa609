//! Counters, gauges and histograms, under the names of the server's `/metrics` page without the
//! prefix `vllm:` and without a counter's `_total`.
//!
//! The engine thread takes the lock once per step; observations that share a value are made at
//! once (1,024 streams that got their previous token in the same step waited equally long), so a
//! decode step costs one histogram search, not one per request.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::scheduler::request::FinishReason;

/// 0.5 ms to 20 minutes. Half a millisecond, because small models decode faster than that.
const SECONDS: &[f64] = &[
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1,
    0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 40.0,
    60.0, 120.0, 240.0, 480.0, 960.0, 1200.0,
];
/// Tokens, 1-2-5.
const TOKENS: &[f64] = &[
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5,
    5e5, 1e6,
];
/// Tokens of a step: powers of two, as batches are.
const STEP_TOKENS: &[f64] = &[
    1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0,
    16384.0,
];
/// Samples of a request.
const SAMPLES: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0];
/// Times that a request was preempted.
const PREEMPTIONS: &[f64] = &[1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0];

/// Counts of values between fixed bounds.
#[derive(Debug, Clone)]
pub struct Histogram {
    bounds: &'static [f64],
    /// One per bound, and one for what exceeds the last.
    counts: Vec<u64>,
    sum: f64,
    count: u64,
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Self {
        Self {
            bounds,
            counts: vec![0; bounds.len() + 1],
            sum: 0.0,
            count: 0,
        }
    }

    /// Counts a value. O(log bounds).
    pub fn observe(&mut self, value: f64) {
        self.observe_n(value, 1);
    }

    /// Counts a value `n` times.
    pub fn observe_n(&mut self, value: f64, n: u64) {
        // A bound is inclusive, as in Prometheus' `le`.
        let bucket = self.bounds.partition_point(|&bound| bound < value);
        self.counts[bucket] += n;
        self.sum += value * n as f64;
        self.count += n;
    }

    /// (upper bound, observations up to it), ascending; infinity last.
    pub fn cumulative(&self) -> impl Iterator<Item = (f64, u64)> + '_ {
        let bounds = self.bounds.iter().copied().chain([f64::INFINITY]);
        bounds.zip(self.counts.iter().scan(0, |total, &count| {
            *total += count;
            Some(*total)
        }))
    }

    /// Sum of all values.
    #[must_use]
    pub fn sum(&self) -> f64 {
        self.sum
    }

    /// Number of values.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }
}

/// The numbers themselves. A clone is a consistent copy.
#[derive(Debug, Clone)]
#[allow(missing_docs)] // the names are the documentation: they are those of the metrics page
pub struct MetricsData {
    pub num_requests_running: u64,
    pub num_requests_waiting: u64,
    pub kv_cache_usage_perc: f64,
    /// Of samples that have an output token or are over. It only grows.
    pub settled_prompt_tokens: u64,
    pub prompt_tokens: u64,
    pub generation_tokens: u64,
    pub prefix_cache_queries: u64,
    pub prefix_cache_hits: u64,
    pub num_preemptions: u64,
    /// By [`FinishReason`].
    pub request_success: [u64; FinishReason::ALL.len()],
    pub time_to_first_token_seconds: Histogram,
    pub inter_token_latency_seconds: Histogram,
    pub request_time_per_output_token_seconds: Histogram,
    pub e2e_request_latency_seconds: Histogram,
    pub request_queue_time_seconds: Histogram,
    pub request_prefill_time_seconds: Histogram,
    pub request_decode_time_seconds: Histogram,
    pub request_inference_time_seconds: Histogram,
    pub request_prompt_tokens: Histogram,
    pub request_generation_tokens: Histogram,
    pub request_params_n: Histogram,
    pub request_params_max_tokens: Histogram,
    pub request_max_num_generation_tokens: Histogram,
    pub request_num_preemptions: Histogram,
    pub iteration_tokens: Histogram,
}

impl Default for MetricsData {
    fn default() -> Self {
        let seconds = || Histogram::new(SECONDS);
        let tokens = || Histogram::new(TOKENS);
        Self {
            num_requests_running: 0,
            num_requests_waiting: 0,
            kv_cache_usage_perc: 0.0,
            settled_prompt_tokens: 0,
            prompt_tokens: 0,
            generation_tokens: 0,
            prefix_cache_queries: 0,
            prefix_cache_hits: 0,
            num_preemptions: 0,
            request_success: [0; FinishReason::ALL.len()],
            time_to_first_token_seconds: seconds(),
            inter_token_latency_seconds: seconds(),
            request_time_per_output_token_seconds: seconds(),
            e2e_request_latency_seconds: seconds(),
            request_queue_time_seconds: seconds(),
            request_prefill_time_seconds: seconds(),
            request_decode_time_seconds: seconds(),
            request_inference_time_seconds: seconds(),
            request_prompt_tokens: tokens(),
            request_generation_tokens: tokens(),
            request_params_n: Histogram::new(SAMPLES),
            request_params_max_tokens: tokens(),
            request_max_num_generation_tokens: tokens(),
            request_num_preemptions: Histogram::new(PREEMPTIONS),
            iteration_tokens: Histogram::new(STEP_TOKENS),
        }
    }
}

impl MetricsData {
    /// Counters by name.
    #[must_use]
    pub fn counters(&self) -> [(&'static str, u64); 5] {
        [
            ("prompt_tokens", self.prompt_tokens),
            ("generation_tokens", self.generation_tokens),
            ("prefix_cache_queries", self.prefix_cache_queries),
            ("prefix_cache_hits", self.prefix_cache_hits),
            ("num_preemptions", self.num_preemptions),
        ]
    }

    /// Gauges by name; one under its older name too.
    #[must_use]
    pub fn gauges(&self) -> [(&'static str, f64); 4] {
        [
            ("num_requests_running", self.num_requests_running as f64),
            ("num_requests_waiting", self.num_requests_waiting as f64),
            ("kv_cache_usage_perc", self.kv_cache_usage_perc),
            ("gpu_cache_usage_perc", self.kv_cache_usage_perc),
        ]
    }

    /// Histograms by name; one under its older name too.
    #[must_use]
    pub fn histograms(&self) -> [(&'static str, &Histogram); 16] {
        [
            (
                "time_to_first_token_seconds",
                &self.time_to_first_token_seconds,
            ),
            (
                "inter_token_latency_seconds",
                &self.inter_token_latency_seconds,
            ),
            (
                "time_per_output_token_seconds",
                &self.inter_token_latency_seconds,
            ),
            (
                "request_time_per_output_token_seconds",
                &self.request_time_per_output_token_seconds,
            ),
            (
                "e2e_request_latency_seconds",
                &self.e2e_request_latency_seconds,
            ),
            (
                "request_queue_time_seconds",
                &self.request_queue_time_seconds,
            ),
            (
                "request_prefill_time_seconds",
                &self.request_prefill_time_seconds,
            ),
            (
                "request_decode_time_seconds",
                &self.request_decode_time_seconds,
            ),
            (
                "request_inference_time_seconds",
                &self.request_inference_time_seconds,
            ),
            ("request_prompt_tokens", &self.request_prompt_tokens),
            ("request_generation_tokens", &self.request_generation_tokens),
            ("request_params_n", &self.request_params_n),
            ("request_params_max_tokens", &self.request_params_max_tokens),
            (
                "request_max_num_generation_tokens",
                &self.request_max_num_generation_tokens,
            ),
            ("request_num_preemptions", &self.request_num_preemptions),
            ("iteration_tokens", &self.iteration_tokens),
        ]
    }
}

/// The numbers, shared between the engine thread and their readers.
#[derive(Debug, Default)]
pub struct Metrics(Mutex<MetricsData>);

impl Metrics {
    /// The samples that are over, and [`MetricsData::settled_prompt_tokens`]. Neither copies nor
    /// allocates.
    #[must_use]
    pub fn settled(&self) -> (u64, u64) {
        let data = self.lock();
        let ended = data.request_success.iter().sum();
        (ended, data.settled_prompt_tokens)
    }

    /// Exclusive access, for one step's updates.
    pub fn lock(&self) -> MutexGuard<'_, MetricsData> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A consistent copy.
    #[must_use]
    pub fn snapshot(&self) -> MetricsData {
        self.lock().clone()
    }
}

/// Gathers the inter-token latencies of a step: equal ones become one observation.
#[derive(Debug)]
pub struct LatencyBatch {
    now_s: f64,
    last_s: f64,
    count: u64,
}

impl LatencyBatch {
    /// For tokens that arrive at `now_s`.
    #[must_use]
    pub fn new(now_s: f64) -> Self {
        Self {
            now_s,
            last_s: now_s,
            count: 0,
        }
    }

    /// Counts a token whose sample got its previous one at `last_s`.
    #[inline]
    pub fn add(&mut self, last_s: f64, histogram: &mut Histogram) {
        if last_s != self.last_s {
            self.flush(histogram);
            self.last_s = last_s;
        }
        self.count += 1;
    }

    /// Observes what is gathered.
    pub fn flush(&mut self, histogram: &mut Histogram) {
        if self.count > 0 {
            histogram.observe_n(self.now_s - self.last_s, self.count);
            self.count = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_inclusive_and_counts_cumulative() {
        let mut histogram = Histogram::new(&[1.0, 2.0]);
        for value in [0.5, 1.0, 1.5, 3.0] {
            histogram.observe(value);
        }
        let cumulative: Vec<_> = histogram.cumulative().collect();
        assert_eq!(cumulative, [(1.0, 2), (2.0, 3), (f64::INFINITY, 4)]);
        assert_eq!((histogram.sum(), histogram.count()), (6.0, 4));
    }

    #[test]
    fn latencies_are_batched_without_loss() {
        let mut batched = Histogram::new(SECONDS);
        let mut batch = LatencyBatch::new(10.0);
        for last_s in [9.0, 9.0, 9.5, 9.0, 9.9, 9.9] {
            batch.add(last_s, &mut batched);
        }
        batch.flush(&mut batched);
        assert_eq!(batched.count(), 6);
        assert!((batched.sum() - (3.0 + 0.5 + 0.2)).abs() < 1e-9);
    }

    #[test]
    fn bounds_ascend() {
        for bounds in [SECONDS, TOKENS, STEP_TOKENS, SAMPLES, PREEMPTIONS] {
            assert!(bounds.windows(2).all(|pair| pair[0] < pair[1]));
        }
        assert_eq!(SECONDS[0], 0.0005);
    }
}
