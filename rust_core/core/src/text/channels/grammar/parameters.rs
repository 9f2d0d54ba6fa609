//! The arguments of a call in a grammar, parameter by parameter, where they are no JSON.

use serde_json::{Map, Value, json};

use crate::text::channels::envelope::Tags;
use crate::text::channels::rules::{Rules, any_object};
use crate::text::channels::schema::{ArgumentType, resolve, type_of};

/// A tool: its name, and its schema where the arguments follow it.
pub(super) struct Tool<'a> {
    pub(super) name: &'a str,
    pub(super) schema: Option<Value>,
    /// The parameters that it names, whether their schemas are followed or not.
    pub(super) keys: Vec<String>,
}

impl<'a> Tool<'a> {
    /// `schema`: JSON, or nothing.
    pub(super) fn new(name: &'a str, schema: &str, is_strict: bool) -> Result<Self, String> {
        let parsed = match schema {
            "" => Ok(Value::Null),
            text => serde_json::from_str::<Value>(text),
        };
        let root = match parsed {
            Ok(root) => root,
            Err(error) if is_strict => {
                return Err(format!(
                    "grammar: the parameters of {name:?} are no JSON: {error}"
                ));
            }
            Err(_) => Value::Null,
        };
        let properties = resolve(&root, &root).get("properties");
        let keys = properties.and_then(Value::as_object);
        Ok(Self {
            name,
            keys: keys.map_or_else(Vec::new, |keys| keys.keys().cloned().collect()),
            schema: (is_strict && !schema.is_empty()).then(|| of_object(root)),
        })
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
pub(super) fn with_definitions(mut schema: Value, root: &Value) -> Value {
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
    let value_open = tags.value_open.as_deref().map(|text| rules.soft(text));
    let value_open = value_open.unwrap_or_default();
    let separator = rules.soft(&tags.separator);
    let Some(parameters) = parameters(tool) else {
        let rule = match tags.close.contains("{key}") {
            true => format!("any_parameter_{number}"),
            false => "any_parameter".to_owned(),
        };
        let any = any_parameter(rules, tags, &value_open, &tool.keys, &rule);
        if any.is_empty() {
            return Vec::new();
        }
        let any = rules.sequence(&[&format!("({any})"), &separator]);
        rules.add(&rule, &any);
        return vec![format!("{rule}*")];
    };
    // A line feed on each side of a value is free; that of a text is read with it.
    let line = if tags.on_lines { "\"\\n\"?" } else { "" };
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
        let head = rules.literal(&format!("{}{name}{end}", tags.open));
        let close = tags.close.replace("{key}", name);
        let value = match (kind, texts_of(schema)) {
            (ArgumentType::Json, _) => {
                let json = rules.json(schema);
                let close = rules.literal(&close);
                rules.sequence(&[line, &json, line, &close])
            }
            (_, Some(texts)) => {
                let texts: Vec<String> = texts.iter().map(|text| rules.literal(text)).collect();
                let close = rules.literal(&close);
                rules.sequence(&[line, &format!("({})", texts.join(" | ")), line, &close])
            }
            _ => rules.text_up_to(&format!("value_{number}_{index}"), &close),
        };
        let rule = format!("parameter_{number}_{index}");
        let body = rules.sequence(&[&head, &value_open, &value, &separator]);
        rules.add(&rule, &body);
        parts.push(format!("{rule}{}", if *is_required { "" } else { "?" }));
    }
    parts
}

/// Any parameter, its value any text. `keys`: those there are, where a closing tag names its parameter.
fn any_parameter(
    rules: &mut Rules<'_>,
    tags: &Tags,
    value_open: &str,
    keys: &[String],
    rule: &str,
) -> String {
    let ends = tags.key_ends.iter().map(|(end, _)| rules.literal(end));
    let ends = format!("({})", ends.collect::<Vec<_>>().join(" | "));
    if !tags.close.contains("{key}") {
        let head = rules.literal(&tags.open);
        let value = rules.text_up_to("any_value", &tags.close);
        return rules.sequence(&[&head, PARAMETER_NAME, &ends, value_open, &value]);
    }
    let one = |(index, key): (usize, &String)| {
        let head = rules.literal(&format!("{}{key}", tags.open));
        let close = tags.close.replace("{key}", key);
        let value = rules.text_up_to(&format!("{rule}_{index}"), &close);
        rules.sequence(&[&head, &ends, value_open, &value])
    };
    let all: Vec<String> = keys.iter().enumerate().map(one).collect();
    all.join(" | ")
}

/// The strings that a schema lists, if it lists nothing else.
pub(super) fn texts_of(schema: &Value) -> Option<Vec<String>> {
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

/// Parameters in the schema's order. `equals` stands between name and value, `comma` between parameters,
/// both as grammar.
pub(super) fn listed(
    rules: &mut Rules<'_>,
    tool: &Tool<'_>,
    number: usize,
    (equals, comma): (&str, &str),
    mut value: impl FnMut(&mut Rules<'_>, &Value, &str) -> String,
) -> String {
    let Some(parameters) = parameters(tool) else {
        let any = value(rules, &json!({}), "any");
        rules.add("any_parameter", &format!("{IDENTIFIER} {equals} {any}"));
        return format!("(any_parameter ({comma} any_parameter)*)?");
    };
    // Two rules a place: behind another parameter, and as the first one.
    let name_of = |place: usize, is_first: bool| {
        format!(
            "{}_{number}_{place}",
            if is_first { "first" } else { "more" }
        )
    };
    for (place, (name, schema, is_required)) in parameters.iter().enumerate() {
        let value = value(rules, schema, &format!("value_{number}_{place}"));
        let head = rules.literal(name);
        let rule = format!("parameter_{number}_{place}");
        let body = rules.sequence(&[&head, equals, &value]);
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
    let parameters = listed(rules, tool, number, ("\":\"", "\",\""), value);
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
