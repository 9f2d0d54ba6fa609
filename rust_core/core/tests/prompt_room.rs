//! Prompts beside decodes: as much of a step as its time allows, on a device with a clock of its own.

mod common;

use common::{Wish, World, config};
use octavo_core::scheduler::SchedulerConfig;

/// Seconds that a token of a prompt takes on the device; a decode takes the world's own millisecond.
const PER_TOKEN_S: f64 = 0.5e-3;

/// Tokens of prompts that steps are padded to.
const PADDED: [usize; 5] = [16, 32, 64, 128, 256];

fn world(max_step_s: f64) -> World {
    World::new(SchedulerConfig {
        padded_prompts: PADDED.to_vec(),
        max_num_batched_tokens: 1024,
        max_model_len: 2048,
        max_num_seqs: 16,
        max_step_s,
        ..config(2048, 4)
    })
}

/// Runs one step: the tokens of prompts in it.
fn step(world: &mut World, per_token_s: f64) -> usize {
    assert!(world.schedule());
    let batch = &world.in_flight.back().unwrap().batch;
    let num_prompt = batch.num_tokens - batch.num_decodes;
    world.now_s += num_prompt as f64 * per_token_s;
    world.update();
    world.drain();
    num_prompt
}

fn prompt(seed: u32, len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| (i * 7 + seed) % 13).collect()
}

/// One request decodes for long; its prompt took one step.
fn decoding(max_step_s: f64) -> World {
    let mut world = world(max_step_s);
    world.add(&Wish::new(&prompt(1, 200), 1000));
    assert_eq!(step(&mut world, PER_TOKEN_S), 200);
    for _ in 0..4 {
        assert_eq!(step(&mut world, PER_TOKEN_S), 0);
    }
    world
}

/// The chunks of a prompt that has come, until it is done.
fn chunks(world: &mut World, len: usize, per_token_s: f64) -> Vec<usize> {
    let mut chunks = Vec::new();
    while chunks.iter().sum::<usize>() < len {
        chunks.push(step(world, per_token_s));
        assert!(chunks.len() < 1000);
    }
    chunks
}

#[test]
fn a_prompt_alone_or_without_a_limit_is_computed_at_once() {
    let mut alone = world(0.01);
    alone.add(&Wish::new(&prompt(2, 1000), 2));
    assert_eq!(chunks(&mut alone, 1000, PER_TOKEN_S), [1000]);
    alone.finish(1, 100);

    let mut unlimited = decoding(0.0);
    unlimited.add(&Wish::new(&prompt(2, 1000), 2));
    assert_eq!(chunks(&mut unlimited, 1000, PER_TOKEN_S), [1000]);
}

#[test]
fn beside_decodes_a_step_keeps_to_its_time() {
    for (max_step_s, wanted) in [(0.02, 32), (0.04, 64)] {
        let mut world = decoding(max_step_s);
        world.add(&Wish::new(&prompt(2, 1000), 2));
        let chunks = chunks(&mut world, 1000, PER_TOKEN_S);
        // The first by a guess, and then the largest size within time.
        for &chunk in &chunks[1..] {
            assert!(chunk <= wanted, "{chunks:?}");
        }
        let num_largest = chunks.iter().filter(|&&chunk| chunk == wanted).count();
        assert!(num_largest * wanted > 800, "{chunks:?}");
        world.finish(2, 2000);
    }
}

#[test]
fn where_nothing_is_padded_the_time_is_used_up() {
    let mut world = World::new(SchedulerConfig {
        max_num_batched_tokens: 1024,
        max_model_len: 2048,
        max_step_s: 0.02,
        ..config(2048, 4)
    });
    world.add(&Wish::new(&prompt(1, 200), 1000));
    for _ in 0..5 {
        step(&mut world, PER_TOKEN_S);
    }
    world.add(&Wish::new(&prompt(2, 1000), 2));
    let chunks = chunks(&mut world, 1000, PER_TOKEN_S);
    // (20 - 1) / 0.5, less what planning takes on this clock.
    let middle = &chunks[2..chunks.len() - 1];
    assert!(
        middle.iter().all(|chunk| (34..=38).contains(chunk)),
        "{chunks:?}"
    );
    world.finish(1, 2000);
}

#[test]
fn a_device_that_has_become_slower_gets_less() {
    let mut world = decoding(0.04);
    world.add(&Wish::new(&prompt(2, 1800), 2));
    let mut last = 0;
    for _ in 0..10 {
        last = step(&mut world, PER_TOKEN_S);
    }
    assert_eq!(last, 64);
    // One slow step is no reason yet.
    step(&mut world, 10.0 * PER_TOKEN_S);
    assert_eq!(step(&mut world, PER_TOKEN_S), 64);
    for _ in 0..10 {
        last = step(&mut world, 2.0 * PER_TOKEN_S);
    }
    assert_eq!(last, 32);
    world.finish(1, 2000);
}

#[test]
fn a_prompt_makes_progress_however_slow_the_device() {
    let mut world = decoding(0.01);
    world.add(&Wish::new(&prompt(2, 300), 2));
    let chunks = chunks(&mut world, 300, 1.0);
    // 1024 / 128 tokens; now and then a step goes without, to know its time.
    let num_empty = chunks.iter().filter(|&&chunk| chunk == 0).count();
    let middle = &chunks[2..chunks.len() - 1];
    assert!(
        middle.iter().all(|&chunk| chunk == 0 || chunk == 8),
        "{chunks:?}"
    );
    assert!(num_empty <= 1, "{chunks:?}");
    world.finish(1, 2000);
}

#[test]
fn the_time_of_decodes_is_looked_at_again() {
    let mut world = decoding(0.01);
    world.add(&Wish::new(&prompt(2, 2000), 2));
    let chunks = chunks(&mut world, 2000, 1.0);
    let empty: Vec<_> = (0..chunks.len()).filter(|&i| chunks[i] == 0).collect();
    assert!(chunks.len() > 120 && !empty.is_empty(), "{chunks:?}");
    assert!(
        empty.windows(2).all(|pair| pair[1] - pair[0] == 64),
        "{empty:?}"
    );
    world.finish(1, 4000);
}

#[test]
fn many_prompts_beside_one_decode_get_more() {
    let mut one = decoding(0.02);
    let mut many = decoding(0.02);
    one.add(&Wish::new(&prompt(2, 900), 2));
    for seed in 2..12 {
        many.add(&Wish::new(&prompt(seed, 900), 2));
    }
    let tokens = |world: &mut World| (0..4).map(|_| step(world, PER_TOKEN_S)).sum::<usize>();
    assert!(tokens(&mut many) >= 2 * tokens(&mut one));
    one.finish(1, 2000);
    many.finish(1, 4000);
}
