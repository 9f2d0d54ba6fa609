//! Prompts beside decodes on a device that is made up: tokens a second and times between tokens by
//! `max_step_s`, in virtual time. `cargo bench --bench prompt_room`
//!
//! A device's products take as long as their weights' reading or their arithmetic, its attention by the
//! bytes it reads and the pairs it computes. A GPU's next step is planned before the last came back.

use std::collections::{HashMap, HashSet, VecDeque};

use octavo_core::engine::outbox::Delivery;
use octavo_core::engine::{AddRequest, EngineCore, Sampled};
use octavo_core::scheduler::batch::{ScheduledBatch, Staging};
use octavo_core::scheduler::{LongPrefill, Policy, SchedulerConfig};

/// Requests of one length that come whenever one of `concurrency` has ended.
#[derive(Clone, Copy)]
struct Load {
    name: &'static str,
    concurrency: usize,
    num_requests: usize,
    input_len: usize,
    output_len: usize,
    /// Of long prompts beside them, which come at this distance in seconds; None: none.
    long: Option<(usize, f64)>,
}

const GPU_LOADS: [Load; 6] = [
    Load {
        name: "512/256 c=64",
        concurrency: 64,
        num_requests: 256,
        input_len: 512,
        output_len: 256,
        long: None,
    },
    Load {
        name: "512/256 c=256",
        concurrency: 256,
        num_requests: 768,
        input_len: 512,
        output_len: 256,
        long: None,
    },
    Load {
        name: "220/200 c=1000",
        concurrency: 1000,
        num_requests: 1000,
        input_len: 220,
        output_len: 200,
        long: None,
    },
    Load {
        name: "512/256 c=8",
        concurrency: 8,
        num_requests: 32,
        input_len: 512,
        output_len: 256,
        long: None,
    },
    Load {
        name: "4096/128 c=16",
        concurrency: 16,
        num_requests: 48,
        input_len: 4096,
        output_len: 128,
        long: None,
    },
    Load {
        name: "8 decode, 8k prompts",
        concurrency: 8,
        num_requests: 8,
        input_len: 128,
        output_len: 1500,
        long: Some((8000, 0.5)),
    },
];

const CPU_LOADS: [Load; 4] = [
    Load {
        name: "128/128 c=4",
        concurrency: 4,
        num_requests: 16,
        input_len: 128,
        output_len: 128,
        long: None,
    },
    Load {
        name: "128/128 c=16",
        concurrency: 16,
        num_requests: 64,
        input_len: 128,
        output_len: 128,
        long: None,
    },
    Load {
        name: "256/128 c=64",
        concurrency: 64,
        num_requests: 192,
        input_len: 256,
        output_len: 128,
        long: None,
    },
    Load {
        name: "2 decode, 4k prompts",
        concurrency: 2,
        num_requests: 2,
        input_len: 128,
        output_len: 1500,
        long: Some((4000, 4.0)),
    },
];

/// Seconds that parts of a step take.
struct Device {
    name: &'static str,
    reading_s: f64,
    per_row_s: f64,
    /// Beyond a row's: sampling and the output head.
    per_sample_s: f64,
    per_pair_s: f64,
    per_context_s: f64,
    /// Of each token before a chunk that is too short for all multiprocessors.
    per_start_s: f64,
    fixed_s: f64,
    max_num_seqs: usize,
    max_num_batched_tokens: usize,
    steps_in_flight: usize,
    loads: &'static [Load],
}

/// Rows that a GPU's steps with prompts are padded to.
const PADDED: [usize; 10] = [16, 32, 64, 128, 192, 256, 384, 512, 768, 1024];

