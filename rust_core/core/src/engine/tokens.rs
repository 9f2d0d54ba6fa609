//! One step's tokens, on their way into their samples.

use super::{Cursor, EngineCore, Sample, Sampled, SampledLogprobs, Step};
use crate::engine::metrics::{LatencyBatch, MetricsData};
use crate::engine::outbox::{Delta, OutboxData};
use crate::scheduler::request::{FinishReason, StopReason};
use crate::scheduler::{Landed, Scheduler};
use crate::text::matcher::{Accepted, Constraint};

/// Forced tokens a step: a schema's longest names are shorter, and a step's chunk stays small.
const MAX_FORCED: u32 = 64;

/// A step that holds a chunk beside its decodes takes about this part longer than one that does not
/// (bench/NOTES.md). Where a step is ahead, and most others hold none, that has to come back.
const CHUNK_PART: usize = 12;

/// The forced tokens of a sample that are worth a chunk.
fn least_forced(scheduler: &Scheduler, index: u32) -> usize {
    if scheduler.is_ahead(index) {
        // The step ahead is given up for them, and would have had the first.
        2 + scheduler.num_running() / CHUNK_PART
    } else {
        1
    }
}

impl EngineCore {
    pub(super) fn take_tokens(
        &mut self,
        step: &Step,
        cursor: &mut Cursor,
        sampled: &Sampled<'_>,
        now_s: f64,
    ) {
        let (outbox, metrics) = (self.outbox.clone(), self.metrics.clone());
        let (outbox, metrics) = (&mut outbox.lock(), &mut metrics.lock());
        let mut latencies = LatencyBatch::new(now_s);
        let num_begun = metrics.time_to_first_token_seconds.count();
        while let Some(entry) = step.plan.entries.get(cursor.entry) {
            // Moved on first: an entry that panics is not tried again.
            let row = cursor.sample;
            cursor.entry += 1;
            cursor.sample += usize::from(entry.sample);
            match self.scheduler.land(entry, false) {
                Landed::Stale | Landed::Partial => {}
                Landed::Complete => {
                    metrics.prompt_tokens +=
                        u64::from(self.scheduler.requests()[entry.index as usize].num_prompt);
                    self.finish(
                        entry.index,
                        FinishReason::Length,
                        None,
                        now_s,
                        outbox,
                        metrics,
                    );
                }
                Landed::Sample => {
                    self.accept(
                        entry.index,
                        row,
                        sampled,
                        now_s,
                        outbox,
                        metrics,
                        &mut latencies,
                    );
                }
            }
        }
        latencies.flush(&mut metrics.inter_token_latency_seconds);
        self.scheduler.current = None;
        // As vLLM counts: computed prompt tokens and generated ones. Each generated token is the
        // input of a later step or the last, so a sample's first one comes on top of the inputs.
        let num_first = metrics.time_to_first_token_seconds.count() - num_begun;
        metrics
            .iteration_tokens
            .observe((step.num_tokens as u64 + num_first) as f64);
        self.publish(metrics);
    }

    /// Gives a sample its next token.
    #[allow(clippy::too_many_arguments)] // the step's guards, passed on
    #[inline]
    fn accept(
        &mut self,
        index: u32,
        row: usize,
        sampled: &Sampled<'_>,
        now_s: f64,
        outbox: &mut OutboxData,
        metrics: &mut MetricsData,
        latencies: &mut LatencyBatch,
    ) {
        let Some(sample) = &mut self.samples[index as usize] else {
            unreachable!("a token for request {index}, which has no sample")
        };
        let Ok(token) = u32::try_from(sampled.token_ids[row]) else {
            // The sampler found nothing to choose from.
            let why = sample.constraint.as_deref().map(reason_of);
            self.finish(index, FinishReason::Error, why, now_s, outbox, metrics);
            return;
        };
        if sample.num_outputs == 0 {
            sample.first_token_s = now_s;
            metrics
                .time_to_first_token_seconds
                .observe(now_s - sample.arrival_s);
            let request = &self.scheduler.requests()[index as usize];
            metrics.prompt_tokens += u64::from(request.num_prompt);
            metrics.settled_prompt_tokens += u64::from(request.num_prompt);
            let delta = &mut outbox.stream(sample.stream_key).delta;
            delta.num_cached_tokens = request.num_cached_tokens;
            delta.queue_s = sample.scheduled_s.map(|at| at - sample.arrival_s);
            delta.prefill_s = sample.scheduled_s.map(|at| now_s - at);
        } else {
            latencies.add(
                sample.last_token_s,
                &mut metrics.inter_token_latency_seconds,
            );
        }
        sample.last_token_s = now_s;
        metrics.generation_tokens += 1;
        let logprobs = sampled.logprobs.as_ref().map(|logprobs| (logprobs, row));
        let scheduler = &mut self.scheduler;
        let mut finish = append(sample, scheduler, index, token, logprobs, outbox);
        if finish.is_none()
            && sample.may_force
            && sample.num_forced() >= least_forced(scheduler, index)
            && scheduler.disregard(index)
        {
            // Their texts and their places are known: they are computed in one go.
            let mut num_left = MAX_FORCED;
            while let (None, Some(token), 1..) = (&finish, sample.next_forced(), num_left) {
                num_left -= 1;
                metrics.generation_tokens += 1;
                latencies.add(now_s, &mut metrics.inter_token_latency_seconds);
                finish = append(sample, scheduler, index, token, None, outbox);
            }
            scheduler.extend(index);
        }
        if let Some((reason, stop)) = finish {
            self.finish(index, reason, stop, now_s, outbox, metrics);
        }
    }

