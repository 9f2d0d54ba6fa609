//! TextMaker: makes a sample's text of its tokens, plain or in channels.

use std::sync::Arc;

use crate::text::channels::{ChannelStream, Channels, Piece};
use crate::text::detokenizer::Detokenizer;
use crate::text::tokenizer::Tokenizer;

/// The rules of a request's text.
#[derive(Debug, Clone, Copy)]
pub(super) struct TextRules<'a> {
    pub(super) stop: &'a [String],
    pub(super) include_stop: bool,
    pub(super) skip_special: bool,
    pub(super) channels: Option<&'a Arc<Channels>>,
}

/// Where text goes: into a sample's next delta.
#[derive(Debug)]
pub(super) struct TextOut<'a> {
    pub(super) text: &'a mut String,
    pub(super) channels: &'a mut Option<Box<ChannelNews>>,
}

/// The output of a request with channels, beyond text.
#[derive(Debug, Clone, Default, PartialEq)]
#[allow(missing_docs)] // named and explained in _core.pyi
pub struct ChannelNews {
    pub pieces: Vec<Piece>,
    pub num_reasoning_tokens: u32,
}

/// See the module's page.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // boxed wherever it is kept
pub enum TextMaker {
    /// All of it is text.
    Plain(Detokenizer),
    /// In pieces.
    Channels(ChannelStream),
}

impl TextMaker {
    pub(super) fn new(tokenizer: &Arc<Tokenizer>, rules: TextRules<'_>) -> Self {
        let tokenizer = Arc::clone(tokenizer);
        let (include_stop, skip_special) = (rules.include_stop, rules.skip_special);
        match rules.channels {
            None => {
                let stop = rules.stop.to_vec();
                Self::Plain(Detokenizer::new(
                    tokenizer,
                    stop,
                    include_stop,
                    skip_special,
                ))
            }
            Some(channels) => Self::Channels(ChannelStream::new(
                tokenizer,
                Arc::clone(channels),
                rules.stop,
                include_stop,
                skip_special,
            )),
        }
    }

    /// Takes a token: its text goes out. Returns the index of the stop string that ended it.
    ///
    /// `may_stop`: see [`Detokenizer::push_without_stop`].
    #[inline]
    pub(super) fn push(&mut self, token: u32, may_stop: bool, out: TextOut<'_>) -> Option<usize> {
        match self {
            Self::Plain(detokenizer) if may_stop => detokenizer.push(token, out.text),
            Self::Plain(detokenizer) => {
                detokenizer.push_without_stop(token, out.text);
                None
            }
            Self::Channels(stream) => {
                let news = out.channels.get_or_insert_default();
                let stop = stream.push(token, may_stop, &mut news.pieces);
                news.num_reasoning_tokens = stream.num_reasoning_tokens();
                stop
            }
        }
    }

    /// No more tokens: what was held back goes out. Returns as [`TextMaker::push`].
    pub(super) fn finish(&mut self, out: TextOut<'_>) -> Option<usize> {
        match self {
            Self::Plain(detokenizer) => detokenizer.finish(out.text),
            Self::Channels(stream) => {
                let news = out.channels.get_or_insert_default();
                let stop = stream.finish(&mut news.pieces);
                news.num_reasoning_tokens = stream.num_reasoning_tokens();
                stop
            }
        }
    }
}
