//! ObjectReader: a call written as one JSON object, its keys in any order.

use serde::de::IgnoredAny;

use crate::text::channels::envelope::Keys;
use crate::text::channels::value::{Dialect, Progress, ValueReader};

/// State of the object's parser.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ObjectProgress {
    /// All was read, and there may be more.
    More,
    /// The name is known and the arguments are next: pushed again, the object goes on.
    Named,
    /// The object is complete.
    Done,
    /// The next character cannot be part of it. What has left is valid JSON.
    Bad,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    Key,
    Name,
    Id,
    /// The arguments, on their way out.
    Arguments,
    /// The arguments in front of the name.
    Early,
    /// The arguments, as JSON inside a string.
    Quoted,
    Other,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Begin,
    /// A key is due, or the end.
    Key,
    Colon,
    Value,
    Inside(Target),
    /// A comma or the end is due.
    After,
    /// The object is complete, but for what it holds back.
    Over,
}

/// See the module's page.
#[derive(Debug)]
pub(crate) struct ObjectReader {
    state: State,
    reader: ValueReader,
    /// The value under way, or the last key.
    buffer: String,
    /// Objects around this key, inside the call's.
    depth: usize,
    name: Option<String>,
    id: Option<String>,
    /// The arguments, where they wait for the name.
    early: Option<String>,
    /// The name has been announced.
    is_named: bool,
    /// All of the arguments have left.
    has_arguments: bool,
    /// It has a key that no call has.
    is_strange: bool,
}

impl Default for ObjectReader {
    fn default() -> Self {
        Self {
            state: State::Begin,
            reader: ValueReader::default(),
            buffer: String::new(),
            depth: 0,
            name: None,
            id: None,
            early: None,
            is_named: false,
            has_arguments: false,
            is_strange: false,
        }
    }
}

impl ObjectReader {
    /// The function's name, once it is known.
    pub(crate) fn name(&self) -> &str {
        self.name.as_deref().unwrap_or_default()
    }

    /// Takes the call's id, once it is known.
    pub(crate) fn take_id(&mut self) -> Option<String> {
        self.id.take()
    }

    /// True if it has brought arguments, or holds them.
    pub(crate) fn knows_arguments(&self) -> bool {
        self.has_arguments || self.early.is_some() || self.state == State::Value
    }

    /// True if it has a key that no call has.
    pub(crate) fn is_strange(&self) -> bool {
        self.is_strange
    }

    /// True if all of the arguments have left.
    pub(crate) fn has_arguments(&self) -> bool {
        self.has_arguments
    }

    /// Reads a part of `text`, appends the arguments to `out`. Returns the number of bytes read.
    pub(crate) fn push(
        &mut self,
        keys: &Keys,
        text: &str,
        out: &mut String,
    ) -> (usize, ObjectProgress) {
        let mut at = 0;
        while self.state != State::Over {
            let Some(c) = text[at..].chars().next() else {
                return (at, ObjectProgress::More);
            };
            if let State::Inside(target) = self.state {
                let (num_read, progress) = match target {
                    Target::Arguments => self.reader.push(&Dialect::Json, &text[at..], out),
                    _ => {
                        let buffer = &mut self.buffer;
                        self.reader.push(&Dialect::Json, &text[at..], buffer)
                    }
                };
                at += num_read;
                match progress {
                    Progress::More => {}
                    Progress::Done => self.take_value(target, out),
                    Progress::Bad => return (at, self.give_up(target, out)),
                }
                continue;
            }
            if matches!(c, ' ' | '\n' | '\r' | '\t') {
                at += 1;
                continue;
            }
            match (self.state, c) {
                (State::Begin, '{') => self.state = State::Key,
                (State::Key, '"' | '\'') => {
                    self.begin(Target::Key);
                    continue;
                }
                (State::Colon, ':') => self.state = State::Value,
                (State::After, ',') => self.state = State::Key,
                (State::Key | State::After, '}') if self.depth > 0 => {
                    self.depth -= 1;
                    self.state = State::After;
                }
                (State::Key | State::After, '}') => self.state = State::Over,
                (State::Value, c) => match self.begin_value(keys, c) {
                    Begun::Nested => {}
                    Begun::Value => continue,
                    Begun::Named => return (at, ObjectProgress::Named),
                    Begun::Nothing => return (at, ObjectProgress::Bad),
                },
                _ => return (at, ObjectProgress::Bad),
            }
            at += 1;
        }
        (at, self.finish(out))
    }