    /// Ends a sample: last text, last delta, metrics, and what it held.
    pub(super) fn finish(
        &mut self,
        index: u32,
        mut reason: FinishReason,
        mut stop_reason: Option<StopReason>,
        now_s: f64,
        outbox: &mut OutboxData,
        metrics: &mut MetricsData,
    ) {
        let Some(mut sample) = self.samples[index as usize].take() else {
            return;
        };
        self.close_constraint(&mut sample, reason);
        let request = &self.scheduler.requests()[index as usize];
        let delta = &mut outbox.stream(sample.stream_key).delta;
        if let Some(mut text_maker) = sample.text_maker {
            let hit = text_maker.finish(delta.text_out());
            if let (FinishReason::Length, Some(hit)) = (reason, hit) {
                reason = FinishReason::Stop;
                stop_reason = Some(StopReason::Text(sample.rules.strings[hit].clone()));
            }
        }
        if !sample.streams {
            delta.token_ids.extend_from_slice(&request.outputs);
        }
        let has_token = sample.num_outputs > 0;
        let decode_s = has_token.then_some(sample.last_token_s - sample.first_token_s);
        delta.finish_reason = Some(reason);
        delta.stop_reason = stop_reason;
        delta.num_output_tokens = sample.num_outputs;
        delta.num_cached_tokens = request.num_cached_tokens;
        delta.queue_s = sample.scheduled_s.map(|at| at - sample.arrival_s);
        delta.decode_s = decode_s;
        if reason == FinishReason::Length && !has_token {
            // No output token: the whole service was prefill.
            delta.prefill_s = sample.scheduled_s.map(|at| now_s - at);
        }
        let prefill_s = delta.prefill_s;
        let queue_s = delta.queue_s;
        let (num_prompt, num_preemptions) = (request.num_prompt, request.num_preemptions);
        outbox.finish(sample.stream_key);
        self.ended.push(request.request_id);

        if !has_token {
            metrics.settled_prompt_tokens += u64::from(num_prompt);
        }
        let group = self.scheduler.end(index);
        metrics.request_success[reason as usize] += 1;
        // Aborted and failed requests would blur the latencies of those that were served.
        if matches!(reason, FinishReason::Stop | FinishReason::Length) {
            metrics
                .e2e_request_latency_seconds
                .observe(now_s - sample.arrival_s);
            let spans = [
                (queue_s, &mut metrics.request_queue_time_seconds),
                (prefill_s, &mut metrics.request_prefill_time_seconds),
                (decode_s, &mut metrics.request_decode_time_seconds),
                (
                    sample.scheduled_s.map(|at| now_s - at),
                    &mut metrics.request_inference_time_seconds,
                ),
            ];
            for (span, histogram) in spans {
                if let Some(span) = span {
                    histogram.observe(span);
                }
            }
            if let (Some(span), 2..) = (decode_s, sample.num_outputs) {
                let per_token = span / f64::from(sample.num_outputs - 1);
                metrics
                    .request_time_per_output_token_seconds
                    .observe(per_token);
            }
            metrics.request_prompt_tokens.observe(f64::from(num_prompt));
            metrics
                .request_num_preemptions
                .observe(f64::from(num_preemptions));
            metrics
                .request_generation_tokens
                .observe(f64::from(sample.num_outputs));
            metrics
                .request_params_max_tokens
                .observe(f64::from(sample.max_tokens));
        }
        if let Some(group) = group {
            metrics
                .request_params_n
                .observe(f64::from(group.num_samples));
            metrics
                .request_max_num_generation_tokens
                .observe(f64::from(group.max_output));
        }
    }

