//! Vocabulary: a tokenizer's tokens as a trie of byte strings, which grammars are matched against.

use std::str;
use std::sync::Arc;

use toktrie::{INVALID_TOKEN, TokRxInfo, TokTrie, TokenId, TokenizerEnv};

use crate::error::{Error, Result};
use crate::text::tokenizer::Tokenizer;

/// Stands before a text whose first token would otherwise be spelled as a text's beginning.
const LEAD: char = '\u{2}';

/// See the module's page. As wide as the model's logits: ids without a token match nothing.
pub(super) struct Vocabulary {
    tokenizer: Arc<Tokenizer>,
    trie: TokTrie,
}

impl Vocabulary {
    /// O(vocabulary), about half a second for 131,072 tokens.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`]: tokens whose text depends on those around.
    pub(super) fn new(tokenizer: Arc<Tokenizer>, width: usize, eos: &[u32]) -> Result<Self> {
        let Some(table) = tokenizer.table() else {
            return Err(Error::invalid(
                "structured output needs a tokenizer whose tokens have a text of their own",
            ));
        };
        let eos: Vec<u32> = eos
            .iter()
            .copied()
            .filter(|&id| (id as usize) < width)
            .collect();
        let marker = TokTrie::SPECIAL_TOKEN_MARKER;
        let mut words: Vec<Vec<u8>> = (0..width as u32)
            .map(|id| match table.get(id) {
                // A special token's spelling must not match a text: the marker is in no text.
                Some(entry) if entry.is_special => {
                    let name = tokenizer.id_to_token(id).unwrap_or_default();
                    [&[marker], name.as_bytes()].concat()
                }
                // No text begins with this byte either.
                Some(entry) if entry.bytes.first() != Some(&marker) => entry.bytes.to_vec(),
                _ => Vec::new(),
            })
            .collect();
        for &id in &eos {
            let word = &mut words[id as usize];
            if word.first() != Some(&marker) {
                let name = tokenizer.id_to_token(id).unwrap_or_default();
                *word = [&[marker], name.as_bytes()].concat();
            }
        }
        // Without any a text ends where nothing may follow.
        let info = TokRxInfo::new(width as u32, eos.first().copied().unwrap_or(INVALID_TOKEN));
        let mut trie = TokTrie::from(&info, &words);
        if !eos.is_empty() {
            trie = trie.with_eos_tokens(&eos);
        }
        Ok(Self { tokenizer, trie })
    }

    /// `text` in pieces, with the ids of the special tokens that it spells.
    pub(super) fn split_special<'a>(&self, text: &'a str) -> Vec<Piece<'a>> {
        let mut pieces = Vec::new();
        let mut rest = text;
        while let Some((at, len, id)) = self.first_special(rest) {
            if at > 0 {
                pieces.push(Piece::Text(&rest[..at]));
            }
            pieces.push(Piece::Token(id));
            rest = &rest[at + len..];
        }
        if !rest.is_empty() {
            pieces.push(Piece::Text(rest));
        }
        pieces
    }

    /// (offset, bytes, id) of the special token that comes first, the longest of those there.
    fn first_special(&self, text: &str) -> Option<(usize, usize, u32)> {
        let added = self.tokenizer.added_tokens();
        let special = added.iter().filter(|(_, token)| token.special);
        special
            .filter_map(|(id, token)| Some((text.find(&token.content)?, token.content.len(), *id)))
            .filter(|&(_, len, _)| len > 0)
            .min_by_key(|&(at, len, _)| (at, std::cmp::Reverse(len)))
    }

    /// The ids of a text in the middle of another one; None where the tokenizer changes the text.
    fn encode(&self, text: &str) -> Option<Vec<TokenId>> {
        let ids = self.tokenizer.encode(text, false).ok()?;
        if self.spells(&ids, text.as_bytes()) {
            return Some(ids);
        }
        let ids = self
            .tokenizer
            .encode(&format!("{LEAD}{text}"), false)
            .ok()?;
        // The token after which the lead is complete.
        let lead = ids
            .iter()
            .position(|&id| self.trie.token(id).last() == Some(&(LEAD as u8)))?;
        let rest = &ids[lead + 1..];
        self.spells(rest, text.as_bytes()).then(|| rest.to_vec())
    }

    fn spells(&self, ids: &[TokenId], text: &[u8]) -> bool {
        let mut rest = Some(text);
        for &id in ids {
            let word = self.trie.token(id);
            rest = match rest {
                Some(left) if !word.is_empty() => left.strip_prefix(word),
                _ => None,
            };
        }
        rest == Some(&[])
    }
}

/// A part of a text.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Piece<'a> {
    /// Ordinary text.
    Text(&'a str),
    /// A special token.
    Token(u32),
}

impl TokenizerEnv for Vocabulary {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        self.trie.tokenize_with_greedy_fallback(bytes, |text| {
            self.encode(text)
                .unwrap_or_else(|| self.trie.greedy_tokenize(text.as_bytes()))
        })
    }
}
