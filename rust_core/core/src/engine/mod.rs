//! EngineCore: the scheduler with what surrounds it: stop rules, text, delivery, metrics, time.
//!
//! Few verbs: `add_request`, `abort`, `schedule`, `update`, `attach`, `fail_step`; one thread owns
//! it. Time comes in as seconds on the caller's monotonic clock. `schedule` and `update` cost as much
//! as in `scheduler` plus O(1) per token here; in steady decode neither allocates, delivery of
//! text aside. `attach` is O(1) and the only verb that steps with other results than tokens add.
//!
//! A panic is caught here: it ends the request that was being worked on with "error". If the
//! invariants do not hold afterwards, all requests end so and the scheduler starts afresh.
//!
//! Longer than other files: its verbs, and what each returns, are the crate's contract.

mod inspection;
mod masking;
pub mod metrics;
mod new_request;
pub mod outbox;
mod recovery;
mod sampled;
mod text_maker;
mod tokens;

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

pub use self::inspection::Stats;
pub use self::new_request::AddRequest;
pub use self::sampled::{Sampled, SampledLogprobs};
use self::text_maker::{TextMaker, TextRules};
use crate::engine::metrics::Metrics;
use crate::engine::outbox::{Delivery, Delta, Extra, Outbox};
use crate::error::{Error, Result};
use crate::scheduler::batch::{Plan, ScheduledBatch, Staging};
use crate::scheduler::request::FinishReason;
use crate::scheduler::{NewRequest, Scheduler, SchedulerConfig};
use crate::text::matcher::Constraint;
use crate::text::tokenizer::Tokenizer;

/// Tokens and strings that end a request's samples.
#[derive(Debug)]
struct StopRules {
    eos_token_ids: Box<[u32]>,
    stop_token_ids: Box<[u32]>,
    strings: Box<[Arc<str>]>,
}

/// The engine's state of one unfinished sample beyond the scheduler's.
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
    // Boxed: large, and only there to find stop strings; other text is made in the outbox.
    text_maker: Option<Box<TextMaker>>,
    /// The bounds of its next token. Boxed: few samples have any.
    constraint: Option<Box<Constraint>>,
    may_force: bool,
    rules: Arc<StopRules>,
}

#[derive(Debug)]
struct Step {
    id: u64,
    num_samples: usize,
    num_tokens: usize,
    planned_s: f64,
    /// Its requests were given up after a broken invariant.
    is_void: bool,
    plan: Plan,
}

/// Progress within a step's tokens, so that a panic on one leaves the others.
#[derive(Debug, Default)]
struct Cursor {
    entry: usize,
    sample: usize,
}

