//! Words of ASCII text, found by hand: what the common splitting patterns match, at a twentieth of
//! their cost. O(bytes), no allocation.

use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::split::SplitPattern;

use crate::text::splitting::{DIGIT, GPT2, LLAMA3, QWEN2, QWEN35};

/// A family of patterns, where it matters to ASCII.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    /// `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`
    Gpt2,
    /// `(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,most}|
    /// ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`
    Llama3 { most_digits: usize },
}

/// A rule by which a text is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct AsciiRules {
    family: Family,
    /// Each digit is cut out first, and what is around it is cut by itself.
    isolates_digits: bool,
}

impl AsciiRules {
    /// This pre-tokenizer's cuts of ASCII text before it maps its bytes; None if that is not
    /// known here.
    pub(crate) fn of(step: &PreTokenizerWrapper) -> Option<Self> {
        use PreTokenizerWrapper::{ByteLevel, Digits, Sequence, Split};
        let steps = match step {
            Sequence(steps) => steps.as_ref(),
            one => std::slice::from_ref(one),
        };
        let (last, before) = steps.split_last()?;
        let ByteLevel(last) = last else {
            return None;
        };
        if last.add_prefix_space {
            return None;
        }
        let isolates_digit = |step: &PreTokenizerWrapper| match step {
            Digits(digits) => digits.individual_digits,
            Split(split) => matches!(&split.pattern, SplitPattern::Regex(p) if p == DIGIT),
            _ => false,
        };
        let family = |step: &PreTokenizerWrapper| match step {
            Split(split) => match &split.pattern {
                SplitPattern::Regex(pattern) => match pattern.as_str() {
                    GPT2 => Some(Family::Gpt2),
                    LLAMA3 => Some(Family::Llama3 { most_digits: 3 }),
                    QWEN2 | QWEN35 => Some(Family::Llama3 { most_digits: 1 }),
                    _ => None,
                },
                SplitPattern::String(_) => None,
            },
            _ => None,
        };
        let (family, isolates_digits) = match (before, last.use_regex) {
            ([], true) => (Family::Gpt2, false),
            ([digit], true) if isolates_digit(digit) => (Family::Gpt2, true),
            ([words], false) => (family(words)?, false),
            ([digit, words], false) if isolates_digit(digit) => (family(words)?, true),
            _ => return None,
        };
        Some(Self {
            family,
            isolates_digits,
        })
    }

    /// The words of an ASCII text; together they are the text.
    pub(crate) fn words(self, text: &str) -> AsciiWords<'_> {
        debug_assert!(text.is_ascii());
        AsciiWords { rules: self, text }
    }
}

/// See [`AsciiRules::words`].
#[derive(Debug)]
pub(crate) struct AsciiWords<'a> {
    rules: AsciiRules,
    text: &'a str,
}

impl<'a> Iterator for AsciiWords<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        if self.text.is_empty() {
            return None;
        }
        let len = self.rules.word_len(self.text.as_bytes());
        let (word, rest) = self.text.split_at(len);
        self.text = rest;
        Some(word)
    }
}

impl AsciiRules {
    /// Length of the first word of a text that is not empty.
    fn word_len(self, text: &[u8]) -> usize {
        if self.isolates_digits && text[0].is_ascii_digit() {
            return 1;
        }
        match self.family {
            Family::Gpt2 => self.gpt2(text),
            Family::Llama3 { most_digits } => self.llama3(text, most_digits),
        }
    }

    fn gpt2(self, text: &[u8]) -> usize {
        if let Some(len) = contraction(text, false) {
            return len;
        }
        let from = usize::from(text[0] == b' ');
        match text.get(from) {
            Some(b) if b.is_ascii_alphabetic() => run(text, from, |b| b.is_ascii_alphabetic()),
            // With digits cut out before, none follows here but as another word's beginning.
            Some(b) if b.is_ascii_digit() && !self.isolates_digits => {
                run(text, from, |b| b.is_ascii_digit())
            }
            Some(&b) if is_other(b) => run(text, from, is_other),
            _ => self.spaces(text),
        }
    }

