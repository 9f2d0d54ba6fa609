//! JSON schemas, made ready for llguidance: bounded, checked keyword by keyword, with octavo's defaults.
//!
//! All that is reached from the root is visited once, by its JSON pointer. A keyword that constrains and is
//! not supported is an error that names it and its place; what no validator acts upon is dropped; `oneOf`
//! becomes `anyOf` where its options cannot hold at once.

use std::collections::HashSet;

use serde_json::{Map, Value, json};

use super::disjoint::are_disjoint;
use super::options::GrammarOptions;
use super::reference::target;
use crate::error::{Error, Result};

/// Deepest nesting of a schema's text.
const MAX_NESTING: usize = 64;

/// Deepest nesting of schemas, references followed: the crate recurses over them.
const MAX_DEPTH: usize = 256;

/// Whitespace between a text's parts, where nothing else is asked for. Bounded: small models, which a
/// grammar has led where they would not go, write whitespace until they run out of tokens.
const WHITESPACE: &str = r"[\x20\x0A\x0D\x09]{1,20}";

/// Keywords that constrain and that no grammar is made for.
const UNSUPPORTED: [&str; 17] = [
    "not",
    "if",
    "then",
    "else",
    "contains",
    "minContains",
    "maxContains",
    "uniqueItems",
    "propertyNames",
    "dependencies",
    "dependentRequired",
    "dependentSchemas",
    "unevaluatedItems",
    "unevaluatedProperties",
    "$dynamicRef",
    "$recursiveRef",
    "$recursiveAnchor",
];

/// Formats that a grammar is made for.
const FORMATS: [&str; 10] = [
    "date-time",
    "date",
    "time",
    "duration",
    "email",
    "hostname",
    "ipv4",
    "ipv6",
    "uuid",
    "uri",
];

/// The standard's others, which validators check. Any further one is a note to the reader.
const UNSUPPORTED_FORMATS: [&str; 9] = [
    "idn-email",
    "idn-hostname",
    "iri",
    "iri-reference",
    "uri-reference",
    "uri-template",
    "json-pointer",
    "relative-json-pointer",
    "regex",
];

/// The schema for llguidance.
///
/// # Errors
/// [`Error::InvalidArgument`]: it is nested too deeply, no schema, or uses what is not supported.
pub(super) fn prepare(schema: Value, options: &GrammarOptions) -> Result<Value> {
    if nesting(&schema) > MAX_NESTING {
        return Err(Error::invalid(format!(
            "the schema is nested more than {MAX_NESTING} levels deep"
        )));
    }
    let mut visit = Visit {
        root: &schema,
        options,
        seen: HashSet::new(),
        edits: Vec::new(),
    };
    visit.schema(String::new(), 0)?;
    let mut edits = visit.edits;
    // What is inside of a schema comes first: an edit of the schema may rename what leads there.
    edits.sort_by_key(|(pointer, _)| std::cmp::Reverse(pointer.len()));
    let mut prepared = schema.clone();
    for (pointer, edit) in edits {
        if let Some(place) = prepared.pointer_mut(&pointer) {
            edit.apply(place);
        }
    }
    if !prepared.is_object() {
        prepared = if prepared == Value::Bool(false) {
            return Err(Error::invalid("nothing is valid under the schema false"));
        } else {
            json!({})
        };
    }
    if let Value::Object(root) = &mut prepared {
        root.insert(
            "x-guidance".into(),
            guidance(root.get("x-guidance"), options),
        );
    }
    Ok(prepared)
}

/// llguidance's own options. A schema that brings some keeps them.
fn guidance(own: Option<&Value>, options: &GrammarOptions) -> Value {
    let mut guidance = Map::new();
    if options.disable_any_whitespace {
        guidance.insert("whitespace_flexible".into(), Value::Bool(false));
    } else {
        let pattern = options.whitespace_pattern.as_deref().unwrap_or(WHITESPACE);
        guidance.insert("whitespace_pattern".into(), pattern.into());
    }
    if let Some(Value::Object(own)) = own {
        for (key, value) in own {
            guidance.insert(key.clone(), value.clone());
        }
    }
    Value::Object(guidance)
}

