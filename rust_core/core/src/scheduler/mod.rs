//! Continuous batching over a pool of KV blocks: the requests and tokens of the next step.
//!
//! One token budget a step. Decodes come first, then chunks of prompts already admitted, then new
//! admissions in order of [`Rank`]: FCFS, or by priority. When a decode finds no free block, the
//! request of the last rank is preempted and recomputed later; since only lower ranks are ever
//! preempted and admission never skips the head of the queue, the first in rank always advances,
//! so nothing starves under FCFS.
//!
//! **Run-ahead.** `schedule` may be called again before the previous step came back. What a step
//! will have computed counts as computed from then on, and its token is a placeholder
//! (`num_pending`); the device executes steps in order, so a block freed now may be given to a
//! later step at once. A request that *ends* while in flight keeps its blocks and slot until the
//! step comes back; a preempted one gives its blocks back at once and keeps its slot.
//!
//! **Stages.** Where a pipeline's stages work at different steps, a decode comes only so many steps
//! after the one that samples its input, and a step holds its share of the decodes alone. Requests so
//! fall into as many groups as there are stages, whose steps take turns.
//!
//! **Admission** takes all blocks of the known tokens at once, so that a prefill never stops
//! half-way without memory, and shares what the prefix cache holds. Contents are named, and
//! shared, only when their step came back: a failed step poisons no other request.
//!
//! **State.** Where layers keep a state instead of keys and values, a request begins from a checkpoint of
//! its prefix's state, and chunks end where one is due. See `checkpoints.rs`.
//!
//! **Groups** (n > 1): the first sample, the leader, computes the prompt; the others are parked
//! until it has, then start on references to its full blocks. See `groups.rs`.
//!
//! Costs, with r running requests, w waiting, b blocks of the request concerned:
//! | verb | cost |
//! |---|---|
//! | add | O(prompt) to copy, O(log w) to queue |
//! | schedule, steady decode | O(r); nothing depends on w or on the size of the pool |
//! | admission | O(b + log w + log r), hashing the prompt once |
//! | landing an entry | O(1), one hash per full block |
//! | end, abort, preempt | O(b + log w), and moving up to r small entries |
//!
//! Longer than other files: a step's planning and landing are read together.

mod admission;
pub mod batch;
mod block_pool;
mod block_table;
mod checkpoints;
mod config;
mod free_list;
mod groups;
mod integrity;
mod leaving;
mod planning;
mod prefix_cache;
mod prefix_finder;
mod prompt_room;
pub mod request;
pub mod shared_prefixes;
pub mod step_times;

use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;

use slab::Slab;

use self::checkpoints::Checkpoints;
pub use self::config::{LongPrefill, Policy, PrefixSharing, SchedulerConfig, StateConfig};
use self::groups::Group;
use crate::error::{Error, Result};
use crate::scheduler::batch::{Entry, NO_CHECKPOINT, Plan, StagingLimits};
use crate::scheduler::block_pool::{BlockId, SharedPool};
use crate::scheduler::prefix_cache::BlockHasher;
use crate::scheduler::prefix_finder::PrefixFinder;
use crate::scheduler::request::{NO_GROUP, NO_SLOT, Prompt, Rank, Request, RequestStatus, Slot};
use crate::scheduler::step_times::StepTimes;

/// Arguments of `add`.
#[derive(Debug, Clone)]
pub struct NewRequest<'a> {
    /// One id per sample.
    pub request_ids: &'a [u64],
    /// At least one token.
    pub prompt: &'a [u32],
    /// Clipped to what the model's length and the pool leave.
    pub max_tokens: usize,
    /// Lower is served first under [`Policy::Priority`].
    pub priority: i64,
    /// Separates prefix caches.
    pub cache_salt: Option<&'a str>,
}

/// Result of a step that came back for one of its entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Landed {
    /// The request ended meanwhile; the token is dropped.
    Stale,
    /// A chunk of a prompt; more to come.
    Partial,
    /// The whole prompt of a request without output tokens: it is to be ended.
    Complete,
    /// The entry's token belongs to the request.
    Sample,
}

