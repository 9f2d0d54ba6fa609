//! Where states are saved, and what begins from them, case by case. That no request ever computes
//! on another's state is tested by `properties.rs`.

mod common;

use common::{Wish, World, config};
use octavo_core::scheduler::{SchedulerConfig, StateConfig};

/// Blocks of 2 tokens, checkpoints every 8; of an answer every 2.
fn world(num_checkpoints: usize) -> World {
    World::new(SchedulerConfig {
        max_num_batched_tokens: 32,
        state: Some(StateConfig {
            num_checkpoints,
            interval: 8,
        }),
        ..config(64, 2)
    })
}

/// Runs to the end; how many tokens each step computed.
fn run(world: &mut World) -> Vec<usize> {
    let mut counts = Vec::new();
    while world.core.has_work() {
        assert!(world.schedule());
        counts.push(world.in_flight[0].batch.num_tokens);
        world.update();
        world.drain();
    }
    counts
}

fn prompt(length: u32) -> Vec<u32> {
    (0..length).map(|i| i % 11).collect()
}

fn cached(world: &World, id: u64) -> u32 {
    world.samples[&id].num_cached_tokens
}

#[test]
fn a_prompts_chunks_end_where_checkpoints_are_due() {
    let mut world = world(8);
    world.add(&Wish::new(&prompt(15), 1));
    // At 8 tokens, and at 12: a block is left behind the last checkpoint.
    assert_eq!(run(&mut world), [8, 4, 3]);
    world.add(&Wish::new(&prompt(15), 1));
    assert_eq!(run(&mut world), [3]);
    assert_eq!(cached(&world, 1), 12);
}

#[test]
fn a_hit_is_cut_to_the_longest_prefix_with_a_state() {
    let mut world = world(8);
    world.add(&Wish::new(&prompt(15), 1));
    run(&mut world);
    let mut other = prompt(15);
    other[11] = 12;
    world.add(&Wish::new(&other, 1));
    run(&mut world);
    // Five blocks are equal; the state there is of four.
    assert_eq!(cached(&world, 1), 8);
}

#[test]
fn the_next_turn_begins_within_the_last_answer() {
    let mut world = world(8);
    let ids = world.add(&Wish::new(&prompt(6), 10)).unwrap();
    run(&mut world);
    let mut turn = prompt(6);
    turn.extend(&world.samples[&ids[0]].received);
    turn.extend([1, 2, 3]);
    world.add(&Wish::new(&turn, 1));
    run(&mut world);
    // 15 tokens have been computed: the last was only sampled.
    assert_eq!(cached(&world, 1), 14);
}

#[test]
fn samples_of_a_prompt_begin_from_its_checkpoint() {
    for enable_prefix_caching in [false, true] {
        let mut world = World::new(SchedulerConfig {
            enable_prefix_caching,
            state: Some(StateConfig {
                num_checkpoints: 4,
                interval: 8,
            }),
            ..config(64, 2)
        });
        world.add(&Wish {
            num_samples: 3,
            ..Wish::new(&prompt(15), 3)
        });
        run(&mut world);
        assert_eq!([0, 1, 2].map(|id| cached(&world, id)), [0, 12, 12]);
    }
}

#[test]
fn without_checkpoints_nothing_is_found_and_nothing_is_cut() {
    let mut world = world(0);
    for id in 0..2 {
        world.add(&Wish::new(&prompt(15), 2));
        run(&mut world);
        assert_eq!(cached(&world, id), 0);
    }
}

#[test]
fn the_least_recently_used_checkpoint_goes_first() {
    let mut world = world(2);
    // One checkpoint each, at 4 tokens.
    let prompts = [0, 1, 2].map(|first| [vec![first; 5], vec![9; 2]].concat());
    for prompt in [&prompts[0], &prompts[1], &prompts[0], &prompts[2]] {
        world.add(&Wish::new(prompt, 1));
        run(&mut world);
    }
    for prompt in [&prompts[0], &prompts[1]] {
        world.add(&Wish::new(prompt, 1));
        run(&mut world);
    }
    assert_eq!([2, 4, 5].map(|id| cached(&world, id)), [4, 4, 0]);
}
