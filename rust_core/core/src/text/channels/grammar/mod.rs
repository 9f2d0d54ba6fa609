//! The grammar of an envelope's calls, in llguidance's dialect of Lark.
//!
//! Made of the data that the parser reads calls by: what the grammar allows, the parser understands.
//! Markers are written as the family's template writes them.

mod parameters;

use serde_json::Value;

use crate::text::channels::envelope::{
    Arguments, Body, Envelope, FieldKind, IdPlace, Keys, marker,
};
use crate::text::channels::format::{CallFormat, ChannelFormat};
use crate::text::channels::grammar::parameters::{Tool, listed, marked_object, tag_parts};
use crate::text::channels::rules::{Rules, any_object, escape_regex};
use crate::text::channels::value::Dialect;

/// What harmony writes before a function's name.
const HARMONY_CALL: &str = "<|channel|>commentary to=functions.";

/// What calls a grammar allows.
#[derive(Debug, Clone, Copy)]
pub struct GrammarOptions<'a> {
    /// Nothing but calls: the answer begins with one.
    pub at_least_one: bool,
    /// No second call.
    pub at_most_one: bool,
    /// The tools whose arguments follow their schemas; None: all.
    pub strict: Option<&'a [String]>,
    /// Texts that are one special token each, and their ids.
    pub special_tokens: &'a [(String, u32)],
}

impl ChannelFormat {
    /// The text that begins calls within other text, where a [`ChannelFormat::grammar`] of both has to
    /// hold; None: they have no marker.
    #[must_use]
    pub fn trigger(&self) -> Option<&str> {
        let Some(CallFormat { envelope, .. }) = &self.calls else {
            return self.is_harmony.then_some(HARMONY_CALL);
        };
        let frame = Frame::new(envelope);
        let open = format!("{}{}", frame.all.0, frame.one.0);
        // A marker that the prompt ends with stands before text, too.
        trigger(envelope, open.trim_start()).filter(|marker| *marker != envelope.prompted)
    }

    /// The grammar of calls of `tools`: names and JSON schemas.
    ///
    /// # Errors
    /// One line: the format has no calls, there are no tools, or a schema is none.
    pub fn grammar(
        &self,
        tools: &[(String, String)],
        options: &GrammarOptions<'_>,
    ) -> Result<String, String> {
        if tools.is_empty() {
            return Err("grammar: there are no tools".to_owned());
        }
        let tools = tools.iter().map(|(name, schema)| {
            let is_strict = options.strict.is_none_or(|strict| strict.contains(name));
            let schema = match is_strict && !schema.is_empty() {
                true => Some(of_object(serde_json::from_str(schema).map_err(
                    |error| format!("grammar: the parameters of {name:?} are no JSON: {error}"),
                )?)),
                false => None,
            };
            Ok(Tool { name, schema })
        });
        let tools = tools.collect::<Result<Vec<_>, String>>()?;
        let mut rules = Rules::new(options.special_tokens);
        match &self.calls {
            Some(calls) => write_calls(&mut rules, &calls.envelope, &tools, options),
            None if self.is_harmony => write_harmony(&mut rules, &tools, options),
            None => return Err("grammar: the format has no tool calls".to_owned()),
        }
        Ok(rules.finish())
    }
}

/// A schema of arguments, which are an object even where it does not say so.
fn of_object(schema: Value) -> Value {
    let Value::Object(mut schema) = schema else {
        return any_object();
    };
    let is_told = ["type", "$ref", "anyOf", "oneOf", "allOf", "enum", "const"];
    if !is_told.iter().any(|key| schema.contains_key(*key)) {
        schema.insert("type".to_owned(), "object".into());
    }
    Value::Object(schema)
}

