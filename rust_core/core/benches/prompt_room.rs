//! Prompts beside decodes on a device that is made up: tokens a second and times between tokens by
//! `max_step_s`, in virtual time. `cargo bench --bench prompt_room`
//!
//! A device's products take as long as their weights' reading or their arithmetic, its attention by the
//! bytes it reads and the pairs it computes. A GPU's next step is planned before the last came back.

use std::collections::{HashMap, VecDeque};

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
    /// What the tokens before a chunk take of one that is too short to be computed side by side.
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

fn run(device: &Device, load: Load, max_step_s: f64) -> Outcome {
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
        padded_prompts: if device.steps_in_flight > 1 {
            PADDED.to_vec()
        } else {
            Vec::new()
        },
        policy: Policy::Fcfs,
        num_stages: 1,
        state: None,
    };
    let mut core = EngineCore::new(config, 1, None).expect("valid");
    let mut buffer = vec![0; core.scheduler().limits().required_len()];
    let mut in_flight: VecDeque<(ScheduledBatch, f64)> = VecDeque::new();
    let (mut now, mut free, mut next_id, mut ended) = (0.0f64, 0.0f64, 0u64, 0);
    let mut arrived: HashMap<u64, f64> = HashMap::new();
    let mut last: HashMap<u64, f64> = HashMap::new();
    let (mut gaps, mut first, mut num_tokens) = (Vec::new(), Vec::new(), 0);
    let mut next_long = load.long.map_or(f64::INFINITY, |(_, every)| every);
    let mut longs = std::collections::HashSet::new();
    let mut add = |core: &mut EngineCore, now: f64, len: usize, max_tokens: usize| {
        let id = next_id;
        next_id += 1;
        let prompt: Vec<u32> = (0..len)
            .map(|i| (i as u32 * 31 + id as u32 * 977) % 30_000)
            .collect();
        core.add_request(AddRequest {
            request_ids: &[id],
            prompt: &prompt,
            max_tokens,
            arrival_s: now,
            deliveries: vec![Delivery::Delta],
            ..AddRequest::default()
        })
        .expect("valid");
        id
    };
    let mut submitted = 0;
    while submitted < load.concurrency {
        arrived.insert(add(&mut core, 0.0, load.input_len, load.output_len), 0.0);
        submitted += 1;
    }
    while ended < load.num_requests {
        if now >= next_long {
            let (len, every) = load.long.expect("it is due");
            let id = add(&mut core, now, len, 8);
            arrived.insert(id, now);
            longs.insert(id);
            next_long += every;
        }
        let mut staging = Staging {
            buffer: &mut buffer,
        };
        let batch = core.schedule(&mut staging, now).expect("valid");
        let planned = batch.is_some();
        if let Some(batch) = batch {
            let plan = core.plan(batch.step_id).expect("in flight");
            let entries: Vec<_> = plan
                .entries
                .iter()
                .map(|e| (e.start as usize, e.count as usize))
                .collect();
            free = free.max(now) + device.step_s(&batch, &entries);
            in_flight.push_back((batch, free));
        }
        if in_flight.len() < device.steps_in_flight && planned {
            continue;
        }
        let (batch, end) = in_flight.pop_front().expect("something runs");
        now = now.max(end);
        let tokens: Vec<i32> = (0..batch.num_samples).map(|i| i as i32 + 5).collect();
        core.update(
            batch.step_id,
            Sampled {
                token_ids: &tokens,
                logprobs: None,
            },
            now,
        )
        .expect("its turn");
        for delta in core.outbox().drain() {
            let id = delta.request_id;
            let is_long = longs.contains(&id);
            for _ in &delta.token_ids {
                num_tokens += 1;
                match last.insert(id, now) {
                    Some(before) if !is_long => gaps.push(now - before),
                    Some(_) => {}
                    None if is_long == load.long.is_some() => first.push(now - arrived[&id]),
                    None => {}
                }
            }
            if delta.finish_reason.is_some() && !is_long {
                ended += 1;
                if submitted < load.num_requests {
                    arrived.insert(add(&mut core, now, load.input_len, load.output_len), now);
                    submitted += 1;
                }
            }
        }
    }
    gaps.sort_by(f64::total_cmp);
    first.sort_by(f64::total_cmp);
    let at = |all: &[f64], q: f64| all[((all.len() - 1) as f64 * q) as usize] * 1e3;
    Outcome {
        rate: num_tokens as f64 / now,
        median_ms: at(&gaps, 0.5),
        p99_ms: at(&gaps, 0.99),
        ttft_ms: at(&first, 0.5),
    }
}

fn main() {
    for (device, load) in DEVICES
        .iter()
        .flat_map(|d| d.loads.iter().map(move |l| (d, *l)))
    {
        println!("{}: {}", device.name, load.name);
        for ms in [0.0, 10.0, 15.0, 20.0] {
            let o = run(device, load, ms / 1e3);
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
