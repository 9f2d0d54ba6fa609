//! WordEncoder: the ids of a text, word by word, from memory.
//!
//! A tokenizer that cuts a text into words gives a word the same ids wherever it stands, and few
//! words make up most of a text. A known word costs one look-up in a hash map, a fraction of
//! what the crate takes to find its ids again. O(bytes).

use std::collections::HashMap;
use std::sync::{PoisonError, RwLock};

use tokenizers::models::ModelWrapper;
use tokenizers::{
    Model, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, Result, Tokenizer,
};

use crate::text::ascii_words::AsciiRules;
use crate::text::text_parts::{can_be_cut, first_cut, last_cut};

/// About 10 MB of words. When so many are known, all are forgotten.
const MAX_WORDS: usize = 1 << 16;

/// Longer words hardly come twice.
const MAX_WORD_BYTES: usize = 48;

/// After so many new words they are remembered: one that comes again soon is found.
const NEWS: usize = 64;

/// Words and their ids.
#[derive(Debug, Default)]
struct Words {
    /// Word -> where its ids are.
    places: HashMap<Box<str>, (u32, u32)>,
    ids: Vec<u32>,
}

impl Words {
    fn get(&self, word: &str) -> Option<&[u32]> {
        let &(from, to) = self.places.get(word)?;
        Some(&self.ids[from as usize..to as usize])
    }

    fn add(&mut self, word: Box<str>, ids: &[u32]) {
        let from = self.ids.len() as u32;
        self.ids.extend_from_slice(ids);
        self.places.insert(word, (from, self.ids.len() as u32));
    }

    fn clear(&mut self) {
        self.places.clear();
        self.ids.clear();
    }
}

/// See the module. Shared between threads, none of which waits for another.
#[derive(Debug)]
pub(crate) struct WordEncoder {
    rules: Option<AsciiRules>,
    // Two forms of words are in it, which do not get in each other's way: ASCII as it is in the
    // text, and all else in the vocabulary's characters, none of which is ASCII's blank or control.
    known: RwLock<Words>,
}

impl WordEncoder {
    /// None if this tokenizer's ids depend on more than the word.
    pub(crate) fn new(tokenizer: &Tokenizer) -> Option<Self> {
        let ModelWrapper::BPE(model) = tokenizer.get_model() else {
            return None;
        };
        // With dropout no two encodings of a word are the same.
        if model.dropout.is_some() || !can_be_cut(tokenizer) {
            return None;
        }
        Some(Self {
            rules: tokenizer.get_pre_tokenizer().and_then(AsciiRules::of),
            known: RwLock::default(),
        })
    }

    /// Append the ids of `text`, without those that a post-processor puts around it.
    ///
    /// # Errors
    /// As the crate's.
    pub(crate) fn encode(
        &self,
        tokenizer: &Tokenizer,
        text: &str,
        ids: &mut Vec<u32>,
    ) -> Result<()> {
        let vocabulary = tokenizer.get_added_vocabulary();
        let pieces = vocabulary.extract_and_normalize(tokenizer.get_normalizer(), text);
        let mut news = News::default();
        for (piece, _, tokens) in pieces.get_splits(OffsetReferential::Normalized, OffsetType::None)
        {
            match tokens {
                Some(tokens) => ids.extend(tokens.iter().map(|token| token.id)),
                None => self.encode_piece(tokenizer, piece, ids, &mut news)?,
            }
        }
        self.remember(&mut news);
        Ok(())
    }

    /// A piece between added tokens: ASCII by hand, all else by the tokenizer's own rules.
    fn encode_piece(
        &self,
        tokenizer: &Tokenizer,
        mut piece: &str,
        ids: &mut Vec<u32>,
        news: &mut News,
    ) -> Result<()> {
        let Some(rules) = self.rules else {
            return self.encode_by_pattern(tokenizer, piece, ids, news);
        };
        let mut mapped = String::new();
        while !piece.is_empty() {
            let first = piece.bytes().position(|b| !b.is_ascii());
            let cut = first.map_or(piece.len(), |first| last_cut(&piece[..first]));
            let (ascii, rest) = piece.split_at(cut);
            for word in rules.words(ascii) {
                let map = |word: &str| {
                    mapped.clear();
                    mapped.extend(word.bytes().map(mapped_ascii));
                    tokenizer.get_model().tokenize(&mapped)
                };
                self.encode_word(word, map, ids, news)?;
            }
            let Some(first) = first else { break };
            let (other, rest) = rest.split_at(first_cut(rest, first - cut));
            self.encode_by_pattern(tokenizer, other, ids, news)?;
            piece = rest;
        }
        Ok(())
    }

    fn encode_by_pattern(
        &self,
        tokenizer: &Tokenizer,
        text: &str,
        ids: &mut Vec<u32>,
        news: &mut News,
    ) -> Result<()> {
        let mut words = PreTokenizedString::from(text);
        if let Some(step) = tokenizer.get_pre_tokenizer() {
            step.pre_tokenize(&mut words)?;
        }
        for (word, ..) in words.get_splits(OffsetReferential::Normalized, OffsetType::None) {
            self.encode_word(word, |word| tokenizer.get_model().tokenize(word), ids, news)?;
        }
        Ok(())
    }

