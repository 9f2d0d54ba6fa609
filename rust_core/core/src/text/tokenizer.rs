//! Tokenizer: text to token ids and back, over the crate `tokenizers`.
//!
//! Costs: encoding is O(text) for ordinary text and O(n log n) in the longest run without a split
//! point. Byte-level tokenizers remember the ids of words (`WordEncoder`), which is most of their speed
//! (`cargo bench -p octavo-core --bench text`). Encoding takes many times the text in memory, so long
//! texts are encoded in parts wherever the rules show that the ids stay the same. Decoding is O(tokens). The table for
//! incremental decoding and token bytes (`TokenTable`) is built with the tokenizer, O(vocabulary),
//! so that no request waits for it.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::OnceLock;

pub use tokenizers::AddedToken;
use tokenizers::{Decoder, PostProcessor, TruncationDirection};

use crate::files::gguf::GgufFile;
use crate::text::gguf_tokenizer;
use crate::text::text_parts::{PART_BYTES, parts};
use crate::text::token_table::TokenTable;
use crate::text::tokenizer_changes;
pub use crate::text::tokenizer_changes::PrefixSpace;
use crate::text::word_encoder::WordEncoder;

/// An error of a tokenizer's construction or of an encoding, in one line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenizerError(pub String);

impl fmt::Display for TokenizerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for TokenizerError {}

/// A vocabulary with its rules. Immutable; share it through an `Arc`.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// None: words are not all there is to this tokenizer.
    words: Option<WordEncoder>,
    vocab_size: usize,
    table: Option<TokenTable>,
    /// Tokens added before and after a text; None if that is not so simple.
    affixes: OnceLock<Option<(Vec<u32>, Vec<u32>)>>,
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size)
            .finish_non_exhaustive()
    }
}

/// The crate may panic over what it cannot encode.
fn guarded<T>(encode: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, TokenizerError> {
    match catch_unwind(AssertUnwindSafe(encode)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(e)) => Err(TokenizerError(format!("the text cannot be encoded: {e}"))),
        Err(_) => Err(TokenizerError("the text cannot be encoded".to_owned())),
    }
}

