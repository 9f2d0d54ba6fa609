//! EngineCore: the scheduler with what surrounds it: stop rules, text, delivery, metrics, time.
//!
//! Few verbs: `add_request`, `abort`, `schedule`, `update`, `attach`, `fail_step`; one thread owns
//! it. Time comes in as seconds on the caller's monotonic clock. `schedule` and `update` cost what
//! `scheduler` says plus O(1) per token here; in steady decode neither allocates, delivery of
//! text aside. `attach` is O(1) and the only verb that steps with other results than tokens add.
//!
//! A panic is caught here: it ends the request that was being worked on with "error". If the
//! invariants do not hold afterwards, all requests end so and the scheduler starts afresh.

pub mod metrics;
pub mod outbox;
mod recovery;
mod tokens;

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use crate::engine::metrics::{Metrics, MetricsData};
use crate::engine::outbox::{Delivery, Delta, Extra, Outbox};
use crate::error::{Error, Result};
use crate::scheduler::batch::{Plan, ScheduledBatch, Staging};
use crate::scheduler::request::FinishReason;
use crate::scheduler::{NewRequest, Scheduler, SchedulerConfig};
use crate::text::detokenizer::Detokenizer;
use crate::text::tokenizer::Tokenizer;

/// One request as the engine receives it: a sample per id, all of one prompt.
#[derive(Debug, Default)]
pub struct AddRequest<'a> {
    /// One per sample, not in use.
    pub request_ids: &'a [u64],
    /// At least one token.
    pub prompt: &'a [u32],
    /// Clipped to what the model's length and the KV cache leave.
    pub max_tokens: usize,
    /// No EOS, stop token or stop string counts before so many tokens.
    pub min_tokens: usize,
    /// Empty: EOS is ignored.
    pub eos_token_ids: &'a [u32],
    /// Further ids that end a sample.
    pub stop_token_ids: &'a [u32],
    /// Strings that end a sample; need a tokenizer.
    pub stop: &'a [String],
    /// Whether the stop string is part of the text.
    pub include_stop_str_in_output: bool,
    /// Whether special tokens leave no text.
    pub skip_special_tokens: bool,
    /// How many likely tokens to report with each.
    pub num_logprobs: Option<usize>,
    /// Lower is served first under the priority policy.
    pub priority: i64,
    /// Separates prefix caches.
    pub cache_salt: Option<&'a str>,
    /// When it arrived.
    pub arrival_s: f64,
    /// Tokens per delta of its streams, at least 1; None: the engine's.
    pub stream_interval: Option<u32>,
    /// One per sample.
    pub deliveries: Vec<Delivery>,
}

/// One step's tokens.
#[derive(Debug, Clone, Copy)]
pub struct Sampled<'a> {
    /// One per sample of the step.
    pub token_ids: &'a [i32],
    /// Rows for the same samples.
    pub logprobs: Option<SampledLogprobs<'a>>,
}

/// Per sample, `width` ids and log-probabilities: the chosen token, then the best ones in order.
#[derive(Debug, Clone, Copy)]
pub struct SampledLogprobs<'a> {
    /// `[num_samples, width]`.
    pub ids: &'a [i32],
    /// `[num_samples, width]`.
    pub values: &'a [f32],
    /// Ranks of the chosen tokens, `[num_samples]`; 1 is the best.
    pub ranks: &'a [i32],
    /// 1 + k.
    pub width: usize,
}

/// What ends a request's samples.
#[derive(Debug)]
struct StopRules {
    eos_token_ids: Box<[u32]>,
    stop_token_ids: Box<[u32]>,
    strings: Box<[Arc<str>]>,
}

/// What the engine knows of one unfinished sample beyond the scheduler.
#[derive(Debug)]
struct Sample {
    /// Bit `id % 64` is set for every id that may end it: one test rules out nearly all tokens.
    stop_mask: u64,
    num_outputs: u32,
    min_tokens: u32,
    max_len: u32,
    stream_key: u32,
    streams: bool,
    stream_interval: u32,
    last_token_s: f64,
    first_token_s: f64,
    scheduled_s: Option<f64>,
    arrival_s: f64,
    max_tokens: u32,
    num_logprobs: Option<u32>,
    // Boxed: large, and only there to look for stop strings; other text is made in the outbox.
    detokenizer: Option<Box<Detokenizer>>,
    rules: Arc<StopRules>,
}

