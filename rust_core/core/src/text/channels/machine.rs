//! Machine: one answer's text in, pieces of its channels out.
//!
//! Text, reasoning and calls follow one another as markers say. What may be a marker's beginning is
//! held until it is one or is not, white space until it is known not to stand beside a marker. Each
//! byte is read once, and nothing is looked at again but the few that a marker nearly matched.

use std::sync::Arc;

use crate::text::channels::call::{Call, Outcome, Sink};
use crate::text::channels::format::{CallFormat, Meaning};
use crate::text::channels::harmony::Harmony;
use crate::text::channels::piece::{Piece, PieceKind, append};
use crate::text::channels::scanner::Held;
use crate::text::channels::settings::Channels;

/// See the module's page.
#[derive(Debug)]
pub struct Machine {
    channels: Arc<Channels>,
    state: State,
    num_calls: u32,
    num_reasoning_tokens: u32,
    /// Tokens that are reasoning unless a marker ends with one of the next.
    num_open_tokens: u32,
}

#[derive(Debug)]
enum State {
    Marked(Marked),
    Harmony(Box<Harmony>),
}

/// The state of formats whose channels are between markers.
#[derive(Debug, Default)]
struct Marked {
    held: Held,
    prose: Prose,
    call: Option<Box<Call>>,
}

/// Text or reasoning on its way out.
#[derive(Debug, Default)]
struct Prose {
    is_reasoning: bool,
    /// White space that may stand beside a marker.
    blank: String,
    lead: Lead,
    /// A bare call may begin here.
    may_begin_call: bool,
    /// There has been text.
    has_text: bool,
    /// Bytes that the prompt has written, and no answer's text.
    num_prompted: usize,
}

/// Treatment of white space at the beginning of a stretch of text.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Lead {
    #[default]
    Keep,
    Drop,
    /// It separates two stretches, if there is a second one.
    Join,
}

const BLANK: [char; 4] = [' ', '\n', '\r', '\t'];

impl Prose {
    fn add(&mut self, text: &str, pieces: &mut Vec<Piece>) {
        let num_prompted = self.num_prompted.min(text.len());
        self.num_prompted -= num_prompted;
        let text = &text[num_prompted..];
        if text.is_empty() {
            return;
        }
        let solid = text.trim_end_matches(BLANK);
        if solid.is_empty() {
            self.blank.push_str(text);
            return;
        }
        let kind = match self.is_reasoning {
            true => PieceKind::Reasoning,
            false => PieceKind::Text,
        };
        let mut solid_part = solid;
        if self.lead == Lead::Drop {
            self.blank.clear();
            solid_part = solid.trim_start_matches(BLANK);
        }
        append(pieces, kind, 0, &self.blank);
        append(pieces, kind, 0, solid_part);
        self.blank.clear();
        self.blank.push_str(&text[solid.len()..]);
        self.lead = Lead::Keep;
        self.may_begin_call = false;
        self.has_text |= !self.is_reasoning;
    }

    /// Text or reasoning begins behind a marker.
    fn turn(&mut self, is_reasoning: bool) {
        self.blank.clear();
        self.num_prompted = 0;
        self.is_reasoning = is_reasoning;
        self.lead = match is_reasoning || !self.has_text {
            true => Lead::Drop,
            false => Lead::Join,
        };
        self.may_begin_call = !is_reasoning && !self.has_text;
    }

    fn finish(&mut self, pieces: &mut Vec<Piece>) {
        if self.lead == Lead::Keep && !self.is_reasoning {
            append(pieces, PieceKind::Text, 0, &self.blank);
        }
        self.blank.clear();
    }
}

impl Machine {
    /// At the beginning of an answer.
    #[must_use]
    pub fn new(channels: Arc<Channels>) -> Self {
        let state = if channels.format.is_harmony {
            State::Harmony(Box::default())
        } else {
            let mut marked = Marked::default();
            if channels.in_reasoning {
                marked.prose.turn(true);
            }
            marked.prose.may_begin_call = !channels.in_reasoning;
            marked.read_prompt(&channels);
            State::Marked(marked)
        };
        Self {
            channels,
            state,
            num_calls: 0,
            num_reasoning_tokens: 0,
            num_open_tokens: 0,
        }
    }

    /// True inside reasoning.
    #[must_use]
    pub fn is_reasoning(&self) -> bool {
        match &self.state {
            State::Marked(marked) => marked.prose.is_reasoning,
            State::Harmony(harmony) => harmony.is_reasoning(),
        }
    }

    /// Number of tokens that were reasoning, markers aside; those that may begin one count once they
    /// do not. See [`Machine::push_token`].
    #[must_use]
    pub fn num_reasoning_tokens(&self) -> u32 {
        self.num_reasoning_tokens
    }

    /// Takes a token's text, which may be empty.
    pub fn push_token(&mut self, text: &str, pieces: &mut Vec<Piece>) {
        let was_reasoning = self.is_reasoning();
        self.push(text, pieces);
        if !self.is_reasoning() {
            self.num_open_tokens = 0;
        } else if was_reasoning {
            self.num_open_tokens += 1;
        }
        if !self.holds_marker() {
            self.num_reasoning_tokens += std::mem::take(&mut self.num_open_tokens);
        }
    }