    fn llama3(self, text: &[u8], most_digits: usize) -> usize {
        if let Some(len) = contraction(text, true) {
            return len;
        }
        let first = text[0];
        if first.is_ascii_alphabetic() {
            return run(text, 0, |b| b.is_ascii_alphabetic());
        }
        if first.is_ascii_digit() {
            return run(&text[..most_digits.min(text.len())], 0, |b| {
                b.is_ascii_digit()
            });
        }
        let is_letter = |b: &u8| b.is_ascii_alphabetic();
        if !is_line_end(first) && text.get(1).is_some_and(is_letter) {
            return run(text, 1, |b| b.is_ascii_alphabetic());
        }
        let from = usize::from(first == b' ');
        if text.get(from).is_some_and(|&b| is_other(b)) {
            return run(text, run(text, from, is_other), is_line_end);
        }
        let spaces = &text[..run(text, 0, is_space)];
        match spaces.iter().rposition(|&b| is_line_end(b)) {
            Some(last) => last + 1,
            None => self.spaces(text),
        }
    }

    /// `\s+(?!\S)|\s+`: all but the last one of several, which belongs to the word after them.
    fn spaces(self, text: &[u8]) -> usize {
        let len = run(text, 0, is_space);
        debug_assert!(len > 0, "every other byte has a rule");
        // A digit that is cut out ends the text before it.
        let ends = match text.get(len) {
            None => true,
            Some(b) => self.isolates_digits && b.is_ascii_digit(),
        };
        if ends || len == 1 { len } else { len - 1 }
    }
}

/// The end of the run of bytes of a kind that starts at `from`.
fn run(text: &[u8], from: usize, is_kind: impl Fn(u8) -> bool) -> usize {
    let len = text[from..].iter().position(|&b| !is_kind(b));
    len.map_or(text.len(), |len| from + len)
}

/// `'s|'t|'re|'ve|'m|'ll|'d`
fn contraction(text: &[u8], ignores_case: bool) -> Option<usize> {
    let [b'\'', rest @ ..] = text else {
        return None;
    };
    let lower = |at: usize| {
        let byte = *rest.get(at)?;
        Some(if ignores_case {
            byte.to_ascii_lowercase()
        } else {
            byte
        })
    };
    match (lower(0)?, lower(1)) {
        (b's' | b't' | b'm' | b'd', _) => Some(2),
        (b'r' | b'v', Some(b'e')) | (b'l', Some(b'l')) => Some(3),
        _ => None,
    }
}

fn is_line_end(byte: u8) -> bool {
    matches!(byte, b'\r' | b'\n')
}

/// `\s`
fn is_space(byte: u8) -> bool {
    matches!(byte, b'\t'..=b'\r' | b' ')
}

/// `[^\s\p{L}\p{N}]`
fn is_other(byte: u8) -> bool {
    !is_space(byte) && !byte.is_ascii_alphanumeric()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;
    use tokenizers::pre_tokenizers::digits::Digits;
    use tokenizers::pre_tokenizers::sequence::Sequence;
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

    use super::*;
    use crate::text::splitting;

    /// The words as the crate's regexes find them.
    fn expected(step: &PreTokenizerWrapper, text: &str) -> Vec<String> {
        let mut string = PreTokenizedString::from(text);
        step.pre_tokenize(&mut string).unwrap();
        string
            .get_splits(OffsetReferential::Original, OffsetType::Byte)
            .into_iter()
            .map(|(_, (from, to), _)| text[from..to].to_owned())
            .collect()
    }

    /// Every pre-tokenizer that has rules.
    fn known() -> Vec<(AsciiRules, PreTokenizerWrapper)> {
        let mut all: Vec<PreTokenizerWrapper> = splitting::all()
            .map(|splitting| splitting.pre_tokenizer(false).unwrap().into())
            .collect();
        let gpt2 = ByteLevel::new(false, true, true);
        all.push(gpt2.into());
        all.push(Sequence::new(vec![Digits::new(true).into(), gpt2.into()]).into());
        all.into_iter()
            .filter_map(|step| Some((AsciiRules::of(&step)?, step)))
            .collect()
    }

    #[test]
    fn the_families_are_known() {
        assert_eq!(known().len(), 9);
        let prefixed: PreTokenizerWrapper = ByteLevel::new(true, true, true).into();
        assert_eq!(AsciiRules::of(&prefixed), None);
        let groups: PreTokenizerWrapper =
            Sequence::new(vec![Digits::new(false).into(), ByteLevel::default().into()]).into();
        assert_eq!(AsciiRules::of(&groups), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, cases: 2000, ..Default::default() })]

        #[test]
        fn words_are_the_patterns(
            text in "([ab'sStTrRvVeElLmMdD]|[ \\n\\r\t]|[0-9]|[.,!$(-]|[\x00-\x7f]){0,40}",
        ) {
            for (rules, step) in known() {
                let words: Vec<&str> = rules.words(&text).collect();
                prop_assert_eq!(words, expected(&step, &text), "{:?}", rules);
            }
        }
    }
}
