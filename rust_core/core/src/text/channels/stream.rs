//! ChannelStream: one sample's tokens in, pieces of its channels out, stop strings looked for in text.

use std::sync::Arc;

use crate::text::channels::machine::Machine;
use crate::text::channels::piece::{Piece, PieceKind, append};
use crate::text::channels::settings::Channels;
use crate::text::detokenizer::Detokenizer;
use crate::text::stop_strings::StopStrings;
use crate::text::tokenizer::Tokenizer;

/// See the module's page.
#[derive(Debug)]
pub struct ChannelStream {
    detokenizer: Detokenizer,
    machine: Machine,
    stops: StopStrings,
    /// A token's text.
    text: String,
    /// A token's pieces on their way to the stop strings.
    fresh: Vec<Piece>,
}

impl ChannelStream {
    /// `stop` and `skip_special`: as [`Detokenizer::new`]; markers leave text all the same.
    #[must_use]
    pub fn new(
        tokenizer: Arc<Tokenizer>,
        channels: Arc<Channels>,
        stop: &[String],
        include_stop: bool,
        skip_special: bool,
    ) -> Self {
        let markers = channels.format().markers();
        let ids = markers
            .iter()
            .filter_map(|text| tokenizer.token_to_id(text));
        let visible: Vec<u32> = ids.collect();
        let detokenizer = Detokenizer::new(tokenizer, Vec::new(), false, skip_special);
        Self {
            detokenizer: detokenizer.with_visible(visible),
            machine: Machine::new(channels),
            stops: StopStrings::new(stop, include_stop),
            text: String::new(),
            fresh: Vec::new(),
        }
    }

    /// Number of tokens that were reasoning.
    #[must_use]
    pub fn num_reasoning_tokens(&self) -> u32 {
        self.machine.num_reasoning_tokens()
    }

    /// Takes a token; appends to `pieces` what became certain. Returns the index of the stop string
    /// that ended the text, once. After that nothing comes.
    ///
    /// `may_stop`: false where its text must not end the sequence, nor begin a stop string.
    pub fn push(&mut self, token: u32, may_stop: bool, pieces: &mut Vec<Piece>) -> Option<usize> {
        if self.stops.is_over() {
            return None;
        }
        self.text.clear();
        self.detokenizer.push(token, &mut self.text);
        if self.stops.is_empty() {
            self.machine.push_token(&self.text, pieces);
            return None;
        }
        self.machine.push_token(&self.text, &mut self.fresh);
        self.pass(may_stop, pieces)
    }

    /// No more tokens: appends what was held back. Returns the index of a stop string that this last
    /// text completed.
    pub fn finish(&mut self, pieces: &mut Vec<Piece>) -> Option<usize> {
        if self.stops.is_over() {
            return None;
        }
        self.text.clear();
        self.detokenizer.finish(&mut self.text);
        self.machine.push(&self.text, &mut self.fresh);
        self.machine.finish(&mut self.fresh);
        let stop = self.pass(true, pieces);
        self.release(pieces);
        stop
    }

    /// Lets fresh pieces past the stop strings, which are looked for in text alone.
    fn pass(&mut self, may_stop: bool, pieces: &mut Vec<Piece>) -> Option<usize> {
        let mut fresh = std::mem::take(&mut self.fresh);
        let mut hit = None;
        for piece in fresh.drain(..) {
            if hit.is_some() {
                break;
            }
            if piece.kind != PieceKind::Text {
                // Text on both sides of it is not one text.
                self.release(pieces);
                append(pieces, piece.kind, piece.call, &piece.text);
                continue;
            }
            let mut text = String::new();
            if may_stop {
                hit = self.stops.push(&piece.text, &mut text);
            } else {
                self.stops.release(&mut text);
                text.push_str(&piece.text);
            }
            append(pieces, PieceKind::Text, 0, &text);
        }
        self.fresh = fresh;
        hit
    }

    fn release(&mut self, pieces: &mut Vec<Piece>) {
        let mut text = String::new();
        self.stops.release(&mut text);
        append(pieces, PieceKind::Text, 0, &text);
    }
}
