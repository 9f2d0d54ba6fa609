//! Call: the text from a call's first marker on, read by its envelope.
//!
//! Until a call's name and its first argument are seen, all text is held: it may be no call. From
//! then on its arguments leave as they come.

use crate::text::channels::envelope::{Arguments, Body, Envelope, FieldKind, Keys, marker};
use crate::text::channels::expect::{Expect, Match};
use crate::text::channels::format::{CallFormat, Due};
use crate::text::channels::object::{ObjectProgress, ObjectReader};
use crate::text::channels::piece::{Piece, PieceKind, append};
use crate::text::channels::python::{PythonProgress, PythonReader};
use crate::text::channels::settings::Channels;
use crate::text::channels::tags::{TagProgress, TagReader, TagRules};
use crate::text::channels::value::{Progress, ValueReader};

/// A name or id has at most so many bytes: what is longer is none.
const MAX_FIELD_BYTES: usize = 256;

/// What became of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// All was read.
    More,
    /// The next character belongs to what follows the calls, as does what is held.
    Over,
    /// This is no call: what is held is text.
    Failed,
    /// What is held is a marker around text.
    Frame,
}

#[derive(Debug)]
enum Stage {
    /// A call is due, or after the first one, the end.
    Due,
    /// A field's text.
    Field(usize),
    /// What ends the field.
    FieldEnd(usize),
    Value(ValueReader),
    Tags(Box<TagReader>),
    Object(Box<ObjectReader>),
    Python(Box<PythonReader>),
}

/// What was done with so many bytes.
enum Step {
    /// Held, unless they left.
    Read(usize),
    /// They and what was held are settled.
    Drop(usize),
    /// The same, and no more calls follow.
    Close(usize),
    /// Held; the next character fits nowhere.
    Stop(usize),
    /// Dealt with; the next character fits nowhere.
    Leave(usize),
    /// What is held is a marker around text.
    Frame,
}

impl Step {
    fn num_read(&self) -> usize {
        match self {
            Self::Read(n) | Self::Drop(n) | Self::Close(n) | Self::Stop(n) | Self::Leave(n) => *n,
            Self::Frame => 0,
        }
    }
}

/// Where calls go.
pub(crate) struct Sink<'a> {
    pub(crate) pieces: &'a mut Vec<Piece>,
    /// Number of calls begun.
    pub(crate) num_calls: &'a mut u32,
}

impl Sink<'_> {
    pub(crate) fn begin(&mut self, name: &str, id: &str) {
        let call = *self.num_calls;
        *self.num_calls += 1;
        append(self.pieces, PieceKind::Name, call, name);
        if !id.is_empty() {
            append(self.pieces, PieceKind::Id, call, id);
        }
    }

    pub(crate) fn add(&mut self, kind: PieceKind, text: &str) {
        let call = self.num_calls.saturating_sub(1);
        append(self.pieces, kind, call, text);
    }
}

/// See the module's page.
#[derive(Debug)]
pub(crate) struct Call {
    stage: Stage,
    /// Text that has not become part of a call.
    held: String,
    expect: Expect,
    in_section: bool,
    in_array: bool,
    /// The first call begins without a marker.
    is_bare: bool,
    /// A call's name has left, and not its end.
    is_open: bool,
    /// A call has begun.
    has_called: bool,
    /// The last call's closing marker was read.
    is_closed: bool,
    field: String,
    name: String,
    id: String,
    /// Arguments on their way out.
    arguments: String,
}

impl Call {
    /// `marker`: what was found; empty for a call without one.
    pub(crate) fn new(format: &CallFormat, marker: &str, is_section: bool) -> Self {
        let mut call = Self {
            stage: Stage::Due,
            held: marker.to_owned(),
            expect: Expect::default(),
            in_section: is_section,
            in_array: false,
            is_bare: marker.is_empty(),
            is_open: false,
            has_called: false,
            is_closed: false,
            field: String::new(),
            name: String::new(),
            id: String::new(),
            arguments: String::new(),
        };
        if !is_section || matches!(format.envelope.body, Body::Python { .. }) {
            call.open(&format.envelope);
        }
        call
    }

    /// True once a call has begun: what follows the calls is the answer's text.
    pub(crate) fn has_called(&self) -> bool {
        self.has_called
    }

    /// Takes the text that did not become part of a call, in two parts: text, and what may be a
    /// marker's beginning.
    pub(crate) fn take_held(&mut self) -> (String, String) {
        let num_open = match &self.stage {
            // White space and half a marker, after a call.
            Stage::Due if self.has_called => self.held.len(),
            Stage::Tags(reader) => reader.num_matched(),
            _ => self.expect.num_matched(),
        };
        let mut text = std::mem::take(&mut self.held);
        let again = text.split_off(text.len() - num_open.min(text.len()));
        (text, again)
    }

    /// A call's opening marker was read.
    fn open(&mut self, envelope: &Envelope) {
        self.is_closed = false;
        self.field.clear();
        self.name.clear();
        self.id.clear();
        self.stage = match &envelope.body {
            Body::Object { .. } => Stage::Due,
            Body::Fields { .. } => Stage::Field(0),
            Body::Python { .. } => Stage::Python(Box::default()),
        };
    }

