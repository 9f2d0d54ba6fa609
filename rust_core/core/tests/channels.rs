//! Whatever the envelope and however its text is cut, the pieces are what was written.

use std::sync::Arc;

use octavo_core::text::channels::{
    ChannelFormat, Channels, Machine, Piece, PieceKind, tool_call_formats,
};
use proptest::prelude::*;
use proptest::sample::select;
use serde_json::{Map, Value, json};

/// Parameters of every kind.
const SCHEMA: &str = r##"{"type": "object", "$defs": {"n": {"type": "integer"}}, "properties": {
    "s": {"type": "string"}, "text": {"type": "string"}, "n": {"$ref": "#/$defs/n"},
    "x": {"type": "number"}, "b": {"type": "boolean"}, "o": {"type": "object"},
    "a": {"type": "array"}, "e": {"enum": ["red", "blue"]}
}}"##;

#[derive(Debug, Clone)]
struct Call {
    name: String,
    arguments: Map<String, Value>,
}

impl Call {
    fn new(name: &str, arguments: Value) -> Self {
        let Value::Object(arguments) = arguments else {
            panic!("arguments are an object")
        };
        Self {
            name: name.to_owned(),
            arguments,
        }
    }

    fn json(&self) -> String {
        Value::Object(self.arguments.clone()).to_string()
    }
}

fn machine(tool_calls: &str, reasoning: Option<&str>, in_reasoning: bool) -> Machine {
    let format = ChannelFormat::new(Some(tool_calls), reasoning, None).unwrap();
    let tool = |name: &str| (name.to_owned(), SCHEMA.to_owned());
    let tools = [tool("get_weather"), tool("f"), tool("ns.search-web")];
    Machine::new(Arc::new(Channels::new(
        Arc::new(format),
        in_reasoning,
        true,
        true,
        &tools,
    )))
}

/// The pieces of a text that arrives in these parts, joined where they are one.
fn fold(mut machine: Machine, parts: &[&str]) -> Vec<Piece> {
    let mut all: Vec<Piece> = Vec::new();
    let mut add = |pieces: Vec<Piece>| {
        for piece in pieces {
            let is_part = matches!(
                piece.kind,
                PieceKind::Text | PieceKind::Reasoning | PieceKind::Arguments
            );
            match all.last_mut() {
                Some(last) if is_part && (last.kind, last.call) == (piece.kind, piece.call) => {
                    last.text.push_str(&piece.text);
                }
                _ => all.push(piece),
            }
        }
    };
    for part in parts {
        let mut pieces = Vec::new();
        machine.push(part, &mut pieces);
        add(pieces);
    }
    let mut pieces = Vec::new();
    machine.finish(&mut pieces);
    add(pieces);
    all
}

/// As lines: `text: …`, `f({…})`, with `…` in place of the closing bracket of a call without an end.
fn lines(pieces: &[Piece]) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for piece in pieces {
        match piece.kind {
            PieceKind::Text => lines.push(format!("text: {}", piece.text)),
            PieceKind::Reasoning => lines.push(format!("reasoning: {}", piece.text)),
            PieceKind::Name => {
                let number = lines
                    .iter()
                    .filter(|line| line.starts_with("call: "))
                    .count();
                assert_eq!(piece.call as usize, number);
                lines.push(format!("call: {}(", piece.text));
            }
            PieceKind::Id => lines
                .last_mut()
                .unwrap()
                .push_str(&format!("#{} ", piece.text)),
            PieceKind::Arguments => lines.last_mut().unwrap().push_str(&piece.text),
            PieceKind::End => lines.last_mut().unwrap().push(')'),
        }
    }
    lines
}

fn chars(text: &str) -> Vec<&str> {
    let ends = text.char_indices().map(|(at, c)| (at, at + c.len_utf8()));
    ends.map(|(at, end)| &text[at..end]).collect()
}

/// The lines of a text, the same for every way to cut it.
fn parse(tool_calls: &str, reasoning: Option<&str>, in_reasoning: bool, text: &str) -> Vec<String> {
    let make = || machine(tool_calls, reasoning, in_reasoning);
    let whole = fold(make(), &[text]);
    assert_eq!(
        whole,
        fold(make(), &chars(text)),
        "cut in characters: {text}"
    );
    for size in [2, 3, 7] {
        let parts: Vec<String> = chars(text).chunks(size).map(|part| part.concat()).collect();
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        assert_eq!(whole, fold(make(), &parts), "cut in {size}: {text}");
    }
    lines(&whole)
}