    fn encode_word(
        &self,
        word: &str,
        tokenize: impl FnOnce(&str) -> Result<Vec<tokenizers::Token>>,
        ids: &mut Vec<u32>,
        news: &mut News,
    ) -> Result<()> {
        {
            let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
            if let Some(known) = known.get(word) {
                ids.extend_from_slice(known);
                return Ok(());
            }
        }
        let from = ids.len();
        ids.extend(tokenize(word)?.iter().map(|token| token.id));
        if word.len() <= MAX_WORD_BYTES {
            news.words.push((word.into(), ids[from..].into()));
            if news.words.len() == NEWS {
                self.remember(news);
            }
        }
        Ok(())
    }

    /// Unless another thread is at it: then they are forgotten.
    fn remember(&self, news: &mut News) {
        if news.words.is_empty() {
            return;
        }
        if let Ok(mut known) = self.known.try_write() {
            if known.places.len() + news.words.len() > MAX_WORDS {
                known.clear();
            }
            for (word, ids) in news.words.drain(..) {
                known.add(word, &ids);
            }
        }
        news.words.clear();
    }
}

/// Words that were not known.
#[derive(Debug, Default)]
struct News {
    words: Vec<(Box<str>, Box<[u32]>)>,
}

/// The character that stands for an ASCII byte in byte-level vocabularies: itself, or, where it
/// cannot be seen, one behind the first 256.
fn mapped_ascii(byte: u8) -> char {
    match byte {
        0..=b' ' => char::from_u32(256 + u32::from(byte)).unwrap_or_default(),
        127 => '\u{121}',
        _ => char::from(byte),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokenizers::models::bpe::BPE;
    use tokenizers::normalizers::NFC;
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;
    use tokenizers::{AddedToken, NormalizerWrapper, PreTokenizerWrapper};

    use super::*;
    use crate::text::splitting;

    /// A byte-level vocabulary with a few merges and two added tokens.
    fn tokenizer(step: PreTokenizerWrapper, composes: bool) -> Tokenizer {
        let mut tokens: Vec<String> = ByteLevel::alphabet()
            .into_iter()
            .map(String::from)
            .collect();
        tokens.sort();
        let merges = [
            ("Ġ", "a"),
            ("a", "b"),
            ("Ġa", "b"),
            ("'", "s"),
            ("Ã", "©"),
            ("Ġ", "Ġ"),
            ("ĠĠ", "ĠĠ"),
            ("1", "2"),
            ("a", "Ã©"),
            ("Ċ", "Ċ"),
            ("å", "®"),
            ("!", "!"),
        ];
        let merges = merges.map(|(left, right)| (left.to_owned(), right.to_owned()));
        tokens.extend(merges.iter().map(|(left, right)| format!("{left}{right}")));
        let vocab = (0..).zip(tokens).map(|(id, token)| (token, id));
        let model = BPE::builder()
            .vocab_and_merges(
                vocab.collect::<tokenizers::models::bpe::Vocab>(),
                merges.to_vec(),
            )
            .build()
            .unwrap();
        let mut tokenizer = Tokenizer::new(model);
        tokenizer.with_pre_tokenizer(Some(step));
        let _ = tokenizer.with_normalizer(composes.then(|| NormalizerWrapper::from(NFC)));
        let special = AddedToken::from("<s>", true);
        tokenizer.add_special_tokens([special]).unwrap();
        let plain = AddedToken::from("<é>", false);
        tokenizer.add_tokens([plain]).unwrap();
        tokenizer
    }

    fn all() -> Vec<(Tokenizer, WordEncoder)> {
        let mut all: Vec<Tokenizer> = splitting::all()
            .map(|splitting| {
                tokenizer(
                    splitting.pre_tokenizer(false).unwrap().into(),
                    splitting.compose,
                )
            })
            .collect();
        all.push(tokenizer(ByteLevel::new(false, true, true).into(), true));
        all.into_iter()
            .map(|tokenizer| {
                let words = WordEncoder::new(&tokenizer).expect("it works word by word");
                (tokenizer, words)
            })
            .collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

        #[test]
        fn ids_are_the_tokenizer_s(
            texts in prop::collection::vec(
                "([ab'sS12] ?|[ \\n\\r\t]|[!.,½]|<s>|<é>|e\u{301}|é|字|😀|\u{a0}|[\x00-\x7f]| [a-b]{2} a){0,30}",
                1..4,
            ),
        ) {
            for (tokenizer, words) in all() {
                // Twice: the second time every word is known.
                for text in texts.iter().chain(&texts) {
                    let expected = tokenizer.encode_fast(text.as_str(), false).unwrap();
                    let mut ids = Vec::new();
                    words.encode(&tokenizer, text, &mut ids).unwrap();
                    prop_assert_eq!(&ids, expected.get_ids(), "{:?}", text);
                }
            }
        }
    }

    #[test]
    fn what_is_known_is_bounded() {
        let (tokenizer, words) = all().pop().unwrap();
        let text: String = (0..MAX_WORDS + 100).map(|n| format!(" a{n:b}")).collect();
        let text = text.replace('1', "b").replace('0', "a");
        words.encode(&tokenizer, &text, &mut Vec::new()).unwrap();
        let known = words.known.read().unwrap().places.len();
        assert!(0 < known && known < 200, "{known}");
        let long = "a".repeat(MAX_WORD_BYTES + 1);
        words.encode(&tokenizer, &long, &mut Vec::new()).unwrap();
        assert!(words.known.read().unwrap().get(&long).is_none());
    }
}
