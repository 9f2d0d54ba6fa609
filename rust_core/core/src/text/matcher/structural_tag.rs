//! Structural tags to Lark: texts between tags whose contents follow a schema, as xgrammar and vLLM
//! write them.
//!
//! Two forms: the older `{"structures": [{begin, schema, end}], "triggers": [...]}`, and
//! `{"type": "structural_tag", "format": F}`, where F is a tree of formats. Text that spells a special
//! token stands for the token.

use std::fmt::Write;

use serde_json::{Value, json};

use super::options::GrammarOptions;
use super::vocabulary::{Piece, Vocabulary};
use super::{gbnf, lark, schema};
use crate::error::{Error, Result};

const MAX_DEPTH: usize = 32;

/// Any text. Without `&` a terminal of its own, which the lexer knows well.
const ANY_TEXT: &str = "/(?s:.*)/";

/// The grammar of a structural tag.
///
/// # Errors
/// [`Error::InvalidArgument`] naming the part that is wrong or not supported.
pub(super) fn to_lark(
    tag: &Value,
    options: &GrammarOptions,
    vocabulary: &Vocabulary,
) -> Result<String> {
    let mut writer = Writer {
        options,
        vocabulary,
        rules: String::new(),
        num_rules: 0,
    };
    let start = match (tag.get("format"), tag.get("structures")) {
        (Some(format), _) => writer.format(format, "format", 0)?,
        (None, Some(_)) => writer.triggered(&from_structures(tag)?, "structures", 0)?,
        _ => return Err(Error::invalid("neither format nor structures is there")),
    };
    Ok(format!("start: {start}\n{}", writer.rules))
}

/// The older form as triggered tags.
fn from_structures(tag: &Value) -> Result<Value> {
    let structures = list(tag, "structures", "structures")?;
    let tags: Result<Vec<Value>> = structures
        .iter()
        .map(|one| {
            let schema = one.get("schema").cloned().unwrap_or_else(|| json!({}));
            let content = json!({"type": "json_schema", "json_schema": schema});
            let (begin, end) = (
                text(one, "begin", "structures")?,
                text(one, "end", "structures")?,
            );
            Ok(json!({"begin": begin, "content": content, "end": end}))
        })
        .collect();
    Ok(json!({"triggers": list(tag, "triggers", "structures")?, "tags": tags?}))
}

fn wrong(place: &str, why: &str) -> Error {
    Error::invalid(format!("{place}: {why}"))
}

fn list<'a>(value: &'a Value, key: &str, place: &str) -> Result<&'a Vec<Value>> {
    match value.get(key) {
        Some(Value::Array(items)) if !items.is_empty() => Ok(items),
        _ => Err(wrong(
            place,
            &format!("{key} must be a list that is not empty"),
        )),
    }
}

fn text<'a>(value: &'a Value, key: &str, place: &str) -> Result<&'a str> {
    let found = value.get(key).and_then(Value::as_str);
    found.ok_or_else(|| wrong(place, &format!("{key} must be a text")))
}

fn flag(value: &Value, key: &str) -> bool {
    value.get(key).and_then(Value::as_bool).unwrap_or(false)
}

/// A dispatch goes on after what it has found, unless it says otherwise.
fn loops(format: &Value) -> bool {
    format.get("loop").and_then(Value::as_bool).unwrap_or(true)
}

struct Writer<'a> {
    options: &'a GrammarOptions,
    vocabulary: &'a Vocabulary,
    rules: String,
    num_rules: usize,
}

