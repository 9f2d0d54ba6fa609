//! Steady decode does not allocate. A binary of its own: it counts every allocation.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use octavo_core::engine::outbox::Delivery;
use octavo_core::engine::{AddRequest, EngineCore, Sampled};
use octavo_core::scheduler::batch::Staging;
use octavo_core::scheduler::{LongPrefill, Policy, SchedulerConfig};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: forwards to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise, passed on.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise, passed on.
        unsafe { System.realloc(pointer, layout, new_size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn steady_decode_does_not_allocate() {
    const RUNNING: usize = 64;
    let mut core = EngineCore::new(
        SchedulerConfig {
            // Too few to last without evicting cached blocks of the past.
            num_blocks: RUNNING * 80 + 300,
            block_size: 16,
            max_num_seqs: RUNNING,
            max_num_batched_tokens: 8192,
            max_model_len: 4096,
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
    .unwrap();
    let mut buffer = vec![0; core.scheduler().limits().required_len()];
    let mut in_flight = std::collections::VecDeque::with_capacity(4);
    let mut tokens = vec![0; RUNNING];
    let mut step = |core: &mut EngineCore, depth: usize| {
        while in_flight.len() < depth {
            let mut staging = Staging {
                buffer: &mut buffer,
            };
            let Some(batch) = core.schedule(&mut staging, 1.0).unwrap() else {
                break;
            };
            in_flight.push_back((batch.step_id, batch.num_samples));
        }
        let (step_id, num_samples) = in_flight.pop_front().unwrap();
        tokens
            .iter_mut()
            .for_each(|token| *token = (*token * 5 + 7) & 0xffff);
        let sampled = Sampled {
            token_ids: &tokens[..num_samples],
            logprobs: None,
        };
        core.update(step_id, sampled, 1.0).unwrap();
    };
    // A first generation fills the cache with blocks to evict.
    for generation in 0..2 {
        for id in 0..RUNNING as u64 {
            let id = generation * 1000 + id;
            let prompt: Vec<u32> = (0..256 + id as u32 % 16)
                .map(|i| i * 7 + id as u32)
                .collect();
            core.add_request(AddRequest {
                request_ids: &[id],
                prompt: &prompt,
                max_tokens: if generation == 0 { 300 } else { 900 },
                deliveries: vec![Delivery::Final],
                ..AddRequest::default()
            })
            .unwrap();
        }
        let warm_up = if generation == 0 { 400 } else { 40 };
        for _ in 0..warm_up {
            step(&mut core, 2);
            if !core.has_work() {
                break;
            }
        }
    }
    assert_eq!(core.stats().num_running, RUNNING);
    let cached_before = core.stats().num_cached_blocks;
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    for _ in 0..800 {
        step(&mut core, 2);
    }
    let count = ALLOCATIONS.load(Ordering::Relaxed) - before;
    assert_eq!(core.stats().num_running, RUNNING);
    assert!(core.stats().num_cached_blocks >= cached_before);
    assert_eq!(count, 0, "allocations in 800 steps");
    core.check_integrity().unwrap();
}
