//! Harmony: the channels of gpt-oss, whose answers are messages with headers.
//!
//! `<|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>commentary to=functions.f
//! <|constrain|>json<|message|>{…}`: analysis is reasoning, commentary and final are text, and what is
//! addressed to a function is a call. The prompt has written the first `<|start|>assistant`.

use std::sync::LazyLock;

use crate::text::channels::call::Sink;
use crate::text::channels::piece::{PieceKind, append, escape};
use crate::text::channels::scanner::{Held, Scanner};
use crate::text::channels::settings::Channels;
use crate::text::channels::tool_calls::{HARMONY_TOKENS, harmony_token};
use crate::text::channels::value::{Dialect, Progress, ValueReader};

/// A header is shorter than this; longer text that stands where one is due is an answer's.
const MAX_HEADER_BYTES: usize = 256;

static SCANNER: LazyLock<Scanner> = LazyLock::new(|| Scanner::new(HARMONY_TOKENS));

#[derive(Debug)]
enum State {
    Header,
    Text,
    Reasoning,
    /// In a call's message, before its first character.
    CallBegin(String),
    Call(ValueReader),
    /// In a call's message that is no JSON: a JSON string holds it.
    CallText,
    /// After a call's arguments.
    CallOver,
}

/// See the module's page.
#[derive(Debug)]
pub(crate) struct Harmony {
    state: State,
    header: String,
    /// The header holds special tokens: it is one.
    is_header: bool,
    held: Held,
}

impl Default for Harmony {
    fn default() -> Self {
        Self {
            state: State::Header,
            header: String::new(),
            is_header: false,
            held: Held::default(),
        }
    }
}

impl Harmony {
    pub(crate) fn is_reasoning(&self) -> bool {
        matches!(self.state, State::Reasoning)
    }

    pub(crate) fn holds_marker(&self) -> bool {
        !self.held.is_empty()
    }

    pub(crate) fn push(&mut self, channels: &Channels, text: &str, sink: &mut Sink<'_>) {
        let mut held = std::mem::take(&mut self.held);
        let mut rest = text;
        while let Some(found) = held.scan(&SCANNER, rest, |part| self.add(part, sink)) {
            self.take_token(HARMONY_TOKENS[found.marker], channels, sink);
            rest = &rest[found.end..];
        }
        self.held = held;
    }

    pub(crate) fn finish(&mut self, channels: &Channels, sink: &mut Sink<'_>) {
        let held = self.held.take();
        if !held.is_empty() && !matches!(self.state, State::Call(_)) {
            self.add(&held, sink);
        }
        match &self.state {
            State::Header if !self.is_header => {
                append(sink.pieces, PieceKind::Text, 0, &self.header);
            }
            State::CallBegin(name) => sink.begin(name, ""),
            State::CallText => self.end_message(channels, sink),
            _ => {}
        }
        self.header.clear();
    }

    /// Text between tokens.
    fn add(&mut self, text: &str, sink: &mut Sink<'_>) {
        let mut rest = text;
        while !rest.is_empty() {
            match &mut self.state {
                State::Header => {
                    self.header.push_str(rest);
                    if self.header.len() > MAX_HEADER_BYTES
                        || !(self.is_header || may_be_header(&self.header))
                    {
                        self.state = State::Text;
                        append(sink.pieces, PieceKind::Text, 0, &self.header);
                        self.header.clear();
                    }
                    return;
                }
                State::Text => return append(sink.pieces, PieceKind::Text, 0, rest),
                State::Reasoning => return append(sink.pieces, PieceKind::Reasoning, 0, rest),
                State::CallBegin(name) => {
                    rest = rest.trim_start();
                    if rest.is_empty() {
                        return;
                    }
                    sink.begin(name, "");
                    self.state = if rest.starts_with('{') {
                        State::Call(ValueReader::default())
                    } else {
                        sink.add(PieceKind::Arguments, "\"");
                        State::CallText
                    };
                }
                State::Call(reader) => {
                    let mut json = String::new();
                    let (num_read, progress) = reader.push(&Dialect::Json, rest, &mut json);
                    if progress == Progress::Bad {
                        reader.close(&mut json);
                    }
                    sink.add(PieceKind::Arguments, &json);
                    rest = &rest[num_read..];
                    if progress != Progress::More {
                        sink.add(PieceKind::End, "");
                        self.state = State::CallOver;
                    }
                }
                State::CallText => {
                    let mut json = String::new();
                    escape(rest, &mut json);
                    return sink.add(PieceKind::Arguments, &json);
                }
                State::CallOver => {
                    let text = rest.trim();
                    return append(sink.pieces, PieceKind::Text, 0, text);
                }
            }
        }
    }

    fn take_token(&mut self, token: &str, channels: &Channels, sink: &mut Sink<'_>) {
        match (&self.state, token) {
            (State::Header, harmony_token::MESSAGE) => {
                let header = std::mem::take(&mut self.header);
                self.is_header = false;
                self.state = state_of(&header, channels);
            }
            (State::Header, harmony_token::CHANNEL | harmony_token::CONSTRAIN) => {
                self.is_header = true;
                self.header.push_str(token);
            }
            (State::Header, _) => {
                self.is_header = true;
                self.header.clear();
            }
            (_, harmony_token::MESSAGE | harmony_token::CONSTRAIN) => {}
            (_, token) => {
                self.end_message(channels, sink);
                self.state = State::Header;
                self.is_header = true;
                self.header.clear();
                // A model that forgets to end its message begins the next one so.
                if token == harmony_token::CHANNEL {
                    self.header.push_str(token);
                }
            }
        }
    }

    fn end_message(&mut self, _channels: &Channels, sink: &mut Sink<'_>) {
        match &mut self.state {
            State::CallBegin(name) => {
                sink.begin(name, "");
                sink.add(PieceKind::Arguments, "{}");
            }
            State::Call(reader) => {
                let mut json = String::new();
                reader.close(&mut json);
                sink.add(PieceKind::Arguments, &json);
            }
            State::CallText => sink.add(PieceKind::Arguments, "\""),
            _ => return,
        }
        sink.add(PieceKind::End, "");
    }
}

/// True for what may be the beginning of a header, in front of its first special token.
fn may_be_header(header: &str) -> bool {
    let text = header.trim_start();
    let begins = |start: &str| text.starts_with(start) || start.starts_with(text);
    begins("to=") || begins("assistant")
}

/// The kind of a message, by its header.
fn state_of(header: &str, channels: &Channels) -> State {
    let word_after = |mark: &str| {
        let (_, rest) = header.split_once(mark)?;
        let end = rest.find(|c: char| c.is_whitespace() || c == '<');
        Some(&rest[..end.unwrap_or(rest.len())])
    };
    let channel = word_after(harmony_token::CHANNEL).unwrap_or_default();
    if let Some(recipient) = word_after("to=") {
        let name = recipient.strip_prefix("functions.");
        let is_function = name.is_some() || channels.types(recipient).is_some();
        return match is_function && channels.has_calls {
            true => State::CallBegin(name.unwrap_or(recipient).to_owned()),
            false => State::Reasoning,
        };
    }
    match channel {
        "analysis" => State::Reasoning,
        _ => State::Text,
    }
}