const DEVICES: [Device; 3] = [
    // From bench/results/h100.md, scaled to the H200's memory.
    Device {
        name: "8B, H200",
        reading_s: 3.7e-3,
        per_row_s: 2.0e-5,
        per_sample_s: 0.0,
        per_pair_s: 1.9e-9,
        per_context_s: 3.5e-8,
        per_start_s: 4e-7,
        fixed_s: 2e-4,
        max_num_seqs: 256,
        max_num_batched_tokens: 8192,
        steps_in_flight: 2,
        loads: &GPU_LOADS,
    },
    Device {
        name: "1B, H200",
        reading_s: 0.55e-3,
        per_row_s: 3.2e-6,
        per_sample_s: 0.0,
        per_pair_s: 4.7e-10,
        per_context_s: 0.9e-8,
        per_start_s: 1.3e-7,
        fixed_s: 1.5e-4,
        max_num_seqs: 256,
        max_num_batched_tokens: 8192,
        steps_in_flight: 2,
        loads: &GPU_LOADS,
    },
    // From bench/results/cpu.md.
    Device {
        name: "135M, two cores",
        reading_s: 1.9e-3,
        per_row_s: 2.4e-4,
        per_sample_s: 3.0e-4,
        per_pair_s: 5e-8,
        per_context_s: 4e-7,
        per_start_s: 0.0,
        fixed_s: 1e-4,
        max_num_seqs: 64,
        max_num_batched_tokens: 2048,
        steps_in_flight: 1,
        loads: &CPU_LOADS,
    },
];

impl Device {
    fn step_s(&self, batch: &ScheduledBatch, entries: &[(usize, usize)]) -> f64 {
        let num_prompt = batch.num_tokens - batch.num_decodes;
        let padded = PADDED.iter().copied().find(|&size| size >= num_prompt);
        let num_prompt = match padded {
            Some(size) if num_prompt > 0 && self.steps_in_flight > 1 => size,
            _ => num_prompt,
        };
        let rows = (batch.num_decodes + num_prompt) as f64;
        let products = (self.reading_s.powi(4) + (self.per_row_s * rows).powi(4)).powf(0.25);
        let attention: f64 = entries
            .iter()
            .enumerate()
            .map(|(i, &(start, count))| {
                let (start, count) = (start as f64, count as f64);
                let pairs = if i < batch.num_decodes {
                    0.0
                } else {
                    count * (start + count / 2.0)
                };
                let before = if pairs > 0.0 {
                    start * self.per_start_s
                } else {
                    0.0
                };
                start * self.per_context_s + pairs * self.per_pair_s + before
            })
            .sum();
        self.fixed_s + products + attention + batch.num_samples as f64 * self.per_sample_s
    }
}

struct Outcome {
    rate: f64,
    median_ms: f64,
    p99_ms: f64,
    ttft_ms: f64,
}

/// A load on a device, step by step in virtual time.
struct Run<'a> {
    device: &'a Device,
    load: Load,
    core: EngineCore,
    buffer: Vec<i32>,
    /// Steps on the device, and when each ends.
    in_flight: VecDeque<(ScheduledBatch, f64)>,
    now: f64,
    next_id: u64,
    num_submitted: usize,
    num_ended: usize,
    arrived: HashMap<u64, f64>,
    last: HashMap<u64, f64>,
    longs: HashSet<u64>,
    gaps: Vec<f64>,
    first: Vec<f64>,
    num_tokens: usize,
}

impl<'a> Run<'a> {
    fn new(device: &'a Device, load: Load, max_step_s: f64) -> Self {
        let is_padded = device.steps_in_flight > 1;
        let config = SchedulerConfig {
            num_blocks: 1 << 16,
            block_size: 16,
            max_num_seqs: device.max_num_seqs,
            max_num_batched_tokens: device.max_num_batched_tokens,
            max_model_len: 16384,
            enable_prefix_caching: true,
            enable_chunked_prefill: true,
            long_prefill: LongPrefill::default(),
            max_step_s,
            padded_prompts: if is_padded {
                PADDED.to_vec()
            } else {
                Vec::new()
            },
            policy: Policy::Fcfs,
            num_stages: 1,
            state: None,
            prefix_sharing: None,
        };
        let core = EngineCore::new(config, 1, None).expect("valid");
        Self {
            device,
            load,
            buffer: vec![0; core.scheduler().limits().required_len()],
            core,
            in_flight: VecDeque::new(),
            now: 0.0,
            next_id: 0,
            num_submitted: 0,
            num_ended: 0,
            arrived: HashMap::new(),
            last: HashMap::new(),
            longs: HashSet::new(),
            gaps: Vec::new(),
            first: Vec::new(),
            num_tokens: 0,
        }
    }

