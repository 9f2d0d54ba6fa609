//! ValueReader: one value of a model's output, rewritten as JSON while it arrives.
//!
//! Valid JSON leaves as it came, byte for byte. What models write instead of it is mended on the way:
//! raw control characters and unknown escapes in strings, single quotes, Python's words, bare keys,
//! commas before a closing bracket. Python's literals and Gemma's values are two dialects of the same
//! machine. Each byte is read once; nothing is looked at again.

mod strings;

use crate::text::channels::number::json_number;
use crate::text::channels::piece::{escape, quote};
use crate::text::channels::scanner::{Held, Scanner};

/// The form in which values are written.
#[derive(Debug, Clone)]
pub(crate) enum Dialect {
    /// JSON, and what is close to it.
    Json,
    /// Python's literals; never evaluated.
    Python,
    /// Bare keys and words, strings between two of this mark.
    Marked(Box<str>, Scanner),
}

impl Dialect {
    /// Strings between two of `mark`.
    pub(crate) fn marked(mark: &str) -> Self {
        Self::Marked(mark.into(), Scanner::new([mark]))
    }
}

/// State of a value's parser.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Progress {
    /// All was read, and there may be more.
    More,
    /// The value is complete.
    Done,
    /// The next character cannot be part of it.
    Bad,
}

/// Outcome of a character.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Taken,
    /// It belongs to the new state.
    Left,
    /// It fits nowhere.
    Stuck,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Container {
    Object,
    Array,
    /// Python's: closed by a parenthesis, and a JSON array.
    Tuple,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// A value is due. `may_close`: or the end of an array.
    Value {
        may_close: bool,
    },
    /// A key is due, or the end of an object.
    Key,
    Colon,
    /// A comma or a closing bracket is due.
    After,
    /// In a string that ends with this quote.
    String {
        quote: char,
    },
    /// After a backslash.
    Escape {
        quote: char,
    },
    /// After `\u`, `\U` or `\x`: so many hexadecimal digits are due.
    Hex {
        quote: char,
        left: u8,
    },
    /// In a number, a word or a bare key.
    Word,
    /// In the mark that opens a string; so many of its bytes were read.
    Mark {
        matched: usize,
    },
    /// In a string between marks.
    Marked,
    Done,
}

/// See the module's page.
#[derive(Debug)]
pub(crate) struct ValueReader {
    state: State,
    stack: Vec<Container>,
    /// A comma and what follows it, until it is known to be needed.
    comma: String,
    /// A word, or the digits of an escape.
    word: String,
    /// The string or word under way is a key.
    is_key: bool,
    /// The first half of a pair of `\u` escapes.
    high: Option<u16>,
    held: Held,
}

impl Default for ValueReader {
    fn default() -> Self {
        Self {
            state: State::Value { may_close: false },
            stack: Vec::new(),
            comma: String::new(),
            word: String::new(),
            is_key: false,
            high: None,
            held: Held::default(),
        }
    }
}

const fn is_space(c: char) -> bool {
    matches!(c, ' ' | '\n' | '\r' | '\t')
}

impl ValueReader {
    /// True once the value is complete.
    pub(crate) fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// Reads a part of `text`, appends JSON to `out`. Returns the number of bytes that were read, which
    /// end before a character that is not part of the value.
    pub(crate) fn push(
        &mut self,
        dialect: &Dialect,
        text: &str,
        out: &mut String,
    ) -> (usize, Progress) {
        let mut at = 0;
        while let Some(c) = text[at..].chars().next() {
            match self.state {
                State::Done => return (at, Progress::Done),
                State::String { quote } => {
                    at += self.pass_string(&text[at..], quote, out);
                }
                State::Marked => {
                    at += self.pass_marked(dialect, &text[at..], out);
                }
                _ => match self.step(dialect, c, out) {
                    Step::Taken => at += c.len_utf8(),
                    Step::Left => {}
                    Step::Stuck => return (at, Progress::Bad),
                },
            }
        }
        let progress = match self.state {
            State::Done => Progress::Done,
            _ => Progress::More,
        };
        (at, progress)
    }

    /// No more text: a number or word at the end is complete. Returns whether the value is.
    pub(crate) fn finish(&mut self, dialect: &Dialect, out: &mut String) -> bool {
        if self.state == State::Word && self.stack.is_empty() {
            self.end_word(dialect, out);
        }
        self.is_done()
    }

