//! Trigger: the text at which a grammar begins to hold, and the search for it among a sample's tokens.

use std::collections::VecDeque;
use std::sync::Arc;

use super::matching::{Grammar, Matcher};
use crate::text::tokenizer::Tokenizer;

/// A text that begins what a grammar is about, say a model's marker of tool calls.
#[derive(Debug)]
pub struct Trigger {
    text: Box<[u8]>,
    tokenizer: Arc<Tokenizer>,
}

impl Trigger {
    /// `text`: not empty. A special token is found by its name.
    #[must_use]
    pub fn new(text: &str, tokenizer: Arc<Tokenizer>) -> Self {
        Self {
            text: text.as_bytes().into(),
            tokenizer,
        }
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

    /// Takes a token. Returns a matcher behind it if the trigger is complete with it, and what the
    /// tokens have written fits the grammar.
    pub(super) fn accept(&mut self, token: u32) -> Option<Matcher> {
        let trigger = Arc::clone(&self.trigger);
        let text = &trigger.text;
        let begin = self.tail.len();
        let may_begin = trigger.visit(token, |bytes| {
            self.tail.extend_from_slice(bytes);
            begin > 0 || bytes.contains(&text[0])
        });
        if !may_begin {
            self.tail.clear();
            return None;
        }
        self.tokens.push_back((token, begin));
        let found = self.tail.windows(text.len()).position(|at| at == &**text);
        if let Some(at) = found {
            let matcher = self.open_behind(at);
            // What follows is another one's beginning.
            self.keep_from(self.tail.len());
            return matcher;
        }
        let length = self.tail.len();
        let earliest = (length + 1).saturating_sub(text.len());
        let begun = (earliest..length).find(|&at| text.starts_with(&self.tail[at..]));
        self.keep_from(begun.unwrap_or(length));
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
