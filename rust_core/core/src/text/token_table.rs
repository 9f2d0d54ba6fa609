//! TokenTable: what each token of a vocabulary adds to a text, computed once.
//!
//! Most decoders map a token to the same bytes wherever it stands: byte-level ones, and the
//! SentencePiece family (replace the space mark, join byte tokens, fuse, strip a leading space).
//! For those, decoding a token is one look-up. O(vocabulary) to build, O(1) to query, two allocations.

use tokenizers::decoders::DecoderWrapper;
use tokenizers::pre_tokenizers::metaspace::PrependScheme;
use tokenizers::{Decoder, Tokenizer};

/// The search for ids ends this far beyond the last one found.
const MAX_ID_GAP: u32 = 1 << 16;

const KNOWN: u8 = 1;
const SPECIAL: u8 = 2;
const BYTE: u8 = 4;

/// The rule that makes text of tokens' bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Joining {
    /// One stream of bytes; what is not UTF-8 is replaced as in `String::from_utf8_lossy`.
    Bytes,
    /// Pieces of text; a run of byte tokens counts as a whole, one U+FFFD each if it is not UTF-8.
    Pieces,
}

/// See the module's page.
#[derive(Debug)]
pub(crate) struct TokenTable {
    pub(crate) joining: Joining,
    /// Up to so many of this character are cut from the start of the whole text.
    pub(crate) strip: (char, usize),
    /// The first token of a sequence is decoded by these instead.
    first: Vec<DecoderWrapper>,
    starts: Vec<u32>,
    bytes: Vec<u8>,
    flags: Vec<u8>,
}

/// One token's entry.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Entry<'a> {
    pub(crate) bytes: &'a [u8],
    pub(crate) is_special: bool,
    /// `bytes` is one byte of a run.
    pub(crate) is_byte: bool,
}

impl TokenTable {
    /// None if this tokenizer's decoder needs more than one token at a time.
    pub(crate) fn build(tokenizer: &Tokenizer) -> Option<Self> {
        let plan = Plan::new(tokenizer.get_decoder()?)?;
        let spellings = spellings(tokenizer)?;
        let added = tokenizer.get_added_vocabulary();
        let mut table = Self {
            joining: plan.joining,
            strip: plan.strip,
            first: plan.first,
            starts: Vec::with_capacity(spellings.len() + 1),
            bytes: Vec::new(),
            flags: Vec::with_capacity(spellings.len()),
        };
        let mut flags: Vec<u8> = spellings
            .iter()
            .map(|spelling| match spelling {
                None => 0,
                Some(token) if added.is_special_token(token) => KNOWN | SPECIAL,
                Some(_) => KNOWN,
            })
            .collect();
        let texts: Vec<Vec<u8>> = match plan.joining {
            Joining::Bytes => {
                let byte_of = byte_of_char();
                spellings
                    .into_iter()
                    .map(|token| byte_level_bytes(&byte_of, &token.unwrap_or_default()))
                    .collect()
            }
            Joining::Pieces => {
                // A token before the others, so that none of them is taken for the first.
                let mut tokens = vec!["a".to_owned()];
                tokens.extend(spellings.into_iter().map(Option::unwrap_or_default));
                let num_tokens = tokens.len();
                for step in &plan.each {
                    tokens = step.decode_chain(tokens).ok()?;
                }
                if tokens.len() != num_tokens {
                    return None;
                }
                let texts = tokens.into_iter().skip(1);
                texts
                    .zip(&mut flags)
                    .map(|(token, flags)| match byte_token(&token) {
                        Some(byte) if plan.byte_tokens => {
                            *flags |= BYTE;
                            vec![byte]
                        }
                        _ => token.into_bytes(),
                    })
                    .collect()
            }
        };
        table.starts.push(0);
        for text in texts {
            table.bytes.extend(text);
            table.starts.push(u32::try_from(table.bytes.len()).ok()?);
        }
        table.flags = flags;
        Some(table)
    }

    /// A token of the vocabulary; None for other ids.
    #[inline]
    pub(crate) fn get(&self, id: u32) -> Option<Entry<'_>> {
        let flags = *self.flags.get(id as usize)?;
        if flags & KNOWN == 0 {
            return None;
        }
        Some(Entry {
            bytes: self.bytes(id),
            is_special: flags & SPECIAL != 0,
            is_byte: flags & BYTE != 0,
        })
    }

    /// The bytes a token adds in the middle of a text; none for ids out of the vocabulary.
    #[inline]
    pub(crate) fn bytes(&self, id: u32) -> &[u8] {
        match self.starts.get(id as usize..=id as usize + 1) {
            Some(&[start, end]) => &self.bytes[start as usize..end as usize],
            _ => &[],
        }
    }

    /// The text of a token that opens a sequence, where it differs from [`TokenTable::bytes`].
    pub(crate) fn first_text(&self, spelling: impl FnOnce() -> Option<String>) -> Option<String> {
        if self.first.is_empty() {
            return None;
        }
        let mut tokens = vec![spelling()?];
        for step in &self.first {
            tokens = step.decode_chain(tokens).ok()?;
        }
        Some(tokens.concat())
    }
}