impl Tokenizer {
    /// Read a `tokenizer.json`. Its truncation and padding are dropped: a prompt is never cut or
    /// filled up without the caller's knowledge.
    ///
    /// # Errors
    /// The file cannot be read or does not describe a tokenizer.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self, TokenizerError> {
        let path = path.as_ref();
        let fail = |why: String| {
            let why = why.lines().next().unwrap_or_default();
            TokenizerError(format!("{}: {why}", path.display()))
        };
        // The file is input: a panic in the crate over a strange one is an error like any other.
        let read = || {
            let bytes = std::fs::read(path).map_err(|e| e.to_string())?;
            tokenizers::Tokenizer::from_bytes(bytes).map_err(|e| e.to_string())
        };
        let inner = catch_unwind(read)
            .unwrap_or_else(|_| Err("does not describe a tokenizer".to_owned()))
            .map_err(fail)?;
        Ok(Self::new(inner))
    }

    /// Build from GGUF metadata: see `gguf_tokenizer`. O(vocabulary + merges).
    ///
    /// # Errors
    /// A tokenizer model or pre-tokenizer that is not known, or metadata that does not fit together.
    pub fn from_gguf(file: &GgufFile) -> Result<Self, TokenizerError> {
        // The file is input, as in from_file().
        catch_unwind(AssertUnwindSafe(|| gguf_tokenizer::build(file)))
            .unwrap_or_else(|_| Err("its tokenizer does not fit together".to_owned()))
            .map(Self::new)
            .map_err(|why| TokenizerError(format!("{}: {why}", file.path())))
    }

    /// The ids of a file's tokens that end an answer, by its keys and by their spelling; none where
    /// it has no vocabulary. O(vocabulary).
    pub fn end_tokens_of_gguf(file: &GgufFile) -> Vec<u32> {
        gguf_tokenizer::end_tokens(file)
    }

    /// Take one of the crate's tokenizers.
    pub fn new(mut inner: tokenizers::Tokenizer) -> Self {
        inner.with_padding(None);
        // Only a truncation that is set can be refused.
        let _ = inner.with_truncation(None);
        let vocab_size = inner.get_vocab_size(true);
        let table = TokenTable::build(&inner);
        let words = WordEncoder::new(&inner);
        Self {
            inner,
            words,
            vocab_size,
            table,
            affixes: OnceLock::new(),
        }
    }

    /// A copy with further added tokens, in their order, each under the id that it has or else the
    /// next one; `prefix_space` None: what stands in front of a text stays. O(vocabulary).
    ///
    /// # Errors
    /// The normalizer refuses a token.
    pub fn changed(
        &self,
        added: &[AddedToken],
        prefix_space: Option<PrefixSpace>,
    ) -> Result<Self, TokenizerError> {
        let mut inner = self.inner.clone();
        catch_unwind(AssertUnwindSafe(|| {
            tokenizer_changes::apply(&mut inner, added, prefix_space)
        }))
        .unwrap_or_else(|_| Err("tokens cannot be added".to_owned()))
        .map_err(TokenizerError)?;
        Ok(Self::new(inner))
    }

    /// The added tokens with their ids, in the ids' order.
    pub fn added_tokens(&self) -> Vec<(u32, AddedToken)> {
        let mut tokens: Vec<_> = self.inner.get_added_tokens_decoder().into_iter().collect();
        tokens.sort_by_key(|(id, _)| *id);
        tokens
    }

    /// Number of tokens, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The ids of a text.
    ///
    /// # Errors
    /// The tokenizer cannot represent the text (a vocabulary without an unknown token).
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizerError> {
        if let (Some(words), Some((before, behind))) = (&self.words, self.affixes()) {
            let (before, behind) = if add_special {
                (before, behind)
            } else {
                (&[][..], &[][..])
            };
            let mut ids = before.to_vec();
            // The same ids as in one go, in memory for one part.
            for part in parts(text, PART_BYTES) {
                guarded(|| words.encode(&self.inner, part, &mut ids))?;
            }
            ids.extend_from_slice(behind);
            return Ok(ids);
        }
        self.encode_whole(text, add_special)
    }

    fn encode_whole(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizerError> {
        guarded(|| {
            Ok(self
                .inner
                .encode_fast(text, add_special)?
                .get_ids()
                .to_vec())
        })
    }

    /// The ids of two texts as one input, and how many of them belong to the first.
    ///
    /// With `most` the longer text loses tokens at its end, one after another, until the input
    /// holds no more than that; special tokens stay, be they more.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_pair(
        &self,
        first: &str,
        second: &str,
        most: Option<usize>,
    ) -> Result<(Vec<u32>, usize), TokenizerError> {
        guarded(|| {
            let mut a = self.inner.encode_fast(first, false)?;
            let mut b = self.inner.encode_fast(second, false)?;
            if let Some(most) = most {
                let num_special = self
                    .inner
                    .get_post_processor()
                    .map_or(0, |processor| processor.added_tokens(true));
                let (keep_a, keep_b) = shares(a.len(), b.len(), most.saturating_sub(num_special));
                a.truncate(keep_a, 0, TruncationDirection::Right);
                b.truncate(keep_b, 0, TruncationDirection::Right);
            }
            let pair = self.inner.post_process(a, Some(b), true)?;
            let types = pair.get_type_ids();
            let num_first = types.iter().take_while(|&&kind| kind == 0).count();
            Ok((pair.get_ids().to_vec(), num_first))
        })
    }

    fn affixes(&self) -> Option<(&[u32], &[u32])> {
        let find = || {
            let bare = self.encode_whole("a", false).ok()?;
            let full = self.encode_whole("a", true).ok()?;
            let at = full
                .windows(bare.len().max(1))
                .position(|ids| ids == bare)?;
            Some((full[..at].to_vec(), full[at + bare.len()..].to_vec()))
        };
        let (before, behind) = self.affixes.get_or_init(find).as_ref()?;
        Some((before, behind))
    }

    /// The ids of several texts; on all cores where words are not known one by one.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_batch(
        &self,
        texts: &[impl AsRef<str>],
        add_special: bool,
    ) -> Result<Vec<Vec<u32>>, TokenizerError> {
        let mut texts = texts.iter().map(AsRef::as_ref);
        if self.words.is_some() {
            return texts.map(|text| self.encode(text, add_special)).collect();
        }
        guarded(|| {
            let texts: Vec<&str> = texts.by_ref().collect();
            let all = self.inner.encode_batch_fast(texts, add_special)?;
            Ok(all.iter().map(|one| one.get_ids().to_vec()).collect())
        })
    }

    /// The text of ids in one go. Ids that are not in the vocabulary add nothing.
    ///
    /// # Errors
    /// The decoder refuses the tokens; none of the common ones does.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TokenizerError> {
        // Some decoders cannot take an empty sequence.
        if !ids.iter().any(|&id| self.is_visible(id, skip_special)) {
            return Ok(String::new());
        }
        let decode = || self.inner.decode(ids, skip_special);
        match catch_unwind(AssertUnwindSafe(decode)) {
            Ok(Ok(text)) => Ok(text),
            Ok(Err(e)) => Err(TokenizerError(format!("the ids cannot be decoded: {e}"))),
            Err(_) => Err(TokenizerError("the ids cannot be decoded".to_owned())),
        }
    }

    /// The id of a token's exact spelling in the vocabulary.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// A token's spelling in the vocabulary.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The whole tokenizer as the text of a `tokenizer.json`. O(vocabulary).
    ///
    /// # Errors
    /// A part of it cannot be written down.
    pub fn to_json(&self) -> Result<String, TokenizerError> {
        self.inner
            .to_string(false)
            .map_err(|error| TokenizerError(error.to_string()))
    }

    /// The bytes this token adds in the middle of a text; none for ids out of the vocabulary.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        if let Some(table) = self.table() {
            return table.bytes(id).to_vec();
        }
        let (Some(token), Some(decoder)) = (self.id_to_token(id), self.inner.get_decoder()) else {
            return self.id_to_token(id).unwrap_or_default().into_bytes();
        };
        // After another token, so that what only the first one loses is kept.
        let lead = || vec!["a".to_owned()];
        let decode = |tokens| decoder.decode_chain(tokens).map(|parts| parts.concat());
        let both = decode(vec!["a".to_owned(), token.clone()]);
        match (decode(lead()), both) {
            (Ok(lead), Ok(both)) if both.starts_with(&lead) => {
                both.as_bytes()[lead.len()..].to_vec()
            }
            _ => token.into_bytes(),
        }
    }

    /// True if this id adds to a decoded sequence.
    pub(crate) fn is_visible(&self, id: u32, skip_special: bool) -> bool {
        self.inner.id_to_token(id).is_some_and(|token| {
            !skip_special || !self.inner.get_added_vocabulary().is_special_token(&token)
        })
    }

    /// True if the text of a token depends on those around it, so that there is no table for it.
    #[must_use]
    pub fn spaces_tokens(&self) -> bool {
        self.table.is_none()
    }

    /// The table for incremental decoding; None for decoders that need the tokens around.
    pub(crate) fn table(&self) -> Option<&TokenTable> {
        self.table.as_ref()
    }
}

/// Numbers of tokens two texts keep of `room`: the longer one loses first, then both alike, and an
/// odd token is the second one's.
fn shares(a: usize, b: usize, room: usize) -> (usize, usize) {
    let half = room / 2;
    if a + b <= room {
        (a, b)
    } else if a.min(b) > half {
        (half, room - half)
    } else if a <= b {
        (a, room - a)
    } else {
        (room - b, b)
    }
}