    /// Reads one character.
    fn step(&mut self, dialect: &Dialect, c: char, out: &mut String) -> Step {
        match self.state {
            State::Value { may_close } => self.step_value(dialect, c, may_close, out),
            State::Key => self.step_key(dialect, c, out),
            State::Colon if is_space(c) => {
                out.push(c);
                Step::Taken
            }
            State::Colon if c == ':' => {
                out.push(c);
                self.state = State::Value { may_close: false };
                Step::Taken
            }
            State::After => self.step_after(c, out),
            State::Escape { quote } => self.step_escape(dialect, c, quote, out),
            State::Hex { quote, left } => self.step_hex(c, quote, left, out),
            State::Word => self.step_word(dialect, c, out),
            State::Mark { matched } => self.step_mark(dialect, c, matched, out),
            _ => Step::Stuck,
        }
    }

    fn step_value(
        &mut self,
        dialect: &Dialect,
        c: char,
        may_close: bool,
        out: &mut String,
    ) -> Step {
        match c {
            c if is_space(c) => self.space(c, out),
            '{' | '[' => {
                self.flush(out);
                out.push(c);
                self.open(if c == '{' {
                    Container::Object
                } else {
                    Container::Array
                });
            }
            '(' if matches!(dialect, Dialect::Python) => {
                self.flush(out);
                out.push('[');
                self.open(Container::Tuple);
            }
            ']' | ')' if may_close => return self.close_container(c, out),
            c => {
                let begins_word = match dialect {
                    Dialect::Marked(..) => !matches!(c, '}' | ']' | ',' | ':'),
                    _ => c.is_ascii_alphanumeric() || matches!(c, '-' | '+' | '.'),
                };
                return self.begin(dialect, c, false, begins_word, out);
            }
        }
        Step::Taken
    }

    /// Begins a key or a value that is no container: quoted, between marks, or a bare word.
    fn begin(
        &mut self,
        dialect: &Dialect,
        c: char,
        is_key: bool,
        begins_word: bool,
        out: &mut String,
    ) -> Step {
        let is_quote = matches!(c, '"' | '\'');
        let is_mark = matches!(dialect, Dialect::Marked(mark, _) if mark.starts_with(c));
        if !is_quote && !is_mark && !begins_word {
            return Step::Stuck;
        }
        self.flush(out);
        self.is_key = is_key;
        if is_quote {
            out.push('"');
            self.state = State::String { quote: c };
        } else if is_mark {
            self.state = State::Mark { matched: 0 };
            return Step::Left;
        } else {
            self.begin_word(c);
        }
        Step::Taken
    }

    fn step_key(&mut self, dialect: &Dialect, c: char, out: &mut String) -> Step {
        match c {
            c if is_space(c) => self.space(c, out),
            '}' => return self.close_container(c, out),
            c => {
                let begins_word = match dialect {
                    Dialect::Marked(..) => !matches!(c, ',' | ':' | '{' | '[' | ']'),
                    _ => c.is_alphanumeric() || matches!(c, '_' | '$' | '-'),
                };
                return self.begin(dialect, c, true, begins_word, out);
            }
        }
        Step::Taken
    }

    fn step_after(&mut self, c: char, out: &mut String) -> Step {
        match c {
            c if is_space(c) => out.push(c),
            ',' => {
                self.comma.push(',');
                self.state = match self.stack.last() {
                    Some(Container::Object) => State::Key,
                    _ => State::Value { may_close: true },
                };
            }
            ']' | '}' | ')' => return self.close_container(c, out),
            _ => return Step::Stuck,
        }
        Step::Taken
    }

    /// White space: after a comma it waits with it.
    fn space(&mut self, c: char, out: &mut String) {
        if !self.comma.is_empty() {
            self.comma.push(c);
        } else if !self.stack.is_empty() {
            out.push(c);
        }
    }

    fn flush(&mut self, out: &mut String) {
        out.push_str(&self.comma);
        self.comma.clear();
    }

    fn open(&mut self, container: Container) {
        self.stack.push(container);
        self.state = match container {
            Container::Object => State::Key,
            _ => State::Value { may_close: true },
        };
    }