impl Writer<'_> {
    /// Adds a rule. Returns its name.
    fn rule(&mut self, attribute: &str, body: &str) -> String {
        self.num_rules += 1;
        let name = format!("r_{}", self.num_rules);
        let _ = writeln!(self.rules, "{name}{attribute}: {body}");
        name
    }

    /// Adds a terminal. Returns its name.
    fn terminal(&mut self, body: &str) -> String {
        self.num_rules += 1;
        let name = format!("T_{}", self.num_rules);
        let _ = writeln!(self.rules, "{name}: {body}");
        name
    }

    /// A text as literals and special tokens.
    fn literal(&self, text: &str) -> String {
        let pieces = self.vocabulary.split_special(text);
        let parts: Vec<String> = pieces
            .iter()
            .map(|piece| match piece {
                Piece::Text(text) => lark::string(text),
                Piece::Token(id) => format!("<[{id}]>"),
            })
            .collect();
        if parts.is_empty() {
            "\"\"".into()
        } else {
            parts.join(" ")
        }
    }

    /// The expression of a format.
    fn format(&mut self, format: &Value, place: &str, depth: usize) -> Result<String> {
        if depth > MAX_DEPTH {
            return Err(wrong(place, "formats are nested too deeply"));
        }
        match text(format, "type", place)? {
            "const_string" => Ok(self.literal(text(format, "value", place)?)),
            "json_schema" => self.json(format, place),
            "any_text" => {
                let any = self.any_text(format, place)?;
                Ok(self.rule("", &any))
            }
            "token" => self.token(format, "token", place),
            "exclude_token" => self.any_token_but(format, place),
            "any_tokens" => Ok(format!("({})*", self.any_token_but(format, place)?)),
            "grammar" => {
                let grammar = text(format, "grammar", place)?;
                let grammar = if gbnf::is_gbnf(grammar) {
                    gbnf::to_lark(grammar)?
                } else {
                    grammar.to_owned()
                };
                Ok(self.rule("", &format!("%lark {{\n{grammar}\n}}")))
            }
            "regex" => lark::whole_regex(text(format, "pattern", place)?),
            "sequence" => Ok(format!("({})", self.all(format, place, depth)?.join(" "))),
            "or" => Ok(format!("({})", self.all(format, place, depth)?.join(" | "))),
            "optional" => Ok(format!("({})?", self.content(format, place, depth)?)),
            "plus" => Ok(format!("({})+", self.content(format, place, depth)?)),
            "star" => Ok(format!("({})*", self.content(format, place, depth)?)),
            "repeat" => self.repeat(format, place, depth),
            "tag" => self.tag(format, place, depth),
            "triggered_tags" => self.triggered(format, place, depth),
            "tags_with_separator" => self.separated(format, place, depth),
            "dispatch" => self.dispatch(format, place, depth),
            "token_dispatch" => self.token_dispatch(format, place, depth),
            "token_triggered_tags" => self.token_triggered(format, place, depth),
            other => Err(wrong(
                place,
                &format!("the type {other:?} is not supported"),
            )),
        }
    }

    fn all(&mut self, format: &Value, place: &str, depth: usize) -> Result<Vec<String>> {
        let elements = list(format, "elements", place)?.iter().enumerate();
        elements
            .map(|(i, element)| self.format(element, &format!("{place}.elements[{i}]"), depth + 1))
            .collect()
    }

    fn content(&mut self, format: &Value, place: &str, depth: usize) -> Result<String> {
        let content = format.get("content").unwrap_or(&Value::Null);
        self.format(content, &format!("{place}.content"), depth + 1)
    }

    fn json(&mut self, format: &Value, place: &str) -> Result<String> {
        let style = format.get("style").and_then(Value::as_str);
        if !matches!(style, None | Some("json")) {
            let style = style.unwrap_or_default();
            return Err(wrong(
                place,
                &format!("the style {style:?} is not supported"),
            ));
        }
        let schema = format.get("json_schema").cloned().unwrap_or(Value::Null);
        let schema = schema::prepare(schema, self.options)
            .map_err(|error| wrong(&format!("{place}.json_schema"), &error.to_string()))?;
        Ok(self.rule("", &lark::json(&schema)))
    }

    /// A terminal of any text in which no excluded one occurs.
    fn any_text(&mut self, format: &Value, place: &str) -> Result<String> {
        let Some(Value::Array(excludes)) = format.get("excludes") else {
            return Ok(ANY_TEXT.into());
        };
        let excluded: Option<Vec<String>> = excludes
            .iter()
            .map(|one| {
                one.as_str()
                    .filter(|text| !text.is_empty())
                    .map(lark::string)
            })
            .collect();
        let excluded = excluded.ok_or_else(|| wrong(place, "excludes must be a list of texts"))?;
        if excluded.is_empty() {
            return Ok(ANY_TEXT.into());
        }
        let inner = self.terminal(&format!("{ANY_TEXT} ({}) {ANY_TEXT}", excluded.join(" | ")));
        Ok(self.terminal(&format!("{ANY_TEXT} & ~{inner}")))
    }

    fn token_id(&self, value: &Value, place: &str) -> Result<u32> {
        if let Some(id) = value.as_u64() {
            return Ok(u32::try_from(id).unwrap_or(u32::MAX));
        }
        let name = value.as_str().unwrap_or_default();
        match self.vocabulary.split_special(name).as_slice() {
            [Piece::Token(id)] => Ok(*id),
            _ => Err(wrong(place, &format!("{name:?} is no special token"))),
        }
    }

    fn token(&self, format: &Value, key: &str, place: &str) -> Result<String> {
        let id = self.token_id(format.get(key).unwrap_or(&Value::Null), place)?;
        Ok(format!("<[{id}]>"))
    }

    fn any_token_but(&self, format: &Value, place: &str) -> Result<String> {
        let excluded = match format.get("exclude_tokens").or(format.get("excludes")) {
            Some(Value::Array(tokens)) => tokens.as_slice(),
            _ => &[],
        };
        let ids: Result<Vec<String>> = excluded
            .iter()
            .map(|token| Ok(self.token_id(token, place)?.to_string()))
            .collect();
        let ids = ids?;
        Ok(if ids.is_empty() {
            "<[*]>".into()
        } else {
            format!("<[^{}]>", ids.join(","))
        })
    }

    fn repeat(&mut self, format: &Value, place: &str, depth: usize) -> Result<String> {
        let content = self.content(format, place, depth)?;
        let least = format.get("min").and_then(Value::as_u64).unwrap_or(0);
        Ok(match format.get("max").and_then(Value::as_u64) {
            Some(0) => "\"\"".into(),
            Some(most) => format!("({content}){{{least},{most}}}"),
            None => format!("({content}){{{least},}}"),
        })
    }

    // ------------------------------------------------------------------------------------- tags

    /// A tag as a whole.
    fn tag(&mut self, tag: &Value, place: &str, depth: usize) -> Result<String> {
        let begin = self.edge(tag, "begin", place)?;
        let rest = self.after_begin(tag, place, depth)?;
        Ok(format!("({begin} {rest})"))
    }

    /// A tag's begin: a text, or a token.
    fn edge(&self, tag: &Value, key: &str, place: &str) -> Result<String> {
        match tag.get(key) {
            Some(Value::String(text)) => Ok(self.literal(text)),
            Some(token @ Value::Object(_)) => self.token(token, "token", place),
            _ => Err(wrong(place, &format!("{key} must be a text or a token"))),
        }
    }

    /// A tag's content and end.
    fn after_begin(&mut self, tag: &Value, place: &str, depth: usize) -> Result<String> {
        let content = tag.get("content").unwrap_or(&Value::Null);
        let ends: Vec<Value> = match tag.get("end") {
            Some(Value::Array(ends)) if !ends.is_empty() => ends.clone(),
            Some(end) => vec![end.clone()],
            None => return Err(wrong(place, "end is missing")),
        };
        let texts: Option<Vec<&str>> = ends.iter().map(Value::as_str).collect();
        let is_plain = |text: &&str| {
            let pieces = self.vocabulary.split_special(text);
            matches!(pieces.as_slice(), [Piece::Text(_)])
        };
        let is_text = content.get("type").and_then(Value::as_str) == Some("any_text");
        if let Some(texts) = texts.filter(|texts| is_text && texts.iter().all(is_plain)) {
            // The first end is the end: a greedy text would run past it.
            let any = self.any_text(content, place)?;
            let ends: Vec<String> = texts.iter().map(|text| lark::string(text)).collect();
            let end = self.terminal(&ends.join(" | "));
            return Ok(self.rule(&format!("[suffix={end}]"), &any));
        }
        let content = self.format(content, &format!("{place}.content"), depth + 1)?;
        let ends: Result<Vec<String>> = ends
            .into_iter()
            .map(|end| self.edge(&json!({"end": end}), "end", place))
            .collect();
        Ok(format!("{content} ({})", ends?.join(" | ")))
    }

    /// Text, and in it tags that begin with a trigger: from a trigger on a tag is to follow.
    fn triggered(&mut self, format: &Value, place: &str, depth: usize) -> Result<String> {
        let triggers: Option<Vec<&str>> = list(format, "triggers", place)?
            .iter()
            .map(|trigger| trigger.as_str().filter(|text| !text.is_empty()))
            .collect();
        let triggers = triggers.ok_or_else(|| wrong(place, "triggers must hold texts"))?;
        let tags = list(format, "tags", place)?.clone();
        let any = self.any_text(format, place)?;
        let mut groups: Vec<Vec<String>> = vec![Vec::new(); triggers.len()];
        let mut whole = Vec::new();
        for (i, tag) in tags.iter().enumerate() {
            let place = format!("{place}.tags[{i}]");
            let begin = text(tag, "begin", &place)?;
            let Some(k) = triggers
                .iter()
                .position(|trigger| begin.starts_with(trigger))
            else {
                return Err(wrong(&place, "begin starts with none of the triggers"));
            };
            let rest = self.after_begin(tag, &place, depth + 1)?;
            let rest = self.rule("", &rest);
            groups[k].push(format!(
                "{} {rest}",
                self.literal(&begin[triggers[k].len()..])
            ));
            whole.push(format!("{} {rest}", self.literal(begin)));
        }
        let mut options = Vec::new();
        for (trigger, group) in triggers.iter().zip(&groups) {
            if group.is_empty() {
                continue;
            }
            let head = self.head(&any, trigger);
            options.push(format!("{head} ({})", group.join(" | ")));
        }
        let tag = self.rule("", &options.join(" | "));
        let rest = self.rule("", &any);
        let first = whole.join(" | ");
        Ok(
            match (
                flag(format, "at_least_one"),
                flag(format, "stop_after_first"),
            ) {
                (true, true) => format!("({first})"),
                (true, false) => format!("(({first}) {tag}* {rest})"),
                (false, true) => format!("({tag} | {rest})"),
                (false, false) => format!("({tag}* {rest})"),
            },
        )
    }

    /// A rule of free text up to a trigger, with it.
    fn head(&mut self, any: &str, trigger: &str) -> String {
        match self.vocabulary.split_special(trigger).as_slice() {
            // The first one is it: a greedy text would run past it.
            [Piece::Text(trigger)] => {
                self.rule("[lazy]", &format!("{any} {}", lark::string(trigger)))
            }
            _ => {
                let body = format!("{any} {}", self.literal(trigger));
                self.rule("", &body)
            }
        }
    }

    /// The rules of a dispatch: patterns, and what follows each.
    fn dispatched<'a>(
        &mut self,
        format: &'a Value,
        place: &str,
        depth: usize,
    ) -> Result<Vec<(&'a Value, String)>> {
        let rules = list(format, "rules", place)?.iter().enumerate();
        rules
            .map(|(i, rule)| match rule.as_array().map(Vec::as_slice) {
                Some([pattern, content]) => {
                    let place = format!("{place}.rules[{i}]");
                    let content = self.format(content, &place, depth + 1)?;
                    Ok((pattern, self.rule("", &content)))
                }
                _ => Err(wrong(
                    place,
                    "rules must be pairs of a pattern and a format",
                )),
            })
            .collect()
    }

    /// Free text, and what each pattern in it is followed by: again and again, or once.
    fn dispatch(&mut self, format: &Value, place: &str, depth: usize) -> Result<String> {
        let any = self.any_text(format, place)?;
        let mut options = Vec::new();
        for (pattern, content) in self.dispatched(format, place, depth)? {
            let pattern = pattern.as_str().filter(|text| !text.is_empty());
            let pattern = pattern.ok_or_else(|| wrong(place, "a pattern must be a text"))?;
            options.push(format!("{} {content}", self.head(&any, pattern)));
        }
        let rest = self.rule("", &any);
        Ok(self.repeated(&options, "", &rest, loops(format)))
    }

    /// The same with tokens in place of patterns.
    fn token_dispatch(&mut self, format: &Value, place: &str, depth: usize) -> Result<String> {
        let rules = self.dispatched(format, place, depth)?;
        let tokens: Vec<Value> = rules.iter().map(|(token, _)| (*token).clone()).collect();
        let free = self.free_tokens(&tokens, format, place)?;
        let mut options = Vec::new();
        for (token, content) in &rules {
            let id = self.token_id(token, place)?;
            options.push(format!("<[{id}]> {content}"));
        }
        Ok(self.repeated(&options, &free, &free, loops(format)))
    }

    /// Free tokens, and in them tags that begin with a trigger token.
    fn token_triggered(&mut self, format: &Value, place: &str, depth: usize) -> Result<String> {
        let free = self.free_tokens(list(format, "trigger_tokens", place)?, format, place)?;
        let tags = list(format, "tags", place)?.iter().enumerate();
        let tags: Result<Vec<String>> = tags
            .map(|(i, tag)| self.tag(tag, &format!("{place}.tags[{i}]"), depth + 1))
            .collect();
        let tags = tags?;
        let first = self.rule("", &tags.join(" | "));
        let is_one = flag(format, "stop_after_first");
        if !flag(format, "at_least_one") {
            return Ok(self.repeated(&tags, &free, &free, !is_one));
        }
        Ok(match is_one {
            true => first,
            false => format!("({first} {})", self.repeated(&tags, &free, &free, true)),
        })
    }

    /// Any tokens but triggers and those that are excluded.
    fn free_tokens(&mut self, triggers: &[Value], format: &Value, place: &str) -> Result<String> {
        let excluded = format.get("exclude_tokens").and_then(Value::as_array);
        let all: Vec<Value> = triggers
            .iter()
            .chain(excluded.into_iter().flatten())
            .cloned()
            .collect();
        let one = self.any_token_but(&json!({ "exclude_tokens": all }), place)?;
        Ok(self.rule("", &format!("{one}*")))
    }

    /// `before` and one of the options, any number of times or once, and then the rest.
    fn repeated(&mut self, options: &[String], before: &str, rest: &str, many: bool) -> String {
        let one = self.rule("", &options.join(" | "));
        match many {
            true => format!("(({before} {one})* {rest})"),
            false => format!("({before} {one} | {rest})"),
        }
    }

    fn separated(&mut self, format: &Value, place: &str, depth: usize) -> Result<String> {
        let tags = list(format, "tags", place)?.iter().enumerate();
        let tags: Result<Vec<String>> = tags
            .map(|(i, tag)| self.tag(tag, &format!("{place}.tags[{i}]"), depth + 1))
            .collect();
        let tag = self.rule("", &tags?.join(" | "));
        let separator = self.literal(text(format, "separator", place)?);
        let all = if flag(format, "stop_after_first") {
            tag
        } else {
            format!("({tag} ({separator} {tag})*)")
        };
        Ok(if flag(format, "at_least_one") {
            all
        } else {
            format!("({all})?")
        })
    }
}
