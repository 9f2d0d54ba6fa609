//! Triggers: the texts by which it is known that a call has begun.

use serde_json::Value;

use crate::text::channels::envelope::{Arguments, Body, Envelope, Keys};
use crate::text::channels::grammar::heads::{has_bare_calls, heads};

/// See the module's page.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Triggers {
    /// Within other text.
    pub anywhere: Vec<String>,
    /// Where the answer begins. Text may begin with the same bracket: they go up to a tool's name.
    pub at_start: Vec<String>,
}

impl Triggers {
    pub(super) fn new(envelope: &Envelope, tools: &[&str]) -> Self {
        // What the prompt ends with stands before text, too.
        let markers = heads(envelope).filter(|(text, _)| *text != envelope.prompted);
        let mut triggers = Self {
            anywhere: markers.map(|(text, _)| text.to_owned()).collect(),
            at_start: Vec::new(),
        };
        if !has_bare_calls(envelope) {
            return triggers;
        }
        for tool in tools {
            let heads = bare_heads(&envelope.body, tool);
            if !envelope.prompted.is_empty() {
                let prompted = heads.iter().map(|head| envelope.prompted.clone() + head);
                triggers.anywhere.extend(prompted);
            }
            triggers.at_start.extend(heads);
        }
        triggers
    }
}

/// The ways in which a call of a tool begins, up to its name.
fn bare_heads(body: &Body, tool: &str) -> Vec<String> {
    match body {
        Body::Object { keys, in_array } => {
            let bracket = if *in_array { "[" } else { "" };
            let heads = object_heads(keys, tool).into_iter();
            heads.map(|head| format!("{bracket}{head}")).collect()
        }
        Body::Fields { fields, arguments } => {
            let end = fields.first().and_then(|field| field.ends.first());
            match (end, arguments) {
                (Some((end, _)), Arguments::Value(_)) => vec![format!("{tool}{end}")],
                _ => Vec::new(),
            }
        }
        Body::Python { in_list } => {
            let bracket = if *in_list { "[" } else { "" };
            vec![format!("{bracket}{tool}(")]
        }
    }
}

/// With and without spaces, and a type before the name, as OpenAI's API has it.
fn object_heads(keys: &Keys, tool: &str) -> Vec<String> {
    let Some(key) = keys.name.first() else {
        return Vec::new();
    };
    let (key, name) = (Value::from(key.as_str()), Value::from(tool));
    let mut heads = Vec::new();
    for (colon, comma) in [(": ", ", "), (":", ",")] {
        heads.push(format!("{{{key}{colon}{name}"));
        let kind = format!("{{\"type\"{colon}\"function\"{comma}");
        heads.push(format!("{kind}{key}{colon}{name}"));
    }
    heads
}
