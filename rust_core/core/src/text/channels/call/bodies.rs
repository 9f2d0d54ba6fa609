//! The bodies of calls: fields, values, tags, objects, Python.

use crate::text::channels::envelope::{Arguments, Body, FieldKind, Keys, marker};
use crate::text::channels::expect::Match;
use crate::text::channels::format::CallFormat;
use crate::text::channels::object::ObjectProgress;
use crate::text::channels::piece::PieceKind;
use crate::text::channels::python::PythonProgress;
use crate::text::channels::settings::Channels;
use crate::text::channels::tags::{TagProgress, TagRules};
use crate::text::channels::value::{Progress, ValueReader};

use super::{Call, MAX_FIELD_BYTES, Sink, Stage, Step};

impl Call {
    pub(super) fn step_field(&mut self, format: &CallFormat, number: usize, c: char) -> Step {
        let Body::Fields { fields, .. } = &format.envelope.body else {
            return Step::Stop(0);
        };
        if self.field.is_empty() {
            match c {
                ' ' | '\n' | '\r' | '\t' => return Step::Read(1),
                // An object where a name is due: the call is written in the common way.
                '{' | '[' if number == 0 => {
                    self.stage = Stage::Due;
                    return Step::Read(0);
                }
                _ => {}
            }
        }
        if is_name(c) {
            self.field.push(c);
            return match self.field.len() {
                0..=MAX_FIELD_BYTES => Step::Read(c.len_utf8()),
                _ => Step::Stop(c.len_utf8()),
            };
        }
        if self.field.is_empty() {
            return Step::Stop(0);
        }
        // A name of the family's own for text, say.
        let held = self.held.trim();
        if format
            .envelope
            .frames
            .iter()
            .any(|frame| marker(frame) == held)
        {
            return Step::Frame;
        }
        let field = std::mem::take(&mut self.field);
        match fields[number].kind {
            FieldKind::Name => self.name = field,
            FieldKind::Id => self.id = field,
            FieldKind::NameInId => {
                self.name = name_in_id(&field).to_owned();
                self.id = field;
            }
        }
        self.stage = Stage::FieldEnd(number);
        Step::Read(0)
    }

    pub(super) fn step_field_end(&mut self, format: &CallFormat, number: usize, c: char) -> Step {
        let Body::Fields { fields, arguments } = &format.envelope.body else {
            return Step::Stop(0);
        };
        let markers = &format.field_ends[number];
        let is_value = matches!(arguments, Arguments::Value(_));
        let (next, num_read) =
            if markers.is_empty() || (is_value && c == '{' && self.expect.num_matched() == 0) {
                (fields.len(), 0)
            } else {
                let next = |end: usize| fields[number].ends[end].1;
                match self.expect.step(markers, c) {
                    Match::More => return Step::Read(c.len_utf8()),
                    Match::Found(end) => (next(end), c.len_utf8()),
                    Match::Before(end) => (next(end), 0),
                    Match::Not => return Step::Stop(0),
                }
            };
        self.stage = if next < fields.len() {
            Stage::Field(next)
        } else {
            match arguments {
                Arguments::Value(_) => Stage::Value(ValueReader::default()),
                Arguments::Tags(_) => Stage::Tags(Box::default()),
            }
        };
        Step::Read(num_read)
    }

    pub(super) fn step_value(
        &mut self,
        format: &CallFormat,
        text: &str,
        c: char,
        sink: &mut Sink<'_>,
    ) -> Step {
        let (Body::Fields { arguments, .. }, Stage::Value(reader)) =
            (&format.envelope.body, &mut self.stage)
        else {
            return Step::Stop(0);
        };
        let Arguments::Value(dialect) = arguments else {
            return Step::Stop(0);
        };
        if !self.is_open {
            match c {
                '{' => {
                    self.is_open = true;
                    self.held.clear();
                    self.has_called = true;
                    sink.begin(&self.name, &self.id);
                }
                ' ' | '\n' | '\r' | '\t' => return Step::Read(1),
                _ => return Step::Stop(0),
            }
        }
        let (num_read, progress) = reader.push(dialect, text, &mut self.arguments);
        if progress == Progress::Bad {
            reader.close(&mut self.arguments);
        }
        self.flush(sink);
        if progress == Progress::More {
            return Step::Read(num_read);
        }
        self.end(sink);
        Step::Drop(num_read)
    }

