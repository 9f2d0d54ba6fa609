//! A tokenizer from GGUF metadata (`tokenizer.ggml.*`), with no JSON between.
//!
//! Two models: `gpt2`, byte-level BPE whose text splitting is named by `tokenizer.ggml.pre`, and
//! `llama`, SentencePiece's BPE by scores. Control and unknown tokens become special added tokens,
//! user-defined ones plain added tokens, so that each is one id wherever it stands in a text.
//!
//! O(vocabulary + merges); `llama` merges are found by O(characters) look-ups a token.

use std::cmp::Reverse;

use tokenizers::decoders::DecoderWrapper;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as DecoderSequence;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::normalizers::prepend::Prepend;
use tokenizers::normalizers::replace::Replace;
use tokenizers::normalizers::unicode::NFC;
use tokenizers::normalizers::utils::Sequence as NormalizerSequence;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::template::{SpecialToken, TemplateProcessing};
use tokenizers::{AddedToken, Tokenizer};

use crate::files::gguf::GgufFile;
use crate::text::gguf_end_tokens;
use crate::text::splitting::splitting;

const SPACE_MARK: &str = "\u{2581}";

// tokenizer.ggml.token_type
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;

type Result<T> = std::result::Result<T, String>;

/// Build the tokenizer a file describes.
pub(crate) fn build(file: &GgufFile) -> Result<Tokenizer> {
    let model = file
        .str("tokenizer.ggml.model")
        .ok_or("has no tokenizer (key \"tokenizer.ggml.model\")")?;
    match model.as_ref() {
        "gpt2" => byte_level(file),
        "llama" => sentence_piece(file),
        other => Err(format!(
            "tokenizer model {other:?} is not supported; gpt2 and llama are"
        )),
    }
}

/// The ids that end an answer. None where the file has no vocabulary.
pub(crate) fn end_tokens(file: &GgufFile) -> Vec<u32> {
    let Ok(texts) = file.strings("tokenizer.ggml.tokens") else {
        return Vec::new();
    };
    let types = file
        .integers("tokenizer.ggml.token_type")
        .unwrap_or_default();
    gguf_end_tokens::find(file, &texts, |id| types.get(id) == Some(&CONTROL))
}

// ------------------------------------------------------------------------------- vocabulary

struct Tokens<'a> {
    texts: Vec<std::borrow::Cow<'a, str>>,
    types: Vec<i32>,
    ids: Vocab,
}

impl<'a> Tokens<'a> {
    fn read(file: &'a GgufFile) -> Result<Self> {
        let texts = strings(file, "tokenizer.ggml.tokens")?;
        let mut types = match file.get("tokenizer.ggml.token_type") {
            None => vec![NORMAL; texts.len()],
            Some(_) => integers(file, "tokenizer.ggml.token_type")?,
        };
        if types.len() != texts.len() {
            return Err(format!(
                "has {} tokens but {} token types",
                texts.len(),
                types.len()
            ));
        }
        for (text, kind) in texts.iter().zip(&mut types) {
            if gguf_end_tokens::is_control_spelling(text) {
                *kind = CONTROL;
            }
        }
        // Some files hold empty entries; each needs a spelling of its own.
        let texts: Vec<std::borrow::Cow<'a, str>> = texts
            .into_iter()
            .enumerate()
            .map(|(id, text)| match text {
                "" => format!("[EMPTY_{id}]").into(),
                text => text.into(),
            })
            .collect();
        let mut ids = Vocab::with_capacity(texts.len());
        for (id, text) in texts.iter().enumerate() {
            if let Some(other) = ids.insert(text.to_string(), id as u32) {
                return Err(format!("token {text:?} has two ids, {other} and {id}"));
            }
        }
        Ok(Self { texts, types, ids })
    }

    /// Tokens that are cut out of a text before anything else sees it; user-defined ones written
    /// with a space mark only once spaces are marks too, where `marks_spaces`.
    fn added(&self, rstrip: impl Fn(&str) -> bool, marks_spaces: bool) -> Vec<AddedToken> {
        self.texts
            .iter()
            .zip(&self.types)
            .filter(|(_, kind)| matches!(**kind, UNKNOWN | CONTROL | USER_DEFINED))
            .map(|(text, &kind)| {
                let marked = kind == USER_DEFINED && text.contains(SPACE_MARK);
                AddedToken::from(text.as_ref(), kind != USER_DEFINED)
                    .normalized(marks_spaces && marked)
                    .rstrip(rstrip(text))
            })
            .collect()
    }
}

