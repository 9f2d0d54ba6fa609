//! Properties: what is written is read, and any text may be cut anywhere.

use octavo_core::text::channels::{ChannelFormat, PieceKind, tool_call_formats};
use proptest::prelude::*;
use proptest::sample::select;
use serde_json::{Map, Value};

use crate::families::render;
use crate::support::{Call, calls_of, chars, fold, machine, text_of};

/// Formats whose calls begin the answer, without a marker.
const BARE: [&str; 4] = ["llama3_json", "xlam", "pythonic", "functionary_v3"];

/// The end of a parameter, and its successors, where strings stand as they are.
fn ends(format: &str) -> Option<(&'static str, [&'static str; 2])> {
    Some(match format {
        "qwen3_coder" | "seed_oss" => ("</parameter>", ["<parameter=", "</function>"]),
        "glm45" | "glm47" | "hy_v3" => ("</arg_value>", ["<arg_key>", "</tool_call>"]),
        "deepseek_v32" | "deepseek_v4" => (
            "</｜DSML｜parameter>",
            ["<｜DSML｜parameter name=\"", "</｜DSML｜invoke>"],
        ),
        "minimax_m2" => ("</parameter>", ["<parameter name=\"", "</invoke>"]),
        "minimax_m3" => ("]<]minimax[>[</", ["]<]minimax[>[<", "]<]minimax[>[<"]),
        "step3" => (
            "</steptml:parameter>",
            ["<steptml:parameter name=\"", "</steptml:invoke>"],
        ),
        "minicpm5" => ("</param>", ["<param name=\"", "</function>"]),
        "cohere_command4" => (
            "</cofl:tool_param>",
            ["<cofl:tool_param name=\"", "</cofl:tool_call>"],
        ),
        "solar_open2" => (
            "<|tool_arg:end|>",
            ["<|tool_arg:start|>", "<|tool_call:end|>"],
        ),
        _ => return None,
    })
}

/// True if a string cannot be told from what follows it: no parser could.
fn is_ambiguous(format: &str, text: &str) -> bool {
    if format == "minimax_m3" {
        return text.contains("]<]minimax[>[");
    }
    if matches!(format, "gemma4" | "functiongemma") {
        return text.contains("<|\"|>") || text.contains("<escape>");
    }
    let Some((end, followers)) = ends(format) else {
        return false;
    };
    text.match_indices(end).any(|(at, _)| {
        let rest = text[at + end.len()..].trim_start();
        followers
            .iter()
            .any(|follower| rest.starts_with(follower) || follower.starts_with(rest))
    })
}

fn strings(value: &Value) -> Vec<&str> {
    match value {
        Value::String(text) => vec![text],
        Value::Array(items) => items.iter().flat_map(strings).collect(),
        Value::Object(pairs) => pairs.values().flat_map(strings).collect(),
        _ => Vec::new(),
    }
}

/// Text with beginnings of markers in it.
fn prose() -> impl Strategy<Value = String> {
    let words = select(vec![
        "a",
        "é🦊",
        " ",
        "\n",
        "<",
        "</",
        "<tool_cal",
        "<think",
        "[TOOL_",
        "<｜tool▁",
        "<|",
        "{",
        "\"",
        "\\",
        "}",
        "]",
        "<function",
        "</parameter",
        "</param>",
        "</parameter>",
        "<parameter=",
        "</function>",
        "<arg_key>",
        "</arg_value>",
        "]<]minimax",
        "<|\"|",
        "<escap",
        "'",
        ",",
        ":",
        "=",
        "(",
        ")",
        "\t",
        "</｜DSML｜parameter>",
        "</invoke>",
        "<|tool_arg:end|>",
        "null",
        "1",
    ]);
    prop::collection::vec(words, 0..8).prop_map(|words| words.concat())
}

fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i32>().prop_map(Value::from),
        (-1000..1000i32).prop_map(|n| Value::from(f64::from(n) / 8.0)),
        prose().prop_map(Value::from),
    ];
    leaf.prop_recursive(2, 8, 3, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
            prop::collection::vec((select(vec!["k", "key_2"]), inner), 0..3).prop_map(|pairs| {
                let pairs = pairs
                    .into_iter()
                    .map(|(key, value)| (key.to_owned(), value));
                Value::Object(pairs.collect())
            }),
        ]
    })
}

/// A call whose arguments are of their schema's types.
fn call() -> impl Strategy<Value = Call> {
    let object = prop::collection::vec((select(vec!["k", "key_2"]), value()), 0..3);
    let object = object.prop_map(|pairs| {
        let pairs = pairs
            .into_iter()
            .map(|(key, value)| (key.to_owned(), value));
        Value::Object(pairs.collect::<Map<_, _>>())
    });
    let argument = prop_oneof![
        4 => (select(vec!["s", "text"]), prose().prop_map(Value::from)),
        1 => (Just("n"), any::<i32>().prop_map(Value::from)),
        1 => (Just("b"), any::<bool>().prop_map(Value::from)),
        1 => (Just("o"), object),
        1 => (Just("a"), prop::collection::vec(value(), 0..3).prop_map(Value::from)),
    ];
    let names = select(vec!["get_weather", "f", "ns.search-web"]);
    (names, prop::collection::vec(argument, 0..4)).prop_map(|(name, arguments)| {
        let arguments = arguments
            .into_iter()
            .map(|(key, value)| (key.to_owned(), value));
        Call {
            name: name.to_owned(),
            arguments: arguments.collect(),
        }
    })
}

