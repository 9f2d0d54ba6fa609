//! ArgumentTypes: the types of a tool's parameters, for envelopes that hold them as bare text.

use std::collections::HashMap;

use serde::de::IgnoredAny;
use serde_json::{Map, Value};

use crate::text::channels::piece::quote;
use crate::text::channels::value::{Dialect, Progress, ValueReader};

/// References followed from one schema to another; more are a circle.
const MAX_REFERENCES: usize = 16;

/// Conversion of a parameter's text to JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ArgumentType {
    /// A string, as it is.
    Text,
    /// JSON; a string where it is none.
    Json,
    /// JSON where it is some other type of the union; else a string.
    Either,
}

/// The types of a tool's parameters.
#[derive(Debug, Clone, Default)]
pub(crate) struct ArgumentTypes {
    by_name: HashMap<String, ArgumentType>,
    others: Option<ArgumentType>,
}

impl ArgumentTypes {
    /// From a JSON schema; a text that is none knows no parameter. O(schema).
    pub(crate) fn new(schema: &str) -> Self {
        let Ok(Value::Object(root)) = serde_json::from_str(schema) else {
            return Self::default();
        };
        let root = Value::Object(root);
        let object = resolve(&root, &root);
        let mut types = Self::default();
        if let Some(Value::Object(properties)) = object.get("properties") {
            let one = |(name, schema): (&String, &Value)| (name.clone(), type_of(schema, &root));
            types.by_name = properties.iter().map(one).collect();
        }
        if let Some(others @ Value::Object(_)) = object.get("additionalProperties") {
            types.others = Some(type_of(others, &root));
        }
        types
    }

    /// True for the parameters that the schema names.
    pub(crate) fn knows(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }

    /// A parameter's type; of one that is not known, text.
    pub(crate) fn of(&self, name: &str) -> ArgumentType {
        let known = self.by_name.get(name).copied();
        known.or(self.others).unwrap_or(ArgumentType::Text)
    }
}

/// Follows references inside the document.
pub(crate) fn resolve<'a>(schema: &'a Value, root: &'a Value) -> &'a Value {
    let mut schema = schema;
    for _ in 0..MAX_REFERENCES {
        let Some(Value::String(reference)) = schema.get("$ref") else {
            break;
        };
        match reference.strip_prefix('#').and_then(|at| root.pointer(at)) {
            Some(target) => schema = target,
            None => break,
        }
    }
    schema
}

/// The type of values that a schema allows.
pub(crate) fn type_of(schema: &Value, root: &Value) -> ArgumentType {
    match kinds(schema, root, 0) {
        (true, false) | (false, false) => ArgumentType::Text,
        (false, true) => ArgumentType::Json,
        (true, true) => ArgumentType::Either,
    }
}

/// Strings are allowed; other values are.
fn kinds(schema: &Value, root: &Value, depth: usize) -> (bool, bool) {
    let Value::Object(schema) = resolve(schema, root) else {
        return (false, false);
    };
    match schema.get("type") {
        Some(Value::String(name)) => return of_name(name),
        Some(Value::Array(names)) => {
            return any(names.iter().filter_map(Value::as_str).map(of_name));
        }
        _ => {}
    }
    if let Some(Value::Array(values)) = schema.get("enum") {
        return any(values.iter().map(of_value));
    }
    if let Some(value) = schema.get("const") {
        return of_value(value);
    }
    for union in ["anyOf", "oneOf", "allOf"] {
        if let Some(Value::Array(parts)) = schema.get(union)
            && depth < MAX_REFERENCES
        {
            return any(parts.iter().map(|part| kinds(part, root, depth + 1)));
        }
    }
    implied(schema)
}

fn any(parts: impl Iterator<Item = (bool, bool)>) -> (bool, bool) {
    parts.fold((false, false), |all, one| (all.0 || one.0, all.1 || one.1))
}

fn of_name(name: &str) -> (bool, bool) {
    (name == "string", name != "string")
}

fn of_value(value: &Value) -> (bool, bool) {
    (value.is_string(), !value.is_string())
}

