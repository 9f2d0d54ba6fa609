//! Trigger: the texts at which a grammar begins to hold, and the search for them among a sample's tokens.

use std::collections::VecDeque;
use std::sync::Arc;

use super::matching::{Grammar, Matcher};
use crate::text::tokenizer::Tokenizer;

/// The texts of a [`Trigger`]. No text is empty; a special token is found by its name.
#[derive(Debug, Clone, Default)]
pub struct TriggerTexts<'a> {
    /// Those that count wherever they stand.
    pub anywhere: Vec<&'a str>,
    /// Those that count where nothing but white space is before them, reasoning and other triggers aside:
    /// within a text they would be part of it.
    pub at_start: Vec<&'a str>,
    /// The grammar holds to where its text may end, and again from the next trigger on; otherwise from the
    /// first one to the end.
    pub is_repeated: bool,
}

/// Texts that begin what a grammar is about, say a model's markers of tool calls.
#[derive(Debug)]
pub struct Trigger {
    anywhere: Vec<Box<[u8]>>,
    at_start: Vec<Box<[u8]>>,
    is_repeated: bool,
    tokenizer: Arc<Tokenizer>,
}

impl Trigger {
    /// See [`TriggerTexts`].
    #[must_use]
    pub fn new(texts: &TriggerTexts<'_>, tokenizer: Arc<Tokenizer>) -> Self {
        let bytes = |texts: &[&str]| texts.iter().map(|text| text.as_bytes().into()).collect();
        Self {
            anywhere: bytes(&texts.anywhere),
            at_start: bytes(&texts.at_start),
            is_repeated: texts.is_repeated,
            tokenizer,
        }
    }

    pub(super) fn is_repeated(&self) -> bool {
        self.is_repeated
    }

    /// The first place of a text in `bytes`, with which the answer begins if `is_start`.
    fn find(&self, bytes: &[u8], is_start: bool) -> Option<usize> {
        let start = is_start.then(|| num_blank(bytes)).filter(|&at| {
            let mut texts = self.at_start.iter();
            texts.any(|text| bytes[at..].starts_with(text))
        });
        let places = self.anywhere.iter().filter_map(|text| {
            let mut windows = bytes.windows(text.len());
            windows.position(|at| at == &**text)
        });
        places.chain(start).min()
    }

    /// The first place at which a text has begun that may go on behind `bytes`.
    fn find_begun(&self, bytes: &[u8], is_start: bool) -> Option<usize> {
        let begins = |texts: &[Box<[u8]>], at: usize| {
            let rest = &bytes[at..];
            !rest.is_empty() && texts.iter().any(|text| text.starts_with(rest))
        };
        let start = is_start.then(|| num_blank(bytes));
        let start = start.filter(|&at| begins(&self.at_start, at));
        let lengths = self.anywhere.iter().map(|text| text.len());
        let earliest = (bytes.len() + 1).saturating_sub(lengths.max().unwrap_or(0));
        let place = (earliest..bytes.len()).find(|&at| begins(&self.anywhere, at));
        place.into_iter().chain(start).min()
    }

    fn may_begin_in(&self, bytes: &[u8], is_start: bool) -> bool {
        let first = bytes.get(num_blank(bytes)).filter(|_| is_start);
        first.is_some_and(|first| self.at_start.iter().any(|text| text[0] == *first))
            || self.anywhere.iter().any(|text| bytes.contains(&text[0]))
    }

    /// Calls `visit` with the bytes of a token.
    fn visit<R>(&self, token: u32, visit: impl FnOnce(&[u8]) -> R) -> R {
        match self.tokenizer.table().and_then(|table| table.get(token)) {
            Some(entry) if !entry.is_special => visit(entry.bytes),
            _ => {
                let name = self.tokenizer.id_to_token(token).unwrap_or_default();
                visit(name.as_bytes())
            }
        }
    }
}

/// The length of the white space at the beginning of `bytes`.
fn num_blank(bytes: &[u8]) -> usize {
    bytes.len() - bytes.trim_ascii_start().len()
}

/// A grammar that does not hold yet. O(bytes) a token, and nothing is kept of text in which the
/// trigger cannot have begun.
#[derive(Debug)]
pub(super) struct Dormant {
    grammar: Arc<Grammar>,
    trigger: Arc<Trigger>,
    /// The last tokens, as far as the trigger may have begun in them, and where each begins in `tail`.
    tokens: VecDeque<(u32, usize)>,
    tail: Vec<u8>,
    /// Text that is no white space has come before `tail`.
    has_text: bool,
}

impl Dormant {
    pub(super) fn new(grammar: Arc<Grammar>, trigger: Arc<Trigger>) -> Self {
        Self {
            grammar,
            trigger,
            tokens: VecDeque::new(),
            tail: Vec::new(),
            has_text: false,
        }
    }

    pub(super) fn is_repeated(&self) -> bool {
        self.trigger.is_repeated()
    }

    /// The answer begins behind the tokens so far: they were reasoning.
    pub(super) fn restart(&mut self) {
        self.tokens.clear();
        self.tail.clear();
        self.has_text = false;
    }

    /// Takes a token, of the answer or `in_reasoning`. Returns a matcher behind it if the trigger is
    /// complete with it, and what the tokens have written fits the grammar.
    pub(super) fn accept(&mut self, token: u32, in_reasoning: bool) -> Option<Matcher> {
        let trigger = Arc::clone(&self.trigger);
        let begin = self.tail.len();
        let is_start = !self.has_text && !in_reasoning;
        let may_begin = trigger.visit(token, |bytes| {
            self.tail.extend_from_slice(bytes);
            begin > 0 || trigger.may_begin_in(bytes, is_start)
        });
        if !may_begin {
            self.keep_from(self.tail.len());
            return None;
        }
        self.tokens.push_back((token, begin));
        if let Some(at) = trigger.find(&self.tail, is_start) {
            let matcher = self.open_behind(at);
            // What follows is another one's beginning.
            self.tail.truncate(at);
            self.keep_from(at);
            return matcher;
        }
        let begun = trigger.find_begun(&self.tail, is_start);
        self.keep_from(begun.unwrap_or(self.tail.len()));
        None
    }

    /// A matcher that has taken the tokens from the one in which the trigger begins, at a byte of `tail`.
    fn open_behind(&self, at: usize) -> Option<Matcher> {
        let mut matcher = self.grammar.open();
        let first = self.tokens.iter().rposition(|&(_, begin)| begin <= at)?;
        for &(token, _) in self.tokens.range(first..) {
            if !matches!(matcher.accept(token), Ok(false)) {
                return None;
            }
        }
        Some(matcher)
    }

    /// Forgets the tokens that end before a byte of `tail`.
    fn keep_from(&mut self, at: usize) {
        if at == self.tail.len() {
            self.has_text |= num_blank(&self.tail) < at;
            self.tokens.clear();
            self.tail.clear();
            return;
        }
        let first = self.tokens.iter().rposition(|&(_, begin)| begin <= at);
        let num_over = first.unwrap_or(0);
        let begin = self.tokens[num_over].1;
        self.has_text |= num_blank(&self.tail) < begin;
        self.tokens.drain(..num_over);
        for token in &mut self.tokens {
            token.1 -= begin;
        }
        self.tail.drain(..begin);
    }
}
