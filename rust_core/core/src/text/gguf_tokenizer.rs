//! A tokenizer from GGUF metadata (`tokenizer.ggml.*`), with no JSON between.
//!
//! Models: `gpt2`, byte-level BPE whose text splitting is named by `tokenizer.ggml.pre`; `llama`,
//! SentencePiece's BPE by scores, and `gemma4`, the same by merges; `bert`, WordPiece; and `t5`,
//! Unigram. Control and unknown tokens become special added tokens,
//! user-defined ones plain added tokens, so that each is one id wherever it stands in a text.
//!
//! O(vocabulary + merges); `llama` merges are found by O(characters) look-ups a token.

use std::cmp::Reverse;

use tokenizers::Tokenizer;
use tokenizers::decoders::DecoderWrapper;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as DecoderSequence;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BPE, Merges};
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::normalizers::prepend::Prepend;
use tokenizers::normalizers::replace::Replace;
use tokenizers::normalizers::unicode::NFC;
use tokenizers::normalizers::utils::Sequence as NormalizerSequence;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

use crate::files::gguf::GgufFile;
use crate::text::gguf_vocabulary::{
    CONTROL, NORMAL, Result, SPACE_MARK, Tokens, add_bos_eos, scores, strings,
};
use crate::text::splitting::splitting;
use crate::text::{gguf_end_tokens, gguf_unigram, gguf_word_piece};

/// Build the tokenizer a file describes.
pub(crate) fn build(file: &GgufFile) -> Result<Tokenizer> {
    let model = file
        .str("tokenizer.ggml.model")
        .ok_or("has no tokenizer (key \"tokenizer.ggml.model\")")?;
    match model.as_ref() {
        "gpt2" => byte_level(file),
        "llama" | "gemma4" => sentence_piece(file, &model),
        "bert" => gguf_word_piece::build(file),
        "t5" => gguf_unigram::build(file),
        other => Err(format!(
            "tokenizer model {other:?} is not supported; bert, gemma4, gpt2, llama and t5 are"
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

// ------------------------------------------------------------------------------- byte level

fn byte_level(file: &GgufFile) -> Result<Tokenizer> {
    let pre = file.str("tokenizer.ggml.pre").unwrap_or("default".into());
    let splitting =
        splitting(&pre).ok_or_else(|| format!("pre-tokenizer {pre:?} is not supported"))?;
    let tokens = Tokens::read(file)?;
    let merges = merges(file, &tokens)?;
    let bpe = BPE::builder()
        .vocab_and_merges(tokens.ids(), merges)
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

fn sentence_piece(file: &GgufFile, model: &str) -> Result<Tokenizer> {
    let tokens = Tokens::read(file)?;
    let merges = match model {
        "gemma4" => merges(file, &tokens)?,
        _ => merges_by_score(&tokens, &scores(file, &tokens)?),
    };
    let mut builder = BPE::builder()
        .vocab_and_merges(tokens.ids(), merges)
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
            if let (Some(left_id), Some(right_id)) = (tokens.id(left), tokens.id(right)) {
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
