//! Proofs that no value is valid under two schemas: `oneOf` over such schemas is `anyOf`.

use serde_json::Value;

use super::reference::target;

/// Schemas within schemas that a proof goes into: a tag stands near the top.
const MAX_DEPTH: usize = 6;

const TYPES: [&str; 6] = ["null", "boolean", "number", "string", "array", "object"];

/// True if it can be shown that no value is valid under both; `root` holds what they refer to.
pub(super) fn are_disjoint(root: &Value, a: &Value, b: &Value) -> bool {
    disjoint(root, a, b, MAX_DEPTH)
}

fn disjoint(root: &Value, a: &Value, b: &Value, depth: usize) -> bool {
    let (Some(a), Some(b)) = (resolved(root, a), resolved(root, b)) else {
        return false;
    };
    if depth == 0 {
        return false;
    }
    if a == &Value::Bool(false) || b == &Value::Bool(false) {
        return true;
    }
    let (types_a, types_b) = (types(a), types(b));
    if !types_a.iter().any(|kind| types_b.contains(kind)) {
        return true;
    }
    if let (Some(values_a), Some(values_b)) = (values(a), values(b))
        && !values_a.iter().any(|value| values_b.contains(value))
    {
        return true;
    }
    splits(root, a, b, depth)
        || splits(root, b, a, depth)
        || (types_a == ["object"] && types_b == ["object"] && members(root, a, b, depth))
}

/// True if `a` is made of schemas that are disjoint from `b`.
fn splits(root: &Value, a: &Value, b: &Value, depth: usize) -> bool {
    let list = |key| a.get(key).and_then(Value::as_array);
    let apart = |option: &Value| disjoint(root, option, b, depth - 1);
    let any_of = ["anyOf", "oneOf"].into_iter().filter_map(list);
    any_of.into_iter().any(|options| options.iter().all(apart))
        || list("allOf").is_some_and(|all| all.iter().any(apart))
}

/// True if two objects differ in a property that one of them requires: a value valid under both would
/// have it, and its value would be valid under both.
fn members(root: &Value, a: &Value, b: &Value, depth: usize) -> bool {
    let required = |schema: &'_ Value| -> Vec<String> {
        let names = schema.get("required").and_then(Value::as_array);
        let names = names.into_iter().flatten().filter_map(Value::as_str);
        names.map(str::to_owned).collect()
    };
    required(a).iter().chain(&required(b)).any(|name| {
        match (property(a, name), property(b, name)) {
            (Some(one), Some(other)) => disjoint(root, one, other, depth - 1),
            _ => false,
        }
    })
}

/// The schema of a property; None where it may be anything, or a pattern decides.
fn property<'a>(schema: &'a Value, name: &str) -> Option<&'a Value> {
    if let Some(own) = schema.get("properties").and_then(|all| all.get(name)) {
        return Some(own);
    }
    if schema.get("patternProperties").is_some() {
        return None;
    }
    schema.get("additionalProperties")
}

/// Follows references that have nothing beside them which constrains.
fn resolved<'a>(root: &'a Value, mut schema: &'a Value) -> Option<&'a Value> {
    for _ in 0..MAX_DEPTH {
        match schema.get("$ref").and_then(Value::as_str) {
            Some(reference) => schema = root.pointer(&target(reference)?)?,
            None => return Some(schema),
        }
    }
    None
}

fn types(schema: &Value) -> Vec<&str> {
    let known = |name: &'_ str| match name {
        "integer" => Some("number"),
        name => TYPES.into_iter().find(|kind| *kind == name),
    };
    match schema.get("type") {
        Some(Value::String(name)) => known(name).into_iter().collect(),
        Some(Value::Array(names)) => {
            let names = names.iter().filter_map(Value::as_str);
            names.filter_map(known).collect()
        }
        _ => match values(schema) {
            Some(values) => values.iter().map(|value| kind_of(value)).collect(),
            None => TYPES.to_vec(),
        },
    }
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

fn values(schema: &Value) -> Option<Vec<&Value>> {
    match (schema.get("const"), schema.get("enum")) {
        (Some(value), _) => Some(vec![value]),
        (None, Some(Value::Array(values))) => Some(values.iter().collect()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn tags_types_and_values_tell_schemas_apart() {
        let root = json!({"$defs": {
            "Cat": {"type": "object", "properties": {"kind": {"const": "cat"}}, "required": ["kind"]},
            "Dog": {"type": "object", "properties": {"kind": {"enum": ["dog", "wolf"]}}},
        }});
        let cat = json!({"$ref": "#/$defs/Cat"});
        let dog = json!({"$ref": "#/$defs/Dog"});
        let apart = [
            (cat.clone(), dog.clone()),
            (
                json!({"type": "string"}),
                json!({"type": ["integer", "null"]}),
            ),
            (json!({"const": 1}), json!({"enum": [2, "1"]})),
            (
                cat.clone(),
                json!({"anyOf": [dog.clone(), {"type": "null"}]}),
            ),
            (cat.clone(), json!({"allOf": [{}, dog.clone()]})),
            (json!(false), json!({})),
        ];
        for (a, b) in &apart {
            assert!(
                are_disjoint(&root, a, b) && are_disjoint(&root, b, a),
                "{a} {b}"
            );
        }
        let together = [
            (cat.clone(), cat.clone()),
            (json!({"type": "number"}), json!({"type": "integer"})),
            (dog.clone(), json!({"type": "object"})),
            (json!({}), json!({"const": 1})),
        ];
        for (a, b) in &together {
            assert!(!are_disjoint(&root, a, b), "{a} {b}");
        }
    }
}
