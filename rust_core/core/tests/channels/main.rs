//! Whatever the envelope and however its text is cut, the pieces are what was written.

mod families;
mod grammars;
mod properties;
mod reasoning;
mod streaming;
mod support;

use std::sync::Arc;

use octavo_core::text::channels::{ChannelFormat, Channels, Machine, PieceKind, tool_call_formats};
use serde_json::{Value, json};

use crate::families::render;
use crate::support::{Call, calls_of, chars, fold, lines, machine, parse, text_of};

#[test]
fn every_format_reads_what_its_family_writes() {
    let calls = [
        Call::new(
            "get_weather",
            json!({"s": "São \"Paulo\" {x}\n\\d é 🦊", "n": 3, "x": -1.5, "b": true,
                   "o": {"k": ["v", null, {"z": "}"}]}, "a": [1, "]"], "e": "red"}),
        ),
        Call::new("f", json!({})),
        Call::new(
            "ns.search-web",
            json!({"s": "", "text": " <tool_call> \n\n"}),
        ),
    ];
    for format in tool_call_formats() {
        for count in 1..=calls.len() {
            let calls = &calls[..count];
            let text = render(format, calls);
            let make = || machine(format, None, false);
            let pieces = fold(make(), &[&text]);
            assert_eq!(pieces, fold(make(), &chars(&text)), "{format}");
            let found = calls_of(&pieces);
            assert_eq!(found.len(), count, "{format}: {text}\n{pieces:?}");
            for ((name, arguments, is_over), call) in found.iter().zip(calls) {
                assert_eq!(name, &call.name, "{format}");
                assert!(is_over, "{format}: {text}\n{pieces:?}");
                let value: Value = serde_json::from_str(arguments).expect(arguments);
                assert_eq!(
                    value,
                    Value::Object(call.arguments.clone()),
                    "{format}: {text}"
                );
            }
            assert_eq!(text_of(&pieces, PieceKind::Text), "", "{format}: {text}");
        }
    }
}

#[test]
fn valid_json_leaves_as_it_came() {
    let arguments = r#"{ "a" :[1 ,2.50, -1e5],"b":{"c":"\u00e9\ud83e\udd8a\/"} }"#;
    let text = format!(r#"<tool_call>{{"arguments":{arguments}, "name":"f"}}</tool_call>"#);
    assert_eq!(
        parse("hermes", None, false, &text),
        [format!("call: f({arguments})")]
    );
    let text = format!(r#"<tool_call>{{"name":"f","arguments":{arguments}}}</tool_call>"#);
    assert_eq!(
        parse("hermes", None, false, &text),
        [format!("call: f({arguments})")]
    );
}

#[test]
fn text_stands_around_calls() {
    let hermes = |text| parse("hermes", Some("think"), false, text);
    assert_eq!(
        hermes(
            "Let me see.\n\n<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>\nDone."
        ),
        ["text: Let me see.", "call: f({})", "text: \nDone."]
    );
    assert_eq!(
        hermes("\n<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>\n\n"),
        ["call: f({})"]
    );
    assert_eq!(hermes(" \n plain \n"), ["text:  \n plain \n"]);
    assert_eq!(
        hermes(
            "a<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call> b \
                <tool_call>{\"name\": \"g\", \"arguments\": {}}</tool_call>"
        ),
        ["text: a", "call: f({})", "text:  b", "call: g({})"]
    );
}

#[test]
fn what_is_no_call_is_text() {
    for text in [
        "a <tool_call> b",
        "<tool_call>",
        "<tool_call",
        "<tool_call></tool_call>",
        "<tool_call>{\"name\": }</tool_call>",
        "<tool_call>{\"arguments\": {}}</tool_call> and",
        "<tool_call>{\"name\": \"f\", \"arguments\": 5}",
        "<tool_call>{\"name\": \"f\", \"argu",
        "x < y <too l_call> <tool_call>[1, 2]",
        "</tool_call>",
    ] {
        assert_eq!(
            parse("hermes", None, false, text),
            [format!("text: {text}")]
        );
    }
    for text in [
        "<tool_call>\nno\n</tool_call>",
        "<function=f",
        "<function=>\n</function>",
        "<function=f>\ntext\n</function>",
        "use `<function=` here",
    ] {
        assert_eq!(
            parse("qwen3_coder", None, false, text),
            [format!("text: {text}")]
        );
    }
    for text in [
        "{\"a\": 1}",
        "{\"name\": \"Bo\", \"age\": 3}",
        "{\"name\": \"zzz\", \"parameters\": {}}",
        "{",
        "[1]",
    ] {
        assert_eq!(
            parse("llama3_json", None, false, text),
            [format!("text: {text}")]
        );
    }
    for text in ["[f]", "[f(1)]", "[a link](x)", "[zzz(a=1)]", "[", "[f(a"] {
        assert_eq!(
            parse("pythonic", None, false, text),
            [format!("text: {text}")]
        );
    }
    for text in [
        "[TOOL_CALLS]",
        "[TOOL_CALLS]f",
        "[TOOL_CALLS]f[ARGS]x",
        "[TOOL_CALLS] [",
        "[TOOL_CALLS]f g{}",
    ] {
        assert_eq!(
            parse("mistral", None, false, text),
            [format!("text: {text}")]
        );
    }
}

#[test]
fn a_failed_call_gives_way_to_the_next() {
    assert_eq!(
        parse(
            "hermes",
            None,
            false,
            "<tool_call><tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>"
        ),
        ["call: f({})"]
    );
    assert_eq!(
        parse(
            "qwen3_coder",
            None,
            false,
            "<function=f<function=f>\n</function>"
        ),
        ["text: <function=f", "call: f({})"]
    );
    assert_eq!(
        parse(
            "deepseek_v31",
            None,
            false,
            "<｜tool▁calls▁begin｜>x<｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
        ),
        ["text: <｜tool▁calls▁begin｜>x", "call: f({})"]
    );
}

#[test]
fn broken_arguments_are_closed_and_the_rest_is_text() {
    assert_eq!(
        parse(
            "hermes",
            None,
            false,
            "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": [1, <b>}}</tool_call>"
        ),
        ["call: f({\"a\": [1]})", "text: <b>}}</tool_call>"]
    );
    assert_eq!(
        parse(
            "hermes",
            None,
            false,
            "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": 1}\n</tool_call>x"
        ),
        ["call: f({\"a\": 1})", "text: x"]
    );
    assert_eq!(
        parse(
            "hermes",
            None,
            false,
            "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": 1}}}\n</tool_call>x"
        ),
        ["call: f({\"a\": 1})", "text: x"]
    );
    assert_eq!(
        parse(
            "glm45",
            None,
            false,
            "<tool_call>f\n<arg_key>s</arg_key>\nx y"
        ),
        ["call: f({})", "text: <arg_key>s</arg_key>\nx y"]
    );
}

