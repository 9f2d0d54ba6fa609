//! Prompts beside decodes on a device that is made up: tokens a second and times between tokens by
//! `max_step_s`, in virtual time. `cargo bench --bench prompt_room`
//!
//! The device is an 8B Llama on an H200, as bench/results tell: products that take as long as their
//! weights' reading or their arithmetic, attention by its bytes and its pairs. One step ahead.

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

const LOADS: [Load; 6] = [
    Load { name: "512/256 c=64", concurrency: 64, num_requests: 256, input_len: 512, output_len: 256, long: None },
    Load { name: "512/256 c=256", concurrency: 256, num_requests: 768, input_len: 512, output_len: 256, long: None },
    Load { name: "220/200 c=1000", concurrency: 1000, num_requests: 1000, input_len: 220, output_len: 200, long: None },
    Load { name: "512/256 c=8", concurrency: 8, num_requests: 32, input_len: 512, output_len: 256, long: None },
    Load { name: "4096/128 c=16", concurrency: 16, num_requests: 48, input_len: 4096, output_len: 128, long: None },
    Load { name: "8 decode, 8k prompts", concurrency: 8, num_requests: 8, input_len: 128, output_len: 1500, long: Some((8000, 0.5)) },
];

fn step_s(batch: &ScheduledBatch, entries: &[(usize, usize)]) -> f64 {
    let rows = batch.num_tokens as f64;
    // Rows of a captured shape.
    let chunk = (batch.num_tokens - batch.num_decodes) as f64;
    let sizes = [16.0, 32.0, 64.0, 128.0, 192.0, 256.0, 384.0, 512.0, 768.0, 1024.0];
    let padded = sizes.iter().copied().find(|&s| s >= chunk).unwrap_or(chunk);
    let rows = if chunk > 0.0 { rows - chunk + padded } else { rows };
    let products = (3.7e-3f64.powi(4) + (2.0e-5 * rows).powi(4)).powf(0.25);
    let mut attention = 0.0;
    for (i, &(start, count)) in entries.iter().enumerate() {
        attention += if i < batch.num_decodes {
            start as f64 * 131_072.0 / 3.7e12
        } else {
            count as f64 * (start as f64 + count as f64 / 2.0) * 1.9e-9 + start as f64 * 131_072.0 / 3.7e12
        };
    }
    products + attention + 2e-4
}

struct Outcome {
    rate: f64,
    median_ms: f64,
    p99_ms: f64,
    ttft_ms: f64,
}

fn run(load: Load, max_step_s: f64) -> Outcome {
    let config = SchedulerConfig {
        num_blocks: 1 << 16,
        block_size: 16,
        max_num_seqs: 256,
        max_num_batched_tokens: 8192,
        max_model_len: 16384,
        enable_prefix_caching: true,
        enable_chunked_prefill: true,
        long_prefill: LongPrefill::default(),
        max_step_s,
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
        let prompt: Vec<u32> = (0..len).map(|i| (i as u32 * 31 + id as u32 * 977) % 30_000).collect();
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
        let mut staging = Staging { buffer: &mut buffer };
        let batch = core.schedule(&mut staging, now).expect("valid");
        let planned = batch.is_some();
        if let Some(batch) = batch {
            let plan = core.plan(batch.step_id).expect("in flight");
            let entries: Vec<_> = plan.entries.iter().map(|e| (e.start as usize, e.count as usize)).collect();
            free = free.max(now) + step_s(&batch, &entries);
            in_flight.push_back((batch, free));
        }
        if in_flight.len() < 2 && planned {
            continue;
        }
        let (batch, end) = in_flight.pop_front().expect("something runs");
        now = now.max(end);
        let tokens: Vec<i32> = (0..batch.num_samples).map(|i| i as i32 + 5).collect();
        core.update(batch.step_id, Sampled { token_ids: &tokens, logprobs: None }, now).expect("its turn");
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
    for load in LOADS {
        println!("{}", load.name);
        for ms in [0.0, 10.0, 15.0, 20.0, 30.0, 50.0] {
            let o = run(load, ms / 1e3);
            println!(
                "  {ms:5.0} ms: {:8.0} tok/s, ITL p50 {:6.2} p99 {:7.2} ({:4.1}x), TTFT p50 {:7.1}",
                o.rate, o.median_ms, o.p99_ms, o.p99_ms / o.median_ms, o.ttft_ms
            );
        }
    }
}
