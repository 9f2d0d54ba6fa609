//! ChannelFormat: a model's forms of reasoning and tool calls, made ready to parse by.

use crate::text::channels::envelope::{Arguments, Body, Envelope, Reasoning, marker};
use crate::text::channels::overrides::Overrides;
use crate::text::channels::scanner::Scanner;
use crate::text::channels::tags::TagScanners;
use crate::text::channels::{reasoning, tool_calls};

/// The meaning of a marker in an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Meaning {
    /// Reasoning begins.
    Think,
    /// Reasoning ends.
    EndThink,
    /// Calls follow.
    Section,
    /// A call begins.
    Call,
    /// Not part of the text around it.
    Frame,
}

/// The markers of an answer.
#[derive(Debug)]
pub(crate) struct Markers {
    pub(crate) scanner: Scanner,
    pub(crate) list: Vec<(Box<str>, Meaning)>,
}

/// A marker's part in and between calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Due {
    SectionOpen,
    SectionClose,
    Open,
    Close,
}

/// An envelope, made ready.
#[derive(Debug)]
pub(crate) struct CallFormat {
    pub(crate) envelope: Envelope,
    /// Text allowed in and between calls.
    pub(crate) due_markers: Vec<Box<str>>,
    pub(crate) due: Vec<Due>,
    /// By field: what ends it.
    pub(crate) field_ends: Vec<Vec<Box<str>>>,
    pub(crate) tag_scanners: Option<TagScanners>,
}

impl CallFormat {
    fn new(envelope: Envelope) -> Self {
        let mut due_markers: Vec<Box<str>> = Vec::new();
        let mut due = Vec::new();
        let mut add = |markers: &[String], part: Due| {
            let markers = markers.iter().map(|text| marker(text));
            for text in markers.filter(|text| !text.is_empty()) {
                if !due_markers.iter().any(|known| **known == *text) {
                    due_markers.push(text.into());
                    due.push(part);
                }
            }
        };
        add(&envelope.open, Due::Open);
        add(&envelope.close, Due::Close);
        if let Some((open, close)) = &envelope.section {
            add(open, Due::SectionOpen);
            add(close, Due::SectionClose);
        }
        let (mut field_ends, mut tag_scanners) = (Vec::new(), None);
        if let Body::Fields { fields, arguments } = &envelope.body {
            let ends = |ends: &[(String, usize)]| -> Vec<Box<str>> {
                let ends = ends.iter().map(|(end, _)| marker(end));
                ends.filter(|end| !end.is_empty()).map(Into::into).collect()
            };
            field_ends = fields.iter().map(|field| ends(&field.ends)).collect();
            if let Arguments::Tags(tags) = arguments {
                tag_scanners = Some(TagScanners::new(tags, &envelope.close));
            }
        }
        Self {
            envelope,
            due_markers,
            due,
            field_ends,
            tag_scanners,
        }
    }
}

/// See the module's page.
#[derive(Debug)]
pub struct ChannelFormat {
    pub(crate) calls: Option<CallFormat>,
    pub(crate) reasoning: Option<Reasoning>,
    pub(crate) is_harmony: bool,
    /// By whether calls and reasoning are looked for.
    markers: [Markers; 4],
}

