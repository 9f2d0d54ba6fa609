//! Pieces of Lark text, the grammar language that every kind of constraint is written in.

use std::fmt::Write;

use serde_json::Value;

use crate::error::{Error, Result};

/// A string literal that matches `text`.
pub(super) fn string(text: &str) -> String {
    let mut literal = String::with_capacity(text.len() + 2);
    literal.push('"');
    for c in text.chars() {
        match c {
            '"' => literal.push_str("\\\""),
            '\\' => literal.push_str("\\\\"),
            // Lark takes no control characters in a literal, DEL among them.
            '\0'..='\x1f' | '\x7f' => {
                let _ = write!(literal, "\\u{:04x}", c as u32);
            }
            c => literal.push(c),
        }
    }
    literal.push('"');
    literal
}

/// One character of a regular expression's class, spelled so that it has no other meaning.
pub(super) fn class_char(c: char) -> String {
    format!("\\x{{{:x}}}", c as u32)
}

/// A schema that has been prepared, in place of a rule.
pub(super) fn json(schema: &Value) -> String {
    format!("%json {schema}")
}

/// A regular expression literal of a whole text: anchors at its ends change nothing there, and the crate
/// knows none.
///
/// # Errors
/// [`Error::InvalidArgument`]: it matches only an empty text.
pub(super) fn whole_regex(pattern: &str) -> Result<String> {
    let pattern = pattern.strip_prefix('^').unwrap_or(pattern);
    let is_escaped = |text: &str| text.chars().rev().take_while(|&c| c == '\\').count() % 2 == 1;
    let pattern = match pattern.strip_suffix('$') {
        Some(rest) if !is_escaped(rest) => rest,
        _ => pattern,
    };
    if pattern.is_empty() {
        return Err(Error::invalid("it matches only an empty text"));
    }
    Ok(format!("/{}/", llguidance::regex_to_lark(pattern, "")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals_hold_no_control_characters() {
        assert_eq!(string("a\"\\\n\u{7f}é"), "\"a\\\"\\\\\\u000a\\u007fé\"");
    }

    #[test]
    fn anchors_at_a_patterns_ends_are_its_own() {
        assert_eq!(whole_regex("^a+$").unwrap(), "/a+/");
        assert_eq!(whole_regex("a\\$").unwrap(), "/a\\$/");
        assert_eq!(whole_regex("a\\\\$").unwrap(), "/a\\\\/");
        assert!(whole_regex("^$").is_err());
    }
}
