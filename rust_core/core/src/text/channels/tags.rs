//! TagReader: parameters between tags, rewritten as one JSON object while they arrive.
//!
//! A value ends where its closing tag is followed by another parameter or the call's end; one that is
//! followed by anything else is part of the value. Strings leave as they come, other values when they
//! are closed.

use crate::text::channels::elements::elements_to_json;
use crate::text::channels::envelope::{Tags, marker};
use crate::text::channels::expect::{Expect, Match};
use crate::text::channels::piece::{escape, quote};
use crate::text::channels::scanner::{Held, Scanner};
use crate::text::channels::schema::{ArgumentType, ArgumentTypes, to_json};

/// A parameter's name has at most so many bytes: what is longer is none.
const MAX_KEY_BYTES: usize = 1024;

/// The scanners of an envelope's tags; made once.
#[derive(Debug, Clone)]
pub(crate) struct TagScanners {
    /// Successors of a parameter: another one, or the end of the call.
    between: Vec<Box<str>>,
    key_ends: Scanner,
    /// None: the closing tag depends on the key.
    value_ends: Option<Scanner>,
}

impl TagScanners {
    /// `close`: what ends the call.
    pub(crate) fn new(tags: &Tags, close: &[String]) -> Self {
        let between = std::iter::once(&tags.open).chain(close);
        Self {
            between: between.map(|text| marker(text).into()).collect(),
            key_ends: Scanner::new(tags.key_ends.iter().map(|(end, _)| end)),
            value_ends: (!tags.close.contains("{key}")).then(|| value_ends(tags, "")),
        }
    }
}

fn value_ends(tags: &Tags, key: &str) -> Scanner {
    let close = tags.close.replace("{key}", key);
    let with_line = if tags.on_lines {
        format!("\n{close}")
    } else {
        String::new()
    };
    Scanner::new([close, with_line])
}

/// State of the parameters' parser.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TagProgress {
    /// All was read, and there may be more.
    More,
    /// There are parameters, or the end of none: pushed again, they go on.
    Begun,
    /// The call's closing marker was read.
    Closed,
    /// The next character cannot be part of it. What has left is valid JSON.
    Bad,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// A parameter or the call's end is due. `in_value`: or the value under way goes on.
    Between {
        in_value: bool,
    },
    Key,
    /// The text between a name and its value is due.
    ValueOpen,
    Value,
    /// A parameter or the end was found, and has been announced.
    Found {
        number: usize,
    },
}

/// See the module's page.
#[derive(Debug)]
pub(crate) struct TagReader {
    state: State,
    expect: Expect,
    held: Held,
    key: String,
    kind: ArgumentType,
    /// The closing tag of this key.
    own_ends: Option<Scanner>,
    /// A value that leaves when it is closed.
    buffer: String,
    /// Text read since the last certain thing: a closing tag that may be none, for example.
    tail: String,
    /// The length of that closing tag.
    tag_len: usize,
    /// The value's first line feed may still be dropped.
    is_at_start: bool,
    is_begun: bool,
    num_parameters: usize,
}

impl Default for TagReader {
    fn default() -> Self {
        Self {
            state: State::Between { in_value: false },
            expect: Expect::default(),
            held: Held::default(),
            key: String::new(),
            kind: ArgumentType::Text,
            own_ends: None,
            buffer: String::new(),
            tail: String::new(),
            tag_len: 0,
            is_at_start: false,
            is_begun: false,
            num_parameters: 0,
        }
    }
}

/// The schema by which parameters are read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TagRules<'a> {
    pub(crate) tags: &'a Tags,
    pub(crate) scanners: &'a TagScanners,
    pub(crate) types: Option<&'a ArgumentTypes>,
}

impl TagReader {
    /// Number of bytes at the end of what was read that may begin a marker.
    pub(crate) fn num_matched(&self) -> usize {
        self.expect.num_matched()
    }

    /// Takes what was read and is part of no parameter.
    pub(crate) fn take_tail(&mut self) -> String {
        std::mem::take(&mut self.tail)
    }

    /// Reads a part of `text`, appends the arguments to `out`. Returns the number of bytes read.
    pub(crate) fn push(
        &mut self,
        rules: TagRules<'_>,
        text: &str,
        out: &mut String,
    ) -> (usize, TagProgress) {
        let mut at = 0;
        loop {
            if let State::Found { number } = self.state {
                if !std::mem::replace(&mut self.is_begun, true) {
                    return (at, TagProgress::Begun);
                }
                if number > 0 {
                    self.close(out);
                    return (at, TagProgress::Closed);
                }
                self.key.clear();
                self.state = State::Key;
            }
            let rest = &text[at..];
            let Some(c) = rest.chars().next() else {
                return (at, TagProgress::More);
            };
            match self.state {
                State::Between { in_value } => match self.between(rules, c, in_value, out) {
                    Some(num_read) => at += num_read,
                    None => {
                        self.close(out);
                        return (at, TagProgress::Bad);
                    }
                },
                State::Key => {
                    let key = &mut self.key;
                    let ends = &rules.scanners.key_ends;
                    let found = self.held.scan(ends, rest, |part| key.push_str(part));
                    let num_read = found.map_or(rest.len(), |found| found.end);
                    self.tail.push_str(&rest[..num_read]);
                    at += num_read;
                    if self.key.len() > MAX_KEY_BYTES {
                        self.close(out);
                        return (at, TagProgress::Bad);
                    }
                    if let Some(found) = found {
                        self.end_key(rules, found.marker, out);
                    }
                }
                State::ValueOpen => {
                    let open = rules.tags.value_open.as_deref().map_or("", marker);
                    match self.expect.step(&[open], c) {
                        Match::More => {
                            self.tail.push(c);
                            at += c.len_utf8();
                        }
                        Match::Found(_) => {
                            at += c.len_utf8();
                            self.begin_value(out);
                        }
                        Match::Before(_) | Match::Not => {
                            self.close(out);
                            return (at, TagProgress::Bad);
                        }
                    }
                }
                State::Value => at += self.pass_value(rules, rest, out),
                State::Found { .. } => {}
            }
        }
    }

