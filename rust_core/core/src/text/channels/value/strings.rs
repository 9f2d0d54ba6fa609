//! The strings of a value: quotes, escapes, and what models write in their place.

use crate::text::channels::piece::escape;

use super::{Dialect, State, Step, ValueReader};

impl ValueReader {
    /// The inside of a string up to what needs a look. Returns the number of bytes read.
    pub(super) fn pass_string(&mut self, text: &str, quote: char, out: &mut String) -> usize {
        let special = |b: u8| matches!(b, b'"' | b'\'' | b'\\' | 0..0x20);
        let num_plain = text.bytes().position(special).unwrap_or(text.len());
        if num_plain > 0 {
            self.end_pair(out);
            out.push_str(&text[..num_plain]);
        }
        let Some(c) = text[num_plain..].chars().next() else {
            return num_plain;
        };
        if c == quote {
            self.end_string(out);
        } else if c == '\\' {
            self.state = State::Escape { quote };
        } else {
            self.end_pair(out);
            if c == '\'' {
                out.push(c);
            } else {
                escape(c.encode_utf8(&mut [0; 4]), out);
            }
        }
        num_plain + c.len_utf8()
    }

    pub(super) fn step_escape(
        &mut self,
        dialect: &Dialect,
        c: char,
        quote: char,
        out: &mut String,
    ) -> Step {
        let is_python = matches!(dialect, Dialect::Python);
        self.state = State::String { quote };
        let num_digits = match c {
            'u' => 4,
            'U' if is_python => 8,
            'x' if is_python => 2,
            _ => 0,
        };
        if num_digits > 0 {
            self.word.clear();
            self.word.push(c);
            self.state = State::Hex {
                quote,
                left: num_digits,
            };
            return Step::Taken;
        }
        self.end_pair(out);
        match c {
            '"' | '\\' | '/' | 'b' | 'f' | 'n' | 'r' | 't' => {
                out.push('\\');
                out.push(c);
            }
            '\'' => out.push(c),
            '\n' if is_python => {}
            'a' if is_python => out.push_str("\\u0007"),
            'v' if is_python => out.push_str("\\u000b"),
            '0' if is_python => out.push_str("\\u0000"),
            c => {
                out.push_str("\\\\");
                escape(c.encode_utf8(&mut [0; 4]), out);
            }
        }
        Step::Taken
    }

    pub(super) fn step_hex(&mut self, c: char, quote: char, left: u8, out: &mut String) -> Step {
        if !c.is_ascii_hexdigit() {
            // No such escape: what was read of it is text.
            self.state = State::String { quote };
            self.end_pair(out);
            out.push_str("\\\\");
            out.push_str(&self.word);
            self.word.clear();
            return Step::Left;
        }
        self.word.push(c);
        if left > 1 {
            self.state = State::Hex {
                quote,
                left: left - 1,
            };
            return Step::Taken;
        }
        self.state = State::String { quote };
        let word = std::mem::take(&mut self.word);
        let (kind, digits) = word.split_at(1);
        let code = u32::from_str_radix(digits, 16).unwrap_or(0xfffd);
        match (kind, code) {
            ("u", 0xd800..0xdc00) => {
                self.end_pair(out);
                self.high = Some(code as u16);
            }
            ("u", 0xdc00..0xe000) => match self.high.take() {
                Some(high) => {
                    out.push_str("\\u");
                    out.push_str(&format!("{high:04x}"));
                    out.push_str("\\u");
                    out.push_str(digits);
                }
                None => out.push_str("\\ufffd"),
            },
            ("u", _) => {
                self.end_pair(out);
                out.push_str("\\u");
                out.push_str(digits);
            }
            _ => {
                self.end_pair(out);
                let c = char::from_u32(code).unwrap_or('\u{fffd}');
                escape(c.encode_utf8(&mut [0; 4]), out);
            }
        }
        Step::Taken
    }

    /// Half a pair of escapes without the other half is no character.
    pub(super) fn end_pair(&mut self, out: &mut String) {
        if self.high.take().is_some() {
            out.push_str("\\ufffd");
        }
    }

    pub(super) fn end_string(&mut self, out: &mut String) {
        self.end_pair(out);
        out.push('"');
        if self.is_key {
            self.state = State::Colon;
        } else {
            self.end_value();
        }
    }
}