#[derive(Debug)]
struct Step {
    id: u64,
    num_samples: usize,
    num_tokens: usize,
    /// Its requests were given up after a broken invariant.
    is_void: bool,
    plan: Plan,
}

/// How far a step's tokens are taken, so that a panic on one leaves the others.
#[derive(Debug, Default)]
struct Cursor {
    entry: usize,
    sample: usize,
}

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

/// See the module doc.
#[derive(Debug)]
pub struct EngineCore {
    scheduler: Scheduler,
    /// By the scheduler's slab index.
    samples: Vec<Option<Sample>>,
    steps: VecDeque<Step>,
    spare_plans: Vec<Plan>,
    next_step_id: u64,
    stream_interval: u32,
    tokenizer: Option<Arc<Tokenizer>>,
    outbox: Arc<Outbox>,
    metrics: Arc<Metrics>,
    /// The outbox was filled by a verb that cannot say so; the next `update` does.
    owes_wake_up: bool,
    /// Preemptions before the scheduler was last replaced.
    preemptions_before: u64,
    indices: Vec<u32>,
    /// Samples that are over, until somebody asks.
    ended: Vec<u64>,
}

impl EngineCore {
    /// An idle core.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] naming a field of the config that is out of range.
    pub fn new(
        config: SchedulerConfig,
        stream_interval: u32,
        tokenizer: Option<Arc<Tokenizer>>,
    ) -> Result<Self> {
        if stream_interval == 0 {
            return Err(Error::invalid("stream_interval must be at least 1"));
        }
        Ok(Self {
            scheduler: Scheduler::new(config)?,
            samples: Vec::new(),
            steps: VecDeque::with_capacity(4),
            spare_plans: Vec::new(),
            next_step_id: 0,
            stream_interval,
            tokenizer,
            outbox: Arc::default(),
            metrics: Arc::default(),
            owes_wake_up: false,
            preemptions_before: 0,
            indices: Vec::new(),
            ended: Vec::new(),
        })
    }

    /// Where the samples' output goes.
    #[must_use]
    pub fn outbox(&self) -> &Arc<Outbox> {
        &self.outbox
    }

    /// The numbers.
    #[must_use]
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// The scheduler, to look at.
    #[must_use]
    pub fn scheduler(&self) -> &Scheduler {
        &self.scheduler
    }

