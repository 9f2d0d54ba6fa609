//! Places at which a long text can be cut without changing its token ids.
//!
//! Tokenizers that cut a text into words first encode each word by itself. All the patterns known
//! here start a new word at a space between two ASCII letters, whatever stands around; cutting
//! there changes nothing. Other tokenizers (SentencePiece joins across spaces) are never cut.

use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::split::SplitPattern;
use tokenizers::{SplitDelimiterBehavior, Tokenizer};

use crate::text::splitting::is_word_pattern;

/// A part is cut at the first place after so many bytes.
pub(crate) const PART_BYTES: usize = 32 << 10;

/// True if the rules of this tokenizer are known to allow cuts. O(added tokens).
pub(crate) fn can_be_cut(tokenizer: &Tokenizer) -> bool {
    let mut finds_words = false;
    tokenizer.get_normalizer().is_none_or(normalizer_allows)
        && tokenizer
            .get_pre_tokenizer()
            .is_some_and(|step| step_allows(step, &mut finds_words))
        && finds_words
        // An added token must not reach over a cut, or swallow the space at it.
        && tokenizer.get_added_vocabulary().get_added_tokens_decoder().values().all(|token| {
            !(token.lstrip || token.rstrip || token.single_word || token.content.contains(' '))
        })
}

/// Composition leaves ASCII before ASCII alone.
fn normalizer_allows(normalizer: &NormalizerWrapper) -> bool {
    match normalizer {
        NormalizerWrapper::NFC(_) => true,
        NormalizerWrapper::Sequence(steps) => steps.as_ref().iter().all(normalizer_allows),
        _ => false,
    }
}

fn step_allows(step: &PreTokenizerWrapper, finds_words: &mut bool) -> bool {
    match step {
        PreTokenizerWrapper::Sequence(steps) => steps
            .as_ref()
            .iter()
            .all(|step| step_allows(step, finds_words)),
        PreTokenizerWrapper::Digits(_) => true,
        PreTokenizerWrapper::ByteLevel(step) => {
            *finds_words |= step.use_regex;
            !step.add_prefix_space
        }
        PreTokenizerWrapper::Split(split) => {
            let SplitPattern::Regex(pattern) = &split.pattern else {
                return false;
            };
            let known = is_word_pattern(pattern);
            *finds_words |= known == Some(true);
            known.is_some() && split.behavior == SplitDelimiterBehavior::Isolated && !split.invert
        }
        _ => false,
    }
}

/// The text in parts of `part_bytes` and a little more; in one if there is no place to cut.
pub(crate) fn parts(text: &str, part_bytes: usize) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let cut = first_cut(rest, part_bytes.min(rest.len()));
        let (part, after) = rest.split_at(cut);
        rest = after;
        Some(part)
    })
}

/// The first place to cut after `from`, or the end.
pub(crate) fn first_cut(text: &str, from: usize) -> usize {
    let at = text.as_bytes()[from..].windows(3).position(is_cut);
    at.map_or(text.len(), |at| from + at + 1)
}

/// The last place to cut, or 0.
pub(crate) fn last_cut(text: &str) -> usize {
    let at = text.as_bytes().windows(3).rposition(is_cut);
    at.map_or(0, |at| at + 1)
}

fn is_cut(window: &[u8]) -> bool {
    window[0].is_ascii_alphabetic() && window[1] == b' ' && window[2].is_ascii_alphabetic()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

    use super::*;
    use crate::text::splitting;

    fn words(step: &PreTokenizerWrapper, text: &str) -> Vec<String> {
        let mut string = PreTokenizedString::from(text);
        step.pre_tokenize(&mut string).unwrap();
        string
            .get_splits(OffsetReferential::Original, OffsetType::Byte)
            .into_iter()
            .map(|(word, ..)| word.to_owned())
            .collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

        #[test]
        fn cuts_change_no_word(
            text in "([ab'sSlL] ?|[ \\n\\r\t]|[0-9½.,!$(-]|é|漢|\u{301}|😀){0,60}",
            part_bytes in 0..20usize,
        ) {
            prop_assert_eq!(parts(&text, part_bytes).collect::<String>(), text.as_str());
            for splitting in splitting::all() {
                let step: PreTokenizerWrapper = splitting.pre_tokenizer(false).unwrap().into();
                let mut finds_words = false;
                prop_assert!(step_allows(&step, &mut finds_words) && finds_words);
                let expected = words(&step, &text);
                let cut: Vec<String> =
                    parts(&text, part_bytes).flat_map(|part| words(&step, part)).collect();
                prop_assert_eq!(cut, expected, "{:?}", splitting);
            }
        }
    }

    #[test]
    fn a_text_is_cut_before_a_space() {
        let all = |text, part_bytes| parts(text, part_bytes).collect::<Vec<_>>();
        assert_eq!(all("ab cd  ef g", 1), ["ab", " cd  ef", " g"]);
        assert_eq!(all("ab cd", 100), ["ab cd"]);
        assert_eq!(all("", 1), [""; 0]);
    }
}
