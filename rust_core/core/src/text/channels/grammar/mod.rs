//! The grammar of an envelope's calls, in llguidance's dialect of Lark.
//!
//! Made of the data that the parser reads calls by: what the grammar allows, the parser understands.
//! Where a call must come it is written as the family's template writes it; where one may, in any of the
//! ways that the parser reads, so that what binds it is its tool's name, and its schema if asked for.
//! White space around markers is free in both, within [`GAP`].

mod call;
mod harmony;
mod heads;
mod options;
mod parameters;
mod python;
mod triggers;

use crate::text::channels::envelope::{Body, Envelope, marker};
use crate::text::channels::format::{CallFormat, ChannelFormat};
use crate::text::channels::grammar::call::{body, common_object};
use crate::text::channels::grammar::harmony::{HARMONY_CALLS, write_harmony};
use crate::text::channels::grammar::heads::{Head, has_bare_calls, heads};
use crate::text::channels::grammar::parameters::Tool;
use crate::text::channels::rules::{GAP, Rules};

pub use self::options::{Extent, GrammarOptions};
pub use self::triggers::Triggers;

impl ChannelFormat {
    /// The texts that begin calls of `tools` within other text, and those that do where an answer begins.
    #[must_use]
    pub fn triggers(&self, tools: &[&str]) -> Triggers {
        match &self.calls {
            None if self.is_harmony => Triggers {
                anywhere: HARMONY_CALLS.map(str::to_owned).to_vec(),
                at_start: Vec::new(),
            },
            None => Triggers::default(),
            Some(CallFormat { envelope, .. }) => Triggers::new(envelope, tools),
        }
    }

    /// True if a call may begin without a marker of its own.
    #[must_use]
    pub fn is_bare(&self) -> bool {
        let calls = self.calls.as_ref();
        calls.is_some_and(|calls| has_bare_calls(&calls.envelope))
    }

    /// The grammar of calls of `tools`: names and JSON schemas.
    ///
    /// # Errors
    /// One line: the format has no calls, or none that a trigger begins; there are no tools, or a schema
    /// is none.
    pub fn grammar(
        &self,
        tools: &[(String, String)],
        options: &GrammarOptions<'_>,
    ) -> Result<String, String> {
        if tools.is_empty() {
            return Err("grammar: there are no tools".to_owned());
        }
        let tools = tools.iter().map(|(name, schema)| {
            let is_strict = options.strict.is_none_or(|strict| strict.contains(name));
            Tool::new(name, schema, is_strict)
        });
        let tools = tools.collect::<Result<Vec<_>, String>>()?;
        let mut rules = Rules::new(options.special_tokens);
        match &self.calls {
            Some(calls) => write_calls(&mut rules, &calls.envelope, &tools, options),
            None if self.is_harmony => write_harmony(&mut rules, &tools, options),
            None => return Err("grammar: the format has no tool calls".to_owned()),
        }
        Ok(rules.finish())
    }
}

fn write_calls(
    rules: &mut Rules<'_>,
    envelope: &Envelope,
    tools: &[Tool<'_>],
    options: &GrammarOptions<'_>,
) {
    rules.add_gap();
    let is_free = !options.at_least_one;
    let mut names = Vec::new();
    for (number, tool) in tools.iter().enumerate() {
        let rule = format!("call_{number}");
        let mut body = body(rules, envelope, tool, number, is_free);
        if is_free && matches!(envelope.body, Body::Fields { .. }) {
            // The common way, which models fall back to.
            let object = common_object(rules, tool);
            body = format!("{body} | {object}");
        }
        rules.add(&rule, &body);
        names.push(rule);
    }
    rules.add("call", &names.join(" | "));
    let frame = Frame::new(rules, envelope, options);
    if options.at_least_one {
        let start = frame.whole(rules);
        rules.add("start", &start);
        return;
    }
    let mut calls = Vec::new();
    let is_bare = options.extent == Extent::Calls && has_bare_calls(envelope);
    if is_bare {
        let whole = frame.whole(rules);
        calls.push(rules.sequence(&[GAP, &whole]));
    }
    for (number, (text, head)) in heads(envelope).enumerate() {
        let rest = match head {
            Head::Section => frame.behind_section(rules, text),
            Head::Call => frame.behind_open(rules),
        };
        // Text before a marker could be a call that begins without one, and bind nothing.
        let begin = match is_bare {
            true => format!("{GAP} {}", rules.literal(text)),
            false => rules.text_and_head(text, number),
        };
        calls.push(rules.sequence(&[&begin, &rest]));
    }
    rules.add_text();
    if options.extent == Extent::Calls {
        // A token may hold the end of a call and what follows it.
        rules.add("calls", &calls.join(" | "));
        rules.add("start", "calls TEXT");
        return;
    }
    if envelope.is_bare {
        let start = frame.whole(rules);
        rules.add("calls", &start);
        rules.add("PLAIN", r"/([^\[{](.|\n)*)?/");
        rules.add("start", "calls | PLAIN");
        return;
    }
    rules.add("calls", &calls.join(" | "));
    let many = if options.at_most_one { "?" } else { "*" };
    rules.add("start", &format!("(calls){many} TEXT"));
}

/// The text around calls, as grammar.
struct Frame<'a> {
    envelope: &'a Envelope,
    is_free: bool,
    at_most_one: bool,
    section: (String, String),
    open: String,
    close: String,
    brackets: (&'static str, &'static str),
    separator: String,
}

