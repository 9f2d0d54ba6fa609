//! Detokenizer: the text of one sequence, token by token.
//!
//! Pushes and the final [`Detokenizer::finish`] together give exactly what
//! [`Tokenizer::decode`] gives for all ids at once, however they are cut; what a later token could
//! still change (half a character, a run of byte tokens, the beginning of a stop string) is held
//! back. A push is one look-up in a shared table, a check that its few bytes are UTF-8 and a copy:
//! O(bytes), without allocation in the steady state. Decoders that need the tokens around
//! (WordPiece, CTC, BPE with word ends) go through a small window instead: O(window) a token.

use std::sync::Arc;

use crate::text::stop_strings::StopStrings;
use crate::text::token_table::{Joining, TokenTable};
use crate::text::tokenizer::Tokenizer;

/// Tokens a window may hold before its older half is dropped.
const MAX_WINDOW: usize = 16;

/// See the module's page.
#[derive(Debug)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    joiner: Joiner,
    stops: StopStrings,
    skip_special: bool,
    /// Special tokens that leave text all the same.
    visible: Box<[u32]>,
    /// A push's text on its way to the stop strings.
    scratch: String,
}

impl Detokenizer {
    /// `stop`: the text ends before the first of these, or after it with `include_stop`; empty
    /// ones are ignored. `skip_special`: special tokens leave no text.
    pub fn new(
        tokenizer: Arc<Tokenizer>,
        stop: Vec<String>,
        include_stop: bool,
        skip_special: bool,
    ) -> Self {
        let joiner = match tokenizer.table() {
            Some(table) => Joiner::Table(TableJoiner::new(table)),
            None => Joiner::Window(Window::default()),
        };
        Self {
            tokenizer,
            joiner,
            stops: StopStrings::new(&stop, include_stop),
            skip_special,
            visible: Box::default(),
            scratch: String::new(),
        }
    }

    /// These special tokens leave text, whatever becomes of the others.
    #[must_use]
    pub fn with_visible(mut self, token_ids: Vec<u32>) -> Self {
        self.visible = token_ids.into();
        self
    }

    #[inline]
    fn join(&mut self, token: u32, out: &mut String) {
        let skip = Skip {
            special: self.skip_special,
            but: &self.visible,
        };
        self.joiner.push(&self.tokenizer, token, skip, out);
    }

    /// Take a token; append to `out` the text that became certain.
    ///
    /// Returns the index of the stop string that ended the text, once. After that nothing comes.
    pub fn push(&mut self, token: u32, out: &mut String) -> Option<usize> {
        if self.stops.is_empty() {
            self.join(token, out);
            return None;
        }
        if self.stops.is_over() {
            return None;
        }
        let mut scratch = std::mem::take(&mut self.scratch);
        scratch.clear();
        self.join(token, &mut scratch);
        let stop = self.stops.push(&scratch, out);
        self.scratch = scratch;
        stop
    }

    /// Take a token whose text must not end the sequence, nor count as a stop string's beginning
    /// (`min_tokens` is not reached); append to `out` the text that became certain.
    pub fn push_without_stop(&mut self, token: u32, out: &mut String) {
        if !self.stops.is_over() {
            self.stops.release(out);
            self.join(token, out);
        }
    }

    /// No more tokens: append to `out` what was held back.
    ///
    /// Returns the index of a stop string that this last text completed.
    pub fn finish(&mut self, out: &mut String) -> Option<usize> {
        if self.stops.is_over() {
            return None;
        }
        self.scratch.clear();
        self.joiner.finish(&mut self.scratch);
        let stop = self.stops.push(&self.scratch, out);
        self.stops.release(out);
        stop
    }
}

/// The special tokens that leave no text: all, or none, but for some.
#[derive(Debug, Clone, Copy)]
struct Skip<'a> {
    special: bool,
    but: &'a [u32],
}

#[derive(Debug)]
enum Joiner {
    Table(TableJoiner),
    Window(Window),
}

impl Joiner {
    #[inline]
    fn push(&mut self, tokenizer: &Tokenizer, token: u32, skip: Skip<'_>, out: &mut String) {
        match (self, tokenizer.table()) {
            (Joiner::Table(joiner), Some(table)) => {
                joiner.push(tokenizer, table, token, skip, out);
            }
            (Joiner::Window(window), _) => window.push(tokenizer, token, skip, out),
            (Joiner::Table(_), None) => unreachable!("new() saw the table"),
        }
    }

    fn finish(&mut self, out: &mut String) {
        match self {
            Joiner::Table(joiner) => joiner.finish(out),
            Joiner::Window(window) => window.finish(out),
        }
    }
}

/// Joins the table's bytes.
#[derive(Debug)]
struct TableJoiner {
    joining: Joining,
    /// Bytes that are no whole character yet, or a run of byte tokens.
    pending: Vec<u8>,
    is_first: bool,
    strip: (char, usize),
}

impl TableJoiner {
    fn new(table: &TokenTable) -> Self {
        Self {
            joining: table.joining,
            pending: Vec::new(),
            is_first: true,
            strip: table.strip,
        }
    }