fn write_calls(
    rules: &mut Rules<'_>,
    envelope: &Envelope,
    tools: &[Tool<'_>],
    options: &GrammarOptions<'_>,
) {
    let names: Vec<String> = tools
        .iter()
        .enumerate()
        .map(|(number, tool)| {
            let rule = format!("call_{number}");
            let body = call(rules, envelope, tool, number);
            rules.add(&rule, &body);
            rule
        })
        .collect();
    rules.add("call", &names.join(" | "));
    let frame = Frame::new(envelope);
    let close = rules.literal(frame.one.1);
    let one = rules.sequence(&[&rules.literal(&frame.one.0), "call", &close]);
    rules.add("one", &one);
    let repeat = match options.at_most_one {
        true => String::new(),
        false => format!("({} one)*", rules.literal(frame.separator)),
    };
    let all_close = rules.literal(&frame.all.1);
    let calls = |rules: &Rules<'_>, open: &str| {
        rules.sequence(&[&rules.literal(open), "call", &close, &repeat, &all_close])
    };
    let open = format!("{}{}", frame.all.0, frame.one.0);
    if options.at_least_one {
        let start = calls(rules, &open);
        rules.add("start", &start);
        return;
    }
    rules.add_text();
    let many = if options.at_most_one { "?" } else { "*" };
    let open = open.trim_start();
    match trigger(envelope, open) {
        // Text cannot hold a special token: a call is told by its first.
        Some(trigger) if rules.is_special(trigger) => {
            let calls = calls(rules, open);
            rules.add("calls", &calls);
            rules.add("start", &format!("TEXT (calls TEXT){many}"));
        }
        Some(trigger) => {
            // Text in front of a call ends with what the call begins with. No special token can be
            // part of a text.
            let (plain, tokens) = rules.split_at_special(trigger);
            let calls = calls(rules, &open[plain.len()..]);
            rules.add("calls", &calls);
            if tokens.is_empty() {
                let quoted = rules.literal(plain);
                rules.add("head[lazy]", &format!("TEXT {quoted}"));
            } else {
                let plain = escape_regex(plain);
                rules.add("HEAD", &format!(r"/(.|\n)*{plain}/"));
                rules.add("head", "HEAD");
            }
            rules.add("start", &format!("(head calls){many} TEXT"));
        }
        None => {
            let calls = calls(rules, open);
            rules.add("calls", &calls);
            rules.add("PLAIN", r"/([^\[{](.|\n)*)?/");
            rules.add("start", "calls | PLAIN");
        }
    }
}

/// The marker by which a call is told in a text; None: it has none. `open`: what is written before the
/// first call.
fn trigger<'a>(envelope: &'a Envelope, open: &str) -> Option<&'a str> {
    let section = envelope.section.as_ref();
    let first_marker = section.map_or("", |(open, _)| first(open));
    let markers = [first_marker, first(&envelope.open)].map(marker);
    let mut markers = markers.into_iter();
    markers.find(|text| !text.is_empty() && open.starts_with(text))
}

/// What is written around calls.
struct Frame<'a> {
    all: (String, String),
    one: (String, &'a str),
    separator: &'a str,
}

impl<'a> Frame<'a> {
    fn new(envelope: &'a Envelope) -> Self {
        let (section_open, section_close) = match &envelope.section {
            Some((open, close)) => (first(open), first(close)),
            None => ("", ""),
        };
        let call_open = match envelope.is_bare {
            true => "",
            false => first(&envelope.open),
        };
        let (bracket_open, bracket_close) = match envelope.body {
            Body::Object { in_array: true, .. } | Body::Python { in_list: true } => ("[", "]"),
            _ => ("", ""),
        };
        let separator = match bracket_open {
            "" => envelope.separator.as_str(),
            _ => ", ",
        };
        if matches!(envelope.body, Body::Python { .. }) {
            // All calls share one pair of markers.
            let call_close = match envelope.is_bare {
                true => "",
                false => first(&envelope.close),
            };
            return Self {
                all: (
                    format!("{call_open}{bracket_open}"),
                    format!("{bracket_close}{call_close}"),
                ),
                one: (String::new(), ""),
                separator,
            };
        }
        if envelope.has_own_section {
            return Self {
                all: (String::new(), String::new()),
                one: (format!("{section_open}{call_open}"), section_close),
                separator,
            };
        }
        Self {
            all: (
                format!("{}{bracket_open}", section_open.trim_end_matches('[')),
                format!("{bracket_close}{section_close}"),
            ),
            one: (call_open.to_owned(), ""),
            separator,
        }
    }
}

fn first(texts: &[String]) -> &str {
    texts.first().map_or("", String::as_str)
}