/// Levels of arrays and objects. Not recursive: it comes before the limit.
fn nesting(value: &Value) -> usize {
    let mut most = 0;
    let mut open = vec![(value, 1)];
    while let Some((value, level)) = open.pop() {
        match value {
            Value::Array(items) => open.extend(items.iter().map(|item| (item, level + 1))),
            Value::Object(members) => open.extend(members.values().map(|item| (item, level + 1))),
            _ => continue,
        }
        most = most.max(level);
    }
    most
}

/// A change of one schema.
enum Edit {
    /// Its keyword goes.
    Remove(&'static str),
    /// A keyword gets a value.
    Set(&'static str, Value),
    /// `oneOf` becomes `anyOf`; with a tag's name, each option requires it.
    OneOfToAnyOf(Option<String>),
    /// Nothing is valid under it.
    Never,
}

impl Edit {
    fn apply(self, schema: &mut Value) {
        let Value::Object(members) = schema else {
            return;
        };
        match self {
            Self::Remove(key) => {
                members.shift_remove(key);
            }
            Self::Set(key, value) => {
                members.insert(key.into(), value);
            }
            Self::OneOfToAnyOf(tag) => {
                let Some(Value::Array(options)) = members.shift_remove("oneOf") else {
                    return;
                };
                let options: Vec<Value> = match tag {
                    Some(tag) => options
                        .into_iter()
                        .map(|option| json!({"allOf": [option, {"required": [tag]}]}))
                        .collect(),
                    None => options,
                };
                if let Some(other) = members.shift_remove("anyOf") {
                    let both = json!([{"anyOf": other}, {"anyOf": options}]);
                    match members.get_mut("allOf").and_then(Value::as_array_mut) {
                        Some(all) => all.push(json!({"allOf": both})),
                        None => {
                            members.insert("allOf".into(), both);
                        }
                    }
                } else {
                    members.insert("anyOf".into(), options.into());
                }
            }
            Self::Never => *schema = Value::Bool(false),
        }
    }
}

struct Visit<'a> {
    root: &'a Value,
    options: &'a GrammarOptions,
    seen: HashSet<String>,
    /// By pointer.
    edits: Vec<(String, Edit)>,
}

impl Visit<'_> {
    fn schema(&mut self, pointer: String, depth: usize) -> Result<()> {
        if depth > MAX_DEPTH {
            return Err(Error::invalid(format!(
                "the schema's references are nested more than {MAX_DEPTH} levels deep"
            )));
        }
        if !self.seen.insert(pointer.clone()) {
            return Ok(());
        }
        let root = self.root;
        let schema = match root.pointer(&pointer) {
            Some(Value::Object(members)) => members,
            Some(Value::Bool(_)) => return Ok(()),
            _ => return Err(at(&pointer, "a schema must be an object, true or false")),
        };
        if schema
            .get("not")
            .is_some_and(|not| not == &json!({}) || not == &Value::Bool(true))
        {
            self.edits.push((pointer, Edit::Never));
            return Ok(());
        }
        for key in UNSUPPORTED {
            if let Some(value) = schema.get(key) {
                if !is_neutral(key, value, schema) {
                    return Err(at(&pointer, &format!("{key} is not supported")));
                }
                self.edits.push((pointer.clone(), Edit::Remove(key)));
            }
        }
        self.format(&pointer, schema)?;
        let is_open = !schema.contains_key("additionalProperties");
        let has_members =
            schema.contains_key("properties") || schema.contains_key("patternProperties");
        if self.options.disable_additional_properties && is_open && has_members {
            let edit = Edit::Set("additionalProperties", Value::Bool(false));
            self.edits.push((pointer.clone(), edit));
        }
        self.one_of(&pointer, schema)?;
        self.reference(&pointer, schema, depth)?;
        self.children(&pointer, schema, depth)
    }

    fn format(&mut self, pointer: &str, schema: &Map<String, Value>) -> Result<()> {
        let Some(Value::String(format)) = schema.get("format") else {
            return Ok(());
        };
        if UNSUPPORTED_FORMATS.contains(&format.as_str()) {
            return Err(at(pointer, &format!("format {format:?} is not supported")));
        }
        if !FORMATS.contains(&format.as_str()) {
            self.edits
                .push((pointer.to_owned(), Edit::Remove("format")));
        }
        Ok(())
    }