/// See the module doc.
#[derive(Debug)]
pub struct EngineCore {
    scheduler: Scheduler,
    /// By the scheduler's slab index.
    samples: Vec<Option<Sample>>,
    steps: VecDeque<Step>,
    spare_plans: Vec<Plan>,
    stream_interval: u32,
    tokenizer: Option<Arc<Tokenizer>>,
    outbox: Arc<Outbox>,
    metrics: Arc<Metrics>,
    /// The outbox was filled by a verb without a result for it; the next `update` reports it.
    owes_wake_up: bool,
    /// When the last step came back.
    returned_s: f64,
    /// Preemptions before the scheduler was last replaced.
    preemptions_before: u64,
    indices: Vec<u32>,
    /// Samples with a constraint: a step without any examines none.
    num_constrained: usize,
    /// Scratch of `take_masks`: a sample's token in the oldest step, as sampled.
    new_tokens: Vec<Option<i32>>,
    /// Samples that are over, until they are taken.
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
            stream_interval,
            tokenizer,
            outbox: Arc::default(),
            metrics: Arc::default(),
            owes_wake_up: false,
            returned_s: f64::NEG_INFINITY,
            preemptions_before: 0,
            indices: Vec::new(),
            num_constrained: 0,
            new_tokens: Vec::new(),
            ended: Vec::new(),
        })
    }

    /// The samples' output.
    #[must_use]
    pub fn outbox(&self) -> &Arc<Outbox> {
        &self.outbox
    }

    /// The numbers.
    #[must_use]
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// The scheduler, read-only.
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
        if self.tokenizer.is_none() && new.channels.is_some() {
            return Err(Error::invalid("channels need a tokenizer"));
        }
        // Everything of the text side first: what fails there leaves no trace.
        let text_makers = catch_unwind(AssertUnwindSafe(|| {
            let rules = TextRules {
                stop: new.stop,
                include_stop: new.include_stop_str_in_output,
                skip_special: new.skip_special_tokens,
                channels: new.channels.as_ref(),
            };
            let one = |tokenizer| Box::new(TextMaker::new(tokenizer, rules));
            let all = new
                .request_ids
                .iter()
                .map(|_| self.tokenizer.as_ref().map(one));
            all.collect::<Vec<_>>()
        }))
        .map_err(|_| Error::Panic("the detokenizer cannot be built".into()))?;
        let constraints = masking::open_constraints(&new, self.tokenizer.as_ref())?;

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
        let texts = text_makers.into_iter().zip(constraints);
        let each = self.indices.iter().zip(texts).zip(new.deliveries);
        for ((&index, (text_maker, constraint)), delivery) in each {
            let request = &self.scheduler.requests()[index as usize];
            let delta = Delta {
                request_id: request.request_id,
                num_prompt_tokens: request.num_prompt,
                channels: new.channels.as_ref().map(|_| Box::default()),
                logprobs: new.num_logprobs.map(|_| Vec::new()),
                cumulative_logprob: new.num_logprobs.map(|_| 0.0),
                ..Delta::default()
            };
            let max_len = request.max_len;
            let max_tokens = max_len - request.num_prompt;
            // Text without stop strings is made when it is fetched.
            let (text_maker, makes_text) = match new.stop {
                [] => (None, text_maker),
                _ => (text_maker, None),
            };
            let stream_key = outbox.open(delta, delivery, makes_text);
            if self.samples.len() <= index as usize {
                self.samples.resize_with(index as usize + 1, || None);
            }
            self.num_constrained += usize::from(constraint.is_some());
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
                text_maker,
                constraint,
                may_force: new.may_force,
                rules: rules.clone(),
            });
        }
        drop(outbox);
        self.publish(&mut self.metrics.lock());
        Ok(())
    }

    /// Delivers samples of one prompt that `add_request` did not take: one delta each, with "error".
    /// Returns true if a wake-up is due.
    pub fn refuse(&mut self, request_ids: &[u64], num_prompt_tokens: u64) -> bool {
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
        let num_samples = request_ids.len() as u64;
        let mut metrics = metrics.lock();
        metrics.request_success[FinishReason::Error as usize] += num_samples;
        metrics.settled_prompt_tokens += num_samples * num_prompt_tokens;
        drop(metrics);
        self.wake_up_is_due(was_empty)
    }

    /// Attaches `extra` to a sample's next delta. Returns the extra that it replaces, or this one where
    /// the sample is unknown or over. No lock is held when the caller drops it.
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
    /// them. Returns true if a wake-up is due.
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
        if self.num_constrained > 0 {
            batch.num_constrained = self.count_constrained(&plan);
        }
        self.steps.push_back(Step {
            id: batch.step_id,
            num_samples: batch.num_samples,
            num_tokens: batch.num_tokens,
            planned_s: now_s,
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

    /// Takes the tokens of the oldest step in flight. Returns true if a wake-up is due.
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
        // The device does one step after the other.
        let began_s = self.returned_s.max(step.planned_s);
        self.returned_s = now_s;
        self.scheduler.observe_step(&step.plan, now_s - began_s);
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

    /// The step's computation failed: its requests end with "error". Returns true if a wake-up
    /// is due.
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

    /// Forgets the prefix cache. O(pool).
    pub fn reset_prefix_cache(&mut self) {
        self.scheduler.reset_prefix_cache();
    }

    fn wake_up_is_due(&mut self, was_empty: bool) -> bool {
        let owed = std::mem::take(&mut self.owes_wake_up);
        (owed || was_empty) && !self.outbox.lock().is_empty()
    }
}
