#![allow(missing_docs)] // criterion_group! makes functions without any
//! schedule + update in steady decode, without Python. `cargo bench --bench scheduler`

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use octavo_core::engine::outbox::Delivery;
use octavo_core::engine::{AddRequest, EngineCore, Sampled};
use octavo_core::scheduler::batch::Staging;
use octavo_core::scheduler::{LongPrefill, Policy, SchedulerConfig};

const BLOCK_SIZE: usize = 16;
const MAX_MODEL_LEN: usize = 1 << 20;

/// An engine in which `num_running` requests decode and `num_waiting` more would like to.
struct Decoding {
    core: EngineCore,
    buffer: Vec<i32>,
    tokens: Vec<i32>,
}

impl Decoding {
    fn new(num_running: usize, num_waiting: usize, num_blocks: usize, context: usize) -> Self {
        let core = EngineCore::new(
            SchedulerConfig {
                num_blocks,
                block_size: BLOCK_SIZE,
                max_num_seqs: num_running,
                max_num_batched_tokens: 8192,
                max_model_len: MAX_MODEL_LEN,
                enable_prefix_caching: true,
                enable_chunked_prefill: true,
                long_prefill: LongPrefill::default(),
                max_step_s: 0.0,
                padded_prompts: Vec::new(),
                policy: Policy::Fcfs,
                num_stages: 1,
                state: None,
                prefix_sharing: None,
            },
            1,
            None,
        )
        .expect("a valid config");
        let buffer = vec![0; core.scheduler().limits().required_len()];
        let mut this = Self {
            core,
            buffer,
            tokens: vec![0; num_running],
        };
        for id in 0..num_running + num_waiting {
            let length = context + id % BLOCK_SIZE;
            let prompt: Vec<u32> = (0..length).map(|i| (i * 31 + id * 977) as u32).collect();
            this.core
                .add_request(AddRequest {
                    request_ids: &[id as u64],
                    prompt: &prompt,
                    max_tokens: MAX_MODEL_LEN,
                    deliveries: vec![Delivery::Final],
                    ..AddRequest::default()
                })
                .expect("a valid request");
        }
        while this.core.stats().num_running < num_running {
            this.step();
        }
        (0..4).for_each(|_| this.step());
        this
    }

    fn step(&mut self) {
        let mut staging = Staging {
            buffer: &mut self.buffer,
        };
        let batch = self
            .core
            .schedule(&mut staging, 0.0)
            .expect("valid")
            .expect("work to do");
        let num_samples = batch.num_samples;
        // Tokens that vary, as block names must.
        self.tokens
            .iter_mut()
            .for_each(|token| *token = (*token * 5 + 1) & 0xffff);
        let sampled = Sampled {
            token_ids: &self.tokens[..num_samples],
            logprobs: None,
        };
        self.core
            .update(batch.step_id, sampled, 0.0)
            .expect("valid");
    }
}

fn steady_decode(c: &mut Criterion) {
    // A pool that outlasts the measurement: requests never end and never preempt.
    const ROOM: usize = 1 << 20;
    let mut group = c.benchmark_group("running");
    for num_running in [1, 64, 256, 1024] {
        let mut engine = Decoding::new(num_running, 0, ROOM, 1024);
        group.bench_function(BenchmarkId::from_parameter(num_running), |b| {
            b.iter(|| engine.step());
        });
    }
    group.finish();
    let mut group = c.benchmark_group("waiting_with_256_running");
    for num_waiting in [0, 10_000] {
        let mut engine = Decoding::new(256, num_waiting, ROOM, 1024);
        group.bench_function(BenchmarkId::from_parameter(num_waiting), |b| {
            b.iter(|| engine.step());
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(std::time::Duration::from_millis(200))
        .measurement_time(std::time::Duration::from_millis(500));
    targets = steady_decode
}
criterion_main!(benches);
