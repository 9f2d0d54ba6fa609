//! PythonReader: calls written as Python, `[f(a=1, b="x"), g()]`. Read, never evaluated.

use crate::text::channels::piece::quote;
use crate::text::channels::value::{Dialect, Progress, ValueReader};

/// State of the calls' parser.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PythonProgress {
    /// All was read, and there may be more.
    More,
    /// A call begins: pushed again, it goes on.
    Named,
    /// A call is complete.
    Ended,
    /// The list is closed.
    Done,
    /// The next character cannot be part of it. What has left of a call is valid JSON.
    Bad,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The list's bracket is due, or a name where there need be none.
    Begin,
    Name,
    /// A parameter or the call's end is due.
    Parameter,
    Key,
    /// After a key: the equals sign is due.
    Equals,
    Value,
    /// After a value: a comma or the call's end is due.
    AfterValue,
    /// After a call.
    After,
}

/// See the module's page.
#[derive(Debug)]
pub(crate) struct PythonReader {
    state: State,
    in_list: bool,
    name: String,
    key: String,
    reader: ValueReader,
    num_parameters: usize,
    is_named: bool,
}

impl Default for PythonReader {
    fn default() -> Self {
        Self {
            state: State::Begin,
            in_list: false,
            name: String::new(),
            key: String::new(),
            reader: ValueReader::default(),
            num_parameters: 0,
            is_named: false,
        }
    }
}

impl PythonReader {
    /// The function's name, once it is known.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// True between calls outside a list, where other text may follow.
    pub(crate) fn is_between(&self) -> bool {
        self.state == State::After && !self.in_list
    }

    /// Reads a part of `text`, appends arguments to `out`. Returns the number of bytes read.
    ///
    /// `needs_list`: calls stand in a list.
    pub(crate) fn push(
        &mut self,
        needs_list: bool,
        text: &str,
        out: &mut String,
    ) -> (usize, PythonProgress) {
        let mut at = 0;
        while let Some(c) = text[at..].chars().next() {
            if self.state == State::Value {
                let (num_read, progress) = self.reader.push(&Dialect::Python, &text[at..], out);
                at += num_read;
                match progress {
                    Progress::More => {}
                    Progress::Done => self.state = State::AfterValue,
                    Progress::Bad => return (at, self.give_up(out)),
                }
                continue;
            }
            let is_space = matches!(c, ' ' | '\n' | '\r' | '\t');
            if is_space && !matches!(self.state, State::Name | State::Key) {
                at += 1;
                continue;
            }
            let is_name = c.is_alphanumeric() || matches!(c, '_' | '.' | '-' | ':' | '/');
            match (self.state, c) {
                (State::Begin, '[') => {
                    self.in_list = true;
                    self.state = State::After;
                }
                (State::After, ']') if self.in_list => return (at + 1, PythonProgress::Done),
                (State::After, ',' | ';') if !self.name.is_empty() => {}
                (State::Begin | State::After, c) if is_name && !c.is_ascii_digit() => {
                    if self.state == State::Begin && needs_list {
                        return (at, PythonProgress::Bad);
                    }
                    self.name.clear();
                    self.is_named = false;
                    self.num_parameters = 0;
                    self.state = State::Name;
                    continue;
                }
                (State::Name, '(') => self.state = State::Parameter,
                (State::Name, c) if is_name && self.name.len() < 256 => self.name.push(c),
                (State::Parameter | State::AfterValue, ')') => {
                    if !std::mem::replace(&mut self.is_named, true) {
                        return (at, PythonProgress::Named);
                    }
                    self.close(out);
                    self.state = State::After;
                    return (at + 1, PythonProgress::Ended);
                }
                (State::AfterValue, ',') => self.state = State::Parameter,
                (State::Parameter, c) if c.is_alphabetic() || c == '_' => {
                    self.key.clear();
                    self.state = State::Key;
                    continue;
                }
                (State::Key, c) if c.is_alphanumeric() || c == '_' => self.key.push(c),
                (State::Key | State::Equals, '=') => {
                    if !std::mem::replace(&mut self.is_named, true) {
                        self.state = State::Equals;
                        return (at, PythonProgress::Named);
                    }
                    self.begin_value(out);
                }
                (State::Key, _) if is_space => self.state = State::Equals,
                _ => return (at, self.give_up(out)),
            }
            at += c.len_utf8();
        }
        (at, PythonProgress::More)
    }

    fn begin_value(&mut self, out: &mut String) {
        out.push_str(if self.num_parameters == 0 { "{" } else { ", " });
        self.num_parameters += 1;
        quote(&self.key, out);
        out.push_str(": ");
        self.reader = ValueReader::default();
        self.state = State::Value;
    }

    fn close(&mut self, out: &mut String) {
        if self.num_parameters == 0 {
            out.push('{');
        }
        out.push('}');
    }

    fn give_up(&mut self, out: &mut String) -> PythonProgress {
        if self.is_named && self.state != State::After {
            if self.state == State::Value {
                self.reader.close(out);
            }
            self.close(out);
        }
        PythonProgress::Bad
    }
}
