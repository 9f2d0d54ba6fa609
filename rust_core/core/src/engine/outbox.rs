//! Outbox: each sample's news, on its way from the engine thread to the event loop.
//!
//! A sample's entry gathers tokens until it is drained, so tokens that arrive while the loop is
//! busy leave together, as one delta and one write. Server-sent events are assembled only at the
//! drain, for the same reason, and so is text without stop strings: for 256
//! samples whose data is in no cache it was half of what a step's tokens cost the engine's thread.
//! Appending is O(1) amortised; draining is O(what is drained).

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use slab::Slab;

pub use crate::engine::text_maker::ChannelNews;
use crate::engine::text_maker::{TextMaker, TextOut};
use crate::scheduler::request::{FinishReason, StopReason};
use crate::text::channels::{Piece, PieceKind};
use crate::text::sse::{SseTemplate, write_chunk, write_reasoning};

/// The way a sample's output is delivered.
#[derive(Debug, Clone)]
pub enum Delivery {
    /// As ready frames, but for each sample's last.
    Sse(Arc<SseTemplate>),
    /// As text and ids, when they come.
    Delta,
    /// Once, at the end.
    Final,
}

/// One chosen or likely token: (id, logprob, rank).
pub type Logprob = (u32, f32, u32);

/// A result of a kind that the core does not know, carried to whoever drains: an object of the
/// binding's, say.
#[derive(Debug, Clone)]
pub struct Extra(Arc<dyn Any + Send + Sync>);

impl Extra {
    /// Wraps a value.
    #[must_use]
    pub fn new<T: Any + Send + Sync>(value: T) -> Self {
        Self(Arc::new(value))
    }

    /// The value, if it is a `T`.
    #[must_use]
    pub fn get<T: Any>(&self) -> Option<&T> {
        self.0.downcast_ref()
    }
}

/// The same value, not an equal one.
impl PartialEq for Extra {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// One sample's news since it was last drained. See `_core.pyi`.
#[derive(Debug, Clone, Default, PartialEq)]
#[allow(missing_docs)] // named and explained in _core.pyi
pub struct Delta {
    pub request_id: u64,
    pub sse: Option<Vec<u8>>,
    pub text: String,
    // Boxed: few have it, and every delta is moved about.
    pub channels: Option<Box<ChannelNews>>,
    pub token_ids: Vec<u32>,
    pub logprobs: Option<Vec<Vec<Logprob>>>,
    pub finish_reason: Option<FinishReason>,
    pub stop_reason: Option<StopReason>,
    pub cumulative_logprob: Option<f64>,
    pub num_prompt_tokens: u32,
    pub num_cached_tokens: u32,
    pub num_output_tokens: u32,
    pub queue_s: Option<f64>,
    pub prefill_s: Option<f64>,
    pub decode_s: Option<f64>,
    pub extra: Option<Extra>,
}

impl Delta {
    /// The pieces of a request with channels.
    #[must_use]
    pub fn pieces(&self) -> Option<&[Piece]> {
        self.channels.as_ref().map(|news| news.pieces.as_slice())
    }

    /// Takes the pieces, leaving the running total.
    fn take_channels(&mut self) -> Option<Box<ChannelNews>> {
        let news = self.channels.as_mut()?;
        let num_reasoning_tokens = news.num_reasoning_tokens;
        Some(std::mem::replace(
            news,
            Box::new(ChannelNews {
                pieces: Vec::new(),
                num_reasoning_tokens,
            }),
        ))
    }

    /// Where its text goes.
    pub(super) fn text_out(&mut self) -> TextOut<'_> {
        TextOut {
            text: &mut self.text,
            channels: &mut self.channels,
        }
    }
}

/// A sample's gathered output.
#[derive(Debug)]
pub struct Stream {
    /// The next drain's delta, without its `sse`.
    pub delta: Delta,
    /// The token that stops it is part of its text: a grammar's last one, not a mark of the end.
    pub ends_with_text: bool,
    delivery: Delivery,
    /// Makes the text of `delta.token_ids` at the drain; None where the engine makes it, or there is none.
    // Boxed: large, and the engine's thread passes it by.
    text_maker: Option<Box<TextMaker>>,
    queued: bool,
    has_sent_first: bool,
    /// Tokens of `delta.token_ids` whose text is made.
    num_detokenized: usize,
    /// Its text could not be made.
    has_failed: bool,
    /// Tokens since the last drain.
    num_fresh: u32,
}