/// The rule of one call.
fn call(rules: &mut Rules<'_>, envelope: &Envelope, tool: &Tool<'_>, number: usize) -> String {
    match &envelope.body {
        Body::Object { keys, .. } => {
            let close = match envelope.is_bare {
                true => "",
                false => first(&envelope.close),
            };
            let (head, id, tail) = object_parts(keys, tool.name);
            let arguments = rules.json(tool.schema.as_ref().unwrap_or(&any_object()));
            rules.sequence(&[
                &rules.literal(&head.0),
                id.0,
                &rules.literal(&head.1),
                &arguments,
                &rules.literal(&tail.0),
                id.1,
                &rules.literal(&format!("{}{close}", tail.1)),
            ])
        }
        Body::Fields { fields, arguments } => {
            let mut parts: Vec<String> = Vec::new();
            let mut literal = String::new();
            let mut at = 0;
            while at < fields.len() {
                let field = &fields[at];
                match field.kind {
                    FieldKind::Name => literal.push_str(tool.name),
                    FieldKind::Id | FieldKind::NameInId => {
                        if field.kind == FieldKind::NameInId {
                            literal.push_str(&format!("functions.{}:", tool.name));
                        }
                        parts.push(rules.literal(&literal));
                        parts.push("/[0-9]{1,4}/".to_owned());
                        literal.clear();
                    }
                }
                let end = field.ends.first();
                literal.push_str(end.map_or("", |(end, _)| end));
                at = end.map_or(fields.len(), |(_, next)| *next);
            }
            let close = first(&envelope.close);
            match arguments {
                Arguments::Value(Dialect::Marked(mark, _)) => {
                    parts.push(rules.literal(&literal));
                    parts.push(marked_object(rules, tool, mark, number));
                }
                Arguments::Value(_) => {
                    parts.push(rules.literal(&literal));
                    parts.push(rules.json(tool.schema.as_ref().unwrap_or(&any_object())));
                }
                Arguments::Tags(tags) => {
                    parts.push(rules.literal(&literal));
                    parts.extend(tag_parts(rules, tool, tags, number));
                }
            }
            parts.push(rules.literal(close));
            let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
            rules.sequence(&parts)
        }
        Body::Python { .. } => {
            let value = |rules: &mut Rules<'_>, schema: &Value, _: &str| rules.json(schema);
            let parameters = listed(rules, tool, number, ("=", ", "), value);
            let open = rules.literal(&format!("{}(", tool.name));
            rules.sequence(&[&open, &parameters, &rules.literal(")")])
        }
    }
}

/// A call object around its arguments and id: ((before the id, after it), (first id, last id),
/// (before the last id, after it)).
type ObjectParts = (
    (String, String),
    (&'static str, &'static str),
    (String, String),
);

fn object_parts(keys: &Keys, name: &str) -> ObjectParts {
    let name = Value::from(name).to_string();
    let key = |keys: &[String]| Value::from(first(keys)).to_string();
    if keys.name_is_key {
        let head = format!("{{{name}: ");
        return (
            (head, String::new()),
            ("", ""),
            ("}".to_owned(), String::new()),
        );
    }
    let head = format!("{}: {name}, {}: ", key(&keys.name), key(&keys.arguments));
    let id = key(&keys.id);
    match keys.id_place {
        IdPlace::None => (
            (format!("{{{head}"), String::new()),
            ("", ""),
            ("}".to_owned(), String::new()),
        ),
        IdPlace::First => (
            (format!("{{{id}: \""), format!("\", {head}")),
            ("/[0-9]{1,4}/", ""),
            ("}".to_owned(), String::new()),
        ),
        IdPlace::Last => (
            (format!("{{{head}"), String::new()),
            ("", "/[a-zA-Z0-9]{9}/"),
            (format!(", {id}: \""), "\"}".to_owned()),
        ),
    }
}

