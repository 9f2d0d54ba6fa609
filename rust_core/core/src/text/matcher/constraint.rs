//! Constraint: what a sample's next token may be. Reasoning comes first, and then the grammar holds; words
//! that must not come are bad all along.

use std::sync::Arc;

use super::bad_words::BadWords;
use super::matching::{Grammar, Matcher};
use super::trigger::{Dormant, Trigger};

/// The tokens around a sample's reasoning, during which no grammar holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReasoningTokens {
    /// Opens it, as the first token; None where only the prompt does.
    pub open: Option<u32>,
    /// Closes it.
    pub close: u32,
    /// The prompt has opened it.
    pub is_open: bool,
    /// After so many tokens of reasoning it is closed.
    pub budget: Option<u32>,
}

/// No token came, or one that the grammar does not allow: no other was left by the request's own settings.
const NOTHING_LEFT: &str = "allowed_token_ids, bad_words and logit_bias leave no token that the grammar, or the \
                            form of the tool calls, allows next";
const NOTHING_FITS: &str =
    "no token of the vocabulary fits the grammar here, or to find out is beyond its limits";

/// The effect of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accepted {
    /// More may follow.
    Open,
    /// The grammar holds from here on: what was sampled behind this token was not bound by it.
    Armed,
    /// The text is complete.
    Complete,
    /// It may not come here, or the grammar is beyond its limits: the sample cannot go on.
    Failed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Reasoning may begin with the next token.
    Before,
    Reasoning {
        num_tokens: u32,
    },
    After,
}

/// See the module's page. One per sample that has any.
#[derive(Debug)]
pub struct Constraint {
    matcher: Option<Matcher>,
    /// The grammar, until its trigger comes; kept beside the matcher where it may come again.
    dormant: Option<Dormant>,
    bad_words: Option<BadWords>,
    reasoning: Option<ReasoningTokens>,
    phase: Phase,
    /// Tokens that end the sample, allowed wherever the text may end.
    stop_token_ids: Box<[u32]>,
    failure: Option<&'static str>,
    /// A token that was taken ahead of its `accept`, and what that is to return.
    ahead: Option<(u32, Accepted)>,
    /// Tokens that must come next, where that has been found out already.
    forced: Option<Vec<u32>>,
}

impl Constraint {
    /// None if nothing would ever be constrained. With a trigger the grammar holds from there on; where the
    /// text that is there by then does not fit, it does not.
    #[must_use]
    pub fn new(
        grammar: Option<&Arc<Grammar>>,
        trigger: Option<&Arc<Trigger>>,
        reasoning: Option<ReasoningTokens>,
        bad_words: &Arc<[Box<[u32]>]>,
        stop_token_ids: &[u32],
    ) -> Option<Self> {
        let has_budget = reasoning.is_some_and(|tokens| tokens.budget.is_some());
        let bad_words = BadWords::new(bad_words);
        if grammar.is_none() && bad_words.is_none() && !has_budget {
            return None;
        }
        let phase = match reasoning {
            Some(tokens) if tokens.is_open => Phase::Reasoning { num_tokens: 0 },
            Some(tokens) if tokens.open.is_some() => Phase::Before,
            _ => Phase::After,
        };
        let dormant = grammar.cloned().zip(trigger.cloned());
        Some(Self {
            matcher: grammar.filter(|_| trigger.is_none()).map(Grammar::open),
            dormant: dormant.map(|(grammar, trigger)| Dormant::new(grammar, trigger)),
            bad_words,
            reasoning,
            phase,
            stop_token_ids: stop_token_ids.into(),
            failure: None,
            ahead: None,
            forced: None,
        })
    }

    /// False while every token may come, and no mask is needed.
    #[must_use]
    pub fn is_active(&self) -> bool {
        let has_budget = self.reasoning.is_some_and(|tokens| tokens.budget.is_some());
        self.matcher.is_some() || self.bad_words.is_some() || has_budget
    }

    /// Forgets the grammar.
    pub fn release(&mut self) {
        self.matcher = None;
    }

    /// Writes a bit per token that may come next to `row`; false, and nothing is written, where every
    /// token may. What fails here makes the next `accept` fail.
    pub fn fill_mask(&mut self, row: &mut [u32]) -> bool {
        let mut is_masked = self.fill_allowed(row);
        for token in self.bad_words.iter().flat_map(BadWords::banned) {
            if !is_masked {
                row.fill(u32::MAX);
                is_masked = true;
            }
            forbid(row, token);
        }
        is_masked
    }

