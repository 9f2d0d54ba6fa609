//! Rules: the text of a Lark grammar under construction.

use std::collections::HashSet;

use serde_json::{Value, json};

use crate::text::channels::envelope::marker;

/// White space that may stand at a marker: a rule that [`Rules::add_gap`] adds.
pub(crate) const GAP: &str = "GAP?";

/// See the module's page.
#[derive(Debug)]
pub(crate) struct Rules<'a> {
    text: String,
    names: HashSet<String>,
    /// Longest first.
    special_tokens: Vec<(&'a str, u32)>,
}

/// The schema of arguments that follow none.
pub(crate) fn any_object() -> Value {
    json!({"type": "object", "x-guidance": {"whitespace_pattern": r"[ \n\r\t]{1,20}"}})
}

/// A text as a regular expression between slashes.
pub(crate) fn escape_regex(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        if "\\.+*?()|[]{}^$/".contains(c) {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

impl<'a> Rules<'a> {
    pub(crate) fn new(special_tokens: &'a [(String, u32)]) -> Self {
        let mut special_tokens: Vec<_> = special_tokens
            .iter()
            .filter(|(text, _)| !text.is_empty())
            .map(|(text, id)| (text.as_str(), *id))
            .collect();
        special_tokens.sort_by_key(|(text, _)| std::cmp::Reverse(text.len()));
        Self {
            text: String::new(),
            names: HashSet::new(),
            special_tokens,
        }
    }

    /// Adds a rule, unless there is one of this name.
    pub(crate) fn add(&mut self, name: &str, body: &str) {
        if self.names.insert(name.to_owned()) {
            self.text.push_str(name);
            self.text.push_str(": ");
            self.text
                .push_str(if body.is_empty() { "\"\"" } else { body });
            self.text.push('\n');
        }
    }

    pub(crate) fn finish(self) -> String {
        self.text
    }

    /// Parts one after another; empty ones are left out, and one of two gaps.
    pub(crate) fn sequence(&self, parts: &[&str]) -> String {
        let mut all = String::new();
        for part in parts {
            let is_double = all.ends_with(GAP) && part.starts_with(GAP);
            let part = if is_double {
                part[GAP.len()..].trim_start()
            } else {
                part
            };
            if !all.is_empty() && !part.is_empty() {
                all.push(' ');
            }
            all.push_str(part);
        }
        all
    }

    /// Adds the white space that models write around markers: enough for what templates have there.
    pub(crate) fn add_gap(&mut self) {
        self.add("GAP", r"/\n{1,2}[ \t]{0,8}|[ \t]{1,8}/");
    }

    /// A marker, the white space at its ends free.
    pub(crate) fn soft(&self, text: &str) -> String {
        let inner = marker(text);
        let at = text.find(inner).unwrap_or_default();
        let gap = |is_there: bool| if is_there { GAP } else { "" };
        let begin = gap(at > 0 || inner.len() < text.len() && inner.is_empty());
        let end = gap(text.len() > at + inner.len());
        self.sequence(&[begin, &self.literal(inner), end])
    }

    /// One of the markers, the first unless `is_free`. One that is empty makes all of them optional.
    pub(crate) fn any_marker(&self, texts: &[String], is_free: bool) -> String {
        let num = if is_free { texts.len() } else { 1 };
        let mut soft: Vec<String> = Vec::new();
        for text in texts.iter().take(num) {
            let text = self.soft(text);
            if !soft.contains(&text) {
                soft.push(text);
            }
        }
        let num_given = soft.len();
        soft.retain(|text| !text.is_empty());
        match (soft.len(), num_given > soft.len()) {
            (0, _) => String::new(),
            (1, false) => soft.remove(0),
            (_, is_optional) => {
                let mark = if is_optional { "?" } else { "" };
                format!("({}){mark}", soft.join(" | "))
            }
        }
    }

    /// A text, its special tokens by id.
    pub(crate) fn literal(&self, text: &str) -> String {
        let mut parts = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let tokens = self.special_tokens.iter();
            let places = tokens.filter_map(|token| Some((rest.find(token.0)?, token)));
            let next = places.min_by_key(|(at, token)| (*at, std::cmp::Reverse(token.0.len())));
            let Some((at, (token, id))) = next else {
                parts.push(Value::from(rest).to_string());
                break;
            };
            if at > 0 {
                parts.push(Value::from(&rest[..at]).to_string());
            }
            parts.push(format!("<[{id}]>"));
            rest = &rest[at + token.len()..];
        }
        parts.join(" ")
    }

    /// True if a text begins with a special token.
    pub(crate) fn is_special(&self, text: &str) -> bool {
        let mut tokens = self.special_tokens.iter();
        tokens.any(|(token, _)| text.starts_with(token))
    }

    /// A text up to its first special token, and the rest.
    pub(crate) fn split_at_special<'t>(&self, text: &'t str) -> (&'t str, &'t str) {
        let tokens = self.special_tokens.iter();
        let first = tokens.filter_map(|(token, _)| text.find(token)).min();
        text.split_at(first.unwrap_or(text.len()))
    }

    /// A value by its schema.
    pub(crate) fn json(&self, schema: &Value) -> String {
        // `true` and `{}` allow everything; what is no schema at all does, too.
        match schema {
            Value::Object(_) => format!("%json {schema}"),
            _ => "%json {}".to_owned(),
        }
    }

    /// Any text, without special tokens.
    pub(crate) fn add_text(&mut self) {
        self.add("TEXT", r"/(.|\n)*/");
    }

    /// Any text up to `close`, and that.
    pub(crate) fn text_up_to(&mut self, name: &str, close: &str) -> String {
        if self.is_special(close) {
            let close = self.literal(close);
            return format!(r"/(.|\n)*/ {close}");
        }
        let (plain, tokens) = self.split_at_special(close);
        if tokens.is_empty() {
            let close = self.literal(close);
            self.add(&format!("{name}[lazy]"), &format!(r"/(.|\n)*/ {close}"));
            return name.to_owned();
        }
        // No text holds a special token: the one that follows tells where it ends.
        format!(r"/(.|\n)*{}/ {}", escape_regex(plain), self.literal(tokens))
    }

    /// Any text, and the marker that ends it: the first of its kind, unless it is a special token.
    pub(crate) fn text_and_head(&mut self, marker: &str, number: usize) -> String {
        // Text cannot hold a special token: it is told by that alone.
        if self.is_special(marker) {
            return format!("TEXT {}", self.literal(marker));
        }
        self.text_up_to(&format!("head_{number}"), marker)
    }

    /// Any text between two marks.
    pub(crate) fn text_between(&mut self, name: &str, mark: &str) -> String {
        let text = self.text_up_to(&format!("{name}_text"), mark);
        let mark = self.literal(mark);
        self.sequence(&[&mark, &text])
    }

    /// Values of the dialect whose strings stand between marks.
    pub(crate) fn add_marked(&mut self, mark: &str) {
        if self.names.contains("marked_value") {
            return;
        }
        let text = self.text_between("marked", mark);
        self.add("marked_string", &text);
        self.add(
            "marked_value",
            r#"marked_string | /-?[0-9]+(\.[0-9]+)?/ | "true" | "false" | "null" | marked_array | marked_object"#,
        );
        self.add(
            "marked_array",
            r#""[" (marked_value ("," marked_value)*)? "]""#,
        );
        self.add(
            "marked_object",
            r#""{" (marked_pair ("," marked_pair)*)? "}""#,
        );
        self.add(
            "marked_pair",
            r#"/[a-zA-Z_][a-zA-Z0-9_]{0,63}/ ":" marked_value"#,
        );
    }
}
