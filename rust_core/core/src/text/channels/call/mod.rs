//! Call: the text from a call's first marker on, read by its envelope.
//!
//! Until a call's name and its first argument are seen, all text is held: it may be no call. From
//! then on its arguments leave as they come.

mod bodies;

use crate::text::channels::envelope::{Body, Envelope};
use crate::text::channels::expect::{Expect, Match};
use crate::text::channels::format::{CallFormat, Due};
use crate::text::channels::object::ObjectReader;
use crate::text::channels::piece::{Piece, PieceKind, append};
use crate::text::channels::python::PythonReader;
use crate::text::channels::settings::Channels;
use crate::text::channels::tags::TagReader;
use crate::text::channels::value::ValueReader;

/// A name or id has at most so many bytes: what is longer is none.
const MAX_FIELD_BYTES: usize = 256;

/// Outcome of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// All was read.
    More,
    /// The next character belongs to what follows the calls, as does what is held.
    Over,
    /// This is no call: what is held is text.
    Failed,
    /// The held text is a marker around text.
    Frame,
}

#[derive(Debug)]
enum Stage {
    /// A call is due, or after the first one, the end.
    Due,
    /// A field's text.
    Field(usize),
    /// The end of the field.
    FieldEnd(usize),
    Value(ValueReader),
    Tags(Box<TagReader>),
    Object(Box<ObjectReader>),
    Python(Box<PythonReader>),
}

/// Outcome of so many bytes.
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
    /// The held text is a marker around text.
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
