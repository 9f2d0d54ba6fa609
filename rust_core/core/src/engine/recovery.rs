//! After a panic: end the request that was being worked on; if that does not restore the
//! invariants, end them all.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::{Cursor, EngineCore, Step};
use crate::scheduler::Scheduler;
use crate::scheduler::request::FinishReason;

impl EngineCore {
    /// After a caught panic: ends the request that was being worked on, and everything if the
    /// invariants do not hold then.
    pub(super) fn recover(&mut self, now_s: f64) {
        self.recover_with(None, 0, now_s);
    }

    pub(super) fn recover_in_step(&mut self, step: &Step, cursor: &mut Cursor, now_s: f64) {
        if !self.recover_with(Some(step), cursor.entry, now_s) {
            // The rest of the step is about requests that are gone.
            cursor.entry = usize::MAX;
        }
    }

    /// Returns true if the other requests live on.
    fn recover_with(&mut self, taking: Option<&Step>, first: usize, now_s: f64) -> bool {
        let culprit = self.scheduler.current.take();
        let is_sound = catch_unwind(AssertUnwindSafe(|| {
            let index = culprit?;
            let (outbox, metrics) = (self.outbox.clone(), self.metrics.clone());
            let (outbox, metrics) = (&mut outbox.lock(), &mut metrics.lock());
            self.finish(index, FinishReason::Error, None, now_s, outbox, metrics);
            self.publish(metrics);
            self.check_with(taking, first).ok()
        }));
        let is_sound = matches!(is_sound, Ok(Some(())));
        if !is_sound {
            self.start_afresh(now_s);
        }
        is_sound
    }