/// A group's totals, once the last of its samples has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupDone {
    /// Number of samples.
    pub num_samples: u32,
    /// The longest output among them.
    pub max_output: u32,
}

/// Multiplicative hashing of ids the engine hands out itself.
#[derive(Debug, Default, Clone)]
pub(crate) struct IdHasher(u64);

impl Hasher for IdHasher {
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }
    fn write_u64(&mut self, value: u64) {
        // The high bits of the product depend on all of the value; the map looks at both ends.
        let product = (self.0 ^ value).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        self.0 = product ^ (product >> 32);
    }
    fn finish(&self) -> u64 {
        self.0
    }
}

/// See the module doc.
#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    limits: StagingLimits,
    pool: SharedPool,
    /// None: no layer has state.
    states: Option<Checkpoints>,
    /// None: the device reads what requests share for each of them.
    prefixes: Option<PrefixFinder>,
    hasher: BlockHasher,
    step_times: StepTimes,
    /// Of the last step of decodes alone: how many, and its number.
    measured_decodes: (usize, u64),
    requests: Slab<Request>,
    index_of: HashMap<u64, u32, BuildHasherDefault<IdHasher>>,
    /// Admitted requests that still have tokens to schedule, by rank.
    running: Vec<(Rank, u32)>,
    waiting: BTreeMap<Rank, u32>,
    groups: Slab<Group>,
    /// Groups that hold references for samples not admitted yet.
    sharing: Vec<u32>,
    free_slots: Vec<Slot>,
    next_sequence: u64,
    /// Steps planned so far: the next one's number.
    num_steps: u64,
    num_running: usize,
    num_parked: usize,
    num_prefilling: usize,
    /// Seats that only wait for a step to come back; their blocks will be free soon.
    num_leaving: usize,
    /// The head of the queue that found too little memory, and how little.
    blocked: Option<(Rank, usize)>,
    pub(crate) num_preemptions: u64,
    pub(crate) prefix_queries: u64,
    pub(crate) prefix_hits: u64,
    /// Scratch of `schedule`.
    closing: Vec<u32>,
    /// Requests, and their ids, whose slots know of samples that have been given up.
    misled: Vec<(u32, u64)>,
    hits: Vec<BlockId>,
    /// The checkpoint of the hits' state.
    hit_state: Option<BlockId>,
    /// The request being worked on, so that a caught panic can be blamed.
    pub(crate) current: Option<u32>,
}

/// Tokens of output that a request can append before its buffers grow.
const HEADROOM_TOKENS: usize = 4096;

/// A guess at the time of a step of `max_num_batched_tokens`, until one was measured: an 8B Llama on a
/// Hopper GPU takes about so long (bench/results/h100.md).
const FIRST_STEP_S: f64 = 0.2;

impl Scheduler {
    /// A scheduler with an empty cache.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the config is out of range.
    pub fn new(config: SchedulerConfig) -> Result<Self> {
        config.validate()?;
        Ok(Self {
            limits: config.limits(),
            pool: SharedPool::new(config.num_blocks),
            states: config
                .state
                .map(|state| Checkpoints::new(state, config.block_size, config.max_num_seqs)),
            prefixes: config
                .prefix_sharing
                .map(|sharing| PrefixFinder::new(sharing, config.num_blocks, config.block_size)),
            hasher: BlockHasher::new(),
            step_times: StepTimes::new(FIRST_STEP_S / config.max_num_batched_tokens as f64),
            measured_decodes: (0, 0),
            requests: Slab::with_capacity(config.max_num_seqs),
            index_of: HashMap::default(),
            running: Vec::with_capacity(config.max_num_seqs),
            waiting: BTreeMap::new(),
            groups: Slab::new(),
            sharing: Vec::new(),
            // Popped from the end: low slots first.
            free_slots: (0..config.max_num_seqs as u32).rev().collect(),
            next_sequence: 0,
            num_steps: 0,
            num_running: 0,
            num_parked: 0,
            num_prefilling: 0,
            num_leaving: 0,
            blocked: None,
            num_preemptions: 0,
            prefix_queries: 0,
            prefix_hits: 0,
            closing: Vec::with_capacity(config.max_num_seqs),
            misled: Vec::new(),
            hits: Vec::new(),
            hit_state: None,
            current: None,
            config,
        })
    }