// ------------------------------------------------------------------------------- writing calls

fn call_object(call: &Call, name: &str, arguments: &str) -> String {
    format!(
        "{{\"{name}\": {}, \"{arguments}\": {}}}",
        json!(call.name),
        call.json()
    )
}

fn usual(call: &Call) -> String {
    call_object(call, "name", "arguments")
}

fn join(calls: &[Call], separator: &str, one: impl Fn(&Call) -> String) -> String {
    calls.iter().map(one).collect::<Vec<_>>().join(separator)
}

/// A parameter's text: strings as they are.
fn raw(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn tags(call: &Call, one: impl Fn(&str, &Value) -> String) -> String {
    call.arguments
        .iter()
        .map(|(key, value)| one(key, value))
        .collect()
}

fn python(value: &Value) -> String {
    match value {
        Value::Null => "None".to_owned(),
        Value::Bool(true) => "True".to_owned(),
        Value::Bool(false) => "False".to_owned(),
        Value::String(text) => {
            let escaped = text.replace('\\', "\\\\").replace('\'', "\\'");
            format!("'{}'", escaped.replace('\n', "\\n"))
        }
        Value::Array(items) => {
            let items: Vec<String> = items.iter().map(python).collect();
            format!("[{}]", items.join(", "))
        }
        Value::Object(pairs) => {
            let pair = |(key, value): (&String, &Value)| {
                format!("{}: {}", python(&json!(key)), python(value))
            };
            format!(
                "{{{}}}",
                pairs.iter().map(pair).collect::<Vec<_>>().join(", ")
            )
        }
        number => number.to_string(),
    }
}

fn python_call(call: &Call) -> String {
    let one = |(key, value): (&String, &Value)| format!("{key}={}", python(value));
    let arguments: Vec<String> = call.arguments.iter().map(one).collect();
    format!("{}({})", call.name, arguments.join(", "))
}

fn marked(value: &Value, mark: &str) -> String {
    match value {
        Value::String(text) => format!("{mark}{text}{mark}"),
        Value::Array(items) => {
            let items: Vec<String> = items.iter().map(|item| marked(item, mark)).collect();
            format!("[{}]", items.join(","))
        }
        Value::Object(pairs) => {
            let pair = |(key, value): (&String, &Value)| format!("{key}:{}", marked(value, mark));
            format!(
                "{{{}}}",
                pairs.iter().map(pair).collect::<Vec<_>>().join(",")
            )
        }
        other => other.to_string(),
    }
}

fn function(call: &Call, line: &str) -> String {
    let body = tags(call, |key, value| {
        format!("<parameter={key}>{line}{}{line}</parameter>\n", raw(value))
    });
    format!("<function={}>\n{body}</function>", call.name)
}

fn keyed(call: &Call, line: &str) -> String {
    tags(call, |key, value| {
        format!(
            "<arg_key>{key}</arg_key>{line}<arg_value>{}</arg_value>{line}",
            raw(value)
        )
    })
}

fn typed(call: &Call, tag: &str) -> String {
    tags(call, |key, value| {
        let is_text = value.is_string();
        format!(
            "<{tag} name=\"{key}\" string=\"{is_text}\">{}</{tag}>\n",
            raw(value)
        )
    })
}

/// Calls as a model of the family writes them.
fn render(format: &str, calls: &[Call]) -> String {
    let array = |one: fn(&Call) -> String| format!("[{}]", join(calls, ", ", one));
    let parameters = |call: &Call| call_object(call, "name", "parameters");
    match format {
        "hermes" => join(calls, "\n", |c| {
            format!("<tool_call>\n{}\n</tool_call>", usual(c))
        }),
        "longcat" => join(calls, "\n", |c| {
            format!("<longcat_tool_call>\n{}\n</longcat_tool_call>", usual(c))
        }),
        "llama3_json" => join(calls, "; ", parameters),
        "xlam" => array(usual),
        "granite" => format!("<|tool_call|>{}", array(usual)),
        "granite-20b-fc" => join(calls, "\n", |c| format!("<function_call> {}", usual(c))),
        "phi4_mini_json" => format!("functools{}", array(usual)),
        "jamba" => format!("<tool_calls>{}</tool_calls>", array(usual)),
        "minimax" => format!("<tool_calls>\n{}\n</tool_calls>", join(calls, "\n", usual)),
        "nemotron" => format!("<TOOLCALL>{}</TOOLCALL>", array(usual)),
        "internlm" => join(calls, "", |c| {
            format!(
                "<|action_start|><|plugin|>\n{}<|action_end|>",
                parameters(c)
            )
        }),
        "gigachat3" => join(calls, "", |c| {
            format!("function call<|role_sep|>\n{}", usual(c))
        }),
        "inkling" => join(calls, "", |c| {
            let object = call_object(c, "name", "args");
            format!("<|content_invoke_tool_json|>{object}<|end_message|>")
        }),
        "mistral" => join(calls, "", |c| {
            format!("[TOOL_CALLS]{}[ARGS]{}", c.name, c.json())
        }),
        "mistral_array" => format!("[TOOL_CALLS]{}", array(usual)),
        "cohere_command3" => {
            let one = |c: &Call| call_object(c, "tool_name", "parameters");
            format!(
                "<|START_ACTION|>[\n    {}\n]<|END_ACTION|>",
                join(calls, ",\n    ", one)
            )
        }
        "apertus" => {
            let one = |c: &Call| format!("{{{}: {}}}", json!(c.name), c.json());
            format!(
                "<|tools_prefix|>[{}]<|tools_suffix|>",
                join(calls, ", ", one)
            )
        }
        "deepseek_v3" => {
            let one = |c: &Call| {
                let (name, json) = (&c.name, c.json());
                format!(
                    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{json}\n```\
                     <｜tool▁call▁end｜>"
                )
            };
            let calls = join(calls, "\n", one);
            format!("<｜tool▁calls▁begin｜>{calls}<｜tool▁calls▁end｜>")
        }
        "deepseek_v31" => {
            let one = |c: &Call| {
                let (name, json) = (&c.name, c.json());
                format!("<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{json}<｜tool▁call▁end｜>")
            };
            format!(
                "<｜tool▁calls▁begin｜>{}<｜tool▁calls▁end｜>",
                join(calls, "", one)
            )
        }
        "kimi_k2" => {
            let one = |c: &Call| {
                let (name, json) = (&c.name, c.json());
                format!(
                    "<|tool_call_begin|>functions.{name}:3<|tool_call_argument_begin|>{json}\
                     <|tool_call_end|>"
                )
            };
            let calls = join(calls, "", one);
            format!("<|tool_calls_section_begin|>{calls}<|tool_calls_section_end|>")
        }
        "functionary_v3" => join(calls, "", |c| format!(">>>{}\n{}", c.name, c.json())),
        "gemma4" => join(calls, "", |c| {
            let arguments = marked(&Value::Object(c.arguments.clone()), "<|\"|>");
            format!("<|tool_call>call:{}{arguments}<tool_call|>", c.name)
        }),
        "functiongemma" => join(calls, "", |c| {
            let arguments = marked(&Value::Object(c.arguments.clone()), "<escape>");
            format!(
                "<start_function_call>call:{}{arguments}<end_function_call>",
                c.name
            )
        }),
        "qwen3_coder" => join(calls, "\n", |c| {
            format!("<tool_call>\n{}\n</tool_call>", function(c, "\n"))
        }),
        "seed_oss" => join(calls, "\n", |c| {
            format!("<seed:tool_call>\n{}\n</seed:tool_call>", function(c, ""))
        }),
        "glm45" => join(calls, "\n", |c| {
            format!("<tool_call>{}\n{}</tool_call>", c.name, keyed(c, "\n"))
        }),
        "glm47" => join(calls, "", |c| {
            format!("<tool_call>{}{}</tool_call>", c.name, keyed(c, ""))
        }),
        "hy_v3" => {
            let one = |c: &Call| {
                format!(
                    "<tool_call>{}<tool_sep>\n{}</tool_call>",
                    c.name,
                    keyed(c, "\n")
                )
            };
            format!("<tool_calls>\n{}\n</tool_calls>", join(calls, "\n", one))
        }
        "deepseek_v32" | "deepseek_v4" => {
            let section = match format {
                "deepseek_v32" => "function_calls",
                _ => "tool_calls",
            };
            let one = |c: &Call| {
                let body = typed(c, "｜DSML｜parameter");
                format!(
                    "<｜DSML｜invoke name=\"{}\">\n{body}</｜DSML｜invoke>",
                    c.name
                )
            };
            let calls = join(calls, "\n", one);
            format!("\n\n<｜DSML｜{section}>\n{calls}\n</｜DSML｜{section}>")
        }
        "minimax_m2" => {
            let one = |c: &Call| {
                let body = tags(c, |key, value| {
                    format!("<parameter name=\"{key}\">{}</parameter>\n", raw(value))
                });
                format!("<invoke name=\"{}\">\n{body}</invoke>", c.name)
            };
            format!(
                "<minimax:tool_call>\n{}\n</minimax:tool_call>",
                join(calls, "\n", one)
            )
        }
        "minimax_m3" => {
            let ns = "]<]minimax[>[";
            let one = |c: &Call| {
                let body = tags(c, |key, value| {
                    format!("{ns}<{key}>{}{ns}</{key}>\n", raw(value))
                });
                format!("{ns}<invoke name=\"{}\">\n{body}{ns}</invoke>", c.name)
            };
            format!(
                "{ns}<tool_call>\n{}\n{ns}</tool_call>",
                join(calls, "\n", one)
            )
        }
        "step3" => {
            let one = |c: &Call| {
                let body = tags(c, |key, value| {
                    format!(
                        "<steptml:parameter name=\"{key}\">{}</steptml:parameter>",
                        raw(value)
                    )
                });
                format!(
                    "<｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name=\"{}\">\n{body}\
                     </steptml:invoke><｜tool_call_end｜>",
                    c.name
                )
            };
            let calls = join(calls, "\n", one);
            format!("<｜tool_calls_begin｜>\n{calls}\n<｜tool_calls_end｜>")
        }
        "minicpm5" => join(calls, "\n", |c| {
            let body = tags(c, |key, value| {
                format!("<param name=\"{key}\">{}</param>", raw(value))
            });
            format!("<function name=\"{}\">{body}</function>", c.name)
        }),
        "cohere_command4" => {
            let one = |c: &Call| {
                let body = typed(c, "cofl:tool_param");
                format!(
                    "<cofl:tool_call id=\"7\" name=\"{}\">\n{body}</cofl:tool_call>",
                    c.name
                )
            };
            format!(
                "<cofl:tool_calls>\n{}\n</cofl:tool_calls>",
                join(calls, "\n", one)
            )
        }
        "solar_open2" => join(calls, "\n", |c| {
            let body = tags(c, |key, value| {
                format!(
                    "<|tool_arg:start|>{key}<|tool_arg:value|>{}<|tool_arg:end|>\n",
                    raw(value)
                )
            });
            format!("<|tool_call:start|>{}\n{body}<|tool_call:end|>", c.name)
        }),
        "pythonic" => array(python_call),
        "llama4_pythonic" => format!("<|python_start|>{}<|python_end|>", array(python_call)),
        "lfm2" => format!("<|tool_call_start|>{}<|tool_call_end|>", array(python_call)),
        "olmo3" => {
            format!(
                "<function_calls>\n{}\n</function_calls>",
                join(calls, "\n", python_call)
            )
        }
        "openai" => join(calls, "<|call|><|start|>assistant", |c| {
            let (name, json) = (&c.name, c.json());
            format!("<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{json}")
        }),
        other => panic!("{other} is not written here"),
    }
}

/// Formats whose calls begin the answer, without a marker.
const BARE: [&str; 3] = ["llama3_json", "xlam", "pythonic"];

/// What ends a parameter, and what may follow it, where strings stand as they are.
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

/// The calls of folded pieces: name, arguments as JSON, whether there was an end.
fn calls_of(pieces: &[Piece]) -> Vec<(String, String, bool)> {
    let mut calls: Vec<(String, String, bool)> = Vec::new();
    for piece in pieces {
        match piece.kind {
            PieceKind::Name => calls.push((piece.text.clone(), String::new(), false)),
            PieceKind::Arguments => calls[piece.call as usize].1.push_str(&piece.text),
            PieceKind::End => calls[piece.call as usize].2 = true,
            _ => {}
        }
    }
    calls
}

fn text_of(pieces: &[Piece], kind: PieceKind) -> String {
    let pieces = pieces.iter().filter(|piece| piece.kind == kind);
    pieces.map(|piece| piece.text.as_str()).collect()
}

// ------------------------------------------------------------------------------------- vectors

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

#[test]
fn reasoning_tokens_are_counted() {
    let mut machine = machine("hermes", Some("think"), false);
    let mut pieces = Vec::new();
    for token in ["<think>", "\n", "a", " b", "</", "think", ">", "\n\n", "c"] {
        machine.push_token(token, &mut pieces);
    }
    assert_eq!(machine.num_reasoning_tokens(), 3);
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

// ---------------------------------------------------------------------------------- properties

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
