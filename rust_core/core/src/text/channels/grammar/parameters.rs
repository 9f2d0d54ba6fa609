//! The arguments of a call in a grammar, parameter by parameter, where they are no JSON.

use serde_json::{Map, Value, json};

use crate::text::channels::envelope::Tags;
use crate::text::channels::rules::Rules;
use crate::text::channels::schema::{ArgumentType, resolve, type_of};

/// A tool: its name, and its schema where the arguments follow it.
pub(super) struct Tool<'a> {
    pub(super) name: &'a str,
    pub(super) schema: Option<Value>,
}

/// Parameters of a tool whose schema is not followed.
const PARAMETER_NAME: &str = "/[a-zA-Z_][a-zA-Z0-9_.-]{0,63}/";

/// The same, where it is a word of Python.
const IDENTIFIER: &str = "/[a-zA-Z_][a-zA-Z0-9_]{0,63}/";

/// Arrays in arrays follow their schema so deep: one may refer to itself.
const MAX_DEPTH: usize = 4;

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
pub(super) fn tag_parts(
    rules: &mut Rules<'_>,
    tool: &Tool<'_>,
    tags: &Tags,
    number: usize,
) -> Vec<String> {
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
pub(super) fn listed(
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
pub(super) fn marked_object(
    rules: &mut Rules<'_>,
    tool: &Tool<'_>,
    mark: &str,
    number: usize,
) -> String {
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