fn cut<'a>(text: &'a str, sizes: &[usize]) -> Vec<&'a str> {
    let mut parts = Vec::new();
    let mut rest = text;
    let mut sizes = sizes.iter().cycle();
    while let (false, Some(&size)) = (rest.is_empty(), sizes.next()) {
        let mut at = size.min(rest.len());
        while !rest.is_char_boundary(at) {
            at += 1;
        }
        let (part, after) = rest.split_at(at);
        parts.push(part);
        rest = after;
    }
    parts
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 2_000, max_global_rejects: 1 << 20, ..Default::default() })]

    #[test]
    fn what_is_written_is_read(
        format in select(tool_call_formats()),
        calls in prop::collection::vec(call(), 1..4),
        around in (prose(), prose()),
        sizes in prop::collection::vec(1..9usize, 1..5),
    ) {
        for call in &calls {
            for text in strings(&Value::Object(call.arguments.clone())) {
                prop_assume!(!is_ambiguous(format, text));
            }
        }
        let known = ChannelFormat::new(Some(format), None, None).unwrap();
        let is_clean = |text: &str| !known.markers().iter().any(|marker| text.contains(marker));
        let (before, after) = (around.0.trim(), around.1.trim());
        let takes_text = !BARE.contains(&format) && format != "openai" && format != "llama4_pythonic";
        let (before, after) = if takes_text { (before, after) } else { ("", "") };
        let written = render(format, &calls);
        // Behind a call without a closing marker this might go on.
        let after = after.trim_start_matches(['{', '}', ']', ',', ';', '[', '<', ' ', '\n', '\t']);
        let text = match after {
            "" => format!("{before}{written}"),
            after => format!("{before}{written}\n{after}"),
        };
        // What is around the calls is no part of a marker.
        let places = known.markers().into_iter().filter_map(|marker| text.find(marker));
        prop_assume!(places.min().is_none_or(|at| at >= before.len()));
        prop_assume!(is_clean(before) && is_clean(after));

        let parts = cut(&text, &sizes);
        let pieces = fold(machine(format, None, false), &parts);
        prop_assert_eq!(&pieces, &fold(machine(format, None, false), &[&text]));
        let found = calls_of(&pieces);
        prop_assert_eq!(found.len(), calls.len(), "{}\n{:?}", text, pieces);
        for ((name, arguments, is_over), call) in found.iter().zip(&calls) {
            prop_assert_eq!(name, &call.name);
            prop_assert!(is_over);
            let value: Value = serde_json::from_str(arguments).unwrap();
            prop_assert_eq!(value, Value::Object(call.arguments.clone()), "{}\n{:?}", text, pieces);
        }
        let said: String = text_of(&pieces, PieceKind::Text).split_whitespace().collect();
        let expected: String = format!("{before}{after}").split_whitespace().collect();
        prop_assert_eq!(said, expected, "{}\n{:?}", text, pieces);
    }

    #[test]
    fn any_text_is_cut_anywhere(
        format in select(tool_call_formats()),
        calls in prop::collection::vec(call(), 1..3),
        noise in prop::collection::vec(prose(), 1..4),
        end in 0..400usize,
        in_reasoning in any::<bool>(),
        sizes in prop::collection::vec(1..9usize, 1..5),
    ) {
        // Markers and calls torn apart and put together anew.
        let written = render(format, &calls);
        let middle = written.chars().count() / 2;
        let torn: String = written.chars().skip(middle).chain(written.chars().take(middle)).collect();
        let whole = [noise.concat(), "<think>".to_owned(), torn, "</think>".to_owned(), written].concat();
        let text: String = whole.chars().take(end + 20).collect();
        let make = || machine(format, Some("think"), in_reasoning);
        let pieces = fold(make(), &[&text]);
        prop_assert_eq!(&pieces, &fold(make(), &cut(&text, &sizes)));
        prop_assert_eq!(&pieces, &fold(make(), &chars(&text)));
        // Where there is no call, nothing is lost.
        let plain = fold(machine(format, None, false), &[&text]);
        let has_frames = ["cohere_command3", "cohere_command4", "functionary_v3", "gigachat3",
                          "inkling", "openai"].contains(&format);
        if !has_frames && !plain.iter().any(|piece| piece.kind == PieceKind::Name) {
            prop_assert_eq!(text_of(&plain, PieceKind::Text), text.as_str());
        }
        let mut is_open = false;
        for piece in &pieces {
            // Calls follow one another, and have one name and one end.
            match piece.kind {
                PieceKind::Name => { prop_assert!(!is_open, "{}\n{:?}", text, pieces); is_open = true; }
                PieceKind::End => { prop_assert!(is_open); is_open = false; }
                PieceKind::Arguments | PieceKind::Id => prop_assert!(is_open),
                _ => prop_assert!(!is_open, "{}\n{:?}", text, pieces),
            }
        }
        for (_, arguments, is_over) in calls_of(&pieces) {
            if is_over {
                prop_assert!(serde_json::from_str::<Value>(&arguments).is_ok(), "{}\n{}", text, arguments);
            }
        }
    }
}
