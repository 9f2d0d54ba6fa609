//! GBNF's tokens: names, texts, classes of characters, marks.

use std::iter::Peekable;
use std::str::Chars;

use super::lark;
use crate::error::{Error, Result};

/// Most repetitions that are counted one by one.
const MAX_REPEATS: u32 = 10_000;

/// True for a character of a rule's name.
pub(super) fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '-' || c == '_'
}

/// One token.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Token {
    Name(String),
    Defines,
    Text(String),
    /// A regular expression's class.
    Class(String),
    /// `<name>` or `<[id]>`.
    Special(String),
    Mark(char),
    /// `{least, most}`
    Repeat(u32, Option<u32>),
}

struct Lexer<'a> {
    chars: Peekable<Chars<'a>>,
    line: usize,
}

/// A grammar's tokens, each with its line.
///
/// # Errors
/// [`Error::InvalidArgument`] naming the line at fault.
pub(super) fn tokens(text: &str) -> Result<Vec<(usize, Token)>> {
    let mut lexer = Lexer {
        chars: text.chars().peekable(),
        line: 1,
    };
    let mut tokens = Vec::new();
    while let Some(token) = lexer.next()? {
        tokens.push((lexer.line, token));
    }
    Ok(tokens)
}

impl Lexer<'_> {
    fn error(&self, why: &str) -> Error {
        Error::invalid(format!("line {}: {why}", self.line))
    }

    fn next(&mut self) -> Result<Option<Token>> {
        while let Some(&c) = self.chars.peek() {
            self.chars.next();
            match c {
                '\n' => self.line += 1,
                '#' => while self.chars.next_if(|&c| c != '\n').is_some() {},
                c if c.is_whitespace() => {}
                c => return self.token(c).map(Some),
            }
        }
        Ok(None)
    }

    fn token(&mut self, first: char) -> Result<Token> {
        match first {
            ':' => {
                let rest = [self.chars.next(), self.chars.next()];
                if rest != [Some(':'), Some('=')] {
                    return Err(self.error("a rule is defined by ::="));
                }
                Ok(Token::Defines)
            }
            '"' => self.text(),
            '[' => self.class(),
            '<' => self.special("<"),
            '!' if self.chars.next_if_eq(&'<').is_some() => {
                let special = self.special("<")?;
                match special {
                    Token::Special(name) if name.starts_with("<[") => {
                        Ok(Token::Special(name.replacen("<[", "<[^", 1)))
                    }
                    _ => Err(self.error("only a token's id can be excluded: !<[id]>")),
                }
            }
            '{' => self.repeat(),
            '|' | '(' | ')' | '*' | '+' | '?' | '.' => Ok(Token::Mark(first)),
            c if is_name(c) => {
                let mut name = String::from(c);
                while let Some(c) = self.chars.next_if(|&c| is_name(c)) {
                    name.push(c);
                }
                Ok(Token::Name(name))
            }
            c => Err(self.error(&format!("{c:?} means nothing here"))),
        }
    }

    fn text(&mut self) -> Result<Token> {
        let mut text = String::new();
        loop {
            match self.chars.next() {
                Some('"') => return Ok(Token::Text(text)),
                Some('\\') => text.push(self.escape()?),
                None | Some('\n') => return Err(self.error("a text has no end")),
                Some(c) => text.push(c),
            }
        }
    }

    fn class(&mut self) -> Result<Token> {
        let mut class = String::from("[");
        if self.chars.next_if_eq(&'^').is_some() {
            class.push('^');
        }
        let mut is_empty = true;
        loop {
            match self.chars.next() {
                Some(']') if is_empty => return Err(self.error("a class has no characters")),
                Some(']') => {
                    class.push(']');
                    return Ok(Token::Class(class));
                }
                // Between two characters; elsewhere it is one.
                Some('-') if !is_empty && self.chars.peek() != Some(&']') => class.push('-'),
                Some('\\') => class += &lark::class_char(self.escape()?),
                None | Some('\n') => return Err(self.error("a class has no end")),
                Some(c) => class += &lark::class_char(c),
            }
            is_empty = false;
        }
    }

    fn escape(&mut self) -> Result<char> {
        let num_digits = match self.chars.next() {
            Some('n') => return Ok('\n'),
            Some('r') => return Ok('\r'),
            Some('t') => return Ok('\t'),
            Some('x') => 2,
            Some('u') => 4,
            Some('U') => 8,
            Some(c) if c.is_ascii_punctuation() => return Ok(c),
            _ => return Err(self.error("an escape that is not known")),
        };
        let digits: String = self.chars.by_ref().take(num_digits).collect();
        let code = u32::from_str_radix(&digits, 16).ok();
        code.and_then(char::from_u32)
            .ok_or_else(|| self.error("an escape that is no character"))
    }

    fn special(&mut self, opening: &str) -> Result<Token> {
        let mut name = String::from(opening);
        loop {
            match self.chars.next() {
                Some('>') => {
                    name.push('>');
                    return Ok(Token::Special(name));
                }
                Some(c) if !c.is_whitespace() => name.push(c),
                _ => return Err(self.error("a token's name has no end")),
            }
        }
    }

    fn repeat(&mut self) -> Result<Token> {
        let mut inside = String::new();
        loop {
            match self.chars.next() {
                Some('}') => break,
                Some(c) if c.is_ascii_digit() || c == ',' => inside.push(c),
                Some(' ') => {}
                _ => return Err(self.error("a repetition is {m}, {m,} or {m,n}")),
            }
        }
        let number = |text: &str| match text {
            "" => Ok(None),
            text => match text.parse() {
                Ok(number) if number <= MAX_REPEATS => Ok(Some(number)),
                _ => Err(self.error(&format!("more than {MAX_REPEATS} repetitions"))),
            },
        };
        let (least, most) = match inside.split_once(',') {
            Some((least, most)) => (number(least)?.unwrap_or(0), number(most)?),
            None => match number(&inside)? {
                Some(times) => (times, Some(times)),
                None => return Err(self.error("a repetition without a number")),
            },
        };
        if most.is_some_and(|most| most < least) {
            return Err(self.error("a repetition ends before it begins"));
        }
        Ok(Token::Repeat(least, most))
    }
}
