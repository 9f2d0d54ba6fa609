//! Reasoning between markers, harmony's channels, and the tokens of reasoning.

use crate::support::{machine, parse};

#[test]
fn reasoning_is_told_from_text() {
    let think = |text| parse("hermes", Some("qwen3"), false, text);
    let open = |text| parse("hermes", Some("qwen3"), true, text);
    assert_eq!(
        think("<think>\na\nb\n</think>\n\nc\n"),
        ["reasoning: a\nb", "text: c\n"]
    );
    assert_eq!(open("a\n</think>\n\nc"), ["reasoning: a", "text: c"]);
    assert_eq!(open("all of it \n"), ["reasoning: all of it"]);
    assert_eq!(open("<think>a</think>c"), ["reasoning: a", "text: c"]);
    assert_eq!(open("\n</think>\n\nc"), ["text: c"]);
    assert_eq!(think("a </think> b"), ["text: a  b"]);
    assert_eq!(
        think("a <think>b</think> c"),
        ["text: a", "reasoning: b", "text:  c"]
    );
    assert_eq!(think("<think>a </thin k> b"), ["reasoning: a </thin k> b"]);
    // A call ends it; what only looks like one does not.
    assert_eq!(
        open("a\n<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>\nb"),
        ["reasoning: a", "call: f({})", "text: b"]
    );
    assert_eq!(
        open("use <tool_call> then\n</think>b"),
        ["reasoning: use <tool_call> then", "text: b"]
    );
    for (form, text) in [
        ("mistral", "[THINK]r[/THINK]t"),
        (
            "cohere_command3",
            "<|START_THINKING|>r<|END_THINKING|><|START_RESPONSE|>t<|END_RESPONSE|>",
        ),
        ("seed_oss", "<seed:think>r</seed:think>t"),
        ("minimax_m3", "<mm:think>r</mm:think>t"),
        ("kimi_vl", "◁think▷r◁/think▷t"),
        (
            "granite",
            "Here is my thought process: r\n\nHere is my response: t",
        ),
        (
            "ernie45",
            "<think>\nr\n</think>\n\n<response>\nt</response>\n",
        ),
        (
            "hunyuan_a13b",
            "<think>\nr\n</think>\n<answer>\nt\n</answer>",
        ),
        ("gemma4", "<|channel>thought\nr<channel|>t"),
        ("apertus", "<|inner_prefix|>r<|inner_suffix|>t"),
        (
            "inkling",
            "<|content_thinking|>r<|end_message|><|message_model|><|content_text|>t<|end_message|>",
        ),
        ("solar_open2", "<|think:start|>r<|think:end|>t"),
        (
            "openai",
            "<|channel|>analysis<|message|>r<|end|><|start|>assistant<|channel|>final<|message|>t",
        ),
    ] {
        let tool_calls = if form == "inkling" {
            "inkling"
        } else {
            "hermes"
        };
        let lines = parse(tool_calls, Some(form), false, text);
        assert_eq!(lines[0], "reasoning: r", "{form}");
        assert_eq!(lines[1].trim(), "text: t", "{form}");
        assert_eq!(lines.len(), 2, "{form}");
    }
}

#[test]
fn a_marker_that_the_prompt_has_written() {
    let parse = |text| parse("functionary_v3", None, false, text);
    assert_eq!(parse("all\nHi >>> there"), ["text: Hi >>> there"]);
    assert_eq!(parse("f\n{}"), ["call: f({})"]);
    assert_eq!(
        parse("all\nHi>>>f\n{}>>>f\n{\"a\": 1}"),
        ["text: Hi", "call: f({})", "call: f({\"a\": 1})"]
    );
    assert_eq!(parse("Hi"), ["text: Hi"]);
    assert_eq!(parse(">>>f\n{}"), ["call: f({})"]);
}

#[test]
fn harmony_channels() {
    let parse = |text| parse("openai", Some("openai"), false, text);
    assert_eq!(parse("<|channel|>final<|message|>Hi\n"), ["text: Hi\n"]);
    assert_eq!(parse("Hi there"), ["text: Hi there"]);
    assert_eq!(
        parse(
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|><|start|>assistant to=functions.f<|channel|>commentary json<|message|>{\"a\": 1}"
        ),
        ["reasoning: a", "text: I look.", "call: f({\"a\": 1})"]
    );
    assert_eq!(
        parse(" to=functions.f<|channel|>commentary <|constrain|>json<|message|>{}<|call|>"),
        ["call: f({})"]
    );
    // The recipient runs into the channel; the message ends with the next one's channel.
    assert_eq!(
        parse(
            "<|channel|>commentary to=functions.f<|channel|>json<|message|>{}<|channel|>final<|message|>t"
        ),
        ["call: f({})", "text: t"]
    );
    assert_eq!(
        parse("<|channel|>commentary to=functions.f<|message|>print(\"1\")<|call|>"),
        [r#"call: f("print(\"1\")")"#]
    );
    assert_eq!(
        parse("<|channel|>analysis to=browser.search<|message|>q<|end|>"),
        ["reasoning: q"]
    );
    assert_eq!(
        parse("<|channel|>commentary to=functions.f<|message|>{\"a\": [1"),
        ["call: f({\"a\": ["]
    );
}

#[test]
fn reasoning_tokens_are_counted() {
    let mut machine = machine("hermes", Some("think"), false);
    let mut pieces = Vec::new();
    for token in ["<think>", "\n", "a", " b", "</", "think", ">", "\n\n", "c"] {
        machine.push_token(token, &mut pieces);
    }
    assert_eq!(machine.num_reasoning_tokens(), 3);
}
