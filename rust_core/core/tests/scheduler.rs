//! The scheduler's decisions, case by case. That it never mixes up contents is tested by
//! `properties.rs`.

mod common;

use common::{Wish, World, config};
use octavo_core::scheduler::request::FinishReason;
use octavo_core::scheduler::{LongPrefill, Policy, SchedulerConfig};

fn ids(world: &World) -> Vec<u64> {
    world
        .in_flight
        .back()
        .map(|step| step.request_ids.clone())
        .unwrap_or_default()
}

fn step(world: &mut World) -> Vec<u64> {
    assert!(world.schedule());
    let ids = ids(world);
    world.update();
    ids
}

fn prompt(length: u32) -> Vec<u32> {
    (0..length).collect()
}

#[test]
fn decodes_come_first_and_prefills_fill_the_budget_in_chunks() {
    let mut world = World::new(config(32, 4));
    world.add(&Wish::new(&prompt(4), 20));
    step(&mut world);
    world.add(&Wish::new(&prompt(20), 4));
    world.add(&Wish::new(&prompt(9), 4));
    world.schedule();
    let batch = world.in_flight[0].batch;
    assert_eq!(
        (batch.num_tokens, batch.num_decodes, batch.num_reqs),
        (16, 1, 2)
    );
    assert_eq!((batch.num_samples, batch.max_query_len), (1, 15));
    world.update();
    world.schedule();
    let batch = world.in_flight[0].batch;
    // Of the prompt of 20, one cached block and 15 computed tokens leave one; the prompt of 9 finds
    // its two full blocks in what was just computed.
    assert_eq!(
        (batch.num_tokens, batch.num_reqs, batch.num_samples),
        (1 + 1 + 1, 3, 3)
    );
    world.update();
    world.finish(1, 50);
}

#[test]
fn without_chunks_a_prompt_waits_for_a_step_that_holds_it_whole() {
    let mut world = World::new(SchedulerConfig {
        enable_chunked_prefill: false,
        ..config(32, 4)
    });
    world.add(&Wish::new(&prompt(10), 4));
    world.add(&Wish::new(&[9; 7], 4));
    assert_eq!(step(&mut world), [0]);
    assert_eq!(step(&mut world), [0, 1]);
    // Longer than any step: split, as it would never run else.
    world.add(&Wish::new(&[8; 20], 2));
    world.schedule();
    assert_eq!(world.in_flight[0].batch.num_tokens, 16);
    world.update();
    world.finish(1, 50);
}

#[test]
fn a_long_prompt_leaves_others_their_share_of_a_step() {
    // The limit, or half of a step, until the second prompt is over.
    let wanted = [
        (false, vec![4 + 4, 4 + 4, 4 + 3]),
        (true, vec![8 + 8, 8 + 3]),
    ];
    for (is_adaptive, sizes) in wanted {
        let mut world = World::new(SchedulerConfig {
            long_prefill: LongPrefill {
                threshold: 4,
                is_adaptive,
            },
            ..config(32, 4)
        });
        world.add(&Wish::new(&[7; 20], 2));
        // Alone it takes the whole step.
        world.schedule();
        assert_eq!(world.in_flight[0].batch.num_tokens, 16);
        world.update();
        world.finish(1, 50);

        world.add(&Wish::new(&[8; 20], 1));
        world.add(&Wish::new(&[9; 11], 1));
        for size in sizes {
            world.schedule();
            assert_eq!(world.in_flight[0].batch.num_tokens, size, "{is_adaptive}");
            world.update();
        }
        world.finish(1, 50);
    }
}

#[test]
fn a_long_prompt_is_split_only_where_prompts_may_be() {
    let mut world = World::new(SchedulerConfig {
        enable_chunked_prefill: false,
        long_prefill: LongPrefill {
            threshold: 4,
            is_adaptive: false,
        },
        ..config(32, 4)
    });
    world.add(&Wish::new(&prompt(8), 1));
    world.add(&Wish::new(&[9; 8], 1));
    assert_eq!(step(&mut world), [0, 1]);
}

#[test]
fn stages_take_turns_at_groups_of_requests() {
    let mut world = World::new(SchedulerConfig {
        num_stages: 2,
        ..config(32, 4)
    });
    for id in 0..4 {
        world.add(&Wish::new(&[id; 3], 20));
    }
    let planned = |world: &mut World| {
        assert!(world.schedule());
        let step = world.in_flight.back().unwrap();
        (step.request_ids.clone(), step.batch.awaited_step)
    };
    assert_eq!(planned(&mut world), (vec![0, 1, 2, 3], None));
    // None is due yet; half of them wait on the device for the step before.
    assert_eq!(planned(&mut world), (vec![0, 1], Some(0)));
    assert_eq!(planned(&mut world), (vec![2, 3], Some(0)));
    assert_eq!(planned(&mut world), (vec![0, 1], Some(1)));
    world.update();
    assert_eq!(planned(&mut world), (vec![2, 3], Some(2)));
    // What has come back is not waited for.
    while !world.in_flight.is_empty() {
        world.update();
    }
    assert_eq!(planned(&mut world), (vec![0, 1], None));
    assert_eq!(planned(&mut world), (vec![2, 3], None));
    world.finish(3, 200);
}

