//! GrammarOptions: settings that the text of a constraint leaves open.

/// Options of the kinds that hold JSON.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct GrammarOptions {
    /// No whitespace between a JSON text's parts.
    pub disable_any_whitespace: bool,
    /// Objects have the properties that their schema names and no others.
    pub disable_additional_properties: bool,
    /// Whitespace between parts matches this.
    pub whitespace_pattern: Option<String>,
}