impl Stream {
    /// True if tokens are delivered as they come.
    #[must_use]
    pub fn is_streaming(&self) -> bool {
        !matches!(self.delivery, Delivery::Final)
    }

    /// Appends the text of the gathered tokens. A panic over it is this sample's alone: it ends with
    /// "error", at once or with its next token.
    fn write_text(&mut self) {
        let Some(mut text_maker) = self.text_maker.take() else {
            return;
        };
        let delta = &mut self.delta;
        // A token that marks the end is not part of the text.
        let is_stopped = delta.finish_reason == Some(FinishReason::Stop) && !self.ends_with_text;
        let num_with_text = delta
            .token_ids
            .len()
            .saturating_sub(usize::from(is_stopped));
        let num_detokenized = std::mem::replace(&mut self.num_detokenized, delta.token_ids.len());
        // Apart for a while: the text goes into the same delta.
        let token_ids = std::mem::take(&mut delta.token_ids);
        let done = catch_unwind(AssertUnwindSafe(|| {
            for &token in &token_ids[num_detokenized..num_with_text] {
                text_maker.push(token, true, delta.text_out());
            }
            if delta.finish_reason.is_some() {
                text_maker.finish(delta.text_out());
            }
        }));
        delta.token_ids = token_ids;
        if done.is_ok() {
            self.text_maker = Some(text_maker);
        } else {
            self.has_failed = true;
            if delta.finish_reason.is_some() {
                delta.finish_reason = Some(FinishReason::Error);
            }
        }
    }

    /// True if the gathered text is not worth a delta: half a character is no news to a
    /// client that reads text.
    fn is_silent(&self) -> bool {
        matches!(self.delivery, Delivery::Sse(_))
            && self.delta.text.is_empty()
            && self.delta.pieces().is_none_or(<[Piece]>::is_empty)
            && self.has_sent_first
            && self.delta.finish_reason.is_none()
    }

    /// Takes what is gathered, leaving the running totals.
    fn take(&mut self) -> Delta {
        // The engine's thread, which may be another, keeps its buffer: nothing is allocated there
        // for a token, and nothing that was is freed here.
        let token_ids = match self.delta.finish_reason {
            Some(_) => std::mem::take(&mut self.delta.token_ids),
            None => self.delta.token_ids.clone(),
        };
        self.delta.token_ids.clear();
        let mut taken = Delta {
            text: std::mem::take(&mut self.delta.text),
            token_ids,
            channels: self.delta.take_channels(),
            logprobs: self.delta.logprobs.as_mut().map(std::mem::take),
            stop_reason: self.delta.stop_reason.take(),
            extra: self.delta.extra.take(),
            sse: None,
            ..self.delta
        };
        if let Some(pieces) = taken.pieces() {
            let text = pieces.iter().filter(|piece| piece.kind == PieceKind::Text);
            taken.text = text.map(|piece| piece.text.as_str()).collect();
        }
        if let Delivery::Sse(template) = &self.delivery {
            let mut bytes = Vec::with_capacity(taken.text.len() + 384);
            if !std::mem::replace(&mut self.has_sent_first, true) {
                bytes.extend_from_slice(&template.first);
            }
            // The text that a sample ends with leaves in the frame of its end, which the front end
            // writes: it holds what only the end knows.
            if taken.finish_reason.is_none() {
                match &mut taken.channels {
                    Some(news) => write_pieces(template, &mut news.pieces, &mut bytes),
                    None if !taken.text.is_empty() => {
                        write_chunk(template, &taken.text, &mut bytes);
                    }
                    None => {}
                }
            }
            taken.sse = Some(bytes);
        }
        taken
    }
}

