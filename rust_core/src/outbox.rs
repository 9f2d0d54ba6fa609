//! What happened to each sample, on its way from the engine thread to the event loop.
//!
//! A sample's entry gathers text and tokens until it is drained, so tokens that arrive while the
//! loop is busy leave together, as one delta and one write. Server-sent events are assembled only
//! at the drain, for the same reason. Appending is O(1) amortised; draining is O(what is drained).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use slab::Slab;

use crate::request::{FinishReason, StopReason};
use crate::stream::{self, SseTemplate, write_chunk};

/// How a sample's output is delivered.
#[derive(Debug, Clone)]
pub enum Delivery {
    /// As the ready bytes of server-sent events.
    Sse(Arc<SseTemplate>),
    /// As text and ids, when they come.
    Delta,
    /// Once, at the end.
    Final,
}

/// One chosen or likely token: (id, logprob, rank).
pub type Logprob = (u32, f32, u32);

/// What happened to one sample since it was last drained. See `_core.pyi`.
#[derive(Debug, Clone, Default, PartialEq)]
#[allow(missing_docs)] // named and explained in _core.pyi
pub struct Delta {
    pub request_id: u64,
    pub sse: Option<Vec<u8>>,
    pub text: String,
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
}

/// A sample's gathered output.
#[derive(Debug)]
pub struct Stream {
    /// What the next drain gives out, without its `sse`.
    pub delta: Delta,
    delivery: Delivery,
    queued: bool,
    has_sent_first: bool,
    /// Tokens since the last drain.
    num_fresh: u32,
}

impl Stream {
    /// Whether tokens are wanted as they come.
    #[must_use]
    pub fn is_streaming(&self) -> bool {
        !matches!(self.delivery, Delivery::Final)
    }

    /// Takes what is gathered, leaving the running totals.
    fn take(&mut self) -> Delta {
        let mut taken = Delta {
            text: std::mem::take(&mut self.delta.text),
            token_ids: std::mem::take(&mut self.delta.token_ids),
            logprobs: self.delta.logprobs.as_mut().map(std::mem::take),
            stop_reason: self.delta.stop_reason.take(),
            sse: None,
            ..self.delta
        };
        if let Delivery::Sse(template) = &self.delivery {
            let mut bytes = Vec::with_capacity(taken.text.len() + 384);
            if !std::mem::replace(&mut self.has_sent_first, true) {
                bytes.extend_from_slice(&template.first);
            }
            let finish = taken.finish_reason.map(FinishReason::as_str);
            if !taken.text.is_empty() || finish.is_some() {
                let stop = taken.stop_reason.as_ref().map(|reason| match reason {
                    StopReason::Token(id) => stream::StopReason::Token(*id),
                    StopReason::Text(text) => stream::StopReason::Text(text),
                });
                write_chunk(template, &taken.text, finish, stop, &mut bytes);
            }
            if finish.is_some() {
                bytes.extend_from_slice(&template.last);
            }
            taken.sse = Some(bytes);
        }
        taken
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
    pub fn open(&mut self, delta: Delta, delivery: Delivery) -> u32 {
        self.streams.insert(Stream {
            delta,
            delivery,
            queued: false,
            has_sent_first: false,
            num_fresh: 0,
        }) as u32
    }

    /// The stream of a key.
    pub fn stream(&mut self, key: u32) -> &mut Stream {
        &mut self.streams[key as usize]
    }

    /// A token was added. It is due if the interval is full; the first one always is.
    #[inline]
    pub fn token_added(&mut self, key: u32, stream_interval: u32) {
        let stream = &mut self.streams[key as usize];
        stream.num_fresh += 1;
        if stream.queued {
            return;
        }
        let due = stream.num_fresh >= stream_interval || stream.delta.num_output_tokens == 1;
        // Half a character is no news to a client that reads text.
        let is_silent = matches!(stream.delivery, Delivery::Sse(_))
            && stream.delta.text.is_empty()
            && stream.has_sent_first;
        if due && !is_silent {
            stream.queued = true;
            self.order.push(key);
        }
    }

    /// The sample is over: its stream closes with the next drain.
    pub fn finish(&mut self, key: u32) {
        let stream = &mut self.streams[key as usize];
        debug_assert!(stream.delta.finish_reason.is_some());
        if !std::mem::replace(&mut stream.queued, true) {
            self.order.push(key);
        }
    }

    /// Whether there is nothing to drain.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    fn drain(&mut self) -> Vec<Delta> {
        let mut deltas = Vec::with_capacity(self.order.len());
        for key in self.order.drain(..) {
            let stream = &mut self.streams[key as usize];
            stream.queued = false;
            stream.num_fresh = 0;
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

    fn template() -> Arc<SseTemplate> {
        let part = |text: &str| text.as_bytes().into();
        Arc::new(SseTemplate {
            parts: [part("<"), part("|"), part("|"), part(">")],
            first: part("[first]"),
            last: part("[last]"),
        })
    }

    fn add(outbox: &mut OutboxData, key: u32, text: &str, interval: u32) {
        let delta = &mut outbox.stream(key).delta;
        delta.text.push_str(text);
        delta.token_ids.push(7);
        delta.num_output_tokens += 1;
        outbox.token_added(key, interval);
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
        let key = outbox.open(Delta::default(), Delivery::Sse(template()));
        add(&mut outbox, key, "a", 1);
        assert_eq!(sse(&mut outbox), ["[first]<a|null|null>"]);
        add(&mut outbox, key, "b", 1);
        add(&mut outbox, key, "", 1);
        add(&mut outbox, key, "c\"", 1);
        assert_eq!(sse(&mut outbox), ["<bc\\\"|null|null>"]);
        add(&mut outbox, key, "", 1);
        assert!(outbox.is_empty());
        let delta = &mut outbox.stream(key).delta;
        delta.finish_reason = Some(FinishReason::Stop);
        delta.stop_reason = Some(StopReason::Text("x".into()));
        outbox.finish(key);
        assert_eq!(sse(&mut outbox), ["<|\"stop\"|\"x\">[last]"]);
        assert!(outbox.streams.is_empty());
    }

    #[test]
    fn the_role_chunk_does_not_wait_for_text() {
        let mut outbox = OutboxData::default();
        let key = outbox.open(Delta::default(), Delivery::Sse(template()));
        add(&mut outbox, key, "", 1);
        assert_eq!(sse(&mut outbox), ["[first]"]);
    }

    #[test]
    fn the_interval_holds_tokens_back_but_not_the_first() {
        let mut outbox = OutboxData::default();
        let key = outbox.open(Delta::default(), Delivery::Delta);
        let mut sizes = Vec::new();
        for _ in 0..7 {
            add(&mut outbox, key, "a", 3);
            sizes.extend(outbox.drain().iter().map(|delta| delta.token_ids.len()));
        }
        assert_eq!(sizes, [1, 3, 3]);
    }
}