    #[inline]
    fn push(
        &mut self,
        tokenizer: &Tokenizer,
        table: &TokenTable,
        token: u32,
        skip: Skip<'_>,
        out: &mut String,
    ) {
        let Some(entry) = table.get(token) else {
            return;
        };
        if entry.is_special && skip.special && !skip.but.contains(&token) {
            return;
        }
        let is_first = std::mem::replace(&mut self.is_first, false);
        match self.joining {
            Joining::Bytes if self.pending.is_empty() => match std::str::from_utf8(entry.bytes) {
                Ok(text) => self.emit(text, out),
                Err(_) => self.push_bytes(entry.bytes, out),
            },
            Joining::Bytes => self.push_bytes(entry.bytes, out),
            Joining::Pieces if entry.is_byte => self.pending.extend_from_slice(entry.bytes),
            Joining::Pieces => {
                self.end_run(out);
                let first = is_first
                    .then(|| table.first_text(|| tokenizer.id_to_token(token)))
                    .flatten();
                match (&first, std::str::from_utf8(entry.bytes)) {
                    (Some(text), _) => self.emit(text, out),
                    (None, Ok(text)) => self.emit(text, out),
                    (None, Err(_)) => unreachable!("pieces are text"),
                }
            }
        }
    }

    /// `String::from_utf8_lossy`, in pieces: an unfinished character waits for its other bytes.
    fn push_bytes(&mut self, bytes: &[u8], out: &mut String) {
        let mut pending = std::mem::take(&mut self.pending);
        pending.extend_from_slice(bytes);
        let mut at = 0;
        loop {
            match std::str::from_utf8(&pending[at..]) {
                Ok(text) => {
                    self.emit(text, out);
                    at = pending.len();
                    break;
                }
                Err(error) => {
                    let end = at + error.valid_up_to();
                    self.emit(
                        std::str::from_utf8(&pending[at..end]).unwrap_or_default(),
                        out,
                    );
                    at = end;
                    let Some(num_invalid) = error.error_len() else {
                        break;
                    };
                    self.emit("\u{fffd}", out);
                    at += num_invalid;
                }
            }
        }
        pending.drain(..at);
        self.pending = pending;
    }

    /// A run of byte tokens is over.
    #[inline]
    fn end_run(&mut self, out: &mut String) {
        if self.pending.is_empty() {
            return;
        }
        let run = std::mem::take(&mut self.pending);
        match std::str::from_utf8(&run) {
            Ok(text) => self.emit(text, out),
            Err(_) => run.iter().for_each(|_| self.emit("\u{fffd}", out)),
        }
        self.pending = run;
        self.pending.clear();
    }

    fn finish(&mut self, out: &mut String) {
        match self.joining {
            Joining::Pieces => self.end_run(out),
            Joining::Bytes if !self.pending.is_empty() => {
                self.pending.clear();
                self.emit("\u{fffd}", out);
            }
            Joining::Bytes => {}
        }
    }

    #[inline]
    fn emit(&mut self, text: &str, out: &mut String) {
        let (content, left) = self.strip;
        if left == 0 {
            out.push_str(text);
            return;
        }
        for (at, c) in text.char_indices() {
            if c != content || self.strip.1 == 0 {
                self.strip.1 = 0;
                out.push_str(&text[at..]);
                return;
            }
            self.strip.1 -= 1;
        }
    }
}

/// Decodes the last few tokens again at each step; what two steps agree on is certain.
#[derive(Debug, Default)]
struct Window {
    tokens: Vec<u32>,
    /// The text of `tokens`.
    text: String,
    /// Number of its bytes that have left.
    num_sent: usize,
    skip_special: bool,
}

impl Window {
    fn push(&mut self, tokenizer: &Tokenizer, token: u32, skip: Skip<'_>, out: &mut String) {
        if !tokenizer.is_visible(token, skip.special) {
            if skip.but.contains(&token) {
                // A text of its own: the decoder would leave it out.
                self.finish(out);
                *self = Self::default();
                out.push_str(&tokenizer.id_to_token(token).unwrap_or_default());
            }
            return;
        }
        self.skip_special = skip.special;
        self.tokens.push(token);
        // A decoder that fails has no text for these tokens in one go either.
        let text = tokenizer
            .decode(&self.tokens, skip.special)
            .unwrap_or_default();
        let certain = common_prefix(&self.text, &text);
        if certain > self.num_sent {
            out.push_str(&text[self.num_sent..certain]);
            self.num_sent = certain;
        }
        self.text = text;
        if self.tokens.len() >= MAX_WINDOW {
            self.shrink(tokenizer);
        }
    }

    /// Drop the older half, if the newer one alone reads the same from what has left on.
    fn shrink(&mut self, tokenizer: &Tokenizer) {
        let tokens = &self.tokens[self.tokens.len() / 2..];
        let text = tokenizer
            .decode(tokens, self.skip_special)
            .unwrap_or_default();
        let unsent = self.text.get(self.num_sent..).unwrap_or_default();
        if let Some(sent) = text.strip_suffix(unsent)
            && !sent.is_empty()
        {
            self.num_sent = sent.len();
            self.tokens = tokens.to_vec();
            self.text = text;
        }
    }

    fn finish(&mut self, out: &mut String) {
        out.push_str(self.text.get(self.num_sent..).unwrap_or_default());
        self.num_sent = self.text.len();
    }
}

/// The length of the common prefix of two texts, in whole characters and without U+FFFD at its
/// end, which may stand for the beginning of a character.
fn common_prefix(a: &str, b: &str) -> usize {
    let num_same = a.bytes().zip(b.bytes()).take_while(|(a, b)| a == b).count();
    let mut end = num_same;
    while !b.is_char_boundary(end) {
        end -= 1;
    }
    b[..end].trim_end_matches('\u{fffd}').len()
}