    /// Queues a request. O(prompt + samples).
    ///
    /// # Errors
    /// [`Error::InvalidArgument`]; nothing is queued then.
    pub fn add_request(&mut self, new: AddRequest<'_>) -> Result<()> {
        if new.deliveries.len() != new.request_ids.len() {
            return Err(Error::invalid(format!(
                "{} deliveries for {} samples",
                new.deliveries.len(),
                new.request_ids.len()
            )));
        }
        if new.stream_interval == Some(0) {
            return Err(Error::invalid("stream_interval must be at least 1"));
        }
        if self.tokenizer.is_none() && !new.stop.is_empty() {
            return Err(Error::invalid("stop strings need a tokenizer"));
        }
        // Everything of the text side first: what fails there leaves no trace.
        let detokenizers = catch_unwind(AssertUnwindSafe(|| {
            let one = |tokenizer: &Arc<Tokenizer>| {
                Box::new(Detokenizer::new(
                    tokenizer.clone(),
                    new.stop.to_vec(),
                    new.include_stop_str_in_output,
                    new.skip_special_tokens,
                ))
            };
            let all = new
                .request_ids
                .iter()
                .map(|_| self.tokenizer.as_ref().map(one));
            all.collect::<Vec<_>>()
        }))
        .map_err(|_| Error::Panic("the detokenizer cannot be built".into()))?;

        self.indices.clear();
        self.scheduler.add(
            &NewRequest {
                request_ids: new.request_ids,
                prompt: new.prompt,
                max_tokens: new.max_tokens,
                priority: new.priority,
                cache_salt: new.cache_salt,
            },
            &mut self.indices,
        )?;

        let rules = Arc::new(StopRules {
            eos_token_ids: new.eos_token_ids.into(),
            stop_token_ids: new.stop_token_ids.into(),
            strings: new.stop.iter().map(|stop| stop.as_str().into()).collect(),
        });
        let stop_ids = new.eos_token_ids.iter().chain(new.stop_token_ids);
        let stop_mask = stop_ids.fold(0, |mask, id| mask | 1 << (id % 64));
        let mut outbox = self.outbox.lock();
        let each = self.indices.iter().zip(detokenizers).zip(new.deliveries);
        for ((&index, detokenizer), delivery) in each {
            let request = &self.scheduler.requests()[index as usize];
            let delta = Delta {
                request_id: request.request_id,
                num_prompt_tokens: request.num_prompt,
                logprobs: new.num_logprobs.map(|_| Vec::new()),
                cumulative_logprob: new.num_logprobs.map(|_| 0.0),
                ..Delta::default()
            };
            let max_len = request.max_len;
            let max_tokens = max_len - request.num_prompt;
            // Text in which nothing is looked for is made when it is fetched.
            let (detokenizer, makes_text) = match new.stop {
                [] => (None, detokenizer),
                _ => (detokenizer, None),
            };
            let stream_key = outbox.open(delta, delivery, makes_text);
            if self.samples.len() <= index as usize {
                self.samples.resize_with(index as usize + 1, || None);
            }
            self.samples[index as usize] = Some(Sample {
                stop_mask,
                num_outputs: 0,
                min_tokens: u32::try_from(new.min_tokens).unwrap_or(u32::MAX),
                max_len,
                stream_key,
                streams: outbox.stream(stream_key).is_streaming(),
                stream_interval: new.stream_interval.unwrap_or(self.stream_interval),
                last_token_s: 0.0,
                first_token_s: 0.0,
                scheduled_s: None,
                arrival_s: new.arrival_s,
                max_tokens,
                num_logprobs: new.num_logprobs.map(|k| k as u32),
                detokenizer,
                rules: rules.clone(),
            });
        }
        drop(outbox);
        self.publish(&mut self.metrics.lock());
        Ok(())
    }

    /// Delivers samples that `add_request` did not take: one delta each, with "error". Whether a
    /// wake-up is due.
    pub fn refuse(&mut self, request_ids: &[u64]) -> bool {
        let (outbox, metrics) = (self.outbox.clone(), self.metrics.clone());
        let mut outbox = outbox.lock();
        let was_empty = outbox.is_empty();
        for &request_id in request_ids {
            let delta = Delta {
                request_id,
                finish_reason: Some(FinishReason::Error),
                ..Delta::default()
            };
            let key = outbox.open(delta, Delivery::Delta, None);
            outbox.finish(key);
        }
        drop(outbox);
        metrics.lock().request_success[FinishReason::Error as usize] += request_ids.len() as u64;
        self.wake_up_is_due(was_empty)
    }

    /// Gives a sample's next delta something to carry. What comes back nobody carries: the extra
    /// that was there before, or this one where the sample is unknown or over. No lock is held when
    /// the caller drops it.
    pub fn attach(&mut self, request_id: u64, extra: Extra) -> Option<Extra> {
        let sample = self
            .scheduler
            .index_of(request_id)
            .and_then(|index| self.samples[index as usize].as_ref());
        match sample {
            Some(sample) => self
                .outbox
                .lock()
                .stream(sample.stream_key)
                .delta
                .extra
                .replace(extra),
            None => Some(extra),
        }
    }

