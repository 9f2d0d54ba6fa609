//! Overrides: markers that were found in a model's own template, in place of the table's.

use serde_json::{Map, Value};

use crate::text::channels::envelope::{
    Arguments, Body, Envelope, Field, FieldKind, Keys, Reasoning, Tags,
};
use crate::text::channels::value::Dialect;

/// The keys of an override; see `_core.pyi`.
const KEYS: [&str; 9] = [
    "style",
    "section",
    "call",
    "separator",
    "name_end",
    "keys",
    "parameter",
    "reasoning",
    "frames",
];

/// See the module's page.
#[derive(Debug)]
pub(crate) struct Overrides(Map<String, Value>);

impl Overrides {
    pub(crate) fn parse(json: &str) -> Result<Self, String> {
        let value = serde_json::from_str(json).map_err(|error| format!("overrides: {error}"))?;
        let Value::Object(map) = value else {
            return Err("overrides: no JSON object".to_owned());
        };
        match map.keys().find(|key| !KEYS.contains(&key.as_str())) {
            Some(key) => Err(format!("overrides: unknown key {key:?}")),
            None => Ok(Self(map)),
        }
    }

    pub(crate) fn apply(
        &self,
        envelope: Option<Envelope>,
        form: Option<Reasoning>,
    ) -> Result<(Option<Envelope>, Option<Reasoning>), String> {
        let form = match self.texts("reasoning", 2)? {
            Some(markers) => Some(Reasoning {
                name: form.map_or_else(|| "custom".to_owned(), |form| form.name),
                open: vec![markers[0].clone()],
                close: vec![markers[1].clone()],
                frames: self.texts("frames", 0)?.unwrap_or_default(),
            }),
            None => form,
        };
        let has_calls = self
            .0
            .keys()
            .any(|key| !matches!(&**key, "reasoning" | "frames"));
        let envelope = match envelope {
            Some(envelope) => Some(envelope),
            None if has_calls => Some(Envelope::new("custom", self.style()?)),
            None => None,
        };
        let envelope = envelope.map(|envelope| self.change(envelope)).transpose()?;
        Ok((envelope, form))
    }

    /// The body of an envelope that is not in the table.
    fn style(&self) -> Result<Body, String> {
        let fields = |arguments: Arguments| Body::Fields {
            fields: vec![Field::new(FieldKind::Name, &[])],
            arguments,
        };
        let style = self
            .0
            .get("style")
            .and_then(Value::as_str)
            .unwrap_or("object");
        Ok(match style {
            "object" | "array" => Body::Object {
                keys: Keys::usual().clone(),
                in_array: style == "array",
            },
            "value" => fields(Arguments::Value(Dialect::Json)),
            "tags" => fields(Arguments::Tags(Tags::new(
                "<parameter=",
                &[(">", None)],
                "</parameter>",
            ))),
            "python" => Body::Python { in_list: true },
            other => {
                return Err(format!(
                    "overrides: style {other:?} is none of object, array, value, tags, python"
                ));
            }
        })
    }

    fn change(&self, mut envelope: Envelope) -> Result<Envelope, String> {
        let pair = |markers: Vec<String>| {
            let mut markers = markers.into_iter();
            let mut one = || markers.next().into_iter().collect::<Vec<_>>();
            (one(), one())
        };
        if self.0.get("section").is_some_and(Value::is_null) {
            envelope.section = None;
        } else if let Some(section) = self.texts("section", 2)? {
            envelope.section = Some(pair(section));
        }
        if let Some(call) = self.texts("call", 2)? {
            (envelope.open, envelope.close) = pair(call);
        }
        if let Some(frames) = self.texts("frames", 0)? {
            envelope.frames = frames;
        }
        if let Some(separator) = self.0.get("separator").and_then(Value::as_str) {
            separator.clone_into(&mut envelope.separator);
        }
        match &mut envelope.body {
            Body::Object { keys, .. } => {
                if let Some(names) = self.texts("keys", 3)? {
                    *keys = Keys::new(&names[0], &names[1], &names[2]);
                }
            }
            Body::Fields { fields, arguments } => {
                let arguments_number = fields.len();
                if let Some(ends) = self.texts("name_end", 1)?
                    && let Some(field) = fields.last_mut()
                {
                    field.ends = vec![(ends[0].clone(), arguments_number)];
                }
                if let Arguments::Tags(tags) = arguments
                    && let Some(parts) = self.texts("parameter", 3)?
                {
                    *tags = Tags {
                        on_lines: tags.on_lines || parts[1].ends_with('\n'),
                        ..Tags::new(&parts[0], &[(parts[1].trim(), None)], &parts[2])
                    };
                }
            }
            Body::Python { .. } => {}
        }
        Ok(envelope)
    }

    /// A list of `count` texts, of any number with 0.
    fn texts(&self, key: &str, count: usize) -> Result<Option<Vec<String>>, String> {
        let Some(value) = self.0.get(key) else {
            return Ok(None);
        };
        let texts: Option<Vec<String>> = value.as_array().and_then(|items| {
            let texts = items.iter().map(|item| item.as_str().map(str::to_owned));
            texts.collect()
        });
        match texts {
            Some(texts) if count == 0 || texts.len() == count => Ok(Some(texts)),
            _ if value.is_null() && key == "section" => Ok(None),
            _ => Err(format!("overrides: {key} must be a list of {count} texts")),
        }
    }
}