impl<'a> Frame<'a> {
    fn new(rules: &Rules<'_>, envelope: &'a Envelope, options: &GrammarOptions<'_>) -> Self {
        let is_free = !options.at_least_one;
        let of = |texts: &[String]| rules.any_marker(texts, is_free);
        let (section_open, section_close) = match &envelope.section {
            Some((open, close)) => (of(open), of(close)),
            None => (String::new(), String::new()),
        };
        let optional = |text: String, is_optional: bool| match is_optional && !text.is_empty() {
            true => format!("({text})?"),
            false => text,
        };
        let open = optional(of(&envelope.open), envelope.is_bare);
        let close = optional(of(&envelope.close), envelope.is_bare);
        let brackets = match envelope.body {
            Body::Object { in_array: true, .. } | Body::Python { in_list: true } => {
                ("\"[\"", "\"]\"")
            }
            _ => ("", ""),
        };
        let separator = match (brackets.0, marker(&envelope.separator)) {
            ("", "") => GAP.to_owned(),
            ("", text) => format!("{GAP} {} {GAP}", rules.literal(text)),
            _ => format!("{GAP} \",\" {GAP}"),
        };
        Self {
            envelope,
            is_free,
            at_most_one: options.at_most_one,
            section: (section_open, section_close),
            open,
            close,
            brackets,
            separator,
        }
    }

    /// `first`, and more where there may be.
    fn repeated(&self, first: &str, one: &str) -> String {
        match self.at_most_one {
            true => first.to_owned(),
            false => format!("{first} ({} {one})*", self.separator),
        }
    }

    /// All calls, from their first marker on.
    fn whole(&self, rules: &mut Rules<'_>) -> String {
        let open = match self.envelope.body {
            Body::Python { .. } => &self.open,
            _ => &self.section.0,
        };
        if self.envelope.has_own_section {
            let one = self.in_section(rules);
            rules.add("one", &rules.sequence(&[open, &one]));
            return self.repeated("one", "one");
        }
        let section = self.envelope.section.as_ref();
        let first = section.and_then(|(open, _)| open.first());
        let inside = self.inside(rules, first.map_or("", String::as_str));
        rules.sequence(&[open, &inside])
    }

    /// The grammar after a section's marker.
    fn behind_section(&self, rules: &mut Rules<'_>, text: &str) -> String {
        if self.envelope.has_own_section {
            return self.in_section(rules);
        }
        self.inside(rules, text)
    }

    /// The grammar after one call's marker.
    fn behind_open(&self, rules: &mut Rules<'_>) -> String {
        if matches!(self.envelope.body, Body::Python { .. }) {
            return self.inside(rules, "");
        }
        rules.sequence(&[&self.gap_of_body(), "call", GAP, &self.close])
    }

    /// One call and the end of its section.
    fn in_section(&self, rules: &mut Rules<'_>) -> String {
        let one = self.add_framed(rules);
        rules.sequence(&[GAP, one, GAP, &self.section.1])
    }