    fn one_of(&mut self, pointer: &str, schema: &Map<String, Value>) -> Result<()> {
        let Some(Value::Array(options)) = schema.get("oneOf") else {
            return Ok(());
        };
        let is_coerced = self.root.pointer("/x-guidance/coerce_one_of") == Some(&Value::Bool(true));
        if is_coerced || self.all_disjoint(options) {
            let edit = Edit::OneOfToAnyOf(None);
            self.edits.push((pointer.to_owned(), edit));
            return Ok(());
        }
        // A tag that has a default need not be there; an object that has it is valid all the same.
        let tag = schema
            .get("discriminator")
            .and_then(|tag| tag.get("propertyName"))
            .and_then(Value::as_str);
        if let Some(tag) = tag {
            let tagged: Vec<Value> = options
                .iter()
                .map(|option| json!({"allOf": [self.tagged(option, tag)]}))
                .collect();
            if self.all_disjoint(&tagged) {
                let edit = Edit::OneOfToAnyOf(Some(tag.to_owned()));
                self.edits.push((pointer.to_owned(), edit));
                return Ok(());
            }
        }
        let why = "oneOf is supported where its options cannot hold at once: use anyOf";
        Err(at(pointer, why))
    }

    fn all_disjoint(&self, options: &[Value]) -> bool {
        options.iter().enumerate().all(|(i, a)| {
            let later = &options[i + 1..];
            later.iter().all(|b| are_disjoint(self.root, a, b))
        })
    }

    /// The option itself, requiring the tag.
    fn tagged(&self, option: &Value, tag: &str) -> Value {
        let reference = option.get("$ref").and_then(Value::as_str);
        let found = reference
            .and_then(target)
            .and_then(|pointer| self.root.pointer(&pointer));
        let mut option = found.unwrap_or(option).clone();
        if let Value::Object(members) = &mut option {
            members.insert("required".into(), json!([tag]));
        }
        option
    }

    fn reference(
        &mut self,
        pointer: &str,
        schema: &Map<String, Value>,
        depth: usize,
    ) -> Result<()> {
        let Some(reference) = schema.get("$ref") else {
            return Ok(());
        };
        let Some(reference) = reference.as_str() else {
            return Err(at(pointer, "$ref must be a string"));
        };
        let shown: String = reference.chars().take(100).collect();
        let Some(to) = target(reference) else {
            let why = format!("$ref {shown:?} is not supported: it must begin with \"#/\"");
            return Err(at(pointer, &why));
        };
        if self.root.pointer(&to).is_none() {
            return Err(at(pointer, &format!("$ref {shown:?} leads nowhere")));
        }
        if to.contains('~') || reference.contains('%') {
            let why = format!("$ref {shown:?} is not supported: a name in it is escaped");
            return Err(at(pointer, &why));
        }
        self.schema(to, depth + 1)
    }

    fn children(&mut self, pointer: &str, schema: &Map<String, Value>, depth: usize) -> Result<()> {
        for key in ["properties", "patternProperties"] {
            if let Some(Value::Object(members)) = schema.get(key) {
                for name in members.keys() {
                    let name = name.replace('~', "~0").replace('/', "~1");
                    self.schema(format!("{pointer}/{key}/{name}"), depth + 1)?;
                }
            }
        }
        for key in ["items", "prefixItems", "anyOf", "oneOf", "allOf"] {
            if let Some(Value::Array(items)) = schema.get(key) {
                for index in 0..items.len() {
                    self.schema(format!("{pointer}/{key}/{index}"), depth + 1)?;
                }
            }
        }
        for key in ["items", "additionalItems", "additionalProperties"] {
            if let Some(Value::Object(_)) = schema.get(key) {
                self.schema(format!("{pointer}/{key}"), depth + 1)?;
            }
        }
        Ok(())
    }
}

/// True if a keyword constrains nothing as it stands.
fn is_neutral(key: &str, value: &Value, schema: &Map<String, Value>) -> bool {
    let is_any = |schema: &Value| schema == &Value::Bool(true) || schema == &json!({});
    match key {
        "uniqueItems" => value == &Value::Bool(false),
        // Names are strings in any case.
        "propertyNames" => is_any(value) || value == &json!({"type": "string"}),
        "then" | "else" => !schema.contains_key("if"),
        "if" => !schema.contains_key("then") && !schema.contains_key("else"),
        "minContains" | "maxContains" => !schema.contains_key("contains"),
        "unevaluatedItems" | "unevaluatedProperties" => is_any(value),
        "dependencies" | "dependentRequired" | "dependentSchemas" => value == &json!({}),
        _ => false,
    }
}

