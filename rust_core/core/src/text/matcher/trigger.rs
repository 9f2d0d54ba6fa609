//! Trigger: the texts at which a grammar begins to hold, and the search for them among a sample's tokens.

use std::collections::VecDeque;
use std::sync::Arc;

use super::matching::{Grammar, Matcher};
use crate::text::tokenizer::Tokenizer;

/// Texts that begin what a grammar is about, say a model's markers of tool calls.
#[derive(Debug)]
pub struct Trigger {
    texts: Vec<Box<[u8]>>,
    is_repeated: bool,
    tokenizer: Arc<Tokenizer>,
}

impl Trigger {
    /// `texts`: none of them empty. A special token is found by its name. `is_repeated`: the grammar holds
    /// to where its text may end, and again from the next trigger on; otherwise from the first one to the
    /// end.
    #[must_use]
    pub fn new(texts: &[&str], is_repeated: bool, tokenizer: Arc<Tokenizer>) -> Self {
        Self {
            texts: texts.iter().map(|text| text.as_bytes().into()).collect(),
            is_repeated,
            tokenizer,
        }
    }

    pub(super) fn is_repeated(&self) -> bool {
        self.is_repeated
    }

    /// The first place of a text in `bytes`.
    fn find(&self, bytes: &[u8]) -> Option<usize> {
        let places = self.texts.iter().filter_map(|text| {
            let mut windows = bytes.windows(text.len());
            windows.position(|at| at == &**text)
        });
        places.min()
    }

    /// The first place at which a text has begun that may go on behind `bytes`.
    fn find_begun(&self, bytes: &[u8]) -> Option<usize> {
        let length = self.texts.iter().map(|text| text.len()).max().unwrap_or(0);
        let earliest = (bytes.len() + 1).saturating_sub(length);
        let has_begun = |at: &usize| {
            self.texts
                .iter()
                .any(|text| text.starts_with(&bytes[*at..]))
        };
        (earliest..bytes.len()).find(has_begun)
    }

    fn may_begin_in(&self, bytes: &[u8]) -> bool {
        self.texts.iter().any(|text| bytes.contains(&text[0]))
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

/// A grammar that does not hold yet. O(bytes) a token, and nothing is kept of text in which the
/// trigger cannot have begun.
#[derive(Debug)]
pub(super) struct Dormant {
    grammar: Arc<Grammar>,
    trigger: Arc<Trigger>,
    /// The last tokens, as far as the trigger may have begun in them, and where each begins in `tail`.
    tokens: VecDeque<(u32, usize)>,
    tail: Vec<u8>,
}

impl Dormant {
    pub(super) fn new(grammar: Arc<Grammar>, trigger: Arc<Trigger>) -> Self {
        Self {
            grammar,
            trigger,
            tokens: VecDeque::new(),
            tail: Vec::new(),
        }
    }

    pub(super) fn is_repeated(&self) -> bool {
        self.trigger.is_repeated()
    }

    /// Takes a token. Returns a matcher behind it if the trigger is complete with it, and what the
    /// tokens have written fits the grammar.
    pub(super) fn accept(&mut self, token: u32) -> Option<Matcher> {
        let trigger = Arc::clone(&self.trigger);
        let begin = self.tail.len();
        let may_begin = trigger.visit(token, |bytes| {
            self.tail.extend_from_slice(bytes);
            begin > 0 || trigger.may_begin_in(bytes)
        });
        if !may_begin {
            self.tail.clear();
            return None;
        }
        self.tokens.push_back((token, begin));
        if let Some(at) = trigger.find(&self.tail) {
            let matcher = self.open_behind(at);
            // What follows is another one's beginning.
            self.keep_from(self.tail.len());
            return matcher;
        }
        let begun = trigger.find_begun(&self.tail);
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
            self.tokens.clear();
            self.tail.clear();
            return;
        }
        let first = self.tokens.iter().rposition(|&(_, begin)| begin <= at);
        let num_over = first.unwrap_or(0);
        let begin = self.tokens[num_over].1;
        self.tokens.drain(..num_over);
        for token in &mut self.tokens {
            token.1 -= begin;
        }
        self.tail.drain(..begin);
    }
}
