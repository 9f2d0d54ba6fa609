//! AddRequest: a request as the engine receives it.

use std::sync::Arc;

use crate::engine::outbox::Delivery;
use crate::text::channels::Channels;
use crate::text::matcher::{Grammar, ReasoningTokens, TriggerTexts};

/// One request: a sample per id, all of one prompt.
#[derive(Debug, Default)]
pub struct AddRequest<'a> {
    /// One per sample, not in use.
    pub request_ids: &'a [u64],
    /// At least one token.
    pub prompt: &'a [u32],
    /// Clipped to what the model's length and the KV cache leave.
    pub max_tokens: usize,
    /// No EOS, stop token or stop string counts before so many tokens.
    pub min_tokens: usize,
    /// Empty: EOS is ignored.
    pub eos_token_ids: &'a [u32],
    /// Further ids that end a sample.
    pub stop_token_ids: &'a [u32],
    /// Strings that end a sample; need a tokenizer.
    pub stop: &'a [String],
    /// The stop string is part of the text.
    pub include_stop_str_in_output: bool,
    /// Special tokens leave no text.
    pub skip_special_tokens: bool,
    /// Tells text, reasoning and calls apart; needs a tokenizer.
    pub channels: Option<Arc<Channels>>,
    /// The grammar that its output follows.
    pub grammar: Option<Arc<Grammar>>,
    /// The texts from which on it does; None: from the start.
    pub trigger: Option<TriggerTexts<'a>>,
    /// Sequences of tokens that must not come; those of one token are the sampler's to ban.
    pub bad_words: &'a [Vec<u32>],
    /// Tokens that the grammar leaves no choice about need not be sampled: nothing else is asked of
    /// them.
    pub may_force: bool,
    /// The tokens around reasoning, which comes before what the grammar is about.
    pub reasoning: Option<ReasoningTokens>,
    /// Number of likely tokens to report with each.
    pub num_logprobs: Option<usize>,
    /// Lower is served first under the priority policy.
    pub priority: i64,
    /// Separates prefix caches.
    pub cache_salt: Option<&'a str>,
    /// When it arrived.
    pub arrival_s: f64,
    /// Tokens per delta of its streams, at least 1; None: the engine's.
    pub stream_interval: Option<u32>,
    /// One per sample.
    pub deliveries: Vec<Delivery>,
}