    fn close_container(&mut self, c: char, out: &mut String) -> Step {
        let expected = match self.stack.last() {
            Some(Container::Object) => '}',
            Some(Container::Array) => ']',
            Some(Container::Tuple) => ')',
            None => return Step::Stuck,
        };
        if c != expected {
            return Step::Stuck;
        }
        self.comma.clear();
        out.push(if c == ')' { ']' } else { c });
        self.stack.pop();
        self.end_value();
        Step::Taken
    }

    /// A value inside the top container is complete, or the whole one is.
    fn end_value(&mut self) {
        self.state = if self.stack.is_empty() {
            State::Done
        } else {
            State::After
        };
    }

    fn begin_word(&mut self, c: char) {
        self.word.clear();
        self.word.push(c);
        self.state = State::Word;
    }

    fn step_word(&mut self, dialect: &Dialect, c: char, out: &mut String) -> Step {
        let goes_on = match dialect {
            Dialect::Marked(..) if self.is_key => c != ':',
            Dialect::Marked(..) => !matches!(c, ',' | '}' | ']'),
            _ => c.is_alphanumeric() || matches!(c, '_' | '$' | '-' | '+' | '.'),
        };
        if goes_on {
            self.word.push(c);
            return Step::Taken;
        }
        self.end_word(dialect, out)
    }

    /// Writes the word as JSON, unless it is none.
    fn end_word(&mut self, dialect: &Dialect, out: &mut String) -> Step {
        let word = std::mem::take(&mut self.word);
        let word = word.trim_end();
        if self.is_key {
            quote(word, out);
            self.state = State::Colon;
            return Step::Left;
        }
        match word {
            "true" | "True" => out.push_str("true"),
            "false" | "False" => out.push_str("false"),
            "null" | "None" | "NaN" | "nan" | "Infinity" | "-Infinity" | "inf" => {
                out.push_str("null");
            }
            word => match (json_number(word), dialect) {
                (Some(number), _) => out.push_str(&number),
                (None, Dialect::Marked(..)) => quote(word, out),
                (None, _) => return Step::Stuck,
            },
        }
        self.end_value();
        Step::Left
    }

    fn step_mark(&mut self, dialect: &Dialect, c: char, matched: usize, out: &mut String) -> Step {
        let Dialect::Marked(mark, _) = dialect else {
            return Step::Stuck;
        };
        if !mark[matched..].starts_with(c) {
            // No mark after all: its beginning is the beginning of a word.
            self.word.clear();
            self.word.push_str(&mark[..matched]);
            self.state = State::Word;
            return Step::Left;
        }
        let matched = matched + c.len_utf8();
        if matched == mark.len() {
            out.push('"');
            self.held = Held::default();
            self.state = State::Marked;
        } else {
            self.state = State::Mark { matched };
        }
        Step::Taken
    }

    fn pass_marked(&mut self, dialect: &Dialect, text: &str, out: &mut String) -> usize {
        let Dialect::Marked(_, scanner) = dialect else {
            return text.len();
        };
        match self.held.scan(scanner, text, |part| escape(part, out)) {
            Some(found) => {
                self.end_string(out);
                found.end
            }
            None => text.len(),
        }
    }

    /// Ends a value that will not go on, so that what has left is valid JSON.
    pub(crate) fn close(&mut self, out: &mut String) {
        self.comma.clear();
        match self.state {
            State::Done => return,
            State::Value { may_close: false } => out.push_str("null"),
            State::Colon => out.push_str(":null"),
            State::String { .. } | State::Escape { .. } | State::Hex { .. } | State::Marked => {
                escape(&self.held.take(), out);
                if matches!(self.state, State::Escape { .. }) {
                    out.push_str("\\\\");
                }
                self.end_string(out);
                if self.is_key {
                    out.push_str(":null");
                }
            }
            State::Word | State::Mark { .. } if self.is_key => {
                quote(&self.word, out);
                out.push_str(":null");
            }
            State::Word | State::Mark { .. } => out.push_str("null"),
            State::Value { .. } | State::Key | State::After => {}
        }
        while let Some(container) = self.stack.pop() {
            out.push(match container {
                Container::Object => '}',
                _ => ']',
            });
        }
        self.state = State::Done;
    }
}