    /// The samples that ended since the last call, in order.
    pub fn take_ended(&mut self) -> std::vec::Drain<'_, u64> {
        self.ended.drain(..)
    }

    /// Aborts every request and gives up every step in flight, for a caller that lost track of
    /// them. Whether a wake-up is due.
    pub fn abandon(&mut self, now_s: f64) -> bool {
        let was_empty = self.outbox.lock().is_empty();
        let requests = self.scheduler.requests();
        let alive = self.samples.iter().enumerate();
        let alive = alive.filter_map(|(index, sample)| sample.as_ref().map(|_| index));
        let ids: Vec<u64> = alive.map(|index| requests[index].request_id).collect();
        for id in ids {
            self.abort(id, now_s);
        }
        while let Some(step) = self.steps.pop_front() {
            self.give_up(step, now_s);
        }
        self.wake_up_is_due(was_empty)
    }

    /// Ends one sample; false if it is unknown or over. Its last delta is in the outbox then.
    pub fn abort(&mut self, request_id: u64, now_s: f64) -> bool {
        let Some(index) = self.scheduler.index_of(request_id) else {
            return false;
        };
        self.scheduler.current = Some(index);
        let ended = catch_unwind(AssertUnwindSafe(|| {
            let (outbox, metrics) = (self.outbox.clone(), self.metrics.clone());
            let (outbox, metrics) = (&mut outbox.lock(), &mut metrics.lock());
            self.finish(index, FinishReason::Abort, None, now_s, outbox, metrics);
            self.publish(metrics);
        }));
        if ended.is_err() {
            self.recover(now_s);
        }
        true
    }

    /// Plans one step into `staging`; None when nothing can run.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the staging does not suit the engine's limits.
    pub fn schedule(
        &mut self,
        staging: &mut Staging<'_>,
        now_s: f64,
    ) -> Result<Option<ScheduledBatch>> {
        staging.validate(self.scheduler.limits())?;
        let mut plan = self.spare_plans.pop().unwrap_or_default();
        let batch = loop {
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                self.scheduler.schedule(&mut plan).then(|| {
                    staging.fill(
                        &plan,
                        self.scheduler.requests(),
                        self.scheduler.limits(),
                        self.scheduler.config().block_size,
                    )
                })
            }));
            match outcome {
                Ok(batch) => break batch,
                Err(_) => {
                    let undone = catch_unwind(AssertUnwindSafe(|| {
                        let culprit = self.scheduler.current;
                        self.scheduler.abandon(&mut plan);
                        self.scheduler.current = culprit;
                    }));
                    if undone.is_err() {
                        plan.clear();
                        self.scheduler.current = None;
                    }
                    self.owes_wake_up |= self.outbox.lock().is_empty();
                    self.recover(now_s);
                }
            }
        };
        let Some(mut batch) = batch else {
            self.spare_plans.push(plan);
            return Ok(None);
        };
        if !plan.admitted.is_empty() {
            for &index in &plan.admitted {
                if let Some(sample) = &mut self.samples[index as usize] {
                    sample.scheduled_s.get_or_insert(now_s);
                }
            }
            self.publish(&mut self.metrics.lock());
        }
        batch.step_id = self.next_step_id;
        self.next_step_id += 1;
        self.steps.push_back(Step {
            id: batch.step_id,
            num_samples: batch.num_samples,
            num_tokens: batch.num_tokens,
            is_void: false,
            plan,
        });
        Ok(Some(batch))
    }

    /// The plan of a step in flight.
    #[must_use]
    pub fn plan(&self, step_id: u64) -> Option<&Plan> {
        self.steps
            .iter()
            .find(|step| step.id == step_id)
            .map(|step| &step.plan)
    }

    /// Takes the tokens of the oldest step in flight. Whether a wake-up is due.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if it is another step's turn or the shapes are wrong; nothing is
    /// taken then.
    pub fn update(&mut self, step_id: u64, sampled: Sampled<'_>, now_s: f64) -> Result<bool> {
        let oldest = self.steps.front().map(|step| (step.id, step.num_samples));
        let num_samples = match oldest {
            Some((id, num_samples)) if id == step_id => num_samples,
            Some((id, _)) => {
                return Err(Error::invalid(format!(
                    "step {step_id}: the oldest is {id}"
                )));
            }
            None => return Err(Error::invalid(format!("step {step_id} is not in flight"))),
        };
        sampled.validate(num_samples)?;
        let Some(mut step) = self.steps.pop_front() else {
            return Ok(false);
        };
        let was_empty = self.outbox.lock().is_empty();
        let mut cursor = Cursor::default();
        if !step.is_void {
            while catch_unwind(AssertUnwindSafe(|| {
                self.take_tokens(&step, &mut cursor, &sampled, now_s);
            }))
            .is_err()
            {
                self.recover_in_step(&step, &mut cursor, now_s);
            }
        }
        step.plan.clear();
        self.spare_plans.push(step.plan);
        Ok(self.wake_up_is_due(was_empty))
    }

    /// The step's computation failed: its requests end with "error". Whether a wake-up is due.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the step is not in flight.
    pub fn fail_step(&mut self, step_id: u64, now_s: f64) -> Result<bool> {
        let Some(at) = self.steps.iter().position(|step| step.id == step_id) else {
            return Err(Error::invalid(format!("step {step_id} is not in flight")));
        };
        let Some(step) = self.steps.remove(at) else {
            return Ok(false);
        };
        let was_empty = self.outbox.lock().is_empty();
        self.give_up(step, now_s);
        Ok(self.wake_up_is_due(was_empty))
    }

    /// Ends the requests of a step that will not come back.
    fn give_up(&mut self, mut step: Step, now_s: f64) {
        let mut cursor = Cursor::default();
        if !step.is_void {
            while catch_unwind(AssertUnwindSafe(|| {
                self.fail_entries(&step, &mut cursor, now_s);
            }))
            .is_err()
            {
                self.recover_in_step(&step, &mut cursor, now_s);
            }
        }
        step.plan.clear();
        self.spare_plans.push(step.plan);
    }

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

    /// Whether a `schedule` or an `update` is owed.
    #[must_use]
    pub fn has_work(&self) -> bool {
        !self.steps.is_empty() || self.num_unfinished() > 0
    }

    /// Forgets the prefix cache. O(pool).
    pub fn reset_prefix_cache(&mut self) {
        self.scheduler.reset_prefix_cache();
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

    /// Checks every invariant. O(everything held).
    ///
    /// # Errors
    /// [`Error::Integrity`] naming the first one that is broken.
    pub fn check_integrity(&self) -> Result<()> {
        self.check_with(None, 0)
    }

    /// As `check_integrity`, with a further step that is being taken, from `first` on.
    fn check_with(&self, taking: Option<&Step>, first: usize) -> Result<()> {
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

    fn wake_up_is_due(&mut self, was_empty: bool) -> bool {
        let owed = std::mem::take(&mut self.owes_wake_up);
        (owed || was_empty) && !self.outbox.lock().is_empty()
    }

    /// The gauges, and the counters that the scheduler keeps.
    fn publish(&self, metrics: &mut MetricsData) {
        let scheduler = &self.scheduler;
        metrics.num_requests_running = scheduler.num_running() as u64;
        metrics.num_requests_waiting = scheduler.num_waiting() as u64;
        let pool = scheduler.pool().lock();
        metrics.kv_cache_usage_perc = 1.0 - pool.num_free() as f64 / pool.num_blocks() as f64;
        metrics.num_preemptions = self.preemptions_before + scheduler.num_preemptions;
        metrics.prefix_cache_queries = scheduler.prefix_queries;
        metrics.prefix_cache_hits = scheduler.prefix_hits;
    }
}

impl Sampled<'_> {
    fn validate(&self, num_samples: usize) -> Result<()> {
        if self.token_ids.len() != num_samples {
            return Err(Error::invalid(format!(
                "{} token ids for {num_samples} samples",
                self.token_ids.len()
            )));
        }
        if let Some(logprobs) = &self.logprobs {
            let cells = num_samples * logprobs.width;
            if (logprobs.ids.len(), logprobs.values.len()) != (cells, cells)
                || logprobs.ranks.len() != num_samples
                || logprobs.width == 0
            {
                return Err(Error::invalid(format!(
                    "logprobs of shapes {} {} {} for {num_samples} samples",
                    logprobs.ids.len(),
                    logprobs.values.len(),
                    logprobs.ranks.len()
                )));
            }
        }
        Ok(())
    }
}