    /// The settings.
    #[must_use]
    pub fn config(&self) -> &SchedulerConfig {
        &self.config
    }

    /// The limits a staging buffer must satisfy.
    #[must_use]
    pub fn limits(&self) -> &StagingLimits {
        &self.limits
    }

    /// The requests by slab index.
    #[must_use]
    pub fn requests(&self) -> &Slab<Request> {
        &self.requests
    }

    /// The slab index of an unfinished request.
    #[must_use]
    pub fn index_of(&self, request_id: u64) -> Option<u32> {
        self.index_of.get(&request_id).copied()
    }

    /// The pool.
    #[must_use]
    pub fn pool(&self) -> &SharedPool {
        &self.pool
    }

    /// Admitted and not over.
    #[must_use]
    pub fn num_running(&self) -> usize {
        self.num_running
    }

    /// Not admitted yet, or preempted.
    #[must_use]
    pub fn num_waiting(&self) -> usize {
        self.waiting.len() + self.num_parked
    }

    /// Queues a request; the slab indices of its samples are appended to `indices`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`]; nothing is queued then.
    pub fn add(&mut self, new: &NewRequest<'_>, indices: &mut Vec<u32>) -> Result<()> {
        let num_prompt = new.prompt.len();
        let pool_tokens = self.config.num_blocks * self.config.block_size;
        if num_prompt == 0 {
            return Err(Error::invalid("the prompt is empty"));
        }
        let least = num_prompt + new.max_tokens.min(1);
        if least > self.config.max_model_len {
            return Err(Error::invalid(format!(
                "the prompt has {num_prompt} tokens; max_model_len is {}",
                self.config.max_model_len
            )));
        }
        if num_prompt > pool_tokens {
            return Err(Error::invalid(format!(
                "the prompt has {num_prompt} tokens; the whole KV cache holds {pool_tokens}"
            )));
        }
        if new.request_ids.is_empty() {
            return Err(Error::invalid("request_ids is empty"));
        }
        for (i, id) in new.request_ids.iter().enumerate() {
            if self.index_of.contains_key(id) || new.request_ids[..i].contains(id) {
                return Err(Error::invalid(format!("request id {id} is in use")));
            }
        }
        // The last token is sampled but never computed, hence one more than the pool holds.
        let max_len = num_prompt
            .saturating_add(new.max_tokens)
            .min(self.config.max_model_len)
            .min(pool_tokens + 1);

        let root = self.hasher.root(new.cache_salt);
        let prompt = Arc::new(Prompt::new(new.prompt.into(), root));
        let priority = match self.config.policy {
            Policy::Fcfs => 0,
            Policy::Priority => new.priority,
        };
        let first = indices.len();
        for &request_id in new.request_ids {
            let rank = Rank {
                priority,
                sequence: self.next_sequence,
            };
            self.next_sequence += 1;
            let index = self.requests.insert(Request {
                status: RequestStatus::Waiting,
                slot: NO_SLOT,
                num_tokens: num_prompt as u32,
                num_pending: 0,
                num_void: 0,
                num_in_flight: 0,
                sampled_in: 0,
                num_preemptions: 0,
                max_len: max_len as u32,
                last_token: 0,
                num_prompt: num_prompt as u32,
                prompt_done: false,
                unparked: false,
                group: NO_GROUP,
                request_id,
                rank,
                outputs: Vec::new(),
                prompt: prompt.clone(),
                output_hashes: Vec::new(),
                num_cached_tokens: 0,
                was_admitted: false,
            }) as u32;
            self.index_of.insert(request_id, index);
            indices.push(index);
        }
        self.queue_new(&indices[first..]);
        Ok(())
    }

