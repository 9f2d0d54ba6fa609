//! GrammarSource: a constraint as a request writes it, and the grammar it stands for.

use llguidance::api::TopLevelGrammar;
use serde_json::{Value, json};

use super::options::GrammarOptions;
use super::vocabulary::Vocabulary;
use super::{gbnf, lark, schema, structural_tag};
use crate::error::{Error, Result};

/// Longest text of a constraint. Real schemas have some kilobytes, the largest published ones 200.
const MAX_TEXT_BYTES: usize = 256 << 10;

/// The language that a source is written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GrammarKind {
    /// A JSON schema.
    Json,
    /// Any JSON object; the text is empty.
    JsonObject,
    /// A regular expression that the whole text matches.
    Regex,
    /// A JSON array of texts, one of which it is.
    Choice,
    /// Lark, or GBNF.
    Grammar,
    /// Tags around structures, as JSON.
    StructuralTag,
}

/// See the module's page. Equal sources are one grammar.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct GrammarSource {
    /// The language.
    pub kind: GrammarKind,
    /// The text in that language.
    pub text: String,
    /// Settings that the text leaves open.
    pub options: GrammarOptions,
}

impl GrammarSource {
    /// Translates it for llguidance.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`]: it is too long, not of its kind, or uses what is not supported.
    pub(super) fn lower(&self, vocabulary: &Vocabulary) -> Result<TopLevelGrammar> {
        let text = self.text.as_str();
        if text.len() > MAX_TEXT_BYTES {
            return Err(Error::invalid(format!(
                "it has {} bytes, more than {MAX_TEXT_BYTES}",
                text.len()
            )));
        }
        let lark = match self.kind {
            GrammarKind::Json => {
                let schema = schema::prepare(parse(text)?, &self.options)?;
                return Ok(TopLevelGrammar::from_json_schema(schema));
            }
            GrammarKind::JsonObject => {
                let schema = schema::prepare(json!({"type": "object"}), &self.options)?;
                return Ok(TopLevelGrammar::from_json_schema(schema));
            }
            GrammarKind::Regex => format!("start: {}", lark::whole_regex(text)?),
            GrammarKind::Choice => choice(&parse(text)?)?,
            GrammarKind::Grammar if text.trim().is_empty() => {
                return Err(Error::invalid("it is empty"));
            }
            GrammarKind::Grammar if gbnf::is_gbnf(text) => gbnf::to_lark(text)?,
            GrammarKind::Grammar => text.to_owned(),
            GrammarKind::StructuralTag => {
                structural_tag::to_lark(&parse(text)?, &self.options, vocabulary)?
            }
        };
        Ok(TopLevelGrammar::from_lark(lark))
    }
}

fn parse(text: &str) -> Result<Value> {
    serde_json::from_str(text).map_err(|error| Error::invalid(format!("it is not JSON: {error}")))
}

fn choice(choices: &Value) -> Result<String> {
    let texts: Option<Vec<&str>> = choices
        .as_array()
        .and_then(|items| items.iter().map(Value::as_str).collect());
    match texts {
        Some(texts) if !texts.is_empty() => {
            if texts.iter().any(|text| text.is_empty()) {
                return Err(Error::invalid("it must not hold empty texts"));
            }
            // One terminal: a choice is no prefix of another one there.
            let all: Vec<String> = texts.iter().map(|text| lark::string(text)).collect();
            Ok(format!("start: CHOICE\nCHOICE: {}", all.join(" | ")))
        }
        _ => Err(Error::invalid("it must be a list of texts, at least one")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_texts() {
        assert_eq!(
            choice(&json!(["a", "b\n"])).unwrap(),
            "start: CHOICE\nCHOICE: \"a\" | \"b\\u000a\""
        );
        for bad in [json!([]), json!("a"), json!([1]), json!([""])] {
            assert!(choice(&bad).is_err(), "{bad}");
        }
    }
}