    /// Reads `text`. Returns the number of bytes read.
    pub(crate) fn push(
        &mut self,
        format: &CallFormat,
        channels: &Channels,
        text: &str,
        sink: &mut Sink<'_>,
    ) -> (usize, Outcome) {
        let mut at = 0;
        while at < text.len() {
            let was_open = self.is_open;
            let step = self.step(format, channels, &text[at..], sink);
            if matches!(step, Step::Frame) {
                self.held.clear();
                return (at, Outcome::Frame);
            }
            let num_read = step.num_read();
            match step {
                Step::Read(_) | Step::Stop(_) if !was_open && !self.is_open => {
                    self.held.push_str(&text[at..at + num_read]);
                }
                Step::Drop(_) | Step::Close(_) => self.held.clear(),
                _ => {}
            }
            at += num_read;
            match step {
                Step::Close(_) => return (at, Outcome::Over),
                Step::Stop(_) | Step::Leave(_) if self.has_called => return (at, Outcome::Over),
                Step::Stop(_) | Step::Leave(_) => return (at, Outcome::Failed),
                Step::Drop(_) if self.is_over(&format.envelope) => return (at, Outcome::Over),
                _ => {}
            }
        }
        (at, Outcome::More)
    }

    /// No more text. A call whose arguments are complete is, too.
    pub(crate) fn finish(&mut self, sink: &mut Sink<'_>) {
        if let Stage::Object(reader) = &self.stage
            && self.is_open
            && reader.has_arguments()
        {
            self.end(sink);
        }
        if self.has_called && matches!(self.stage, Stage::Due) {
            self.held.clear();
        }
    }

    /// True if nothing of this envelope can follow.
    fn is_over(&self, envelope: &Envelope) -> bool {
        let closes = |markers: &[String]| markers.iter().any(|marker| !marker.is_empty());
        let may_repeat = matches!(envelope.body, Body::Object { .. }) && envelope.is_bare;
        let section = envelope.section.as_ref();
        self.has_called
            && matches!(self.stage, Stage::Due)
            && !self.in_array
            && (self.is_closed || !closes(&envelope.close))
            && !section.is_some_and(|(_, close)| closes(close))
            && !may_repeat
    }

    fn step(
        &mut self,
        format: &CallFormat,
        channels: &Channels,
        text: &str,
        sink: &mut Sink<'_>,
    ) -> Step {
        let Some(c) = text.chars().next() else {
            return Step::Read(0);
        };
        match self.stage {
            Stage::Due => self.step_due(format, c),
            Stage::Field(number) => self.step_field(format, number, c),
            Stage::FieldEnd(number) => self.step_field_end(format, number, c),
            Stage::Value(_) => self.step_value(format, text, c, sink),
            Stage::Tags(_) => self.step_tags(format, channels, text, sink),
            Stage::Object(_) => self.step_object(format, channels, text, sink),
            Stage::Python(_) => self.step_python(channels, text, sink),
        }
    }

    fn step_due(&mut self, format: &CallFormat, c: char) -> Step {
        if self.expect.num_matched() == 0 {
            let is_object = matches!(format.envelope.body, Body::Object { .. });
            match c {
                '{' => {
                    self.stage = Stage::Object(Box::default());
                    return Step::Read(0);
                }
                '[' if !self.in_array && !self.has_called => {
                    self.in_array = true;
                    return Step::Read(1);
                }
                ']' if self.in_array && self.has_called => {
                    self.in_array = false;
                    return Step::Drop(1);
                }
                // A brace too many is a common slip.
                ',' | ';' | '}' if self.has_called && (is_object || self.in_array) => {
                    return Step::Read(1);
                }
                _ => {}
            }
        }
        let (number, num_read) = match self.expect.step(&format.due_markers, c) {
            Match::More => return Step::Read(c.len_utf8()),
            Match::Found(number) => (number, c.len_utf8()),
            Match::Before(number) => (number, 0),
            Match::Not => return Step::Stop(0),
        };
        match format.due[number] {
            Due::Open => {
                self.open(&format.envelope);
                Step::Read(num_read)
            }
            Due::Close if self.has_called && !self.is_closed => {
                self.is_closed = true;
                Step::Drop(num_read)
            }
            Due::SectionClose if self.has_called => Step::Close(num_read),
            Due::SectionOpen if self.has_called && !self.in_section => {
                self.in_section = true;
                Step::Read(num_read)
            }
            Due::Close | Due::SectionClose | Due::SectionOpen => Step::Stop(num_read),
        }
    }

    fn step_field(&mut self, format: &CallFormat, number: usize, c: char) -> Step {
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

    fn step_field_end(&mut self, format: &CallFormat, number: usize, c: char) -> Step {
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

    fn step_value(
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

    fn step_tags(
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

    fn step_object(
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

    fn step_python(&mut self, channels: &Channels, text: &str, sink: &mut Sink<'_>) -> Step {
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

    /// Lets the arguments go.
    fn flush(&mut self, sink: &mut Sink<'_>) {
        if !self.arguments.is_empty() {
            sink.add(PieceKind::Arguments, &self.arguments);
            self.arguments.clear();
        }
    }

    fn end(&mut self, sink: &mut Sink<'_>) {
        self.is_open = false;
        self.is_closed = false;
        self.stage = Stage::Due;
        sink.add(PieceKind::End, "");
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
