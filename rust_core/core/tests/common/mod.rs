//! A device that checks its input: a KV cache of prefix fingerprints and a deterministic
//! model. A read of a wrong block, position, slot or token gives a wrong fingerprint.
//!
//! Longer than other files: requests, device and checks are one world, driven by every test.
#![allow(dead_code)] // each test binary uses its part

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Range;

use octavo_core::engine::outbox::{Delivery, Delta, Extra};
use octavo_core::engine::{AddRequest, EngineCore, Sampled};
use octavo_core::scheduler::batch::{ScheduledBatch, Staging};
use octavo_core::scheduler::request::{FinishReason, StopReason};
use octavo_core::scheduler::{LongPrefill, Policy, SchedulerConfig};

/// Token ids are below this, so that EOS and equal prefixes happen.
pub(crate) const VOCABULARY: u64 = 13;

/// The fingerprint of a sequence is this one extended token by token.
const EMPTY: u64 = 0x1234_5678_9abc_def1;
const GARBAGE: u64 = 0xdead_dead_dead_dead;

fn extend(fingerprint: u64, token: i32) -> u64 {
    let mixed = (fingerprint ^ (token as u64 + 1)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    mixed ^ (mixed >> 29)
}

fn next_token(fingerprint: u64, seed: u64) -> i32 {
    (extend(fingerprint, seed as i32 + 77) % VOCABULARY) as i32
}

/// A request's parameters.
#[derive(Debug, Clone)]
pub(crate) struct Wish {
    pub prompt: Vec<u32>,
    pub num_samples: usize,
    pub max_tokens: usize,
    pub min_tokens: usize,
    pub eos: Option<u32>,
    pub stop: Option<u32>,
    pub priority: i64,
    pub salt: Option<&'static str>,
    pub streams: bool,
}

impl Wish {
    pub(crate) fn new(prompt: &[u32], max_tokens: usize) -> Self {
        Self {
            prompt: prompt.to_vec(),
            num_samples: 1,
            max_tokens,
            min_tokens: 0,
            eos: None,
            stop: None,
            priority: 0,
            salt: None,
            streams: false,
        }
    }

    /// A sample's output when it runs alone on an endless device, and the reason of its end.
    fn truth(&self, seed: u64, max_len: usize) -> (Vec<u32>, FinishReason, Option<StopReason>) {
        let mut fingerprint = self.prompt.iter().fold(EMPTY, |f, &t| extend(f, t as i32));
        let mut outputs = Vec::new();
        while self.prompt.len() + outputs.len() < max_len {
            let token = next_token(fingerprint, seed) as u32;
            fingerprint = extend(fingerprint, token as i32);
            outputs.push(token);
            if outputs.len() >= self.min_tokens {
                if self.eos == Some(token) {
                    return (outputs, FinishReason::Stop, None);
                }
                if self.stop == Some(token) {
                    return (outputs, FinishReason::Stop, Some(StopReason::Token(token)));
                }
            }
        }
        (outputs, FinishReason::Length, None)
    }
}

/// One sample's expected and received output.
#[derive(Debug)]
pub(crate) struct Expected {
    wish: Wish,
    max_len: usize,
    pub received: Vec<u32>,
    pub finished: Option<(FinishReason, Option<StopReason>)>,
    pub num_cached_tokens: u32,
    may_end_early: bool,
    /// Extra of its next delta.
    extra: Option<Extra>,
}

/// A step on the device.
#[derive(Debug)]
pub(crate) struct Launched {
    pub batch: ScheduledBatch,
    pub request_ids: Vec<u64>,
    pub new_slots: Vec<(u32, u64, u32)>,
    pub tokens: Vec<i32>,
    number: usize,
}

pub(crate) struct World {
    pub core: EngineCore,
    pub in_flight: VecDeque<Launched>,
    pub samples: BTreeMap<u64, Expected>,
    config: SchedulerConfig,
    buffer: Vec<i32>,
    /// Per cell of the cache, the fingerprint of the sequence up to its token.
    cache: Vec<u64>,
    /// Per cell, the step that wrote it last: equal sequences write equal fingerprints.
    cache_writers: Vec<usize>,
    /// Per slot and checkpoint, the fingerprint that its state is of; empty without states.
    states: Vec<u64>,
    /// The same of states.
    state_writers: Vec<usize>,
    block_table: Vec<i32>,
    last_token: Vec<i32>,
    /// The step that has sampled it.
    sampled_in: Vec<Option<u64>>,
    seed: Vec<u64>,
    next_id: u64,
    pub now_s: f64,
    pub num_steps: usize,
}

pub(crate) fn config(num_blocks: usize, block_size: usize) -> SchedulerConfig {
    SchedulerConfig {
        num_blocks,
        block_size,
        max_num_seqs: 4,
        max_num_batched_tokens: 16,
        max_model_len: 32,
        enable_prefix_caching: true,
        enable_chunked_prefill: true,
        long_prefill: LongPrefill::default(),
        max_step_s: 0.0,
        padded_prompts: Vec::new(),
        policy: Policy::Fcfs,
        num_stages: 1,
        state: None,
        prefix_sharing: None,
    }
}

impl World {
    pub(crate) fn new(config: SchedulerConfig) -> Self {
        let core = EngineCore::new(config.clone(), 1, None).expect("a valid config");
        let rows = config.max_num_seqs + 1;
        let columns = config.max_model_len.div_ceil(config.block_size);
        Self {
            in_flight: VecDeque::new(),
            samples: BTreeMap::new(),
            buffer: vec![i32::MIN; core.scheduler().limits().required_len()],
            cache: vec![GARBAGE; config.num_blocks * config.block_size],
            cache_writers: vec![0; config.num_blocks * config.block_size],
            state_writers: vec![0; config.state.map_or(0, |state| rows + state.num_checkpoints)],
            states: vec![GARBAGE; config.state.map_or(0, |state| rows + state.num_checkpoints)],
            block_table: vec![-1; rows * columns],
            last_token: vec![-1; rows],
            sampled_in: vec![None; rows],
            seed: vec![u64::MAX; rows],
            next_id: 0,
            now_s: 0.0,
            num_steps: 0,
            core,
            config,
        }
    }

    /// Queues a request; None if the core refuses it, as it must where it can never run.
    pub(crate) fn add(&mut self, wish: &Wish) -> Option<Vec<u64>> {
        let first = self.next_id;
        self.next_id += wish.num_samples as u64;
        let ids: Vec<u64> = (first..self.next_id).collect();
        let delivery = if wish.streams {
            Delivery::Delta
        } else {
            Delivery::Final
        };
        let result = self.core.add_request(AddRequest {
            request_ids: &ids,
            prompt: &wish.prompt,
            max_tokens: wish.max_tokens,
            min_tokens: wish.min_tokens,
            eos_token_ids: wish.eos.as_slice(),
            stop_token_ids: wish.stop.as_slice(),
            priority: wish.priority,
            cache_salt: wish.salt,
            arrival_s: self.now_s,
            deliveries: vec![delivery; wish.num_samples],
            ..AddRequest::default()
        });
        let pool = self.config.num_blocks * self.config.block_size;
        let least = wish.prompt.len() + wish.max_tokens.min(1);
        let fits = least <= self.config.max_model_len && wish.prompt.len() <= pool;
        assert_eq!(result.is_ok(), fits, "{result:?} for {wish:?}");
        result.ok()?;
        let max_len = (wish.prompt.len() + wish.max_tokens)
            .min(self.config.max_model_len)
            .min(pool + 1);
        for &id in &ids {
            let expected = Expected {
                wish: wish.clone(),
                max_len,
                received: Vec::new(),
                finished: None,
                num_cached_tokens: 0,
                may_end_early: false,
                extra: None,
            };
            self.samples.insert(id, expected);
        }
        self.check();
        Some(ids)
    }

    /// Plans a step and runs it on the device. False if there was nothing to plan.
    pub(crate) fn schedule(&mut self) -> bool {
        self.now_s += 0.001;
        self.buffer.fill(i32::MIN);
        let mut staging = Staging {
            buffer: &mut self.buffer,
        };
        let batch = self
            .core
            .schedule(&mut staging, self.now_s)
            .expect("a valid staging");
        self.check();
        let Some(batch) = batch else { return false };
        self.num_steps += 1;
        let plan = self.core.plan(batch.step_id).expect("it is in flight");
        let request_ids: Vec<u64> = plan.entries.iter().map(|entry| entry.request_id).collect();
        let new_slots = plan.new_slots.clone();
        let launched = self.launch(batch, request_ids, new_slots);
        self.in_flight.push_back(launched);
        true
    }

    /// Takes back the oldest step.
    pub(crate) fn update(&mut self) {
        let Some(step) = self.in_flight.pop_front() else {
            return;
        };
        self.now_s += 0.001;
        // Some steps bring extras: for one sample twice, and for one that may be over.
        if step.batch.step_id % 3 == 0 {
            for &id in step.request_ids.iter().chain(step.request_ids.first()) {
                self.attach(id);
            }
        }
        let was_empty = self.core.outbox().lock().is_empty();
        let sampled = Sampled {
            token_ids: &step.tokens,
            logprobs: None,
        };
        let wake_up = self
            .core
            .update(step.batch.step_id, sampled, self.now_s)
            .expect("it is its turn");
        let is_empty = self.core.outbox().lock().is_empty();
        assert_eq!(wake_up, was_empty && !is_empty);
        self.check();
    }

    /// Gives a sample's next delta something to carry; what that replaces comes back.
    fn attach(&mut self, id: u64) {
        let sample = self.samples.get_mut(&id).expect("known");
        let extra = Extra::new((id, self.num_steps));
        let left = self.core.attach(id, extra.clone());
        let expected = match self.core.token_ids(id) {
            Ok(_) => sample.extra.replace(extra),
            Err(_) => Some(extra),
        };
        assert_eq!(left, expected, "request {id}");
    }

    /// The step at `at` failed: what it wrote is garbage.
    pub(crate) fn fail(&mut self, at: usize) {
        let Some(step) = self.in_flight.remove(at) else {
            return;
        };
        self.core
            .fail_step(step.batch.step_id, self.now_s)
            .expect("it is in flight");
        for (written, writers) in [
            (&mut self.cache, &self.cache_writers),
            (&mut self.states, &self.state_writers),
        ] {
            for (value, &writer) in written.iter_mut().zip(writers) {
                if writer == step.number {
                    *value = GARBAGE;
                }
            }
        }
        for id in step.request_ids {
            self.samples.get_mut(&id).expect("known").may_end_early = true;
        }
        self.check();
    }

    pub(crate) fn abort(&mut self, id: u64) -> bool {
        let known = self.core.abort(id, self.now_s);
        if known {
            self.samples.get_mut(&id).expect("known").may_end_early = true;
        }
        self.check();
        known
    }

    /// Reads the outbox and compares every sample with the truth.
    pub(crate) fn drain(&mut self) {
        for delta in self.core.outbox().drain() {
            self.receive(delta);
        }
    }

    /// Runs until nothing is left; panics if that takes more than `max_steps`.
    pub(crate) fn finish(&mut self, depth: usize, max_steps: usize) {
        let last = self.num_steps + max_steps;
        while self.core.has_work() {
            let planned = self.in_flight.len() < depth && self.schedule();
            if !planned || self.in_flight.len() == depth {
                assert!(
                    !self.in_flight.is_empty(),
                    "there is work, but nothing can run"
                );
                self.update();
                self.drain();
            }
            assert!(self.num_steps <= last, "starved: {} steps", self.num_steps);
        }
        self.drain();
        let stats = self.core.stats();
        assert_eq!(
            (stats.num_running, stats.num_waiting, stats.num_in_flight),
            (0, 0, 0)
        );
        assert_eq!(stats.num_free_blocks, stats.num_blocks);
        for (id, sample) in &self.samples {
            assert!(sample.finished.is_some(), "request {id} never ended");
        }
        let metrics = self.core.metrics().snapshot();
        assert_eq!(
            (metrics.num_requests_running, metrics.num_requests_waiting),
            (0, 0)
        );
        assert_eq!(metrics.kv_cache_usage_perc, 0.0);
        let with_token = self
            .samples
            .values()
            .filter(|s| !s.received.is_empty())
            .count() as u64;
        let num_tokens: usize = self.samples.values().map(|s| s.received.len()).sum();
        assert_eq!(metrics.time_to_first_token_seconds.count(), with_token);
        assert_eq!(metrics.generation_tokens, num_tokens as u64);
        let gaps = metrics.inter_token_latency_seconds.count();
        assert_eq!(gaps, num_tokens as u64 - with_token);
        assert_eq!(
            metrics.request_success.iter().sum::<u64>(),
            self.samples.len() as u64
        );
    }

    fn check(&self) {
        self.core.check_integrity().unwrap();
    }

    fn receive(&mut self, delta: Delta) {
        let id = delta.request_id;
        let sample = self
            .samples
            .get_mut(&id)
            .expect("a delta of a known request");
        assert!(
            sample.finished.is_none(),
            "request {id} got a delta after its last"
        );
        sample.received.extend(&delta.token_ids);
        sample.num_cached_tokens = delta.num_cached_tokens;
        assert_eq!(delta.extra, sample.extra.take(), "request {id}");
        assert_eq!(delta.num_output_tokens as usize, sample.received.len());
        let (tokens, reason, stop) = sample.wish.truth(id, sample.max_len);
        assert!(
            tokens.starts_with(&sample.received),
            "request {id}: {:?} is no beginning of {tokens:?}",
            sample.received
        );
        let Some(finish) = delta.finish_reason else {
            return;
        };
        if matches!(finish, FinishReason::Abort | FinishReason::Error) {
            assert!(sample.may_end_early, "request {id} ended with {finish:?}");
        } else {
            assert_eq!(sample.received, tokens, "request {id}");
            assert_eq!(
                (finish, &delta.stop_reason),
                (reason, &stop),
                "request {id}"
            );
        }
        sample.finished = Some((finish, delta.stop_reason));
    }

    /// Runs a step the way kernels would: by the staged arrays alone.
    fn launch(
        &mut self,
        batch: ScheduledBatch,
        request_ids: Vec<u64>,
        new_slots: Vec<(u32, u64, u32)>,
    ) -> Launched {
        let staged = self.buffer[..batch.packed_len].to_vec();
        assert!(!staged.contains(&i32::MIN), "an element was not written");
        let arrays = Arrays::of(&staged, &batch);
        self.check_shape(&batch, &arrays);
        let (rows, ids) = arrays.updates.split_at(batch.num_block_updates);
        for (&row, &id) in rows.iter().zip(ids) {
            self.block_table[row as usize] = id;
        }
        for &(slot, id, _) in &new_slots {
            self.seed[slot as usize] = id;
            self.last_token[slot as usize] = -1;
        }
        self.copy_states(arrays.restores);
        let mut fingerprints = HashMap::new();
        let mut max_query_len = 0;
        for (r, &id) in request_ids.iter().enumerate().take(batch.num_reqs) {
            let query = arrays.query(r);
            assert!(!query.is_empty() && (r >= batch.num_decodes || query.len() == 1));
            max_query_len = max_query_len.max(query.len());
            let slot = arrays.slots[r] as usize;
            assert_eq!(self.seed[slot], id, "slot {slot} belongs to another");
            if arrays.input_ids[query.start] < 0 {
                assert!(
                    batch.awaited_step >= self.sampled_in[slot],
                    "it waits for too little"
                );
            }
            for row in query {
                let fingerprint = self.compute(&arrays, r, row);
                fingerprints.insert(row as i32, fingerprint);
            }
            self.check_context(id, slot, arrays.seq_lens[r] as usize);
        }
        self.check_shared(&batch, &arrays);
        self.copy_states(arrays.saves);
        assert_eq!(batch.max_query_len, max_query_len);
        assert_eq!(
            batch.max_seq_len as i32,
            arrays.seq_lens.iter().copied().max().expect("some request")
        );
        let sampled = arrays.sample_rows.iter().zip(arrays.sample_slots);
        let tokens: Vec<i32> = sampled
            .take(batch.num_samples)
            .map(|(row, &slot)| {
                let token = next_token(fingerprints[row], self.seed[slot as usize]);
                self.last_token[slot as usize] = token;
                self.sampled_in[slot as usize] = Some(batch.step_id);
                token
            })
            .collect();
        Launched {
            batch,
            request_ids,
            new_slots,
            tokens,
            number: self.num_steps,
        }
    }

    /// The groups' first members have in their cache what each member has there.
    fn check_shared(&self, batch: &ScheduledBatch, arrays: &Arrays) {
        let mut tokens = vec![0; batch.num_reqs];
        let mut first_free = 0;
        for group in arrays.shared_groups[..3 * batch.num_shared_groups].chunks_exact(3) {
            let [first, count, length] = [group[0], group[1], group[2]].map(|n| n as usize);
            assert_eq!(first, first_free);
            first_free += count;
            assert!(count > 1 && length > 0 && batch.num_decodes == batch.num_reqs);
            assert_eq!(length % self.config.block_size, 0);
            let members = &arrays.shared_members[first..first + count];
            let slot = |row: i32| arrays.slots[row as usize] as usize;
            for &row in members {
                assert_eq!(std::mem::replace(&mut tokens[row as usize], length), 0);
                // A row's own key is not there before the step.
                assert!(length < arrays.seq_lens[row as usize] as usize);
                for position in 0..length {
                    let theirs = self.cache[self.cell(slot(members[0]), position)];
                    assert_eq!(theirs, self.cache[self.cell(slot(row), position)]);
                }
            }
        }
        if batch.num_shared_groups > 0 {
            let expected: Vec<i32> = tokens.iter().map(|&n| n as i32).collect();
            assert_eq!(arrays.shared_tokens, expected);
        }
    }

    /// Copies rows of states.
    fn copy_states(&mut self, copies: &[i32]) {
        let (from, to) = copies.split_at(copies.len() / 2);
        for (&from, &to) in from.iter().zip(to) {
            self.states[to as usize] = self.states[from as usize];
            self.state_writers[to as usize] = self.num_steps;
        }
    }

    /// The arrays are those of the step, and their padding does nothing.
    fn check_shape(&self, batch: &ScheduledBatch, arrays: &Arrays) {
        let spare = self.config.max_num_seqs;
        assert!(batch.num_tokens <= self.config.max_num_batched_tokens);
        let Arrays {
            query_start_loc,
            sample_slots,
            sample_rows,
            ..
        } = arrays;
        assert_eq!(query_start_loc[0], 0);
        assert_eq!(query_start_loc[batch.num_reqs], batch.num_tokens as i32);
        let padding = &sample_slots[batch.num_samples..];
        assert!(padding.iter().all(|&s| s as usize == spare));
        let in_step = |&row: &i32| (row as usize) < batch.num_tokens;
        assert!(sample_rows.iter().all(in_step));
    }

    /// The place in the cache of a slot's position.
    fn cell(&self, slot: usize, position: usize) -> usize {
        let block_size = self.config.block_size;
        let columns = self.config.max_model_len.div_ceil(block_size);
        let block = self.block_table[slot * columns + position / block_size] as usize;
        block * block_size + position % block_size
    }

    /// Computes row `row` of the step's request `r`: its fingerprint.
    fn compute(&mut self, arrays: &Arrays, r: usize, row: usize) -> u64 {
        let (slot, query) = (arrays.slots[r] as usize, arrays.query(r));
        let position = arrays.seq_lens[r] as usize - query.len() + row - query.start;
        let cell = self.cell(slot, position);
        assert_eq!(arrays.positions[row] as usize, position);
        assert_eq!(arrays.slot_mapping[row] as usize, cell);
        let token = match arrays.input_ids[row] {
            -1 => self.last_token[slot],
            token => token,
        };
        assert!(token >= 0, "no token in slot {slot}");
        let before = match position {
            0 => EMPTY,
            _ => self.cache[self.cell(slot, position - 1)],
        };
        if let Some(state) = self.states.get(slot)
            && position > 0
        {
            assert_eq!(*state, before, "slot {slot} has another state");
        }
        let fingerprint = extend(before, token);
        if let Some(state) = self.states.get_mut(slot) {
            *state = fingerprint;
            self.state_writers[slot] = self.num_steps;
        }
        self.cache[cell] = fingerprint;
        self.cache_writers[cell] = self.num_steps;
        fingerprint
    }

    /// The whole context in a slot is the request's own.
    fn check_context(&self, id: u64, slot: usize, seq_len: usize) {
        let sample = &self.samples[&id];
        let endless = Wish {
            eos: None,
            stop: None,
            ..sample.wish.clone()
        };
        let (outputs, ..) = endless.truth(id, sample.max_len);
        let truth = sample.wish.prompt.iter().chain(&outputs);
        let mut expected = EMPTY;
        for (position, &token) in truth.take(seq_len).enumerate() {
            expected = extend(expected, token as i32);
            assert_eq!(
                self.cache[self.cell(slot, position)],
                expected,
                "request {id}, position {position} of {seq_len}"
            );
        }
    }
}

/// A step's arrays, as kernels read them.
struct Arrays<'a> {
    input_ids: &'a [i32],
    positions: &'a [i32],
    slot_mapping: &'a [i32],
    slots: &'a [i32],
    seq_lens: &'a [i32],
    query_start_loc: &'a [i32],
    sample_rows: &'a [i32],
    sample_slots: &'a [i32],
    /// Rows of the block table, then their blocks.
    updates: &'a [i32],
    /// The first member, the number of members and shared tokens of each group.
    shared_groups: &'a [i32],
    /// Rows, group by group.
    shared_members: &'a [i32],
    /// Of each row.
    shared_tokens: &'a [i32],
    /// Rows of states to read, then to write, before the step.
    restores: &'a [i32],
    /// The same after it.
    saves: &'a [i32],
}