    pub(super) fn fail_entries(&mut self, step: &Step, cursor: &mut Cursor, now_s: f64) {
        let (outbox, metrics) = (self.outbox.clone(), self.metrics.clone());
        let (outbox, metrics) = (&mut outbox.lock(), &mut metrics.lock());
        while let Some(entry) = step.plan.entries.get(cursor.entry) {
            cursor.entry += 1;
            if self.scheduler.land(entry, true) != Landed::Stale {
                self.finish(
                    entry.index,
                    FinishReason::Error,
                    None,
                    now_s,
                    outbox,
                    metrics,
                );
            }
        }
        self.scheduler.current = None;
        self.publish(metrics);
    }
}

/// The stop reason of a sample that its own request lets go no further.
fn reason_of(constraint: &Constraint) -> StopReason {
    StopReason::Text(constraint.failure().into())
}

/// Appends a token to a sample: stop rules, text, delivery, grammar, length. Returns the end it brings.
#[inline]
fn append(
    sample: &mut Sample,
    scheduler: &mut Scheduler,
    index: u32,
    token: u32,
    logprobs: Option<(&SampledLogprobs<'_>, usize)>,
    outbox: &mut OutboxData,
) -> Option<(FinishReason, Option<StopReason>)> {
    scheduler.push_token(index, token);
    sample.num_outputs += 1;
    let may_stop = sample.num_outputs >= sample.min_tokens;
    let mut finish = None;
    if sample.stop_mask >> (token % 64) & 1 == 1 && may_stop {
        if sample.rules.eos_token_ids.contains(&token) {
            finish = Some((FinishReason::Stop, None));
        } else if sample.rules.stop_token_ids.contains(&token) {
            finish = Some((FinishReason::Stop, Some(StopReason::Token(token))));
        }
    }
    if sample.streams || sample.text_maker.is_some() || sample.num_logprobs.is_some() {
        let delta = &mut outbox.stream(sample.stream_key).delta;
        delta.num_output_tokens = sample.num_outputs;
        if sample.streams {
            delta.token_ids.push(token);
        }
        if let (Some(k), Some((logprobs, row))) = (sample.num_logprobs, logprobs) {
            push_logprobs(delta, logprobs, row, k as usize);
        }
        if let Some(text_maker) = &mut sample.text_maker
            && finish.is_none()
        {
            let hit = text_maker.push(token, may_stop, delta.text_out());
            finish = hit.map(|hit| {
                (
                    FinishReason::Stop,
                    Some(StopReason::Text(sample.rules.strings[hit].clone())),
                )
            });
        }
    }
    if finish.is_none()
        && let Some(constraint) = &mut sample.constraint
    {
        finish = match constraint.accept(token) {
            Accepted::Open => None,
            Accepted::Armed => {
                if !scheduler.disregard(index) && !scheduler.restart(index) {
                    // The last token is on its way without it.
                    constraint.release();
                }
                None
            }
            // Nothing may follow, whatever EOS and min_tokens say.
            Accepted::Complete => {
                outbox.stream(sample.stream_key).ends_with_text = true;
                Some((FinishReason::Stop, None))
            }
            Accepted::Failed => Some((FinishReason::Error, Some(reason_of(constraint)))),
        };
    }
    if finish.is_none() {
        let num_tokens = scheduler.requests()[index as usize].num_tokens;
        finish = (num_tokens >= sample.max_len).then_some((FinishReason::Length, None));
    }
    if finish.is_none()
        && sample.streams
        && !outbox.token_added(sample.stream_key, sample.stream_interval)
    {
        finish = Some((FinishReason::Error, None));
    }
    finish
}

impl Sample {
    /// Number of tokens that its grammar leaves no choice about, as far as is seen from here.
    fn num_forced(&mut self) -> usize {
        self.constraint.as_mut().map_or(0, |one| one.forced().len())
    }

    /// The next token, if its grammar leaves no choice.
    fn next_forced(&mut self) -> Option<u32> {
        self.constraint.as_mut()?.forced().first().copied()
    }
}

fn push_logprobs(delta: &mut Delta, sampled: &SampledLogprobs<'_>, row: usize, k: usize) {
    // The step's rows are as wide as the widest request of the step.
    let width = sampled.width.min(k + 1);
    let cells = row * sampled.width..row * sampled.width + width;
    let (ids, values) = (&sampled.ids[cells.clone()], &sampled.values[cells]);
    let pairs = ids.iter().zip(values).enumerate();
    let row = pairs.map(|(rank, (&id, &value))| {
        let rank = if rank == 0 {
            sampled.ranks[row].max(0) as u32
        } else {
            rank as u32
        };
        (id.max(0) as u32, value, rank)
    });
    if let Some(logprobs) = &mut delta.logprobs {
        logprobs.push(row.collect());
    }
    if let Some(sum) = &mut delta.cumulative_logprob {
        *sum += f64::from(values[0]);
    }
}