    pub(super) fn step_tags(
        &mut self,
        format: &CallFormat,
        channels: &Channels,
        text: &str,
        sink: &mut Sink<'_>,
    ) -> Step {
        let (Body::Fields { arguments, .. }, Some(scanners)) =
            (&format.envelope.body, &format.tag_scanners)
        else {
            return Step::Stop(0);
        };
        let (Arguments::Tags(tags), Stage::Tags(reader)) = (arguments, &mut self.stage) else {
            return Step::Stop(0);
        };
        let rules = TagRules {
            tags,
            scanners,
            types: channels.types(&self.name),
        };
        let mut at = 0;
        let progress = loop {
            let (num_read, progress) = reader.push(rules, &text[at..], &mut self.arguments);
            at += num_read;
            if progress != TagProgress::Begun {
                break progress;
            }
            self.is_open = true;
            self.held.clear();
            self.has_called = true;
            sink.begin(&self.name, &self.id);
        };
        if progress == TagProgress::Bad && !self.is_open {
            return Step::Stop(at);
        }
        let tail = match progress {
            TagProgress::Bad => reader.take_tail(),
            _ => String::new(),
        };
        self.flush(sink);
        match progress {
            TagProgress::Bad => {
                self.end(sink);
                self.held = tail;
                Step::Leave(at)
            }
            TagProgress::Closed => {
                self.end(sink);
                self.is_closed = true;
                Step::Drop(at)
            }
            TagProgress::More | TagProgress::Begun => Step::Read(at),
        }
    }

    pub(super) fn step_object(
        &mut self,
        format: &CallFormat,
        channels: &Channels,
        text: &str,
        sink: &mut Sink<'_>,
    ) -> Step {
        let keys = match &format.envelope.body {
            Body::Object { keys, .. } => keys,
            _ => Keys::usual(),
        };
        let Stage::Object(reader) = &mut self.stage else {
            return Step::Stop(0);
        };
        let mut at = 0;
        let progress = loop {
            let (num_read, progress) = reader.push(keys, &text[at..], &mut self.arguments);
            at += num_read;
            if self.is_bare && !self.is_open && reader.is_strange() {
                return Step::Stop(at);
            }
            if progress != ObjectProgress::Named {
                break progress;
            }
            let is_call = reader.knows_arguments() && channels.may_call(reader.name());
            if self.is_bare && !is_call {
                return Step::Stop(at);
            }
            self.is_open = true;
            self.held.clear();
            self.has_called = true;
            let id = reader.take_id().unwrap_or_default();
            sink.begin(reader.name(), &id);
        };
        if progress == ObjectProgress::Bad && !self.is_open {
            return Step::Stop(at);
        }
        let late_id = self.is_open.then(|| reader.take_id()).flatten();
        self.flush(sink);
        if let Some(id) = late_id {
            sink.add(PieceKind::Id, &id);
        }
        match progress {
            ObjectProgress::More | ObjectProgress::Named => Step::Read(at),
            ObjectProgress::Done | ObjectProgress::Bad => {
                self.end(sink);
                Step::Drop(at)
            }
        }
    }

    pub(super) fn step_python(
        &mut self,
        channels: &Channels,
        text: &str,
        sink: &mut Sink<'_>,
    ) -> Step {
        let Stage::Python(reader) = &mut self.stage else {
            return Step::Stop(0);
        };
        let mut at = 0;
        let progress = loop {
            let (num_read, progress) = reader.push(self.is_bare, &text[at..], &mut self.arguments);
            at += num_read;
            if progress != PythonProgress::Named {
                break progress;
            }
            if self.is_bare && !channels.may_call(reader.name()) {
                return Step::Stop(at);
            }
            self.is_open = true;
            self.held.clear();
            self.has_called = true;
            sink.begin(reader.name(), "");
        };
        let is_between = reader.is_between();
        self.flush(sink);
        match progress {
            PythonProgress::More | PythonProgress::Named => Step::Read(at),
            PythonProgress::Ended => {
                self.is_open = false;
                sink.add(PieceKind::End, "");
                Step::Drop(at)
            }
            PythonProgress::Done => {
                self.stage = Stage::Due;
                if self.has_called {
                    Step::Drop(at)
                } else {
                    Step::Stop(at)
                }
            }
            PythonProgress::Bad if self.is_open => {
                self.end(sink);
                Step::Leave(at)
            }
            PythonProgress::Bad if self.has_called && is_between => {
                self.stage = Stage::Due;
                Step::Read(at)
            }
            PythonProgress::Bad => Step::Stop(at),
        }
    }
}

/// True for the characters of names and ids.
fn is_name(c: char) -> bool {
    !c.is_whitespace()
        && !c.is_control()
        && !matches!(
            c,
            '"' | '\''
                | '`'
                | '<'
                | '>'
                | '{'
                | '}'
                | '['
                | ']'
                | '('
                | ')'
                | '|'
                | ','
                | ';'
                | '='
                | '｜'
        )
}

/// The function of an id such as `functions.f:0`.
fn name_in_id(id: &str) -> &str {
    let name = id.strip_prefix("functions.").unwrap_or(id);
    match name.rsplit_once(':') {
        Some((name, number)) if number.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => name,
    }
}