/// Writes the frames of text and reasoning up to the first piece of a call, and takes those pieces
/// out: what is left is for the front end to write.
fn write_pieces(template: &SseTemplate, pieces: &mut Vec<Piece>, bytes: &mut Vec<u8>) {
    let is_call = |piece: &Piece| piece.kind.is_call();
    let num_ready = pieces.iter().position(is_call).unwrap_or(pieces.len());
    for piece in pieces.drain(..num_ready) {
        match piece.kind {
            PieceKind::Reasoning => write_reasoning(template, &piece.text, bytes),
            _ => write_chunk(template, &piece.text, bytes),
        }
    }
}

/// The streams of all unfinished samples, and those with news, oldest first.
#[derive(Debug, Default)]
pub struct OutboxData {
    streams: Slab<Stream>,
    order: Vec<u32>,
}

impl OutboxData {
    /// Opens a sample's stream; the key is good until `finish`.
    ///
    /// `text_maker`: makes its text, where the engine does not.
    pub fn open(
        &mut self,
        delta: Delta,
        delivery: Delivery,
        text_maker: Option<Box<TextMaker>>,
    ) -> u32 {
        self.streams.insert(Stream {
            delta,
            ends_with_text: false,
            delivery,
            text_maker,
            queued: false,
            has_sent_first: false,
            num_detokenized: 0,
            has_failed: false,
            num_fresh: 0,
        }) as u32
    }

    /// The stream of a key.
    pub fn stream(&mut self, key: u32) -> &mut Stream {
        &mut self.streams[key as usize]
    }

    /// A token was added. It is due if the interval is full; the first one always is. False if the
    /// sample's text could not be made: it is to end.
    #[inline]
    pub fn token_added(&mut self, key: u32, stream_interval: u32) -> bool {
        let stream = &mut self.streams[key as usize];
        stream.num_fresh += 1;
        if !stream.queued {
            let due = stream.num_fresh >= stream_interval || stream.delta.num_output_tokens == 1;
            if due && (stream.text_maker.is_some() || !stream.is_silent()) {
                stream.queued = true;
                self.order.push(key);
            }
        }
        !stream.has_failed
    }

    /// The sample is over: its stream closes with the next drain.
    pub fn finish(&mut self, key: u32) {
        let stream = &mut self.streams[key as usize];
        debug_assert!(stream.delta.finish_reason.is_some());
        if !std::mem::replace(&mut stream.queued, true) {
            self.order.push(key);
        }
    }

    /// True if there is nothing to drain.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    fn drain(&mut self) -> Vec<Delta> {
        let mut deltas = Vec::with_capacity(self.order.len());
        for key in self.order.drain(..) {
            let stream = &mut self.streams[key as usize];
            stream.queued = false;
            stream.write_text();
            if stream.is_silent() {
                continue; // its next token is due, whatever the interval
            }
            stream.num_fresh = 0;
            stream.num_detokenized = 0;
            deltas.push(stream.take());
            if stream.delta.finish_reason.is_some() {
                self.streams.remove(key as usize);
            }
        }
        deltas
    }
}

/// See the module doc.
#[derive(Debug, Default)]
pub struct Outbox(Mutex<OutboxData>);