fn strings<'a>(file: &'a GgufFile, key: &str) -> Result<Vec<&'a str>> {
    file.strings(key).map_err(|e| without_path(file, e.0))
}

fn integers(file: &GgufFile, key: &str) -> Result<Vec<i32>> {
    file.integers(key).map_err(|e| without_path(file, e.0))
}

/// The caller names the file; once is enough.
fn without_path(file: &GgufFile, message: String) -> String {
    match message.strip_prefix(file.path()) {
        Some(rest) => rest.trim_start_matches(": ").to_owned(),
        None => message,
    }
}

/// The ids that open and close a text: those whose `add_*_token` holds and which exist.
fn add_bos_eos(
    tokenizer: &mut Tokenizer,
    file: &GgufFile,
    tokens: &Tokens<'_>,
    defaults: (bool, bool),
    default_ids: (Option<u64>, Option<u64>),
) -> Result<()> {
    let mut special = Vec::new();
    let mut wanted = |name: &str, default: bool, default_id: Option<u64>| -> Result<bool> {
        if !file
            .bool(&format!("tokenizer.ggml.add_{name}_token"))
            .unwrap_or(default)
        {
            return Ok(false);
        }
        let key = format!("tokenizer.ggml.{name}_token_id");
        let Some(id) = file.unsigned(&key).or(default_id) else {
            return Ok(false);
        };
        let Some(text) = usize::try_from(id).ok().and_then(|id| tokens.texts.get(id)) else {
            return Err(format!("key {key:?}: no token has the id {id}"));
        };
        let token = SpecialToken::new(name.to_owned(), vec![id as u32], vec![text.to_string()]);
        special.push(token.map_err(|e| e.to_string())?);
        Ok(true)
    };
    let bos = wanted("bos", defaults.0, default_ids.0)?;
    let eos = wanted("eos", defaults.1, default_ids.1)?;
    if !(bos || eos) {
        return Ok(());
    }
    let template = match (bos, eos) {
        (true, true) => "bos $A eos",
        (true, false) => "bos $A",
        _ => "$A eos",
    };
    let processor = TemplateProcessing::builder()
        .try_single(template)
        .map_err(|e| e.to_string())?
        .special_tokens(special)
        .build()
        .map_err(|e| e.to_string())?;
    tokenizer.with_post_processor(Some(processor));
    Ok(())
}

// ------------------------------------------------------------------------------- byte level

fn byte_level(file: &GgufFile) -> Result<Tokenizer> {
    let pre = file.str("tokenizer.ggml.pre").unwrap_or("default".into());
    let splitting =
        splitting(&pre).ok_or_else(|| format!("pre-tokenizer {pre:?} is not supported"))?;
    let tokens = Tokens::read(file)?;
    let merges = merges(file, &tokens)?;
    let bpe = BPE::builder()
        .vocab_and_merges(tokens.ids.clone(), merges)
        .ignore_merges(splitting.ignore_merges)
        .build()
        .map_err(|e| e.to_string())?;

    let mut tokenizer = Tokenizer::new(bpe);
    if splitting.compose {
        tokenizer
            .with_normalizer(Some(NFC))
            .map_err(|e| e.to_string())?;
    }
    let add_space = file
        .bool("tokenizer.ggml.add_space_prefix")
        .unwrap_or(false);
    tokenizer.with_pre_tokenizer(Some(splitting.pre_tokenizer(add_space)?));
    tokenizer.with_decoder(Some(ByteLevel::new(false, false, false)));
    add_bos_eos(
        &mut tokenizer,
        file,
        &tokens,
        (splitting.add_bos, false),
        (None, None),
    )?;
    tokenizer
        .add_tokens(tokens.added(|_| false, false))
        .map_err(|e| e.to_string())?;
    Ok(tokenizer)
}

