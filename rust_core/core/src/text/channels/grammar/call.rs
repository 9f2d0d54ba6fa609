//! One call in a grammar: fields, an object, or Python.

use serde_json::Value;

use crate::text::channels::envelope::{Arguments, Body, Envelope, Field, FieldKind, IdPlace, Keys};
use crate::text::channels::grammar::parameters::{Tool, listed, marked_object, tag_parts};
use crate::text::channels::grammar::python::python_value;
use crate::text::channels::rules::{GAP, Rules, any_object};
use crate::text::channels::value::Dialect;

/// An id that a model makes up, where its form is free.
const ID: &str = "/[a-zA-Z0-9_.:-]{1,64}/";

/// The text between a call's markers. `is_free`: in any form that the parser reads.
pub(super) fn body(
    rules: &mut Rules<'_>,
    envelope: &Envelope,
    tool: &Tool<'_>,
    number: usize,
    is_free: bool,
) -> String {
    match &envelope.body {
        // Arguments that follow a schema come behind the name.
        Body::Object { keys, .. } if is_free && tool.schema.is_none() => {
            // Without a marker an object is a call by its arguments alone.
            match envelope.is_bare {
                true => bare_object(rules, keys, tool),
                false => free_object(rules, keys, tool),
            }
        }
        Body::Object { keys, .. } => object(rules, keys, tool),
        Body::Fields { fields, arguments } => {
            let arguments = add_arguments(rules, arguments, tool, number);
            let call = FieldCall {
                fields,
                tool,
                arguments: &arguments,
                is_free,
            };
            call.from(rules, 0)
        }
        Body::Python { .. } => {
            let value =
                |rules: &mut Rules<'_>, schema: &Value, _: &str| python_value(rules, schema);
            let comma = format!("\",\" {GAP}");
            let parameters = listed(rules, tool, number, ("\"=\"", &comma), value);
            let open = rules.literal(&format!("{}(", tool.name));
            rules.sequence(&[&open, &parameters, "\")\""])
        }
    }
}

/// A call as the object that most families write, in place of fields.
pub(super) fn common_object(rules: &mut Rules<'_>, tool: &Tool<'_>) -> String {
    match tool.schema {
        None => free_object(rules, Keys::usual(), tool),
        Some(_) => object(rules, Keys::usual(), tool),
    }
}

/// A call's fields from one on.
struct FieldCall<'a> {
    fields: &'a [Field],
    tool: &'a Tool<'a>,
    /// The rule of its arguments.
    arguments: &'a str,
    is_free: bool,
}

impl FieldCall<'_> {
    fn from(&self, rules: &mut Rules<'_>, at: usize) -> String {
        let Some(field) = self.fields.get(at) else {
            return self.arguments.to_owned();
        };
        let name = rules.literal(self.tool.name);
        let content = match field.kind {
            FieldKind::Name => name,
            FieldKind::Id if self.is_free => ID.to_owned(),
            FieldKind::Id => "/[0-9]{1,4}/".to_owned(),
            FieldKind::NameInId if self.is_free => {
                format!("\"functions.\"? {name} (\":\" /[0-9]{{1,4}}/)?")
            }
            FieldKind::NameInId => {
                let head = rules.literal(&format!("functions.{}:", self.tool.name));
                format!("{head} /[0-9]{{1,4}}/")
            }
        };
        let num_ends = if self.is_free { field.ends.len() } else { 1 };
        let mut ends = Vec::new();
        for (end, next) in field.ends.iter().take(num_ends) {
            let rest = self.from(rules, *next);
            let end = rules.soft(end);
            ends.push(rules.sequence(&[&end, &rest]));
        }
        let rest = match ends.len() {
            0 => self.arguments.to_owned(),
            1 => ends.remove(0),
            _ => format!("({})", ends.join(" | ")),
        };
        rules.sequence(&[&content, &rest])
    }
}

/// Adds the arguments behind a call's fields. Returns the rule's name.
fn add_arguments(
    rules: &mut Rules<'_>,
    arguments: &Arguments,
    tool: &Tool<'_>,
    number: usize,
) -> String {
    let body = match arguments {
        Arguments::Value(Dialect::Marked(mark, _)) => marked_object(rules, tool, mark, number),
        Arguments::Value(_) => arguments_object(rules, tool),
        Arguments::Tags(tags) => {
            let parts = tag_parts(rules, tool, tags, number);
            let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
            rules.sequence(&parts)
        }
    };
    let rule = format!("arguments_{number}");
    rules.add(&rule, &body);
    rule
}

