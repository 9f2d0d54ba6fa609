//! The times of steps as the scheduler learns them.

use octavo_core::scheduler::step_times::{Chunks, StepTimes};
use proptest::prelude::*;

/// Of a device: seconds of a step of decodes alone, a token of a prompt, a pair of tokens.
const DECODES_S: f64 = 5e-3;
const PER_TOKEN_S: f64 = 2e-5;
const PER_PAIR_S: f64 = 2e-9;

fn device_s(start: usize, count: usize) -> f64 {
    let Chunks { tokens, pairs } = Chunks::one(start, count);
    DECODES_S + PER_TOKEN_S * tokens + PER_PAIR_S * pairs
}

fn error(times: &StepTimes, start: usize, count: usize) -> f64 {
    let truth = device_s(start, count) - DECODES_S;
    (times.chunks_s(Chunks::one(start, count)) / truth - 1.0).abs()
}

/// Has seen prompts of 8,192 tokens in chunks of 512 beside decodes.
fn learned(per_token_s: f64) -> StepTimes {
    let mut times = StepTimes::new(per_token_s);
    times.observe_decodes(DECODES_S);
    for step in 0..64 {
        let start = step % 16 * 512;
        times.observe(Chunks::one(start, 512), device_s(start, 512), true);
    }
    times
}

#[test]
fn any_guess_ends_at_what_steps_take() {
    for guess in [1e-7, 2e-5, 1e-2] {
        let times = learned(guess);
        for start in [0, 1000, 4000, 8000] {
            let found = error(&times, start, 512);
            assert!(found < 0.1, "{found} at {start}, from {guess}");
        }
    }
}

#[test]
fn one_slow_step_changes_nothing() {
    let mut times = learned(1e-4);
    let before = times.chunks_s(Chunks::one(2048, 512));
    times.observe(Chunks::one(2048, 512), 3.0, true);
    times.observe(Chunks::one(2560, 512), device_s(2560, 512), true);
    let after = times.chunks_s(Chunks::one(2048, 512));
    assert!((after / before - 1.0).abs() < 0.05, "{before} -> {after}");
}

#[test]
fn one_slow_step_of_decodes_is_forgotten() {
    let mut times = learned(1e-4);
    times.observe_decodes(3.0);
    assert!(times.decodes_s() <= 1.5 * DECODES_S);
    for _ in 0..5 {
        times.observe_decodes(DECODES_S);
    }
    assert!((times.decodes_s() / DECODES_S - 1.0).abs() < 0.05);
}

#[test]
fn prompts_alone_are_a_guess_until_there_were_decodes_beside_one() {
    let mut times = StepTimes::new(1.0);
    for _ in 0..40 {
        times.observe(Chunks::one(0, 100), 0.01, false);
    }
    assert!((times.chunks_s(Chunks::one(0, 100)) / 0.01 - 1.0).abs() < 0.05);
    for _ in 0..40 {
        times.observe(Chunks::one(0, 100), 0.002, true);
        times.observe(Chunks::one(0, 100), 0.01, false);
    }
    assert!((times.chunks_s(Chunks::one(0, 100)) / 0.002 - 1.0).abs() < 0.05);
}

fn steps() -> impl Strategy<Value = Vec<(usize, usize, f64, bool)>> {
    let step = (
        0usize..100_000,
        1usize..10_000,
        -1.0..100.0f64,
        any::<bool>(),
    );
    prop::collection::vec(step, 0..40)
}

proptest! {
    #[test]
    fn more_takes_longer_whatever_was_measured(
        guess in 1e-9..1.0f64,
        steps in steps(),
        seconds in 1e-6..10.0f64,
        start in 0usize..100_000,
    ) {
        let mut times = StepTimes::new(guess);
        for (start, count, seconds, has_decodes) in steps {
            times.observe_decodes(seconds.abs() / 10.0);
            times.observe(Chunks::one(start, count), seconds, has_decodes);
        }
        let longest = times.tokens_within(seconds, start);
        prop_assert!(times.chunks_s(Chunks::one(start, longest)) <= seconds * 1.001);
        prop_assert!(times.chunks_s(Chunks::one(start, longest + 1)) >= seconds * 0.999);
        prop_assert!(times.tokens_within(seconds, start + 1000) <= longest);
        prop_assert!(times.tokens_within(seconds * 2.0, start) >= longest);
        let one = times.chunks_s(Chunks::one(start, 100));
        prop_assert!(one > 0.0 && one.is_finite());
        prop_assert!(times.chunks_s(Chunks::one(start, 101)) > one);
        prop_assert!(times.chunks_s(Chunks::one(start + 1000, 100)) > one);
        prop_assert!(times.decodes_s().is_finite());
    }
}