impl Outbox {
    /// Exclusive access, for one step's tokens.
    pub fn lock(&self) -> MutexGuard<'_, OutboxData> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes everything since the last drain, one delta per sample, oldest change first.
    #[must_use]
    pub fn drain(&self) -> Vec<Delta> {
        self.lock().drain()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::detokenizer::Detokenizer;

    fn template() -> Arc<SseTemplate> {
        let part = |text: &str| text.as_bytes().into();
        Arc::new(SseTemplate {
            around_text: [part("<"), part(">")],
            around_reasoning: Some(vec![part("("), part(")")]),
            first: part("[first]"),
        })
    }

    fn add(outbox: &mut OutboxData, key: u32, text: &str, interval: u32) {
        let delta = &mut outbox.stream(key).delta;
        delta.text.push_str(text);
        delta.token_ids.push(7);
        delta.num_output_tokens += 1;
        outbox.token_added(key, interval);
    }

    fn end(outbox: &mut OutboxData, key: u32) {
        outbox.stream(key).delta.finish_reason = Some(FinishReason::Stop);
        outbox.finish(key);
    }

    fn sse(outbox: &mut OutboxData) -> Vec<String> {
        let bytes = outbox.drain().into_iter().map(|delta| delta.sse.unwrap());
        bytes
            .map(|bytes| String::from_utf8(bytes).unwrap())
            .collect()
    }

    #[test]
    fn tokens_since_the_last_drain_leave_as_one_chunk() {
        let mut outbox = OutboxData::default();
        let key = outbox.open(Delta::default(), Delivery::Sse(template()), None);
        add(&mut outbox, key, "a", 1);
        assert_eq!(sse(&mut outbox), ["[first]<a>"]);
        add(&mut outbox, key, "b", 1);
        add(&mut outbox, key, "", 1);
        add(&mut outbox, key, "c\"", 1);
        assert_eq!(sse(&mut outbox), ["<bc\\\">"]);
        add(&mut outbox, key, "", 1);
        assert!(outbox.is_empty());
        add(&mut outbox, key, "d", 1);
        end(&mut outbox, key);
        let [delta] = &outbox.drain()[..] else {
            panic!("one sample ended")
        };
        // The end's own frame holds its text.
        assert_eq!(
            (delta.text.as_str(), delta.sse.as_deref()),
            ("d", Some(&b""[..]))
        );
        assert!(outbox.streams.is_empty());
    }

    #[test]
    fn a_sample_that_ends_with_its_first_token_is_opened_all_the_same() {
        let mut outbox = OutboxData::default();
        let key = outbox.open(Delta::default(), Delivery::Sse(template()), None);
        add(&mut outbox, key, "a", 1);
        end(&mut outbox, key);
        assert_eq!(sse(&mut outbox), ["[first]"]);
    }

    #[test]
    fn the_role_chunk_does_not_wait_for_text() {
        let mut outbox = OutboxData::default();
        let key = outbox.open(Delta::default(), Delivery::Sse(template()), None);
        add(&mut outbox, key, "", 1);
        assert_eq!(sse(&mut outbox), ["[first]"]);
    }

    #[test]
    fn the_interval_holds_tokens_back_but_not_the_first() {
        let mut outbox = OutboxData::default();
        let key = outbox.open(Delta::default(), Delivery::Delta, None);
        let mut sizes = Vec::new();
        for _ in 0..7 {
            add(&mut outbox, key, "a", 3);
            sizes.extend(outbox.drain().iter().map(|delta| delta.token_ids.len()));
        }
        assert_eq!(sizes, [1, 3, 3]);
    }

    #[test]
    fn a_panic_over_text_ends_that_sample_alone() {
        let json = r#"{"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel",
            "vocab": {"a": 0}, "unk_token": "a"}}"#;
        let tokenizer = Arc::new(crate::text::tokenizer::Tokenizer::new(
            json.parse().unwrap(),
        ));
        let mut outbox = OutboxData::default();
        let keys = [Delivery::Delta, Delivery::Delta, Delivery::Final].map(|delivery| {
            let detokenizer = Detokenizer::new(tokenizer.clone(), Vec::new(), false, true);
            let text_maker = Box::new(TextMaker::Plain(detokenizer));
            outbox.open(Delta::default(), delivery, Some(text_maker))
        });
        let push = |outbox: &mut OutboxData, key: u32| {
            outbox.stream(key).delta.token_ids.push(0);
            outbox.token_added(key, 1)
        };
        assert!(keys.iter().all(|&key| push(&mut outbox, key)));
        // More is recorded as made than there are tokens: making the rest panics.
        outbox.stream(keys[1]).num_detokenized = 9;
        outbox.stream(keys[2]).num_detokenized = 9;
        outbox.stream(keys[2]).delta.finish_reason = Some(FinishReason::Length);
        let reasons: Vec<_> = outbox
            .drain()
            .iter()
            .map(|delta| delta.finish_reason)
            .collect();
        assert_eq!(reasons, [None, None, Some(FinishReason::Error)]);
        assert!(push(&mut outbox, keys[0]));
        assert!(!push(&mut outbox, keys[1]), "it is to end");
    }
}
