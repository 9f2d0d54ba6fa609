//! The grammar of an envelope's calls, in llguidance's dialect of Lark.
//!
//! Made of the data that the parser reads calls by: what the grammar allows, the parser understands.
//! Markers are written as the family's template writes them.

use serde_json::{Map, Value, json};

use crate::text::channels::envelope::{
    Arguments, Body, Envelope, FieldKind, IdPlace, Keys, Tags, marker,
};
use crate::text::channels::format::ChannelFormat;
use crate::text::channels::rules::{Rules, any_object, escape_regex};
use crate::text::channels::schema::{ArgumentType, resolve, type_of};
use crate::text::channels::value::Dialect;

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

/// Parameters of a tool whose schema is not followed.
const PARAMETER_NAME: &str = "/[a-zA-Z_][a-zA-Z0-9_.-]{0,63}/";

/// The same, where it is a word of Python.
const IDENTIFIER: &str = "/[a-zA-Z_][a-zA-Z0-9_]{0,63}/";

/// Arrays in arrays follow their schema so deep: one may refer to itself.
const MAX_DEPTH: usize = 4;

/// A tool: its name, and its schema where the arguments follow it.
struct Tool<'a> {
    name: &'a str,
    schema: Option<Value>,
}

impl ChannelFormat {
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
    let first_marker = envelope
        .section
        .as_ref()
        .map_or("", |(open, _)| first(open));
    let trigger = [first_marker, first(&envelope.open)].map(marker);
    let trigger = trigger
        .into_iter()
        .find(|text| !text.is_empty() && open.starts_with(text));
    match trigger {
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

/// A tool's parameters: (name, schema that stands by itself, whether it is required). None: any.
fn parameters(tool: &Tool<'_>) -> Option<Vec<(String, Value, bool)>> {
    let root = tool.schema.as_ref()?;
    let object = resolve(root, root).as_object()?;
    let required: Vec<&str> = match object.get("required") {
        Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    };
    let properties = match object.get("properties") {
        Some(Value::Object(properties)) => properties.clone(),
        _ if object.get("additionalProperties") == Some(&Value::Bool(false)) => Map::new(),
        _ => return None,
    };
    let one = |(name, schema): (String, Value)| {
        let is_required = required.contains(&name.as_str());
        let schema = with_definitions(resolve(&schema, root).clone(), root);
        (name, schema, is_required)
    };
    Some(properties.into_iter().map(one).collect())
}

/// A part of a schema, with the definitions that it may refer to and the settings of its grammar.
fn with_definitions(mut schema: Value, root: &Value) -> Value {
    for key in ["$defs", "definitions", "x-guidance"] {
        if let (Some(definitions), Value::Object(schema)) = (root.get(key), &mut schema) {
            schema.entry(key).or_insert_with(|| definitions.clone());
        }
    }
    schema
}

/// The parameters of a tool between tags.
fn tag_parts(rules: &mut Rules<'_>, tool: &Tool<'_>, tags: &Tags, number: usize) -> Vec<String> {
    let line = if tags.on_lines { "\n" } else { "" };
    let value_open = tags.value_open.as_deref().unwrap_or_default();
    let Some(parameters) = parameters(tool) else {
        if tags.close.contains("{key}") {
            return Vec::new();
        }
        // Any parameter, a string.
        let (end, _) = &tags.key_ends[0];
        let head = rules.literal(&tags.open);
        let between = rules.literal(&format!("{end}{value_open}{line}"));
        let value = rules.text_up_to("any_value", &format!("{line}{}", tags.close));
        let separator = rules.literal(&tags.separator);
        let any = rules.sequence(&[&head, PARAMETER_NAME, &between, &value, &separator]);
        rules.add("any_parameter", &any);
        return vec!["any_parameter*".to_owned()];
    };
    let mut parts = Vec::new();
    for (index, (name, schema, is_required)) in parameters.iter().enumerate() {
        let kind = type_of(schema, schema);
        let wants = match kind {
            ArgumentType::Json => Some(false),
            _ => Some(true),
        };
        let mut ends = tags.key_ends.iter();
        let end = ends.find(|(_, is_text)| is_text.is_none() || *is_text == wants);
        let end = end.map_or(tags.key_ends[0].0.as_str(), |(end, _)| end);
        let head = rules.literal(&format!("{}{name}{end}{value_open}{line}", tags.open));
        let close = format!("{line}{}", tags.close.replace("{key}", name));
        let value = match (kind, texts_of(schema)) {
            (ArgumentType::Json, _) => {
                let json = rules.json(schema);
                let close = rules.literal(&close);
                rules.sequence(&[&json, &close])
            }
            (_, Some(texts)) => {
                let texts: Vec<String> = texts.iter().map(|text| rules.literal(text)).collect();
                let close = rules.literal(&close);
                rules.sequence(&[&format!("({})", texts.join(" | ")), &close])
            }
            _ => rules.text_up_to(&format!("value_{number}_{index}"), &close),
        };
        let separator = rules.literal(&tags.separator);
        let rule = format!("parameter_{number}_{index}");
        let body = rules.sequence(&[&head, &value, &separator]);
        rules.add(&rule, &body);
        parts.push(format!("{rule}{}", if *is_required { "" } else { "?" }));
    }
    parts
}

/// The strings that a schema lists, if it lists nothing else.
fn texts_of(schema: &Value) -> Option<Vec<String>> {
    let texts = |values: &[Value]| {
        let texts = values.iter().map(|value| value.as_str().map(str::to_owned));
        texts
            .collect::<Option<Vec<_>>>()
            .filter(|texts| !texts.is_empty())
    };
    match (schema.get("enum"), schema.get("const")) {
        (Some(Value::Array(values)), _) => texts(values),
        (_, Some(value)) => texts(std::slice::from_ref(value)),
        _ => None,
    }
}

/// Parameters separated by commas, in the schema's order. `marks`: between name and value, and between
/// parameters.
fn listed(
    rules: &mut Rules<'_>,
    tool: &Tool<'_>,
    number: usize,
    (equals, comma): (&str, &str),
    mut value: impl FnMut(&mut Rules<'_>, &Value, &str) -> String,
) -> String {
    let Some(parameters) = parameters(tool) else {
        let any = value(rules, &json!({}), "any");
        let equals = rules.literal(equals);
        rules.add("any_parameter", &format!("{IDENTIFIER} {equals} {any}"));
        let comma = rules.literal(comma);
        return format!("(any_parameter ({comma} any_parameter)*)?");
    };
    let comma = rules.literal(comma);
    // Two rules a place: behind another parameter, and as the first one.
    let name_of = |place: usize, is_first: bool| {
        format!(
            "{}_{number}_{place}",
            if is_first { "first" } else { "more" }
        )
    };
    for (place, (name, schema, is_required)) in parameters.iter().enumerate() {
        let value = value(rules, schema, &format!("value_{number}_{place}"));
        let head = rules.literal(&format!("{name}{equals}"));
        let rule = format!("parameter_{number}_{place}");
        let body = rules.sequence(&[&head, &value]);
        rules.add(&rule, &body);
        for is_first in [true, false] {
            let more = name_of(place + 1, false);
            let mut body = match is_first {
                true => format!("{rule} {more}"),
                false => format!("{comma} {rule} {more}"),
            };
            if !is_required {
                body.push_str(&format!(" | {}", name_of(place + 1, is_first)));
            }
            rules.add(&name_of(place, is_first), &body);
        }
    }
    for is_first in [true, false] {
        rules.add(&name_of(parameters.len(), is_first), "\"\"");
    }
    name_of(0, true)
}

/// Arguments in the dialect of strings between marks.
fn marked_object(rules: &mut Rules<'_>, tool: &Tool<'_>, mark: &str, number: usize) -> String {
    rules.add_marked(mark);
    let value = |rules: &mut Rules<'_>, schema: &Value, name: &str| {
        marked_value(rules, schema, mark, name, 0)
    };
    let parameters = listed(rules, tool, number, (":", ","), value);
    rules.sequence(&["\"{\"", &parameters, "\"}\""])
}

/// A value in that dialect. The members of objects inside follow no schema.
fn marked_value(
    rules: &mut Rules<'_>,
    schema: &Value,
    mark: &str,
    name: &str,
    depth: usize,
) -> String {
    if let Some(texts) = texts_of(schema) {
        let quoted = |text: &String| rules.literal(&format!("{mark}{text}{mark}"));
        let texts: Vec<String> = texts.iter().map(quoted).collect();
        return format!("({})", texts.join(" | "));
    }
    let kind = schema.get("type").and_then(Value::as_str);
    match (kind, schema.get("items")) {
        (Some("string"), _) => rules.text_between(name, mark),
        (Some("number" | "integer" | "boolean" | "null"), _) => rules.json(schema),
        (Some("array"), Some(items @ Value::Object(_))) if depth < MAX_DEPTH => {
            let items = with_definitions(resolve(items, schema).clone(), schema);
            let item = marked_value(rules, &items, mark, &format!("{name}_item"), depth + 1);
            let rule = format!("{name}_array");
            rules.add(&rule, &format!("\"[\" ({item} (\",\" {item})*)? \"]\""));
            rule
        }
        (Some("array"), _) => "marked_array".to_owned(),
        (Some("object"), _) => "marked_object".to_owned(),
        _ => "marked_value".to_owned(),
    }
}

fn write_harmony(rules: &mut Rules<'_>, tools: &[Tool<'_>], options: &GrammarOptions<'_>) {
    let mut names = Vec::new();
    for (number, tool) in tools.iter().enumerate() {
        let head = format!(
            "<|channel|>commentary to=functions.{} <|constrain|>json<|message|>",
            tool.name
        );
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