    /// The last resort: every request ends with "error", the scheduler is replaced.
    fn start_afresh(&mut self, now_s: f64) {
        let config = self.scheduler.config().clone();
        let Ok(fresh) = Scheduler::new(config) else {
            return;
        };
        let mut old = std::mem::replace(&mut self.scheduler, fresh);
        for step in &mut self.steps {
            step.is_void = true;
        }
        self.preemptions_before += old.num_preemptions;
        self.scheduler.prefix_queries = old.prefix_queries;
        self.scheduler.prefix_hits = old.prefix_hits;
        let (outbox, metrics) = (self.outbox.clone(), self.metrics.clone());
        let (outbox, metrics) = (&mut outbox.lock(), &mut metrics.lock());
        self.num_constrained = 0;
        for sample in self.samples.drain(..).flatten() {
            let delta = &mut outbox.stream(sample.stream_key).delta;
            delta.finish_reason = Some(FinishReason::Error);
            delta.num_output_tokens = sample.num_outputs;
            if sample.num_outputs == 0 {
                metrics.settled_prompt_tokens += u64::from(delta.num_prompt_tokens);
            }
            delta.decode_s = (sample.num_outputs > 0).then_some(now_s - sample.first_token_s);
            self.ended.push(delta.request_id);
            outbox.finish(sample.stream_key);
            metrics.request_success[FinishReason::Error as usize] += 1;
        }
        self.publish(metrics);
        // Its drop may trip over the same broken invariant.
        let _ = catch_unwind(AssertUnwindSafe(move || {
            old.current = None;
            drop(old);
        }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::outbox::Delivery;
    use crate::engine::{AddRequest, Sampled};
    use crate::scheduler::batch::Staging;
    use crate::scheduler::{LongPrefill, Policy, SchedulerConfig};

    struct Run {
        core: EngineCore,
        buffer: Vec<i32>,
        reasons: Vec<(u64, FinishReason)>,
    }

    impl Run {
        fn new(num_requests: u64) -> Self {
            let config = SchedulerConfig {
                num_blocks: 32,
                block_size: 4,
                max_num_seqs: 4,
                max_num_batched_tokens: 64,
                max_model_len: 64,
                enable_prefix_caching: true,
                enable_chunked_prefill: true,
                long_prefill: LongPrefill::default(),
                max_step_s: 0.0,
                padded_prompts: Vec::new(),
                policy: Policy::Fcfs,
                num_stages: 1,
                state: None,
                prefix_sharing: None,
            };
            let core = EngineCore::new(config, 1, None).unwrap();
            let buffer = vec![0; core.scheduler().limits().required_len()];
            let mut this = Self {
                core,
                buffer,
                reasons: Vec::new(),
            };
            for id in 0..num_requests {
                this.add(id);
            }
            this
        }

        fn add(&mut self, id: u64) {
            self.core
                .add_request(AddRequest {
                    request_ids: &[id],
                    prompt: &[id as u32 % 2; 6],
                    max_tokens: 8,
                    deliveries: vec![Delivery::Final],
                    ..AddRequest::default()
                })
                .unwrap();
        }

        fn schedule(&mut self) -> Option<(u64, usize)> {
            let mut staging = Staging {
                buffer: &mut self.buffer,
            };
            let batch = self.core.schedule(&mut staging, 0.0).unwrap()?;
            Some((batch.step_id, batch.num_samples))
        }

        fn update(&mut self, (step_id, num_samples): (u64, usize)) -> bool {
            let sampled = Sampled {
                token_ids: &vec![1; num_samples],
                logprobs: None,
            };
            let wake_up = self.core.update(step_id, sampled, 0.0).unwrap();
            self.core.check_integrity().unwrap();
            for delta in self.core.outbox().drain() {
                let reason = delta.finish_reason.expect("delivered at the end");
                self.reasons.push((delta.request_id, reason));
            }
            wake_up
        }

        fn finish(&mut self) {
            for _ in 0..100 {
                if let Some(step) = self.schedule() {
                    self.update(step);
                }
            }
            assert!(!self.core.has_work());
            self.reasons.sort_unstable_by_key(|&(id, _)| id);
            let stats = self.core.stats();
            assert_eq!(stats.num_free_blocks, stats.num_blocks);
        }

        fn all(&self, ids: impl Iterator<Item = u64>, reason: FinishReason) -> bool {
            self.reasons.iter().copied().eq(ids.map(|id| (id, reason)))
        }
    }

    #[test]
    #[cfg_attr(not(debug_assertions), ignore = "needs overflow checks")]
    fn a_panic_over_one_token_ends_that_request_alone() {
        let mut run = Run::new(3);
        let step = run.schedule().unwrap();
        // A counter at its end: the step trips over the second request.
        let index = run.core.scheduler.index_of(1).unwrap();
        let sample = run.core.samples[index as usize].as_mut().unwrap();
        sample.num_outputs = u32::MAX;
        assert!(run.update(step));
        assert_eq!(run.reasons, [(1, FinishReason::Error)]);
        run.finish();
        assert_eq!(run.reasons[0], (0, FinishReason::Length));
        assert_eq!(run.reasons[2], (2, FinishReason::Length));
    }

    #[test]
    fn a_panic_while_planning_ends_the_request_that_was_being_admitted() {
        let mut run = Run::new(1);
        let step = run.schedule().unwrap();
        run.update(step);
        (1..4).for_each(|id| run.add(id));
        // The second in the queue claims more tokens than it has; its admission trips over that,
        // behind a cached block, when others of the step are planned.
        let index = run.core.scheduler.index_of(2).unwrap();
        run.core.scheduler.claim_tokens(index, 9);
        let step = run.schedule().unwrap();
        assert!(
            run.update(step),
            "the planner cannot report the wake-up, so update does"
        );
        assert_eq!(run.reasons, [(2, FinishReason::Error)]);
        assert_eq!(run.core.stats().num_preemptions, 2);
        run.finish();
        assert_eq!(run.reasons.len(), 4);
        assert_eq!(
            run.reasons
                .iter()
                .filter(|(_, r)| *r == FinishReason::Length)
                .count(),
            3
        );
    }

    #[test]
    fn a_broken_invariant_ends_everyone_and_the_core_lives_on() {
        let mut run = Run::new(3);
        let first = run.schedule().unwrap();
        let second = run.schedule().unwrap();
        let index = run.core.scheduler.index_of(1).unwrap();
        run.core.samples[index as usize] = None;
        assert!(run.update(first));
        assert!(
            run.all([0, 2].into_iter(), FinishReason::Error),
            "{:?}",
            run.reasons
        );
        assert!(!run.core.has_work() || run.core.stats().num_in_flight == 1);
        run.update(second);
        run.reasons.clear();
        run.add(7);
        run.finish();
        assert!(run.all([7].into_iter(), FinishReason::Length));
    }
}