fn at(pointer: &str, why: &str) -> Error {
    let place: String = pointer.chars().take(200).collect();
    Error::invalid(format!("at #{place}: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prepared(schema: Value) -> Result<Value> {
        let mut schema = prepare(schema, &GrammarOptions::default())?;
        schema.as_object_mut().unwrap().remove("x-guidance");
        Ok(schema)
    }

    fn refusal(schema: Value) -> String {
        prepared(schema).unwrap_err().to_string()
    }

    #[test]
    fn keywords_without_a_grammar_are_named_with_their_place() {
        let schema = json!({"properties": {"a/b": {"items": {"$ref": "#/$defs/X"}}},
                            "$defs": {"X": {"not": {"const": 1}}, "Y": {"uniqueItems": true}}});
        assert_eq!(refusal(schema), "at #/$defs/X: not is not supported");
        assert_eq!(
            refusal(json!({"properties": {"a/b": {"uniqueItems": true}}})),
            "at #/properties/a~1b: uniqueItems is not supported"
        );
        assert!(refusal(json!({"format": "idn-email"})).contains("idn-email"));
        for reference in ["http://x/y", "other.json", "#name", "#/$defs/Missing"] {
            assert!(refusal(json!({"$ref": reference})).contains(reference));
        }
    }

    #[test]
    fn names_of_properties_are_no_keywords() {
        let schema = json!({"properties": {"not": {"type": "string"}, "oneOf": {"type": "null"}}});
        assert_eq!(prepared(schema.clone()).unwrap(), schema);
    }

    #[test]
    fn what_constrains_nothing_goes() {
        let schema = json!({"uniqueItems": false, "propertyNames": {"type": "string"},
                            "format": "path", "type": "string", "then": false});
        assert_eq!(prepared(schema).unwrap(), json!({"type": "string"}));
        assert_eq!(
            prepared(json!({"items": {"not": {}}})).unwrap(),
            json!({"items": false})
        );
    }

    #[test]
    fn one_of_disjoint_options_is_any_of() {
        let options = json!([{"type": "string"}, {"type": "null"}]);
        assert_eq!(
            prepared(json!({"oneOf": options})).unwrap(),
            json!({"anyOf": options})
        );
        assert!(
            refusal(json!({"oneOf": [{"type": "number"}, {"type": "integer"}]})).contains("oneOf")
        );
        // As pydantic writes a union by a tag that has a default.
        let cat =
            json!({"type": "object", "properties": {"kind": {"const": "cat", "default": "cat"}}});
        let dog =
            json!({"type": "object", "properties": {"kind": {"const": "dog", "default": "dog"}}});
        let union = json!({"oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
                           "discriminator": {"propertyName": "kind"},
                           "$defs": {"Cat": cat, "Dog": dog}});
        let any_of = &prepared(union).unwrap()["anyOf"];
        assert_eq!(any_of[1]["allOf"][1], json!({"required": ["kind"]}));
    }

    #[test]
    fn nesting_and_references_are_bounded() {
        let mut deep = json!({});
        for _ in 0..MAX_NESTING {
            deep = json!({"items": deep});
        }
        assert!(refusal(deep).contains("nested"));
        let mut defs = Map::new();
        for i in 0..10_000 {
            defs.insert(
                format!("d{i}"),
                json!({"$ref": format!("#/$defs/d{}", i + 1)}),
            );
        }
        defs.insert("d10000".into(), json!({}));
        assert!(refusal(json!({"$ref": "#/$defs/d0", "$defs": defs})).contains("references"));
    }

    #[test]
    fn options_reach_every_object() {
        let options = GrammarOptions {
            disable_any_whitespace: true,
            disable_additional_properties: true,
            whitespace_pattern: None,
        };
        let schema = json!({"properties": {"a": {"properties": {}}, "b": {"type": "object"}}});
        let schema = prepare(schema, &options).unwrap();
        assert_eq!(schema["additionalProperties"], json!(false));
        assert_eq!(
            schema["properties"]["a"]["additionalProperties"],
            json!(false)
        );
        assert_eq!(schema["properties"]["b"], json!({"type": "object"}));
        assert_eq!(schema["x-guidance"], json!({"whitespace_flexible": false}));
    }
}