    /// True if what was read last may be a marker's beginning.
    fn holds_marker(&self) -> bool {
        match &self.state {
            State::Marked(marked) => marked.call.is_some() || !marked.held.is_empty(),
            State::Harmony(harmony) => harmony.holds_marker(),
        }
    }

    /// Takes text, appends what became certain.
    pub fn push(&mut self, text: &str, pieces: &mut Vec<Piece>) {
        let mut sink = Sink {
            pieces,
            num_calls: &mut self.num_calls,
        };
        match &mut self.state {
            State::Marked(marked) => marked.push(&self.channels, text, &mut sink),
            State::Harmony(harmony) => harmony.push(&self.channels, text, &mut sink),
        }
    }

    /// No more text: appends what was held.
    pub fn finish(&mut self, pieces: &mut Vec<Piece>) {
        self.num_reasoning_tokens += std::mem::take(&mut self.num_open_tokens);
        let mut sink = Sink {
            pieces,
            num_calls: &mut self.num_calls,
        };
        match &mut self.state {
            State::Marked(marked) => marked.finish(&mut sink),
            State::Harmony(harmony) => harmony.finish(&self.channels, &mut sink),
        }
    }
}

impl Marked {
    /// Reads the marker that the prompt ends with.
    fn read_prompt(&mut self, channels: &Channels) {
        let calls = channels.format.calls.as_ref();
        let Some(format) = calls.filter(|_| channels.has_calls && !channels.in_reasoning) else {
            return;
        };
        let prompted = &format.envelope.prompted;
        self.prose.num_prompted = prompted.len();
        let mut sink = Sink {
            pieces: &mut Vec::new(),
            num_calls: &mut 0,
        };
        self.push(channels, prompted, &mut sink);
    }

    fn push(&mut self, channels: &Channels, text: &str, sink: &mut Sink<'_>) {
        let mut rest = text;
        while !rest.is_empty() {
            let num_read = match (&mut self.call, &channels.format.calls) {
                (Some(_), Some(format)) => self.push_call(format, channels, rest, sink),
                _ => self.push_prose(channels, rest, sink),
            };
            rest = &rest[num_read..];
        }
    }

    /// Reads text up to the first marker's end. Returns the number of bytes read.
    fn push_prose(&mut self, channels: &Channels, text: &str, sink: &mut Sink<'_>) -> usize {
        if self.prose.may_begin_call && self.held.is_empty() && channels.has_calls {
            let num_blank = text.len() - text.trim_start_matches(BLANK).len();
            if num_blank > 0 {
                self.prose.add(&text[..num_blank], sink.pieces);
                return num_blank;
            }
            self.prose.may_begin_call = false;
            if let Some(format) = &channels.format.calls
                && format.envelope.is_bare
                && text.starts_with(['{', '['])
            {
                self.call = Some(Box::new(Call::new(format, "", false)));
                return 0;
            }
        }
        let markers = channels
            .format
            .markers_of(channels.has_calls, channels.has_reasoning);
        let prose = &mut self.prose;
        let found = self
            .held
            .scan(&markers.scanner, text, |part| prose.add(part, sink.pieces));
        let Some(found) = found else {
            return text.len();
        };
        let (marker, meaning) = &markers.list[found.marker];
        match (meaning, &channels.format.calls) {
            (Meaning::Think, _) => prose.turn(true),
            (Meaning::EndThink, _) if prose.is_reasoning => prose.turn(false),
            (Meaning::EndThink, _) => {}
            (Meaning::Frame, _) if prose.is_reasoning => prose.add(marker, sink.pieces),
            (Meaning::Frame, _) if !prose.has_text => prose.turn(false),
            (Meaning::Frame, _) => {}
            (Meaning::Section | Meaning::Call, Some(format)) => {
                // A bracket at its end belongs to what follows.
                let opener = marker.trim_end_matches(['[', '{']);
                let opener = if marker.starts_with(['[', '{']) {
                    marker
                } else {
                    opener
                };
                let call = Call::new(format, opener, *meaning == Meaning::Section);
                self.call = Some(Box::new(call));
                let again = marker[opener.len()..].to_owned();
                self.push(channels, &again, sink);
            }
            (Meaning::Section | Meaning::Call, None) => {}
        }
        found.end
    }

    fn push_call(
        &mut self,
        format: &CallFormat,
        channels: &Channels,
        text: &str,
        sink: &mut Sink<'_>,
    ) -> usize {
        let Some(call) = &mut self.call else {
            return 0;
        };
        let had_called = call.has_called();
        let (num_read, outcome) = call.push(format, channels, text, sink);
        if call.has_called() && !had_called {
            self.prose.turn(false);
        }
        if outcome != Outcome::More {
            let (held, again) = call.take_held();
            self.call = None;
            if outcome == Outcome::Frame {
                self.prose.turn(false);
            }
            self.prose.add(&held, sink.pieces);
            self.push(channels, &again, sink);
        }
        num_read
    }

    fn finish(&mut self, sink: &mut Sink<'_>) {
        if let Some(mut call) = self.call.take() {
            call.finish(sink);
            let (held, again) = call.take_held();
            self.prose.add(&held, sink.pieces);
            self.prose.add(&again, sink.pieces);
        }
        let held = self.held.take();
        self.prose.add(&held, sink.pieces);
        self.prose.finish(sink.pieces);
    }
}
