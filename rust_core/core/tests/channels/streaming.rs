//! Arguments leave while they come, and cost what they are long.

use octavo_core::text::channels::{PieceKind, tool_call_formats};
use serde_json::{Value, json};

use crate::families::render;
use crate::support::{Call, calls_of, chars, fold, machine, text_of};

#[test]
fn arguments_leave_as_they_come() {
    // A character may wait for the next one; a string never waits for its end.
    const MOST_HELD: usize = 8;
    for format in tool_call_formats() {
        let value = "x".repeat(300);
        let text = render(format, &[Call::new("f", json!({"s": value}))]);
        let mut machine = machine(format, None, false);
        let (mut num_read, mut num_left) = (0, 0);
        for part in chars(&text) {
            let mut pieces = Vec::new();
            machine.push(part, &mut pieces);
            num_read += usize::from(part == "x");
            let left = text_of(&pieces, PieceKind::Arguments);
            num_left += left.matches('x').count();
            assert!(
                num_left + MOST_HELD >= num_read,
                "{format}: {num_left} of {num_read}"
            );
        }
        assert_eq!(num_left, 300, "{format}");
    }
}

#[test]
fn long_arguments_take_no_longer_than_they_are() {
    // Quadratic work would not end.
    let value = "abc <\\\"\n</paramete r>é".repeat(5_000);
    for format in [
        "hermes",
        "qwen3_coder",
        "pythonic",
        "gemma4",
        "minimax_m3",
        "openai",
    ] {
        let text = render(
            format,
            &[Call::new("f", json!({"s": value, "o": {"k": value}}))],
        );
        let pieces = fold(machine(format, None, false), &chars(&text));
        let [(_, arguments, true)] = &calls_of(&pieces)[..] else {
            panic!("{format}: one call")
        };
        let arguments: Value = serde_json::from_str(arguments).unwrap();
        assert_eq!(arguments["s"], value, "{format}");
    }
    let openers = "<tool_call>{\"arguments\": {".repeat(20_000);
    let pieces = fold(machine("hermes", None, false), &chars(&openers));
    assert_eq!(text_of(&pieces, PieceKind::Text), openers);
}
