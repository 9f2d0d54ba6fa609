//! The grammar of an envelope's calls, in llguidance's dialect of Lark.

use crate::text::channels::format::ChannelFormat;

/// What calls a grammar allows.
#[derive(Debug, Clone, Copy)]
pub struct GrammarOptions<'a> {
    /// Nothing but calls: the answer begins with one.
    pub at_least_one: bool,
    /// No second call.
    pub at_most_one: bool,
    /// The tools whose arguments follow their schemas; None: all.
    pub strict: Option<&'a [String]>,
    /// Texts that are one special token each, and their ids.
    pub special_tokens: &'a [(String, u32)],
}

impl ChannelFormat {
    /// The grammar of calls of `tools`: names and JSON schemas.
    ///
    /// # Errors
    /// One line: the format has no calls, or there are no tools.
    pub fn grammar(
        &self,
        tools: &[(String, String)],
        options: &GrammarOptions<'_>,
    ) -> Result<String, String> {
        let _ = (tools, options);
        Err("grammar: not made yet".to_owned())
    }
}