    /// Plans the next step; false if nothing can run.
    pub fn schedule(&mut self, plan: &mut Plan) -> bool {
        plan.clear();
        let mut budget = self.config.max_num_batched_tokens;
        let preempted_before = self.num_preemptions;
        self.schedule_decodes(plan, &mut budget, self.config.num_stages as u64);
        plan.num_decodes = plan.entries.len();
        let mut room = self.prompt_room(plan, budget);
        if self.num_prefilling > 0 {
            self.schedule_prefills(plan, &mut room);
        }
        // A step that had to preempt has no memory to admit anyone.
        if self.num_preemptions == preempted_before {
            self.admit(plan, &mut room);
        }
        if plan.entries.is_empty() && self.config.num_stages > 1 {
            // Too few requests for all stages: a step waits for the last one's tokens on the device.
            self.schedule_decodes(plan, &mut budget, 1);
            plan.num_decodes = plan.entries.len();
        }
        for i in 0..self.closing.len() {
            let index = self.closing[i];
            self.leave_running(index);
        }
        self.closing.clear();
        self.current = None;
        if plan.entries.is_empty() {
            return false;
        }
        self.renew_misled(plan);
        if plan.num_decodes == plan.entries.len() {
            self.measured_decodes = (plan.num_decodes, self.num_steps);
            if let Some(finder) = &mut self.prefixes {
                finder.find(&plan.entries, &self.requests, &mut plan.shared);
            }
        }
        plan.step_id = self.num_steps;
        self.num_steps += 1;
        true
    }

    /// Has the slots of misled requests written anew that this plan goes on with, as if they were new.
    fn renew_misled(&mut self, plan: &mut Plan) {
        self.misled.retain(|&(index, request_id)| {
            let request = self.requests.get(index as usize);
            let Some(request) = request.filter(|one| one.request_id == request_id) else {
                return false;
            };
            if !matches!(request.status, RequestStatus::Running(_)) {
                // Its next slot is written whole in any case.
                return false;
            }
            let is_planned = plan.entries.iter().any(|entry| entry.index == index);
            let slot = request.new_slot();
            if is_planned && !plan.new_slots.contains(&slot) {
                plan.new_slots.push(slot);
            }
            !is_planned
        });
    }

    /// Takes a request off the device; it will be recomputed. Its blocks are free at once.
    pub(crate) fn preempt(&mut self, index: u32) {
        self.detach(index);
        let request = &mut self.requests[index as usize];
        let rank = request.rank;
        request.status = RequestStatus::Preempted;
        request.num_preemptions += 1;
        self.num_preemptions += 1;
        self.waiting.insert(rank, index);
        if self.requests[index as usize].num_in_flight == 0 {
            self.free_slot(index);
        }
    }

    /// Takes an entry's step as computed. The caller then pushes the token of a sample.
    ///
    /// With `failed`, nothing of the step is trusted; the caller ends the request unless stale.
    #[inline]
    pub fn land(&mut self, entry: &Entry, failed: bool) -> Landed {
        let index = entry.index;
        self.current = Some(index);
        let request = &mut self.requests[index as usize];
        request.num_in_flight -= 1;
        let is_void = entry.sample && request.num_void > 0;
        if is_void {
            request.num_void -= 1;
        } else {
            request.num_pending -= u32::from(entry.sample);
        }
        if entry.save != NO_CHECKPOINT {
            let is_running = matches!(request.status, RequestStatus::Running(_));
            self.land_save(entry, is_running && !failed && !is_void);
        }
        let request = &mut self.requests[index as usize];
        match &mut request.status {
            RequestStatus::Running(seat) => {
                if failed || is_void {
                    return Landed::Partial;
                }
                seat.num_confirmed += entry.count;
                if seat.num_confirmed >= seat.next_commit {
                    self.name_blocks(index);
                }
                let request = &mut self.requests[index as usize];
                if !request.prompt_done {
                    let confirmed = request.seat().map_or(0, |seat| seat.num_confirmed);
                    if confirmed < request.num_prompt {
                        return Landed::Partial;
                    }
                    request.prompt_done = true;
                    self.share_prompt(index);
                }
                let request = &self.requests[index as usize];
                if entry.sample {
                    Landed::Sample
                } else if request.num_tokens >= request.max_len {
                    Landed::Complete
                } else {
                    Landed::Partial
                }
            }
            RequestStatus::Preempted => {
                if request.num_in_flight == 0 {
                    self.free_slot(index);
                }
                if entry.sample && !is_void {
                    Landed::Sample
                } else {
                    Landed::Partial
                }
            }
            RequestStatus::Finished(_) => {
                if request.num_in_flight == 0 {
                    self.remove(index);
                }
                Landed::Stale
            }
            RequestStatus::Waiting | RequestStatus::Parked => {
                unreachable!(
                    "request {} is in flight and not admitted",
                    request.request_id
                )
            }
        }
    }