    /// Reads a character where a marker is due. Returns the number of bytes read, None if it fits
    /// nowhere.
    fn between(
        &mut self,
        rules: TagRules<'_>,
        c: char,
        in_value: bool,
        out: &mut String,
    ) -> Option<usize> {
        let (number, num_read) = match self.expect.step(&rules.scanners.between, c) {
            Match::More => {
                self.tail.push(c);
                return Some(c.len_utf8());
            }
            Match::Found(number) => {
                self.tail.push(c);
                (number, c.len_utf8())
            }
            Match::Before(number) => (number, 0),
            Match::Not if in_value => {
                // The tag was part of the value after all.
                self.expect = Expect::default();
                let tail = std::mem::take(&mut self.tail);
                let (value, again) = tail.split_at(self.tag_len);
                self.add_value(rules.tags, value, out);
                self.state = State::Value;
                self.pass_value(rules, again, out);
                return Some(0);
            }
            Match::Not => return None,
        };
        if in_value {
            self.end_value(rules.tags, out);
            self.tail = marker(&rules.scanners.between[number]).to_owned();
        }
        self.state = State::Found { number };
        Some(num_read)
    }

    fn end_key(&mut self, rules: TagRules<'_>, end: usize, out: &mut String) {
        self.key = self.key.trim().to_owned();
        let types = rules.types;
        let by_schema = || types.map_or(ArgumentType::Text, |types| types.of(&self.key));
        self.kind = match rules.tags.key_ends[end].1 {
            Some(true) => ArgumentType::Text,
            Some(false) => ArgumentType::Json,
            None => by_schema(),
        };
        if rules.tags.is_nested && types.is_none_or(|types| !types.knows(&self.key)) {
            self.kind = ArgumentType::Either;
        }
        self.own_ends = match rules.scanners.value_ends {
            Some(_) => None,
            None => Some(value_ends(rules.tags, &self.key)),
        };
        if rules.tags.value_open.is_some() {
            self.state = State::ValueOpen;
        } else {
            self.begin_value(out);
        }
    }

    fn begin_value(&mut self, out: &mut String) {
        self.state = State::Value;
        self.is_at_start = true;
        self.held = Held::default();
        self.tail.clear();
        out.push_str(if self.num_parameters == 0 { "{" } else { ", " });
        self.num_parameters += 1;
        quote(&self.key, out);
        out.push_str(": ");
        if self.kind == ArgumentType::Text {
            out.push('"');
        }
    }

    /// Reads a value up to its closing tag. Returns the number of bytes read.
    fn pass_value(&mut self, rules: TagRules<'_>, text: &str, out: &mut String) -> usize {
        let mut held = std::mem::take(&mut self.held);
        let own_ends = self.own_ends.take();
        let ends = own_ends.as_ref().or(rules.scanners.value_ends.as_ref());
        let found = ends
            .and_then(|ends| held.scan(ends, text, |part| self.add_value(rules.tags, part, out)));
        self.held = held;
        self.own_ends = own_ends;
        let Some(found) = found else {
            return text.len();
        };
        if found.marker == 1 {
            self.tail.push('\n');
        }
        self.tail
            .push_str(&rules.tags.close.replace("{key}", &self.key));
        self.tag_len = self.tail.len();
        self.state = State::Between { in_value: true };
        found.end
    }

    /// A part of the value.
    fn add_value(&mut self, tags: &Tags, part: &str, out: &mut String) {
        let mut part = part;
        if std::mem::take(&mut self.is_at_start) && tags.on_lines {
            part = part.strip_prefix('\n').unwrap_or(part);
        }
        if self.kind == ArgumentType::Text {
            escape(part, out);
        } else {
            self.buffer.push_str(part);
        }
    }

    fn end_value(&mut self, tags: &Tags, out: &mut String) {
        if self.kind == ArgumentType::Text {
            out.push('"');
        } else if tags.is_nested && self.buffer.contains(&tags.open) {
            elements_to_json(&self.buffer, tags, out);
        } else {
            to_json(&self.buffer, self.kind, out);
        }
        self.buffer.clear();
    }

    /// Closes the object.
    fn close(&mut self, out: &mut String) {
        if !self.is_begun {
            return;
        }
        if self.num_parameters == 0 {
            out.push('{');
        }
        out.push('}');
    }
}
