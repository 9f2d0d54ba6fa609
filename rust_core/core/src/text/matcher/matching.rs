//! Grammar and Matcher: a compiled grammar, and one sample's place in it.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};

use llguidance::TokenParser;
use llguidance::api::StopReason;

use crate::error::{Error, Result};

/// A lexer that has learned more than this is not kept for the next sample: opening a matcher copies
/// it, and the cache has to hold it.
const MAX_LEARNED_BYTES: usize = 512 << 10;

/// A compiled grammar, shared by the samples that follow it.
pub struct Grammar {
    /// At its start. Its lexer knows what the samples before have learned.
    prototype: Mutex<TokenParser>,
    num_bytes: usize,
}

impl fmt::Debug for Grammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammar")
            .field("num_bytes", &self.num_bytes)
            .finish_non_exhaustive()
    }
}

impl Grammar {
    /// Takes a parser that has seen nothing, and tries its first mask: what can be found out of a
    /// grammar without a token is found out here.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`]: nothing matches the grammar, or a first mask is beyond the limits.
    pub(super) fn new(mut parser: TokenParser, num_text_bytes: usize) -> Result<Self> {
        parser.start_without_prompt();
        parser
            .compute_mask()
            .map_err(|error| Error::invalid(format!("nothing can match it: {}", line(&error))))?;
        // Of the rules no size is known; they grow with the text. The lexer may yet learn.
        let num_lexer_bytes = parser.parser.lexer_stats().num_bytes;
        let num_bytes = num_lexer_bytes.max(MAX_LEARNED_BYTES) + 16 * num_text_bytes;
        Ok(Self {
            prototype: Mutex::new(parser),
            num_bytes,
        })
    }

    /// Memory it takes, roughly.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        self.num_bytes
    }

    /// A matcher at the grammar's start.
    #[must_use]
    pub fn open(self: &Arc<Self>) -> Matcher {
        let prototype = self
            .prototype
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        Matcher {
            parser: prototype.deep_clone(),
            grammar: self.clone(),
            has_failed: false,
        }
    }

    /// Keeps a parser that is back at the start, if its lexer has learned more than the prototype's.
    fn learn(&self, parser: TokenParser) {
        let num_bytes = parser.parser.lexer_stats().num_bytes;
        let mut prototype = self
            .prototype
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let is_more = num_bytes > prototype.parser.lexer_stats().num_bytes;
        if is_more && num_bytes <= MAX_LEARNED_BYTES {
            *prototype = parser;
        }
    }
}

/// The first line of an error of the crate, without its notes.
pub(super) fn line(error: &impl fmt::Display) -> String {
    let text = error.to_string();
    let mut lines = text.lines().filter(|line| !line.starts_with('<'));
    lines.next().unwrap_or("it is not valid").trim().to_owned()
}

/// One sample's place in a grammar.
///
/// After an error, or a panic in the crate, every call is an error.
pub struct Matcher {
    parser: TokenParser,
    grammar: Arc<Grammar>,
    has_failed: bool,
}

impl fmt::Debug for Matcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Matcher")
            .field("num_tokens", &self.parser.num_tokens())
            .field("has_failed", &self.has_failed)
            .finish_non_exhaustive()
    }
}

impl Matcher {
    /// Runs a verb of the parser; whatever goes wrong is this sample's alone.
    fn guarded<T>(
        &mut self,
        verb: impl FnOnce(&mut TokenParser) -> std::result::Result<T, String>,
    ) -> Result<T> {
        if self.has_failed {
            return Err(Error::invalid("the grammar has failed before"));
        }
        let parser = &mut self.parser;
        let result = catch_unwind(AssertUnwindSafe(|| verb(parser)))
            .unwrap_or_else(|_| Err("the grammar cannot be followed".to_owned()));
        result.map_err(|why| {
            self.has_failed = true;
            Error::invalid(why)
        })
    }

    /// Writes a bit per token that may come next to `row`, whose words beyond the vocabulary become 0.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`]: no token may, or finding out is beyond the limits.
    pub fn fill_mask(&mut self, row: &mut [u32]) -> Result<()> {
        self.guarded(|parser| {
            let mask = parser.compute_mask().map_err(|error| line(&error))?;
            let words = mask.as_slice();
            let num = words.len().min(row.len());
            row[..num].copy_from_slice(&words[..num]);
            row[num..].fill(0);
            Ok(())
        })
    }

    /// Takes a token. Returns true if the text is complete and nothing may follow.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`]: the token may not come here.
    pub fn accept(&mut self, token: u32) -> Result<bool> {
        self.guarded(|parser| {
            let backtrack = parser.consume_token(token).map_err(|error| line(&error))?;
            if backtrack != 0 {
                return Err("the grammar takes tokens back".to_owned());
            }
            parser.check_stop().map_err(|error| line(&error))
        })
    }

    /// The tokens that must come next, as the tokenizer spells them; none where there is a choice, or
    /// where the last one's spelling is open.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] after an earlier error.
    pub fn forced(&mut self) -> Result<Vec<u32>> {
        self.guarded(|parser| Ok(parser.compute_ff_tokens()))
    }

    /// True if the text may end here.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] after an earlier error.
    pub fn is_accepting(&mut self) -> Result<bool> {
        self.guarded(|parser| Ok(parser.is_accepting()))
    }

    /// Leaves what its lexer has learned to the grammar's next samples.
    pub fn close(mut self) {
        let was_ok = matches!(
            self.parser.stop_reason(),
            StopReason::NotStopped
                | StopReason::EndOfSentence
                | StopReason::NoExtension
                | StopReason::NoExtensionBias
        );
        if was_ok
            && self
                .guarded(|parser| parser.reset().map_err(|error| line(&error)))
                .is_ok()
        {
            let Self {
                parser, grammar, ..
            } = self;
            let _ = catch_unwind(AssertUnwindSafe(|| grammar.learn(parser)));
        }
    }
}