    /// All calls and what ends them, behind this marker.
    fn inside(&self, rules: &mut Rules<'_>, behind: &str) -> String {
        let (one, close) = match self.envelope.body {
            Body::Python { .. } => ("call", &self.close),
            _ => (self.add_framed(rules), &self.section.1),
        };
        let bracket = match behind.ends_with('[') {
            true => "",
            false => self.brackets.0,
        };
        let is_python = matches!(self.envelope.body, Body::Python { .. });
        let has_begin = self.envelope.section.is_some() || !bracket.is_empty() || is_python;
        let gap = if has_begin { GAP } else { "" };
        // The prompt has written what the first one begins with.
        let is_prompted = !self.envelope.prompted.is_empty();
        let calls = self.repeated(if is_prompted { "call" } else { one }, one);
        let has_end = !self.brackets.1.is_empty() || !close.is_empty();
        let end_gap = if has_end { GAP } else { "" };
        rules.sequence(&[
            gap,
            bracket,
            gap,
            &calls,
            end_gap,
            self.brackets.1,
            if close.is_empty() { "" } else { GAP },
            close,
        ])
    }

    /// Adds a call between its own markers. Returns the rule's name.
    fn add_framed(&self, rules: &mut Rules<'_>) -> &'static str {
        let close_gap = if self.close.is_empty() { "" } else { GAP };
        let framed = rules.sequence(&[
            &self.open,
            &self.gap_of_body(),
            "call",
            close_gap,
            &self.close,
        ]);
        rules.add("framed", &framed);
        "framed"
    }

    /// White space in front of a call's body.
    fn gap_of_body(&self) -> String {
        let is_object = matches!(self.envelope.body, Body::Object { .. });
        let has_open = !self.open.is_empty();
        match is_object && has_open || self.is_free {
            true => GAP.to_owned(),
            false => String::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grammar(name: &str, schema: &str, options: &GrammarOptions<'_>) -> String {
        let format = ChannelFormat::new(Some(name), None, None).unwrap();
        let tools = [("f".to_owned(), schema.to_owned())];
        format.grammar(&tools, options).unwrap()
    }

    const ONE: GrammarOptions<'_> = GrammarOptions {
        extent: Extent::Answer,
        at_least_one: true,
        at_most_one: true,
        strict: None,
        special_tokens: &[],
    };

    #[test]
    fn calls_are_written_as_their_family_does() {
        let text = grammar("hermes", "{}", &ONE);
        for line in [
            r#"call_0: "{\"name\": \"f\", \"arguments\": " %json {"type":"object"} "}""#,
            r#"framed: "<tool_call>" GAP? call GAP? "</tool_call>""#,
            "start: framed",
        ] {
            assert!(text.lines().any(|one| one == line), "{line}\n{text}");
        }
        let schema = r#"{"properties": {"s": {}, "n": {"type": "integer"}}, "required": ["n"]}"#;
        let text = grammar("qwen3_coder", schema, &ONE);
        for line in [
            r#"arguments_0: parameter_0_0? parameter_0_1"#,
            r#"call_0: "f" ">" GAP? arguments_0"#,
            r#"value_0_0[lazy]: /(.|\n)*/ "</parameter>""#,
            r#"parameter_0_1: "<parameter=n>" "\n"? %json {"type":"integer"} "\n"? "</parameter>" GAP?"#,
        ] {
            assert!(text.lines().any(|one| one == line), "{line}\n{text}");
        }
    }

    #[test]
    fn special_tokens_are_written_by_id() {
        let special_tokens = [
            ("<tool_call>".to_owned(), 7),
            ("</tool_call>".to_owned(), 8),
        ];
        let options = GrammarOptions {
            at_least_one: false,
            at_most_one: false,
            special_tokens: &special_tokens,
            ..ONE
        };
        let text = grammar("hermes", "{}", &options);
        assert!(
            text.contains("calls: TEXT <[7]> GAP? call GAP? <[8]>\n"),
            "{text}"
        );
        assert!(text.contains("start: (calls)* TEXT\n"), "{text}");
        assert!(!text.contains("tool_call>"), "{text}");
    }

    #[test]
    fn definitions_and_settings_go_with_a_parameter() {
        let schema = r##"{"properties": {"n": {"$ref": "#/$defs/n"}}, "x-guidance": {"lenient": true},
            "$defs": {"n": {"type": "integer"}}}"##;
        let text = grammar("glm45", schema, &ONE);
        let expected =
            r#"{"type":"integer","$defs":{"n":{"type":"integer"}},"x-guidance":{"lenient":true}}"#;
        assert!(text.contains(expected), "{text}");
    }
}
