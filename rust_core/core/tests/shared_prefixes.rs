//! Groups of decodes that share a prefix: they are found, told apart and left again.

mod common;

use common::{Wish, World, config};
use octavo_core::scheduler::{PrefixSharing, SchedulerConfig};

fn world(max_groups: usize, min_saved_tokens: usize) -> World {
    World::new(SchedulerConfig {
        max_num_seqs: 8,
        max_num_batched_tokens: 64,
        max_model_len: 64,
        prefix_sharing: Some(PrefixSharing {
            max_groups,
            min_tokens: 8,
            min_saved_tokens,
        }),
        ..config(200, 4)
    })
}

fn prompt(head: u32, own: u32) -> Vec<u32> {
    let mut tokens: Vec<u32> = (0..20).map(|n| (n * 7 + head) % 13).collect();
    tokens.extend([own % 13, own % 5, own % 3]);
    tokens
}

/// (groups, members) of each step to the end.
fn run(world: &mut World) -> Vec<(usize, usize)> {
    let mut found = Vec::new();
    while world.core.has_work() {
        assert!(world.schedule());
        let launched = &world.in_flight[0].batch;
        let plan = world.core.plan(launched.step_id).unwrap();
        found.push((plan.shared.groups.len(), plan.shared.members.len()));
        world.update();
        world.drain();
    }
    found
}

/// The first request computes the prefixes that the others then begin with.
fn start(world: &mut World, heads: &[u32]) {
    for &head in heads {
        world.add(&Wish::new(&prompt(head, 0), 1));
    }
    run(world);
    for own in 1..4 {
        for &head in heads {
            world.add(&Wish::new(&prompt(head, own), 4 + own as usize));
        }
    }
}

#[test]
fn decodes_that_begin_with_the_same_blocks_are_a_group() {
    let mut world = world(4, 0);
    start(&mut world, &[1, 2]);
    let found = run(&mut world);
    assert!(found.contains(&(2, 6)), "{found:?}");
    // The answers end one after another; one request alone shares with nobody.
    assert_eq!(found.last(), Some(&(0, 0)));
}

#[test]
fn few_groups_and_little_saved_are_left_alone() {
    let mut few = world(1, 0);
    start(&mut few, &[1, 2]);
    assert_eq!(run(&mut few).iter().max(), Some(&(1, 3)));
    // Three requests that share 20 tokens need not read 40.
    let mut world = world(4, 41);
    start(&mut world, &[1, 2]);
    assert_eq!(run(&mut world).iter().max(), Some(&(0, 0)));
}
