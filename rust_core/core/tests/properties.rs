//! Random lives of an engine: whatever is added, aborted, failed and preempted, in whatever order
//! steps come back, every request ends with exactly the tokens it gets when it runs alone, and all
//! invariants hold after every operation.

mod common;

use common::{Wish, World};
use octavo_core::scheduler::{LongPrefill, Policy, PrefixSharing, SchedulerConfig, StateConfig};
use proptest::prelude::*;
use proptest::sample::select;

#[derive(Debug, Clone)]
enum Op {
    Add(Wish),
    Schedule,
    Update,
    Abort(usize),
    Fail(bool),
    Drain,
    ResetCache,
}

/// Prompts that are often equal, often share a prefix, and reach the limits now and then.
fn prompts() -> impl Strategy<Value = Vec<u32>> {
    let length = prop_oneof![8 => 1usize..12, 1 => 12usize..26];
    (length, 0u32..3, 0usize..12).prop_map(|(length, branch, at)| {
        (0..length)
            .map(|i| if i < at { i as u32 % 5 } else { branch })
            .collect()
    })
}

fn wishes() -> impl Strategy<Value = Wish> {
    (
        prompts(),
        prop_oneof![3 => Just(1usize), 1 => 2usize..=4],
        0usize..14,
        0usize..6,
        prop::option::of(0u32..13),
        prop::option::of(0u32..13),
        -2i64..3,
        select(vec![None, None, Some("a"), Some("b")]),
        any::<bool>(),
    )
        .prop_map(
            |(prompt, num_samples, max_tokens, min_tokens, eos, stop, priority, salt, streams)| {
                Wish {
                    prompt,
                    num_samples,
                    max_tokens,
                    min_tokens,
                    eos,
                    stop,
                    priority,
                    salt,
                    streams,
                }
            },
        )
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        6 => wishes().prop_map(Op::Add),
        12 => Just(Op::Schedule),
        12 => Just(Op::Update),
        2 => any::<usize>().prop_map(Op::Abort),
        1 => any::<bool>().prop_map(Op::Fail),
        2 => Just(Op::Drain),
        1 => Just(Op::ResetCache),
    ];
    prop::collection::vec(op, 1..120)
}

fn configs() -> impl Strategy<Value = SchedulerConfig> {
    (
        4usize..=20,
        1usize..=4,
        1usize..=5,
        1usize..=18,
        8usize..=24,
        any::<[bool; 6]>(),
        1usize..=3,
        prop::option::of((0usize..6, 1usize..30)),
        prop::option::of((1usize..4, 1usize..6, 0usize..8)),
    )
        .prop_map(
            |(
                num_blocks,
                block_size,
                max_num_seqs,
                budget,
                max_model_len,
                [caching, chunked, fcfs, capped, is_adaptive, timed],
                num_stages,
                state,
                sharing,
            )| {
                SchedulerConfig {
                    num_blocks,
                    block_size,
                    max_num_seqs,
                    max_num_batched_tokens: budget,
                    max_model_len,
                    enable_prefix_caching: caching,
                    enable_chunked_prefill: chunked,
                    long_prefill: LongPrefill {
                        threshold: if capped { 3 } else { 0 },
                        is_adaptive,
                    },
                    // Of a clock that gives a step some milliseconds.
                    max_step_s: if timed { 0.002 } else { 0.0 },
                    padded_prompts: Vec::new(),
                    policy: if fcfs { Policy::Fcfs } else { Policy::Priority },
                    num_stages,
                    state: state.map(|(num_checkpoints, interval)| StateConfig {
                        num_checkpoints,
                        interval,
                    }),
                    prefix_sharing: sharing.map(|(max_groups, min_tokens, min_saved_tokens)| {
                        PrefixSharing {
                            max_groups,
                            min_tokens,
                            min_saved_tokens,
                        }
                    }),
                }
            },
        )
}

fn live(config: SchedulerConfig, depth: usize, ops: Vec<Op>) -> World {
    let mut world = World::new(config);
    for op in ops {
        match op {
            Op::Add(wish) => {
                world.add(&wish);
            }
            Op::Schedule => {
                if world.in_flight.len() < depth {
                    world.schedule();
                }
            }
            Op::Update => world.update(),
            Op::Abort(which) => {
                if let Some(&id) = world.samples.keys().nth(which % world.samples.len().max(1)) {
                    world.abort(id);
                }
            }
            Op::Fail(newest) => {
                let last = world.in_flight.len().saturating_sub(1);
                world.fail(if newest { last } else { 0 });
            }
            Op::Drain => world.drain(),
            Op::ResetCache => world.core.reset_prefix_cache(),
        }
    }
    // Alone, a sample takes at most one step a token; together, and recomputed by each preemption,
    // they may take turns.
    let max_steps = 100 + 60 * world.samples.len() * world.samples.len().min(8);
    world.finish(depth, max_steps);
    world
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

    #[test]
    fn every_life_is_as_if_lived_alone(config in configs(), depth in 1usize..=4, ops in ops()) {
        live(config, depth, ops);
    }
}

/// The random lives are worth nothing if they never meet the hard cases.
#[test]
fn the_lives_meet_preemption_sharing_and_hits() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;
    let mut runner = TestRunner::deterministic();
    let (mut preemptions, mut hits, mut state_hits) = (0, 0, 0);
    for _ in 0..200 {
        let config = configs().new_tree(&mut runner).unwrap().current();
        let ops = ops().new_tree(&mut runner).unwrap().current();
        let has_state = config.state.is_some();
        let metrics = live(config, 2, ops).core.metrics().snapshot();
        preemptions += metrics.num_preemptions;
        if has_state {
            state_hits += metrics.prefix_cache_hits;
        } else {
            hits += metrics.prefix_cache_hits;
        }
    }
    assert!(
        preemptions > 50 && hits > 200 && state_hits > 30,
        "{preemptions} preemptions, {hits} hits, {state_hits} with states"
    );
}
