//! Pieces of Lark text, the grammar language that every kind of constraint is written in.

use std::fmt::Write;

use serde_json::Value;

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

/// A regular expression literal.
pub(super) fn regex(pattern: &str) -> String {
    format!("/{}/", llguidance::regex_to_lark(pattern, ""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals_hold_no_control_characters() {
        assert_eq!(string("a\"\\\n\u{7f}é"), "\"a\\\"\\\\\\u000a\\u007fé\"");
    }
}