/// A decoder, taken apart.
struct Plan {
    joining: Joining,
    /// Steps that map each token by itself.
    each: Vec<DecoderWrapper>,
    /// The same steps where one of them treats the first token differently; else empty.
    first: Vec<DecoderWrapper>,
    byte_tokens: bool,
    strip: (char, usize),
}

impl Plan {
    fn new(decoder: &DecoderWrapper) -> Option<Self> {
        let mut steps = Vec::new();
        flatten(decoder, &mut steps);
        let mut plan = Self {
            joining: Joining::Pieces,
            each: Vec::new(),
            first: Vec::new(),
            byte_tokens: false,
            strip: (' ', 0),
        };
        let mut steps = steps.into_iter().peekable();
        if let Some(DecoderWrapper::ByteLevel(_)) = steps.peek() {
            steps.next();
            plan.joining = Joining::Bytes;
        } else {
            let mut first_differs = false;
            while let Some(step) = steps.next_if(|step| {
                matches!(
                    step,
                    DecoderWrapper::Replace(_) | DecoderWrapper::Metaspace(_)
                )
            }) {
                if let DecoderWrapper::Metaspace(metaspace) = step {
                    first_differs |= metaspace.get_prepend_scheme() != PrependScheme::Never;
                }
                plan.each.push(step.clone());
            }
            if first_differs {
                plan.first.clone_from(&plan.each);
            }
            plan.byte_tokens = steps
                .next_if(|step| matches!(step, DecoderWrapper::ByteFallback(_)))
                .is_some();
        }
        let mut fused = plan.joining == Joining::Bytes;
        while steps
            .next_if(|step| matches!(step, DecoderWrapper::Fuse(_)))
            .is_some()
        {
            fused = true;
        }
        if fused
            && let Some(DecoderWrapper::Strip(strip)) =
                steps.next_if(|step| matches!(step, DecoderWrapper::Strip(s) if s.stop == 0))
        {
            plan.strip = (strip.content, strip.start);
        }
        steps.next().is_none().then_some(plan)
    }
}

fn flatten<'a>(decoder: &'a DecoderWrapper, steps: &mut Vec<&'a DecoderWrapper>) {
    match decoder {
        DecoderWrapper::Sequence(sequence) => {
            for step in sequence.get_decoders() {
                flatten(step, steps);
            }
        }
        step => steps.push(step),
    }
}

/// Every token by id. None if the ids are so sparse that a table makes no sense.
fn spellings(tokenizer: &Tokenizer) -> Option<Vec<Option<String>>> {
    let num_tokens = tokenizer.get_vocab_size(true);
    let mut spellings = Vec::with_capacity(num_tokens);
    let mut num_found = 0;
    let mut last_found = 0;
    for id in 0..u32::MAX {
        if num_found == num_tokens {
            break;
        }
        let spelling = tokenizer.id_to_token(id);
        if spelling.is_some() {
            num_found += 1;
            last_found = id;
        } else if id - last_found > MAX_ID_GAP {
            // Two spellings share an id, or ids are far out; the latter only a full list can tell.
            let max = tokenizer.get_vocab(true).into_values().max().unwrap_or(0);
            if max > last_found {
                return None;
            }
            break;
        }
        spellings.push(spelling);
    }
    spellings.truncate(last_found as usize + 1);
    Some(spellings)
}

/// The byte of a `<0x41>` token, by the rule of the crate's ByteFallback.
fn byte_token(token: &str) -> Option<u8> {
    if token.len() == 6 && token.starts_with("<0x") && token.ends_with('>') {
        u8::from_str_radix(token.get(3..5)?, 16).ok()
    } else {
        None
    }
}

/// The inverse of GPT-2's map of bytes to printable characters, by code point (all are below 512).
///
/// Bytes that print stand for themselves; the others, in order, are the characters from 256 on.
fn byte_of_char() -> [Option<u8>; 512] {
    let mut byte_of = [None; 512];
    let mut next = 256;
    for byte in 0..=255u8 {
        let prints = matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
        let code = if prints {
            usize::from(byte)
        } else {
            next += 1;
            next - 1
        };
        byte_of[code] = Some(byte);
    }
    byte_of
}

/// A byte-level token's bytes; one with a foreign character stands for its own spelling.
fn byte_level_bytes(byte_of: &[Option<u8>; 512], token: &str) -> Vec<u8> {
    token
        .chars()
        .map(|c| byte_of.get(c as usize).copied().flatten())
        .collect::<Option<Vec<u8>>>()
        .unwrap_or_else(|| token.as_bytes().to_vec())
}