#[test]
fn a_request_alone_waits_for_its_own_last_step() {
    let mut world = World::new(SchedulerConfig {
        num_stages: 3,
        ..config(32, 4)
    });
    world.add(&Wish::new(&prompt(3), 9));
    for awaited in [None, Some(0), Some(1), Some(2)] {
        assert!(world.schedule());
        assert_eq!(world.in_flight.back().unwrap().batch.awaited_step, awaited);
    }
    world.finish(4, 50);
}

#[test]
fn admission_is_by_arrival_or_by_priority() {
    for (policy, order) in [(Policy::Fcfs, [0, 1, 2]), (Policy::Priority, [2, 0, 1])] {
        let config = SchedulerConfig {
            policy,
            state: None,
            max_num_seqs: 1,
            ..config(32, 4)
        };
        let mut world = World::new(config);
        for priority in [5, 5, -1] {
            world.add(&Wish {
                priority,
                ..Wish::new(&prompt(3), 2)
            });
        }
        let served: Vec<u64> = (0..6).flat_map(|_| step(&mut world)).collect();
        assert_eq!(
            served,
            order.iter().flat_map(|&id| [id, id]).collect::<Vec<_>>()
        );
    }
}

#[test]
fn the_last_in_rank_is_preempted_and_comes_back_first() {
    for (policy, victim) in [(Policy::Fcfs, 2), (Policy::Priority, 0)] {
        let mut world = World::new(SchedulerConfig {
            policy,
            state: None,
            ..config(4, 4)
        });
        for priority in [9, 0, 0] {
            world.add(&Wish {
                priority,
                ..Wish::new(&[priority as u32; 4], 9)
            });
        }
        // Three blocks are full after the prompts; only one is left to grow into.
        step(&mut world);
        let survivors = step(&mut world);
        assert!(!survivors.contains(&victim), "{survivors:?}");
        assert!(world.core.stats().num_preemptions > 0);
        world.add(&Wish::new(&[3], 1));
        world.finish(1, 100);
    }
}

#[test]
fn a_large_request_at_the_head_is_not_overtaken() {
    let mut world = World::new(config(5, 4));
    world.add(&Wish::new(&prompt(4), 8));
    step(&mut world);
    world.add(&Wish::new(&[7; 16], 1));
    world.add(&Wish::new(&[6; 2], 1));
    assert_eq!(step(&mut world), [0]);
    assert_eq!(step(&mut world), [0]);
    world.finish(1, 50);
}

#[test]
fn run_ahead_stops_at_the_length_that_is_known() {
    let mut world = World::new(config(16, 4));
    world.add(&Wish::new(&prompt(3), 2));
    assert!(world.schedule());
    assert!(world.schedule());
    assert!(!world.schedule());
    assert!(world.core.has_work());
    world.update();
    assert!(!world.schedule());
    world.update();
    assert!(!world.core.has_work());
    world.drain();
    assert_eq!(
        world.samples[&0].finished,
        Some((FinishReason::Length, None))
    );
}

#[test]
fn an_end_in_flight_keeps_blocks_and_slot_until_the_step_is_back() {
    let mut world = World::new(SchedulerConfig {
        max_num_seqs: 1,
        ..config(16, 4)
    });
    world.add(&Wish::new(&prompt(6), 9));
    world.schedule();
    world.schedule();
    world.abort(0);
    let stats = world.core.stats();
    assert_eq!((stats.num_running, stats.num_free_blocks), (0, 14));
    world.add(&Wish::new(&prompt(2), 1));
    assert!(!world.schedule(), "the only slot is still in use");
    world.update();
    assert!(!world.schedule());
    world.update();
    assert_eq!(world.core.stats().num_free_blocks, 16);
    assert!(world.schedule());
    world.finish(1, 10);
    assert!(world.samples[&0].received.is_empty());
}

#[test]
fn a_full_prompt_hit_still_computes_the_last_token() {
    let mut world = World::new(config(16, 4));
    world.add(&Wish::new(&prompt(8), 1));
    world.finish(1, 10);
    world.add(&Wish::new(&prompt(8), 1));
    world.schedule();
    assert_eq!(world.in_flight[0].batch.num_tokens, 4);
    world.update();
    world.finish(1, 10);
    assert_eq!(world.samples[&1].num_cached_tokens, 4);
}