fn arguments_object(rules: &Rules<'_>, tool: &Tool<'_>) -> String {
    rules.json(tool.schema.as_ref().unwrap_or(&any_object()))
}

fn first(texts: &[String]) -> String {
    Value::from(texts.first().map_or("", String::as_str)).to_string()
}

/// `{"name": "f", "arguments": …}`, and an id where the family writes one.
fn object(rules: &Rules<'_>, keys: &Keys, tool: &Tool<'_>) -> String {
    let name = Value::from(tool.name).to_string();
    let arguments = arguments_object(rules, tool);
    if keys.name_is_key {
        let head = rules.literal(&format!("{{{name}: "));
        return rules.sequence(&[&head, &arguments, "\"}\""]);
    }
    let head = format!(
        "{}: {name}, {}: ",
        first(&keys.name),
        first(&keys.arguments)
    );
    let id = first(&keys.id);
    match keys.id_place {
        IdPlace::None => {
            let head = rules.literal(&format!("{{{head}"));
            rules.sequence(&[&head, &arguments, "\"}\""])
        }
        IdPlace::First => {
            let open = rules.literal(&format!("{id}: \""));
            let id = format!("({open} /[0-9]{{1,4}}/ \"\\\", \")?");
            rules.sequence(&["\"{\"", &id, &rules.literal(&head), &arguments, "\"}\""])
        }
        IdPlace::Last => {
            let open = rules.literal(&format!(", {id}: \""));
            let id = format!("({open} /[a-zA-Z0-9]{{9}}/ \"\\\"\")?");
            let head = rules.literal(&format!("{{{head}"));
            rules.sequence(&[&head, &arguments, &id, "\"}\""])
        }
    }
}

/// The parts of an object whose keys may have any name that is read so.
struct FreeObject {
    name: String,
    colon: String,
    comma: String,
}

impl FreeObject {
    /// Adds the rules `argument` and `other` of what may stand beside the name.
    fn new(rules: &mut Rules<'_>, keys: &Keys, tool: &Tool<'_>) -> Self {
        let colon = format!("{GAP} \":\" {GAP}");
        let any_of = |keys: &[String], more: &str| {
            let keys = keys.iter().map(String::as_str).chain([more]);
            let keys = keys.filter(|key| !key.is_empty());
            let keys = keys.map(|key| rules.literal(&Value::from(key).to_string()));
            format!("({})", keys.collect::<Vec<_>>().join(" | "))
        };
        let names = any_of(&keys.name, "function");
        let name = rules.literal(&Value::from(tool.name).to_string());
        let argument = any_of(&keys.arguments, "");
        let argument = format!("{argument} {colon} {}", rules.json(&any_object()));
        let other = any_of(&keys.id, "type");
        let other = format!(r#"{other} {colon} (/"[^"\\\x00-\x1F]{{0,64}}"/ | /[0-9]{{1,9}}/)"#);
        rules.add("argument", &argument);
        rules.add("other", &other);
        Self {
            name: format!("{names} {colon} {name}"),
            colon,
            comma: format!("{GAP} \",\" {GAP}"),
        }
    }

    /// An object of `inside` and any number of `member`.
    fn around(&self, inside: &str, member: &str) -> String {
        let comma = &self.comma;
        format!("\"{{\" {GAP} ({member} {comma})* {inside} ({comma} {member})* {GAP} \"}}\"")
    }
}

/// A call as an object, its keys in any order and of any name that is read so.
fn free_object(rules: &mut Rules<'_>, keys: &Keys, tool: &Tool<'_>) -> String {
    if keys.name_is_key {
        let name = rules.literal(&Value::from(tool.name).to_string());
        let any = rules.json(&any_object());
        return format!("\"{{\" {GAP} {name} {GAP} \":\" {GAP} {any} {GAP} \"}}\"");
    }
    let object = FreeObject::new(rules, keys, tool);
    rules.add("member", "argument | other");
    let named = object.around(&object.name, "member");
    // As OpenAI's API has them.
    let nested = format!("\"\\\"function\\\"\" {} {named}", object.colon);
    format!("{named} | {}", object.around(&nested, "member"))
}

/// The same with arguments, once.
fn bare_object(rules: &mut Rules<'_>, keys: &Keys, tool: &Tool<'_>) -> String {
    let object = FreeObject::new(rules, keys, tool);
    let (name, comma) = (&object.name, &object.comma);
    let both = format!(
        "({name} {comma} (other {comma})* argument | argument {comma} (other {comma})* {name})"
    );
    object.around(&both, "other")
}