    fn begin(&mut self, target: Target) {
        self.buffer.clear();
        self.reader = ValueReader::default();
        self.state = State::Inside(target);
    }

    fn begin_value(&mut self, keys: &Keys, c: char) -> Begun {
        let is_in = |names: &[String]| names.contains(&self.buffer);
        let is_arguments = if keys.name_is_key {
            self.name = Some(self.buffer.clone());
            true
        } else {
            is_in(&keys.arguments)
        };
        if is_arguments && !self.has_arguments && self.early.is_none() {
            if !matches!(c, '{' | '[' | '"' | '\'' | 'n' | 'N') {
                return Begun::Nothing;
            }
            if self.name.is_none() {
                self.begin(match c {
                    '"' | '\'' => Target::Quoted,
                    _ => Target::Early,
                });
            } else if !self.is_named {
                self.is_named = true;
                return Begun::Named;
            } else {
                // Those of a call are an object: null is an empty one.
                self.begin(match c {
                    '"' | '\'' => Target::Quoted,
                    'n' | 'N' => Target::Early,
                    _ => Target::Arguments,
                });
            }
            return Begun::Value;
        }
        if self.buffer == "function" && c == '{' {
            self.depth += 1;
            self.state = State::Key;
            return Begun::Nested;
        }
        let target = if is_in(&keys.name) || self.buffer == "function" {
            Target::Name
        } else if is_in(&keys.id) {
            Target::Id
        } else {
            self.is_strange |= self.buffer != "type";
            Target::Other
        };
        self.begin(target);
        Begun::Value
    }

    /// A value is complete.
    fn take_value(&mut self, target: Target, out: &mut String) {
        self.state = State::After;
        let text = || serde_json::from_str::<String>(&self.buffer).ok();
        match target {
            Target::Key => {
                let key = text().unwrap_or_default();
                self.buffer = key;
                self.state = State::Colon;
            }
            Target::Name if self.is_named || self.name.is_some() => {}
            Target::Name => self.name = text().filter(|name| !name.is_empty()),
            Target::Id => self.id = Some(text().unwrap_or_else(|| self.buffer.clone())),
            Target::Arguments => self.has_arguments = true,
            Target::Early => self.keep(out, |buffer| match buffer {
                "null" => "{}".to_owned(),
                other => other.to_owned(),
            }),
            Target::Quoted => self.keep(out, unquoted),
            Target::Other => {}
        }
    }

    /// Lets the arguments go, or keeps them until there is a name.
    fn keep(&mut self, out: &mut String, json: impl Fn(&str) -> String) {
        let json = json(&self.buffer);
        if self.is_named {
            out.push_str(&json);
            self.has_arguments = true;
        } else {
            self.early = Some(json);
        }
    }

    /// A value cannot go on.
    fn give_up(&mut self, target: Target, out: &mut String) -> ObjectProgress {
        if self.is_named && !self.has_arguments {
            if target == Target::Arguments {
                self.reader.close(out);
            } else {
                out.push_str("{}");
            }
            self.has_arguments = true;
        }
        ObjectProgress::Bad
    }

    /// The object is closed: what it held back leaves.
    fn finish(&mut self, out: &mut String) -> ObjectProgress {
        if self.name.is_none() {
            return ObjectProgress::Bad;
        }
        if !std::mem::replace(&mut self.is_named, true) {
            return ObjectProgress::Named;
        }
        if !std::mem::replace(&mut self.has_arguments, true) {
            out.push_str(self.early.as_deref().unwrap_or("{}"));
        }
        ObjectProgress::Done
    }
}

enum Begun {
    /// An object inside the call's.
    Nested,
    Value,
    /// The arguments, for whom the name is to be announced.
    Named,
    /// No arguments can begin so.
    Nothing,
}

/// The JSON inside a JSON string; the string itself where it holds none.
fn unquoted(string: &str) -> String {
    let Ok(inner) = serde_json::from_str::<String>(string) else {
        return string.to_owned();
    };
    let inner = inner.trim();
    if inner.is_empty() {
        return "{}".to_owned();
    }
    if serde_json::from_str::<IgnoredAny>(inner).is_ok() {
        return inner.to_owned();
    }
    let mut json = String::new();
    let mut reader = ValueReader::default();
    let (num_read, progress) = reader.push(&Dialect::Json, inner, &mut json);
    match progress {
        Progress::Done if num_read == inner.len() => json,
        _ => string.to_owned(),
    }
}