/// Of a schema without a type: by the keywords that only one type has.
fn implied(schema: &Map<String, Value>) -> (bool, bool) {
    let keywords = [
        "properties",
        "items",
        "prefixItems",
        "additionalProperties",
        "minimum",
        "maximum",
    ];
    (
        false,
        keywords.iter().any(|word| schema.contains_key(*word)),
    )
}

/// The JSON of a parameter's text.
pub(crate) fn to_json(text: &str, kind: ArgumentType, out: &mut String) {
    let trimmed = text.trim();
    if kind == ArgumentType::Text || trimmed.is_empty() {
        return quote(text, out);
    }
    if kind == ArgumentType::Either {
        // Where a string will do, only what is JSON as it stands is anything else.
        match serde_json::from_str::<IgnoredAny>(trimmed) {
            Ok(_) => out.push_str(trimmed),
            Err(_) => quote(text, out),
        }
        return;
    }
    let word = match trimmed.to_ascii_lowercase().as_str() {
        "true" => "true",
        "false" => "false",
        "null" | "none" => "null",
        _ => "",
    };
    if !word.is_empty() {
        return out.push_str(word);
    }
    let mut reader = ValueReader::default();
    let mut json = String::new();
    let (num_read, progress) = reader.push(&Dialect::Python, trimmed, &mut json);
    let is_whole = num_read == trimmed.len() && progress != Progress::Bad;
    if is_whole && reader.finish(&Dialect::Python, &mut json) {
        out.push_str(&json);
    } else {
        quote(text, out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_follow_the_schema() {
        let types = ArgumentTypes::new(
            r##"{"$defs": {"n": {"type": "integer"}, "loop": {"$ref": "#/$defs/loop"}},
            "properties": {
                "s": {"type": "string"}, "i": {"type": "integer"}, "o": {"type": "object"},
                "su": {"type": ["string", "null"]}, "nu": {"type": ["number", "null"]},
                "any": {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/n"}]},
                "r": {"$ref": "#/$defs/n"}, "e": {"enum": ["a", "b"]}, "e2": {"enum": [1, "b"]},
                "c": {"const": 3}, "u": {}, "p": {"properties": {}}, "loop": {"$ref": "#/$defs/loop"}
            }}"##,
        );
        use ArgumentType::{Either, Json, Text};
        for (name, expected) in [
            ("s", Text),
            ("i", Json),
            ("o", Json),
            ("su", Either),
            ("nu", Json),
            ("any", Either),
            ("r", Json),
            ("e", Text),
            ("e2", Either),
            ("c", Json),
            ("u", Text),
            ("p", Json),
            ("loop", Text),
            ("unknown", Text),
        ] {
            assert_eq!(types.of(name), expected, "{name}");
        }
        let other = ArgumentTypes::new(r#"{"additionalProperties": {"type": "number"}}"#);
        assert_eq!(other.of("x"), Json);
        assert_eq!(ArgumentTypes::new("no").of("x"), Text);
    }

    #[test]
    fn texts_become_json_of_their_type() {
        use ArgumentType::{Either, Json, Text};
        for (text, kind, expected) in [
            ("5", Text, r#""5""#),
            ("5", Json, "5"),
            (" 5\n", Json, "5"),
            ("True", Json, "true"),
            ("None", Json, "null"),
            ("null", Either, "null"),
            ("None", Either, r#""None""#),
            ("007", Either, r#""007""#),
            ("007", Json, "7"),
            ("abc", Json, r#""abc""#),
            ("abc", Either, r#""abc""#),
            ("5", Either, "5"),
            (r#"{"a": [1, 2]}"#, Json, r#"{"a": [1, 2]}"#),
            ("{'a': (1, 'x')}", Json, r#"{"a": [1, "x"]}"#),
            (r#"{"a": "#, Json, r#""{\"a\": ""#),
            ("[1] and more", Json, r#""[1] and more""#),
            (r#""q""#, Either, r#""q""#),
            (r#""q" is"#, Either, r#""\"q\" is""#),
            ("", Json, r#""""#),
            ("1 2", Json, r#""1 2""#),
        ] {
            let mut out = String::new();
            to_json(text, kind, &mut out);
            assert_eq!(out, expected, "{text} as {kind:?}");
        }
    }
}