fn write_harmony(rules: &mut Rules<'_>, tools: &[Tool<'_>], options: &GrammarOptions<'_>) {
    let mut names = Vec::new();
    for (number, tool) in tools.iter().enumerate() {
        let head = format!("{HARMONY_CALL}{} <|constrain|>json<|message|>", tool.name);
        let head = rules.literal(&head);
        let arguments = rules.json(tool.schema.as_ref().unwrap_or(&any_object()));
        let rule = format!("call_{number}");
        let body = rules.sequence(&[&head, &arguments]);
        rules.add(&rule, &body);
        names.push(rule);
    }
    rules.add("call", &names.join(" | "));
    let next = rules.literal("<|start|>assistant");
    let call_end = rules.literal("<|call|>");
    let analysis = rules.literal("<|channel|>analysis<|message|>");
    let end = rules.literal("<|end|>");
    rules.add_text();
    let message_end = match rules.is_special("<|end|>") {
        true => format!("TEXT {end}"),
        false => rules.text_up_to("message_text", "<|end|>"),
    };
    rules.add("thought", &format!("{analysis} {message_end} {next}"));
    let more = match options.at_most_one {
        true => String::new(),
        false => format!("({call_end} {next} thought? call)*"),
    };
    let calls = format!("thought? call {more}");
    if options.at_least_one {
        // Thinking may have been constrained by nothing, and its end leave the next header to us.
        rules.add("start", &format!("({next})? {calls}"));
        return;
    }
    let channel = rules.literal("<|channel|>");
    let message = rules.literal("<|message|>");
    let preamble = format!("{channel} \"commentary\" {message} {message_end} {next}");
    rules.add("preamble", &preamble);
    rules.add("answer", &format!("{channel} \"final\" {message} TEXT"));
    rules.add(
        "start",
        &format!("({next})? thought? preamble? (answer | call {more})"),
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grammar(name: &str, schema: &str, options: &GrammarOptions<'_>) -> String {
        let format = ChannelFormat::new(Some(name), None, None).unwrap();
        let tools = [("f".to_owned(), schema.to_owned())];
        format.grammar(&tools, options).unwrap()
    }

    const ONE: GrammarOptions<'_> = GrammarOptions {
        at_least_one: true,
        at_most_one: true,
        strict: None,
        special_tokens: &[],
    };

    #[test]
    fn calls_are_written_as_their_family_does() {
        assert_eq!(
            grammar("hermes", "{}", &ONE),
            "call_0: \"{\\\"name\\\": \\\"f\\\", \\\"arguments\\\": \" %json {\"type\":\"object\"} \"}\" \"\\n</tool_call>\"\n\
             call: call_0\n\
             one: \"<tool_call>\\n\" call\n\
             start: \"<tool_call>\\n\" call\n"
        );
        let schema = r#"{"properties": {"s": {}, "n": {"type": "integer"}}, "required": ["n"]}"#;
        let text = grammar("qwen3_coder", schema, &ONE);
        assert!(
            text.contains("call_0: \"f>\\n\" parameter_0_0? parameter_0_1 \"</function>\"\n"),
            "{text}"
        );
        assert!(
            text.contains("value_0_0[lazy]: /(.|\\n)*/ \"\\n</parameter>\"\n"),
            "{text}"
        );
        assert!(
            text.contains(
                "\"<parameter=n>\\n\" %json {\"type\":\"integer\"} \"\\n</parameter>\" \"\\n\"\n"
            ),
            "{text}"
        );
    }

    #[test]
    fn special_tokens_are_written_by_id() {
        let special_tokens = [
            ("<tool_call>".to_owned(), 7),
            ("</tool_call>".to_owned(), 8),
        ];
        let options = GrammarOptions {
            at_least_one: false,
            at_most_one: false,
            special_tokens: &special_tokens,
            ..ONE
        };
        let text = grammar("hermes", "{}", &options);
        assert!(
            text.contains("calls: <[7]> \"\\n\" call (\"\\n\" one)*\n"),
            "{text}"
        );
        assert!(text.contains("start: TEXT (calls TEXT)*\n"), "{text}");
        assert!(!text.contains("tool_call>"), "{text}");
    }

    #[test]
    fn definitions_and_settings_go_with_a_parameter() {
        let schema = r##"{"properties": {"n": {"$ref": "#/$defs/n"}}, "x-guidance": {"lenient": true},
            "$defs": {"n": {"type": "integer"}}}"##;
        let text = grammar("glm45", schema, &ONE);
        let expected =
            r#"{"type":"integer","$defs":{"n":{"type":"integer"}},"x-guidance":{"lenient":true}}"#;
        assert!(text.contains(expected), "{text}");
    }
}