impl ChannelFormat {
    /// By names of the tables; `overrides`: see `_core.pyi`.
    ///
    /// # Errors
    /// One line: a name that is not known, or what is wrong with `overrides`.
    pub fn new(
        tool_calls: Option<&str>,
        reasoning: Option<&str>,
        overrides: Option<&str>,
    ) -> Result<Self, String> {
        let overrides = overrides.map(Overrides::parse).transpose()?;
        let calls_name = tool_calls.map(canonical_tool_calls).transpose()?;
        let reasoning_name = reasoning.map(canonical_reasoning).transpose()?;
        let is_harmony = [calls_name, reasoning_name].contains(&Some(tool_calls::HARMONY));
        // Harmony is one form of both.
        let (calls_name, reasoning_name) = match is_harmony {
            true => (None, None),
            false => (calls_name, reasoning_name),
        };
        let envelope = calls_name.and_then(|name| {
            let mut all = tool_calls::envelopes().iter();
            all.find(|envelope| envelope.name == name).cloned()
        });
        let form = reasoning_name.and_then(|name| {
            let mut all = reasoning::forms().iter();
            all.find(|form| form.name == name).cloned()
        });
        let (envelope, form) = match overrides {
            Some(overrides) => overrides.apply(envelope, form)?,
            None => (envelope, form),
        };
        let calls = envelope.map(CallFormat::new);
        let markers = [(false, false), (false, true), (true, false), (true, true)].map(
            |(has_calls, has_reasoning)| {
                Markers::new(
                    calls.as_ref().filter(|_| has_calls),
                    form.as_ref().filter(|_| has_reasoning),
                )
            },
        );
        Ok(Self {
            calls,
            reasoning: form,
            is_harmony,
            markers,
        })
    }

    /// The canonical name of the tool calls' envelope.
    #[must_use]
    pub fn tool_calls(&self) -> Option<&str> {
        match &self.calls {
            Some(calls) => Some(&calls.envelope.name),
            None if self.is_harmony => Some(tool_calls::HARMONY),
            None => None,
        }
    }

    /// The canonical name of the reasoning's form.
    #[must_use]
    pub fn reasoning(&self) -> Option<&str> {
        match &self.reasoning {
            Some(form) => Some(&form.name),
            None if self.is_harmony => Some(tool_calls::HARMONY),
            None => None,
        }
    }

    /// The usual markers around reasoning.
    #[must_use]
    pub fn reasoning_markers(&self) -> Option<(&str, &str)> {
        if self.is_harmony {
            return Some(tool_calls::HARMONY_REASONING);
        }
        let form = self.reasoning.as_ref()?;
        Some((form.open.first()?, form.close.first()?))
    }

    /// The texts of all markers, and of the tokens that they may consist of.
    #[must_use]
    pub fn markers(&self) -> Vec<&str> {
        let mut all: Vec<&str> = Vec::new();
        if self.is_harmony {
            all.extend(tool_calls::HARMONY_TOKENS);
        }
        if let Some(form) = &self.reasoning {
            for text in form.open.iter().chain(&form.close).chain(&form.frames) {
                add_tokens(text, &mut all);
            }
        }
        if let Some(calls) = &self.calls {
            for text in texts(&calls.envelope) {
                add_tokens(text, &mut all);
            }
            all.extend(calls.envelope.tokens.iter().map(String::as_str));
        }
        let mut seen = std::collections::HashSet::new();
        all.retain(|text| !text.is_empty() && seen.insert(*text));
        all
    }

    pub(crate) fn markers_of(&self, has_calls: bool, has_reasoning: bool) -> &Markers {
        &self.markers[usize::from(has_calls) * 2 + usize::from(has_reasoning)]
    }
}

impl Markers {
    fn new(calls: Option<&CallFormat>, reasoning: Option<&Reasoning>) -> Self {
        let mut list: Vec<(Box<str>, Meaning)> = Vec::new();
        let mut add = |texts: &[String], meaning: Meaning| {
            let texts = texts.iter().map(|text| marker(text));
            for text in texts.filter(|text| !text.is_empty()) {
                if !list.iter().any(|(known, _)| **known == *text) {
                    list.push((text.into(), meaning));
                }
            }
        };
        if let Some(form) = reasoning {
            add(&form.open, Meaning::Think);
            add(&form.close, Meaning::EndThink);
        }
        if let Some(CallFormat { envelope, .. }) = calls {
            if let Some((open, _)) = &envelope.section {
                add(open, Meaning::Section);
            }
            add(&envelope.open, Meaning::Call);
            add(&envelope.frames, Meaning::Frame);
        }
        if let Some(form) = reasoning {
            add(&form.frames, Meaning::Frame);
        }
        Self {
            scanner: Scanner::new(list.iter().map(|(text, _)| text)),
            list,
        }
    }
}