impl<'a> Arrays<'a> {
    fn of(staged: &'a [i32], batch: &ScheduledBatch) -> Self {
        let section = |offset: usize, len: usize| &staged[offset..offset + len];
        let tokens = |offset| section(offset, batch.num_tokens);
        let requests = |offset| section(offset, batch.num_reqs);
        Self {
            input_ids: tokens(batch.input_ids_offset),
            positions: tokens(batch.positions_offset),
            slot_mapping: tokens(batch.slot_mapping_offset),
            slots: requests(batch.slots_offset),
            seq_lens: requests(batch.seq_lens_offset),
            query_start_loc: section(batch.query_start_loc_offset, batch.num_reqs + 1),
            sample_rows: requests(batch.sample_rows_offset),
            sample_slots: requests(batch.sample_slots_offset),
            updates: section(batch.block_updates_offset, 2 * batch.num_block_updates),
            shared_groups: section(
                batch.shared_groups_offset,
                batch.shared_members_offset - batch.shared_groups_offset,
            ),
            shared_members: section(
                batch.shared_members_offset,
                batch.shared_tokens_offset - batch.shared_members_offset,
            ),
            shared_tokens: section(
                batch.shared_tokens_offset,
                batch.state_restores_offset - batch.shared_tokens_offset,
            ),
            restores: section(batch.state_restores_offset, 2 * batch.num_state_restores),
            saves: section(batch.state_saves_offset, 2 * batch.num_state_saves),
        }
    }

    /// Rows of request `r`.
    fn query(&self, r: usize) -> Range<usize> {
        self.query_start_loc[r] as usize..self.query_start_loc[r + 1] as usize
    }
}
