//! GrammarOptions: the calls that a grammar allows, and the text around them.

/// The text that a grammar is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// A whole answer.
    Answer,
    /// Calls that follow one another without text between, from one of the format's triggers on, text
    /// before and behind them free.
    Calls,
}

/// The calls that a grammar allows.
#[derive(Debug, Clone, Copy)]
pub struct GrammarOptions<'a> {
    /// The text it is about.
    pub extent: Extent,
    /// Of an answer: nothing but calls, it begins with one.
    pub at_least_one: bool,
    /// No second call.
    pub at_most_one: bool,
    /// The tools whose arguments follow their schemas; None: all.
    pub strict: Option<&'a [String]>,
    /// Texts that are one special token each, and their ids.
    pub special_tokens: &'a [(String, u32)],
}