/// The file's merges, best first: lines of two tokens.
fn merges(file: &GgufFile, tokens: &Tokens<'_>) -> Result<Merges> {
    let max_len = tokens
        .texts
        .iter()
        .map(|text| text.len())
        .max()
        .unwrap_or(0);
    strings(file, "tokenizer.ggml.merges")?
        .into_iter()
        .enumerate()
        .map(|(i, line)| {
            // The first half is not empty, so that a space can be one.
            let at = line.char_indices().skip(1).find(|(_, c)| *c == ' ');
            match at {
                // The crate counts on a merge's result being no longer than every token.
                Some((at, _)) if line.len() - 1 <= max_len => {
                    Ok((line[..at].to_owned(), line[at + 1..].to_owned()))
                }
                _ => Err(format!(
                    "merge {i} ({line:?}) is not two tokens that make a third"
                )),
            }
        })
        .collect()
}

// ------------------------------------------------------------------------------- SentencePiece

fn sentence_piece(file: &GgufFile) -> Result<Tokenizer> {
    let tokens = Tokens::read(file)?;
    let scores = file
        .floats("tokenizer.ggml.scores")
        .map_err(|e| without_path(file, e.0))?;
    if scores.len() != tokens.texts.len() {
        return Err(format!(
            "has {} tokens but {} scores",
            tokens.texts.len(),
            scores.len()
        ));
    }
    let mut builder = BPE::builder()
        .vocab_and_merges(tokens.ids.clone(), merges_by_score(&tokens, &scores))
        .byte_fallback(true)
        .fuse_unk(true);
    let unknown = file
        .unsigned("tokenizer.ggml.unknown_token_id")
        .unwrap_or(0);
    if let Some(text) = usize::try_from(unknown)
        .ok()
        .and_then(|id| tokens.texts.get(id))
    {
        builder = builder.unk_token(text.to_string());
    }
    let mut tokenizer = Tokenizer::new(builder.build().map_err(|e| e.to_string())?);

    let add_space = file.bool("tokenizer.ggml.add_space_prefix").unwrap_or(true);
    let replace = |from: &str, to: &str| Replace::new(from, to).map_err(|e| e.to_string());
    let mut normalizers: Vec<NormalizerWrapper> = Vec::new();
    let mut decoders: Vec<DecoderWrapper> = vec![
        replace(SPACE_MARK, " ")?.into(),
        ByteFallback::new().into(),
        Fuse::new().into(),
    ];
    if add_space {
        normalizers.push(Prepend::new(SPACE_MARK.to_owned()).into());
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    normalizers.push(replace(" ", SPACE_MARK)?.into());
    tokenizer
        .with_normalizer(Some(NormalizerSequence::new(normalizers)))
        .map_err(|e| e.to_string())?;
    tokenizer.with_decoder(Some(DecoderSequence::new(decoders)));
    add_bos_eos(
        &mut tokenizer,
        file,
        &tokens,
        (true, false),
        (Some(1), Some(2)),
    )?;
    // Phi-3's chat tokens swallow the white space after them; the format has no key for it.
    let is_phi3 = file.str("general.architecture").as_deref() == Some("phi3");
    // With a space in front, the marks of a token would get one more.
    let rstrip = |text: &str| is_phi3 && !matches!(text, "<unk>" | "<s>" | "<|endoftext|>");
    tokenizer
        .add_tokens(tokens.added(rstrip, !add_space))
        .map_err(|e| e.to_string())?;
    Ok(tokenizer)
}

/// BPE merges that do what SentencePiece does: of all neighbours that make a token, join those of
/// the best score. Every way to cut a token into two tokens is a merge, best score first.
fn merges_by_score(tokens: &Tokens<'_>, scores: &[f32]) -> Merges {
    let mut merges = Vec::new();
    for (id, (text, &kind)) in tokens.texts.iter().zip(&tokens.types).enumerate() {
        if kind != NORMAL {
            continue;
        }
        for (at, _) in text.char_indices().skip(1) {
            let (left, right) = text.split_at(at);
            if let (Some(&left_id), Some(&right_id)) = (tokens.ids.get(left), tokens.ids.get(right))
            {
                merges.push((scores[id], left_id, right_id, left, right));
            }
        }
    }
    merges.sort_by(|a, b| {
        let tie = |m: &(f32, u32, u32, &str, &str)| {
            (
                Reverse((m.3.chars().count(), m.4.chars().count())),
                m.1,
                m.2,
            )
        };
        b.0.total_cmp(&a.0).then_with(|| tie(a).cmp(&tie(b)))
    });
    merges
        .into_iter()
        .map(|(.., left, right)| (left.to_owned(), right.to_owned()))
        .collect()
}