/// All that an envelope writes.
fn texts(envelope: &Envelope) -> Vec<&str> {
    let mut all: Vec<&String> = envelope.open.iter().chain(&envelope.close).collect();
    all.extend(&envelope.frames);
    if let Some((open, close)) = &envelope.section {
        all.extend(open.iter().chain(close));
    }
    if let Body::Fields { fields, arguments } = &envelope.body {
        all.extend(
            fields
                .iter()
                .flat_map(|field| &field.ends)
                .map(|(end, _)| end),
        );
        if let Arguments::Tags(tags) = arguments {
            all.extend([&tags.open, &tags.close]);
            all.extend(tags.key_ends.iter().map(|(end, _)| end));
            all.extend(&tags.value_open);
        }
    }
    all.into_iter().map(String::as_str).collect()
}

/// A marker, and those of its parts that look like tokens: `<…>` and `[…]`.
fn add_tokens<'a>(text: &'a str, all: &mut Vec<&'a str>) {
    let text = marker(text);
    all.push(text);
    for (open, close) in [('<', '>'), ('[', ']')] {
        let mut rest = text;
        while let Some(at) = rest.find(open) {
            rest = &rest[at..];
            let Some(end) = rest.find(close) else { break };
            all.push(&rest[..=end]);
            rest = &rest[end + 1..];
        }
    }
}

/// The canonical name of a tool-call envelope or of an alias.
///
/// # Errors
/// One line that lists the names, if there is none such.
pub fn canonical_tool_calls(name: &str) -> Result<&'static str, String> {
    find(name, &tool_call_formats(), tool_calls::ALIASES)
        .ok_or_else(|| unknown("tool-call", name, &tool_call_formats()))
}

/// The canonical name of a reasoning form or of an alias.
///
/// # Errors
/// One line that lists the names, if there is none such.
pub fn canonical_reasoning(name: &str) -> Result<&'static str, String> {
    find(name, &reasoning_formats(), reasoning::ALIASES)
        .ok_or_else(|| unknown("reasoning", name, &reasoning_formats()))
}

fn find(
    name: &str,
    names: &[&'static str],
    aliases: &'static [(&str, &str)],
) -> Option<&'static str> {
    let alias = aliases.iter().find(|(alias, _)| *alias == name);
    let name = alias.map_or(name, |(_, name)| name);
    names.iter().copied().find(|known| *known == name)
}

fn unknown(kind: &str, name: &str, names: &[&str]) -> String {
    format!(
        "no {kind} format is called {name:?}; known are {}",
        names.join(", ")
    )
}

/// The canonical names of the tool-call envelopes.
#[must_use]
pub fn tool_call_formats() -> Vec<&'static str> {
    let envelopes = tool_calls::envelopes().iter();
    let mut names: Vec<_> = envelopes.map(|envelope| envelope.name.as_str()).collect();
    names.push(tool_calls::HARMONY);
    names.sort_unstable();
    names
}

/// The canonical names of the reasoning forms.
#[must_use]
pub fn reasoning_formats() -> Vec<&'static str> {
    let forms = reasoning::forms().iter();
    let mut names: Vec<_> = forms.map(|form| form.name.as_str()).collect();
    names.push(tool_calls::HARMONY);
    names.sort_unstable();
    names
}

/// Other names of tool-call envelopes: (alias, canonical name).
#[must_use]
pub fn tool_call_aliases() -> &'static [(&'static str, &'static str)] {
    tool_calls::ALIASES
}

/// Other names of reasoning forms: (alias, canonical name).
#[must_use]
pub fn reasoning_aliases() -> &'static [(&'static str, &'static str)] {
    reasoning::ALIASES
}