#[test]
fn generated_tokens_are_cached() {
    let mut world = World::new(config(16, 4));
    world.add(&Wish::new(&prompt(6), 7));
    world.finish(2, 20);
    let mut turn = prompt(6);
    turn.extend(&world.samples[&0].received);
    world.add(&Wish::new(&turn, 1));
    world.finish(1, 10);
    // 13 tokens; the last was sampled but never computed.
    assert_eq!(world.samples[&1].num_cached_tokens, 12);
}

#[test]
fn a_failed_step_poisons_nobody() {
    let mut world = World::new(config(16, 4));
    world.add(&Wish::new(&prompt(8), 4));
    world.schedule();
    world.fail(0);
    world.add(&Wish::new(&prompt(8), 4));
    world.finish(1, 20);
    assert_eq!(
        world.samples[&0].finished,
        Some((FinishReason::Error, None))
    );
    assert_eq!(world.samples[&1].num_cached_tokens, 0);
}

fn siblings(enable_prefix_caching: bool, num_blocks: usize) -> World {
    let config = SchedulerConfig {
        enable_prefix_caching,
        ..config(num_blocks, 4)
    };
    let mut world = World::new(config);
    world.add(&Wish {
        num_samples: 4,
        ..Wish::new(&prompt(10), 6)
    });
    world
}

#[test]
fn samples_share_the_prompts_full_blocks() {
    for caching in [false, true] {
        let mut world = siblings(caching, 32);
        assert_eq!(step(&mut world), [0]);
        world.schedule();
        let batch = world.in_flight[0].batch;
        assert_eq!((batch.num_reqs, batch.num_tokens), (4, 1 + 3 * 2));
        assert_eq!(world.core.stats().num_free_blocks, 32 - 2 - 4);
        world.update();
        world.finish(1, 20);
        let metrics = world.core.metrics().snapshot();
        assert_eq!(metrics.request_params_n.count(), 1);
        assert_eq!(metrics.request_params_n.sum(), 4.0);
    }
}

#[test]
fn samples_go_on_without_their_leader() {
    for caching in [false, true] {
        // Before the prompt is computed, in flight, and after.
        for steps in 0..3 {
            let mut world = siblings(caching, 32);
            for _ in 0..steps.min(1) {
                world.schedule();
            }
            if steps == 2 {
                world.update();
            }
            world.abort(0);
            world.finish(2, 40);
            for id in 1..4 {
                assert_eq!(
                    world.samples[&id].finished,
                    Some((FinishReason::Length, None))
                );
            }
        }
    }
}

#[test]
fn shared_blocks_are_given_up_when_memory_is_short() {
    for caching in [false, true] {
        let mut world = siblings(caching, 4);
        world.finish(2, 200);
        assert!(
            world
                .samples
                .values()
                .all(|sample| sample.received.len() == 6)
        );
    }
}

#[test]
fn block_updates_are_bounded_by_admitting_less() {
    // Rows of 8 blocks: 2 * 64 + 16 + 32 updates a step. Hits make admissions that are 8
    // blocks and 2 tokens, so that the blocks run out first.
    let config = SchedulerConfig {
        max_num_seqs: 64,
        max_num_batched_tokens: 64,
        ..config(900, 4)
    };
    let mut world = World::new(config);
    world.add(&Wish::new(&prompt(30), 1));
    world.finish(1, 10);
    for _ in 0..64 {
        world.add(&Wish::new(&prompt(30), 1));
    }
    let limit = world.core.scheduler().limits().max_block_updates;
    world.schedule();
    let batch = world.in_flight[0].batch;
    assert!(batch.num_block_updates <= limit && batch.num_block_updates + 8 > limit);
    assert!(batch.num_reqs < 64 && batch.num_tokens < 64);
    world.update();
    world.finish(1, 10);
}

#[test]
fn more_requests_than_a_steps_tokens_take_turns() {
    let config = SchedulerConfig {
        max_num_seqs: 8,
        max_num_batched_tokens: 3,
        ..config(64, 4)
    };
    let mut world = World::new(config);
    for id in 0..8 {
        world.add(&Wish::new(&[id; 2], 5));
    }
    world.finish(2, 100);
}

#[test]
fn zero_tokens_compute_the_prompt_and_sample_nothing() {
    let mut world = World::new(config(16, 4));
    world.add(&Wish::new(&prompt(20), 0));
    assert_eq!(step(&mut world), [0]);
    world.schedule();
    assert_eq!(world.in_flight[0].batch.num_samples, 0);
    world.update();
    world.finish(1, 10);
    assert_eq!(world.core.metrics().snapshot().prompt_tokens, 20);
}