    /// `fill_mask` of reasoning and the grammar.
    fn fill_allowed(&mut self, row: &mut [u32]) -> bool {
        if let (Phase::Reasoning { num_tokens }, Some(tokens)) = (self.phase, self.reasoning) {
            let is_spent = tokens.budget.is_some_and(|budget| num_tokens >= budget);
            if is_spent {
                row.fill(0);
                allow(row, tokens.close);
            }
            return is_spent;
        }
        let Some(matcher) = &mut self.matcher else {
            return false;
        };
        if self.failure.is_some() || matcher.fill_mask(row).is_err() {
            match self.dormant {
                Some(_) => self.matcher = None,
                None => self.failure = self.failure.or(Some(NOTHING_FITS)),
            }
            return false;
        }
        if !self.stop_token_ids.is_empty() && matcher.is_accepting().unwrap_or(false) {
            for &id in &self.stop_token_ids {
                allow(row, id);
            }
        }
        if let (Phase::Before, Some(open)) = (self.phase, self.reasoning.and_then(|r| r.open)) {
            allow(row, open);
        }
        true
    }

    /// Takes the next token ahead of its `accept`, for the mask behind it, and finds what must follow if
    /// that `may_force` it. False: nothing may follow.
    pub fn advance(&mut self, token: u32, may_force: bool) -> bool {
        let accepted = self.accept(token);
        let is_open = matches!(accepted, Accepted::Open | Accepted::Armed);
        self.forced = (may_force && is_open).then(|| self.forced());
        self.ahead = Some((token, accepted));
        is_open
    }

    /// Takes the sample's next token, unless that has ended it.
    pub fn accept(&mut self, token: u32) -> Accepted {
        if let Some((ahead, accepted)) = self.ahead.take() {
            debug_assert_eq!(ahead, token);
            return accepted;
        }
        self.forced = None;
        if self.failure.is_some() {
            return Accepted::Failed;
        }
        if let Some(words) = &mut self.bad_words {
            words.accept(token);
        }
        let is_asleep = self.matcher.is_none();
        let in_reasoning = matches!(self.phase, Phase::Reasoning { .. });
        let dormant = self.dormant.as_mut().filter(|_| is_asleep);
        if let Some((matcher, is_repeated)) =
            dormant.and_then(|one| Some((one.accept(token, in_reasoning)?, one.is_repeated())))
        {
            // A call ends reasoning, too.
            (self.matcher, self.phase) = (Some(matcher), Phase::After);
            self.dormant = self.dormant.take().filter(|_| is_repeated);
            return Accepted::Armed;
        }
        if let Some(tokens) = self.reasoning {
            if let Phase::Reasoning { num_tokens } = &mut self.phase {
                *num_tokens += 1;
                if token == tokens.close {
                    self.phase = Phase::After;
                    if let Some(dormant) = &mut self.dormant {
                        dormant.restart();
                    }
                }
                return Accepted::Open;
            }
            // Where no grammar forbids it, reasoning may begin later too.
            let may_open = self.phase == Phase::Before || self.matcher.is_none();
            if may_open && tokens.open == Some(token) {
                self.phase = Phase::Reasoning { num_tokens: 0 };
                return Accepted::Open;
            }
            self.phase = Phase::After;
        }
        let Some(matcher) = &mut self.matcher else {
            return Accepted::Open;
        };
        let accepted = matcher.accept(token);
        if self.dormant.is_some() {
            // To be bound was nobody's wish: where that fails, it is over, too.
            let is_over = accepted.as_ref().map_or(true, |&is_complete| {
                is_complete || matcher.is_accepting().unwrap_or(true)
            });
            if let Some(matcher) = self.matcher.take_if(|_| is_over) {
                if accepted.is_ok() {
                    matcher.close();
                }
                // The next trigger may begin in the token that ended the last call.
                let dormant = self.dormant.as_mut();
                self.matcher = dormant.and_then(|one| one.accept(token, false));
            }
            return Accepted::Open;
        }
        match accepted {
            Ok(false) => Accepted::Open,
            Ok(true) => Accepted::Complete,
            Err(_) => {
                self.failure = Some(NOTHING_LEFT);
                Accepted::Failed
            }
        }
    }

    /// The tokens that must come next, whatever the model says.
    pub fn forced(&mut self) -> Vec<u32> {
        if let Some(forced) = self.forced.take() {
            return forced;
        }
        match &mut self.matcher {
            Some(matcher) if self.phase == Phase::After && self.failure.is_none() => {
                // What fails here fails with the next token.
                matcher.forced().unwrap_or_default()
            }
            _ => Vec::new(),
        }
    }

    /// The reason, for who sent the request, after [`Accepted::Failed`] and where no token could be chosen.
    #[must_use]
    pub fn failure(&self) -> &'static str {
        self.failure.unwrap_or(NOTHING_LEFT)
    }

    /// The sample has ended well.
    pub fn close(self) {
        if let Some(matcher) = self.matcher.filter(|_| self.failure.is_none()) {
            matcher.close();
        }
    }
}

fn forbid(row: &mut [u32], id: u32) {
    if let Some(word) = row.get_mut(id as usize / 32) {
        *word &= !(1 << (id % 32));
    }
}

fn allow(row: &mut [u32], id: u32) {
    if let Some(word) = row.get_mut(id as usize / 32) {
        *word |= 1 << (id % 32);
    }
}