    /// Appends the token of a landed sample.
    #[inline]
    pub fn push_token(&mut self, index: u32, token: u32) {
        self.requests[index as usize].push_token(token);
    }

    /// Gives up what the steps in flight sample behind the token that has landed: the next step goes on
    /// from that one, with its slot written anew, since the device counts what it samples. Returns false,
    /// and nothing is given up, where the last token is on its way, or where the step ahead has brought a
    /// state past that token.
    pub fn disregard(&mut self, index: u32) -> bool {
        let request = &mut self.requests[index as usize];
        if self.states.is_some() && request.num_pending > 0 {
            return false;
        }
        if let RequestStatus::Running(seat) = &mut request.status {
            if seat.closed {
                return false;
            }
            // Each of them computes the token before its sample: those are due again.
            seat.num_computed -= request.num_pending;
        }
        if request.num_pending > 0 {
            self.misled.push((index, request.request_id));
        }
        request.give_up_pending();
        true
    }

    /// As `disregard`, where a state has to be brought back too: the request is computed again from its
    /// last checkpoint. Returns false, and nothing is given up, where the last token is on its way.
    pub fn restart(&mut self, index: u32) -> bool {
        let request = &mut self.requests[index as usize];
        if !matches!(&request.status, RequestStatus::Running(seat) if !seat.closed) {
            return false;
        }
        request.give_up_pending();
        self.preempt(index);
        true
    }

    /// True if a step in flight will compute the input that a further token needs: that one is sampled
    /// without waiting.
    #[must_use]
    pub fn is_ahead(&self, index: u32) -> bool {
        self.requests[index as usize].num_pending > 0
    }

    /// True if the oldest sample of a request in flight is given up.
    #[must_use]
    pub fn is_void(&self, index: u32) -> bool {
        self.requests
            .get(index as usize)
            .is_some_and(|request| request.num_void > 0)
    }

    /// Has the tokens computed that were pushed behind the one that has landed, as a prompt's are.
    pub fn extend(&mut self, index: u32) {
        let request = &mut self.requests[index as usize];
        if let RequestStatus::Running(seat) = &mut request.status
            && !seat.prefilling
            && seat.num_computed + 1 < request.num_tokens
        {
            seat.prefilling = true;
            self.num_prefilling += 1;
        }
    }

    /// Forgets the prefix cache; running requests keep their blocks. O(pool).
    pub fn reset_prefix_cache(&mut self) {
        self.pool.lock().reset_cache();
        if let Some(states) = &self.states {
            states.pool.lock().reset_cache();
        }
    }

    /// For tests of recovery: breaks a waiting request.
    #[cfg(test)]
    pub(crate) fn claim_tokens(&mut self, index: u32, num_tokens: u32) {
        self.requests[index as usize].num_tokens = num_tokens;
    }

    /// Names the full blocks whose computation came back.
    fn name_blocks(&mut self, index: u32) {
        let block_size = self.config.block_size as u32;
        loop {
            let request = &mut self.requests[index as usize];
            let Some(seat) = request.seat() else { return };
            if seat.num_confirmed < seat.next_commit {
                return;
            }
            let block = (seat.next_commit / block_size - 1) as usize;
            let id = seat.table.block_ids()[block];
            let hash = request.block_hash(&self.hasher, self.config.block_size, block);
            self.pool.lock().set_hash(id, hash);
            if let RequestStatus::Running(seat) = &mut request.status {
                seat.next_commit += block_size;
            }
        }
    }
}