#[test]
fn slips_of_models_are_mended() {
    let one = |json: &str| {
        let text = format!("<tool_call>{{\"name\": \"f\", \"arguments\": {json}}}</tool_call>");
        parse("hermes", None, false, &text)
    };
    for (written, expected) in [
        ("{\"a\": \"x\ny\t\u{1}\"}", "{\"a\": \"x\\ny\\t\\u0001\"}"),
        (r#"{"a": "\d+\.\'"}"#, r#"{"a": "\\d+\\.'"}"#),
        (
            r#"{'a': 'it"s', b: True, "c": None,}"#,
            r#"{"a": "it\"s", "b": true, "c": null}"#,
        ),
        ("[1, 2, ]", "[1, 2]"),
        (
            r#"{"a": .5, "b": 007, "c": NaN}"#,
            r#"{"a": 0.5, "b": 7, "c": null}"#,
        ),
        (
            r#"{"a": "\ud83e x \udd8a \ud83e\udd8a"}"#,
            r#"{"a": "\ufffd x \ufffd \ud83e\udd8a"}"#,
        ),
        (r#"{"a": "\u12 \uzz"}"#, r#"{"a": "\\u12 \\uzz"}"#),
        ("null", "{}"),
        (r#""{\"a\": 1}""#, r#"{"a": 1}"#),
        (r#""no json""#, r#""no json""#),
    ] {
        assert_eq!(one(written), [format!("call: f({expected})")], "{written}");
    }
    assert_eq!(
        parse(
            "hermes",
            None,
            false,
            "<tool_call>{\"type\": \"function\", \"function\": {\"name\": \"f\", \"arguments\": {\"a\": 1}}, \"id\": \"x\"}</tool_call>"
        ),
        ["call: f({\"a\": 1}#x )"]
    );
    assert_eq!(
        parse(
            "qwen3_coder",
            None,
            false,
            "<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>"
        ),
        ["call: f({})"]
    );
    assert_eq!(
        parse(
            "qwen3_coder",
            None,
            false,
            "<function=f>\n</function>\n</tool_call>\n<function=f>\n</function>"
        ),
        ["call: f({})", "call: f({})"]
    );
    assert_eq!(
        parse(
            "qwen3_coder",
            None,
            false,
            "<tool_call><function=f><parameter=s>a</parameter><parameter=n>1</parameter></function></tool_call>"
        ),
        ["call: f({\"s\": \"a\", \"n\": 1})"]
    );
}

#[test]
fn values_may_hold_tags() {
    let value = "x</parameter> <parameter y</function>\n</parameter>\n\n";
    let text = format!("<function=f>\n<parameter=s>\n{value}\n</parameter>\n</function>");
    assert_eq!(
        parse("qwen3_coder", None, false, &text),
        [format!("call: f({{\"s\": {}}})", json!(value))]
    );
}

#[test]
fn types_follow_the_schema() {
    let one = |key: &str, value: &str| {
        let text = format!("<function=f>\n<parameter={key}>\n{value}\n</parameter>\n</function>");
        parse("qwen3_coder", None, false, &text).concat()
    };
    assert_eq!(one("s", "5"), r#"call: f({"s": "5"})"#);
    assert_eq!(one("unknown", "5"), r#"call: f({"unknown": "5"})"#);
    assert_eq!(one("n", "5"), r#"call: f({"n": 5})"#);
    assert_eq!(one("n", "five"), r#"call: f({"n": "five"})"#);
    assert_eq!(one("b", "True"), r#"call: f({"b": true})"#);
    assert_eq!(one("o", "{'a': None}"), r#"call: f({"o": {"a": null}})"#);
    assert_eq!(one("a", "[1, 2"), r#"call: f({"a": "[1, 2"})"#);
}

#[test]
fn ids_come_with_their_calls() {
    assert_eq!(
        parse(
            "kimi_k2",
            None,
            false,
            "<|tool_call_begin|>functions.f:12<|tool_call_argument_begin|>{}<|tool_call_end|>"
        ),
        ["call: f(#functions.f:12 {})"]
    );
    assert_eq!(
        parse(
            "mistral",
            None,
            false,
            "[TOOL_CALLS]f[CALL_ID]abc123def[ARGS]{}[TOOL_CALLS]f{}"
        ),
        ["call: f(#abc123def {})", "call: f({})"]
    );
    assert_eq!(
        parse(
            "mistral",
            None,
            false,
            "[TOOL_CALLS] [{\"id\": \"abc123def\", \"name\": \"f\", \"arguments\": {}}]"
        ),
        ["call: f(#abc123def {})"]
    );
    assert_eq!(
        parse(
            "cohere_command3",
            None,
            false,
            "<|START_ACTION|>[{\"tool_call_id\": \"0\", \"tool_name\": \"f\", \"parameters\": {}}]<|END_ACTION|>"
        ),
        ["call: f(#0 {})"]
    );
}

#[test]
fn a_cut_off_answer_leaves_nothing_wrong() {
    // Bytes of a marker, white space and half a number are no part of an argument.
    assert_eq!(
        parse(
            "qwen3_coder",
            None,
            false,
            "<function=f>\n<parameter=s>\nab\n</par"
        ),
        ["call: f({\"s\": \"ab"]
    );
    assert_eq!(
        parse(
            "hermes",
            None,
            false,
            "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": 12"
        ),
        ["call: f({\"a\": "]
    );
    // The closing marker may miss.
    assert_eq!(
        parse(
            "hermes",
            None,
            false,
            "<tool_call>{\"name\": \"f\", \"arguments\": {}}\n</tool"
        ),
        ["call: f({})"]
    );
    assert_eq!(
        parse(
            "hermes",
            None,
            false,
            "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": 1}"
        ),
        ["call: f({\"a\": 1})"]
    );
}

#[test]
fn overrides_replace_the_table() {
    let parse = |tool_calls: Option<&str>, overrides: &str, text: &str| {
        let format = ChannelFormat::new(tool_calls, None, Some(overrides)).unwrap();
        let channels = Channels::new(Arc::new(format), false, true, true, &[]);
        lines(&fold(Machine::new(Arc::new(channels)), &[text]))
    };
    assert_eq!(
        parse(
            None,
            r#"{"call": ["<<", ">>"]}"#,
            "a<<{\"name\": \"f\", \"arguments\": {}}>>b"
        ),
        ["text: a", "call: f({})", "text: b"]
    );
    assert_eq!(
        parse(
            Some("hermes"),
            r#"{"call": ["<fn>", "</fn>"], "keys": ["tool", "with", ""]}"#,
            "<fn>{\"tool\": \"f\", \"with\": {\"a\": 1}}</fn>"
        ),
        ["call: f({\"a\": 1})"]
    );
    assert_eq!(
        parse(
            None,
            r#"{"style": "tags", "call": ["<do ", "</do>"], "name_end": [">\n"], "parameter": ["<p ", ">", "</p>"]}"#,
            "<do f>\n<p a>1</p>\n</do>"
        ),
        ["call: f({\"a\": \"1\"})"]
    );
    assert_eq!(
        parse(None, r#"{"reasoning": ["<r>", "</r>"]}"#, "<r>x</r>y"),
        ["reasoning: x", "text: y"]
    );
    for (overrides, message) in [
        ("[]", "no JSON object"),
        ("{", "overrides: "),
        (r#"{"cal": []}"#, "unknown key"),
        (r#"{"call": ["a"]}"#, "must be a list of 2 texts"),
        (r#"{"style": "x"}"#, "style \"x\""),
    ] {
        let error = ChannelFormat::new(None, None, Some(overrides)).unwrap_err();
        assert!(error.contains(message), "{error}");
    }
    assert!(
        ChannelFormat::new(Some("nope"), None, None)
            .unwrap_err()
            .contains("hermes")
    );
}

#[test]
fn nested_elements_are_objects_and_arrays() {
    let ns = "]<]minimax[>[";
    let text = format!(
        "{ns}<tool_call>\n{ns}<invoke name=\"f\">\n{ns}<a>{ns}<item>1{ns}</item>{ns}<item>{ns}<k>x{ns}</k>{ns}</item>{ns}</a>\n{ns}</invoke>\n{ns}</tool_call>"
    );
    assert_eq!(
        parse("minimax_m3", None, false, &text),
        [r#"call: f({"a": [1, {"k": "x"}]})"#]
    );
}
