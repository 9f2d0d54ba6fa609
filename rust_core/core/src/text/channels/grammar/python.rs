//! Values as Python writes them, in a grammar.

use serde_json::Value;

use crate::text::channels::grammar::parameters::{texts_of, with_definitions};
use crate::text::channels::rules::{GAP, Rules};
use crate::text::channels::schema::resolve;

/// Values in values follow their schema so deep: one may refer to itself.
const MAX_DEPTH: usize = 4;

/// Keywords that JSON alone is held to.
const EXACT: [&str; 12] = [
    "pattern",
    "format",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "prefixItems",
    "allOf",
    "oneOf",
    "patternProperties",
    "minProperties",
    "maxProperties",
];

/// A value by its schema.
pub(super) fn python_value(rules: &mut Rules<'_>, schema: &Value) -> String {
    add_python(rules);
    value(rules, schema, 0)
}

fn value(rules: &mut Rules<'_>, schema: &Value, depth: usize) -> String {
    let schema = &with_definitions(resolve(schema, schema).clone(), schema);
    let Some(keywords) = schema.as_object() else {
        return "python_value".to_owned();
    };
    if let Some(texts) = texts_of(schema) {
        let texts = texts.iter().flat_map(|text| {
            let escaped = text.replace('\\', "\\\\").replace('\'', "\\'");
            let single = format!("'{}'", escaped.replace('\n', "\\n"));
            [
                rules.literal(&single),
                rules.literal(&Value::from(text.as_str()).to_string()),
            ]
        });
        return format!("({})", texts.collect::<Vec<_>>().join(" | "));
    }
    let is_exact = EXACT.iter().any(|key| keywords.contains_key(*key));
    if is_exact || keywords.contains_key("enum") || keywords.contains_key("const") {
        return rules.json(schema);
    }
    if depth > MAX_DEPTH {
        return "python_value".to_owned();
    }
    if let Some(Value::Array(options)) = keywords.get("anyOf") {
        let options: Vec<String> = options
            .iter()
            .map(|option| value(rules, &with_definitions(option.clone(), schema), depth + 1))
            .collect();
        return format!("({})", options.join(" | "));
    }
    match keywords.get("type") {
        Some(Value::String(kind)) => of_type(rules, kind, schema, depth),
        Some(Value::Array(kinds)) => {
            let kinds = kinds.iter().filter_map(Value::as_str);
            let kinds: Vec<String> = kinds
                .map(|kind| of_type(rules, kind, schema, depth))
                .collect();
            format!("({})", kinds.join(" | "))
        }
        _ => "python_value".to_owned(),
    }
}

fn of_type(rules: &mut Rules<'_>, kind: &str, schema: &Value, depth: usize) -> String {
    let inner = |part: &Value| with_definitions(part.clone(), schema);
    match kind {
        "string" => "PYTHON_STRING".to_owned(),
        "boolean" => "PYTHON_BOOLEAN".to_owned(),
        "null" => "PYTHON_NONE".to_owned(),
        "array" => match schema.get("items") {
            Some(items @ Value::Object(_)) => {
                let item = value(rules, &inner(items), depth + 1);
                format!("\"[\" {GAP} ({item} ({GAP} \",\" {GAP} {item})*)? {GAP} \"]\"")
            }
            _ => "python_list".to_owned(),
        },
        "object" => match schema.get("properties") {
            // Its properties in their order, by JSON's grammar: Python reads that, too.
            Some(Value::Object(properties)) if !properties.is_empty() => rules.json(schema),
            _ => "python_dict".to_owned(),
        },
        "number" | "integer" => {
            let mut number = schema.clone();
            if let Value::Object(keywords) = &mut number {
                keywords.insert("type".to_owned(), kind.into());
            }
            rules.json(&number)
        }
        _ => "python_value".to_owned(),
    }
}

/// Adds the rules of any value.
fn add_python(rules: &mut Rules<'_>) {
    rules.add_gap();
    rules.add(
        "PYTHON_STRING",
        r#"/'([^'\\\n]|\\[^\n])*'|"([^"\\\n]|\\[^\n])*"/"#,
    );
    rules.add("PYTHON_BOOLEAN", r#""True" | "False" | "true" | "false""#);
    rules.add("PYTHON_NONE", r#""None" | "null""#);
    rules.add(
        "PYTHON_NUMBER",
        r"/-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?/",
    );
    rules.add(
        "python_value",
        "PYTHON_STRING | PYTHON_NUMBER | PYTHON_BOOLEAN | PYTHON_NONE | python_list | python_dict",
    );
    let listed = |open: &str, one: &str, close: &str| {
        format!("\"{open}\" {GAP} ({one} ({GAP} \",\" {GAP} {one})*)? {GAP} \"{close}\"")
    };
    rules.add("python_list", &listed("[", "python_value", "]"));
    rules.add(
        "python_pair",
        &format!("PYTHON_STRING {GAP} \":\" {GAP} python_value"),
    );
    rules.add("python_dict", &listed("{", "python_pair", "}"));
}