    fn finish(mut self) -> Outcome {
        for _ in 0..self.load.concurrency {
            self.submit_next();
        }
        let (long_len, every_s) = self.load.long.unwrap_or((0, f64::INFINITY));
        let mut next_long = every_s;
        while self.num_ended < self.load.num_requests {
            if self.now >= next_long {
                let id = self.submit(long_len, 8);
                self.longs.insert(id);
                next_long += every_s;
            }
            let is_planned = self.plan();
            if !is_planned || self.in_flight.len() == self.device.steps_in_flight {
                self.take_back();
            }
        }
        self.gaps.sort_by(f64::total_cmp);
        self.first.sort_by(f64::total_cmp);
        let at = |all: &[f64], q: f64| all[((all.len() - 1) as f64 * q) as usize] * 1e3;
        Outcome {
            rate: self.num_tokens as f64 / self.now,
            median_ms: at(&self.gaps, 0.5),
            p99_ms: at(&self.gaps, 0.99),
            ttft_ms: at(&self.first, 0.5),
        }
    }

    fn submit(&mut self, len: usize, max_tokens: usize) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        let token = |i: usize| (i as u32 * 31 + id as u32 * 977) % 30_000;
        let prompt: Vec<u32> = (0..len).map(token).collect();
        self.core
            .add_request(AddRequest {
                request_ids: &[id],
                prompt: &prompt,
                max_tokens,
                arrival_s: self.now,
                deliveries: vec![Delivery::Delta],
                ..AddRequest::default()
            })
            .expect("valid");
        self.arrived.insert(id, self.now);
        id
    }

    fn submit_next(&mut self) {
        if self.num_submitted < self.load.num_requests {
            self.num_submitted += 1;
            self.submit(self.load.input_len, self.load.output_len);
        }
    }

    /// Plans a step and gives it to the device; false if there is none.
    fn plan(&mut self) -> bool {
        let mut staging = Staging {
            buffer: &mut self.buffer,
        };
        let batch = self.core.schedule(&mut staging, self.now).expect("valid");
        let Some(batch) = batch else { return false };
        let plan = self.core.plan(batch.step_id).expect("in flight");
        let entries: Vec<_> = plan
            .entries
            .iter()
            .map(|entry| (entry.start as usize, entry.count as usize))
            .collect();
        let free_at = self.in_flight.back().map_or(self.now, |&(_, end)| end);
        let end = free_at.max(self.now) + self.device.step_s(&batch, &entries);
        self.in_flight.push_back((batch, end));
        true
    }

    /// Waits for the oldest step.
    fn take_back(&mut self) {
        let (batch, end) = self.in_flight.pop_front().expect("something runs");
        self.now = self.now.max(end);
        let tokens: Vec<i32> = (5..).take(batch.num_samples).collect();
        let sampled = Sampled {
            token_ids: &tokens,
            logprobs: None,
        };
        self.core
            .update(batch.step_id, sampled, self.now)
            .expect("its turn");
        let outbox = self.core.outbox().clone();
        for delta in outbox.drain() {
            let is_long = self.longs.contains(&delta.request_id);
            for _ in &delta.token_ids {
                self.num_tokens += 1;
                match self.last.insert(delta.request_id, self.now) {
                    Some(before) if !is_long => self.gaps.push(self.now - before),
                    None if is_long == self.load.long.is_some() => {
                        self.first.push(self.now - self.arrived[&delta.request_id]);
                    }
                    _ => {}
                }
            }
            if delta.finish_reason.is_some() && !is_long {
                self.num_ended += 1;
                self.submit_next();
            }
        }
    }
}

fn main() {
    for (device, load) in DEVICES
        .iter()
        .flat_map(|d| d.loads.iter().map(move |l| (d, *l)))
    {
        println!("{}: {}", device.name, load.name);
        for ms in [0.0, 10.0, 15.0, 20.0] {
            let o = Run::new(device, load, ms / 1e3).finish();
            println!(
                "  {ms:5.0} ms: {:8.0} tok/s, ITL p50 {:6.2} p99 {:7.2} ({:4.1}x), TTFT p50 {:7.1}",
                o.rate,
                o.median_ms,
                o.p99_ms,
                o.p99_ms / o.median_ms,
                o.ttft_ms
            );
        }
    }
}
