//! SentencePiece's Unigram from GGUF metadata (`t5`), as XLM-RoBERTa and T5 have it.
//!
//! Of all ways to cut a text into tokens, the one whose scores add up to the most.

use tokenizers::Tokenizer;
use tokenizers::models::unigram::Unigram;
use tokenizers::normalizers::replace::Replace;
use tokenizers::normalizers::utils::Sequence as NormalizerSequence;
use tokenizers::normalizers::{NormalizerWrapper, Precompiled, Strip};
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};

use crate::files::gguf::GgufFile;
use crate::text::gguf_vocabulary::{BYTE, Result, Tokens, add_bos_eos, scores};

// llama.cpp's where a file names none: T5's.
const DEFAULT_UNKNOWN: u64 = 2;
const DEFAULT_END: u64 = 1;

pub(super) fn build(file: &GgufFile) -> Result<Tokenizer> {
    let tokens = Tokens::read(file)?;
    let pieces = tokens
        .texts()
        .map(str::to_owned)
        .zip(scores(file, &tokens)?.into_iter().map(f64::from))
        .collect();
    let unknown = file
        .unsigned("tokenizer.ggml.unknown_token_id")
        .unwrap_or(DEFAULT_UNKNOWN);
    let model = Unigram::from(pieces, usize::try_from(unknown).ok(), tokens.has(BYTE))
        .map_err(|e| e.to_string())?;
    let mut tokenizer = Tokenizer::new(model);
    tokenizer
        .with_normalizer(Some(NormalizerSequence::new(normalizers(file)?)))
        .map_err(|e| e.to_string())?;
    let prepends = match file.bool("tokenizer.ggml.add_space_prefix") {
        Some(false) => PrependScheme::Never,
        _ => PrependScheme::Always,
    };
    let metaspace = Metaspace::new('\u{2581}', prepends, true);
    tokenizer.with_pre_tokenizer(Some(metaspace.clone()));
    tokenizer.with_decoder(Some(metaspace));
    add_bos_eos(
        &mut tokenizer,
        file,
        &tokens,
        (false, true),
        (None, Some(DEFAULT_END)),
    )?;
    tokenizer
        .add_tokens(tokens.added(|_| false, false))
        .map_err(|e| e.to_string())?;
    Ok(tokenizer)
}

/// The steps that SentencePiece takes first: its table of characters, and fewer spaces.
fn normalizers(file: &GgufFile) -> Result<Vec<NormalizerWrapper>> {
    let mut found: Vec<NormalizerWrapper> = Vec::new();
    if let Some(table) = file.bytes("tokenizer.ggml.precompiled_charsmap") {
        let table = Precompiled::from(table)
            .map_err(|_| "key \"tokenizer.ggml.precompiled_charsmap\" is no table")?;
        found.push(table.into());
    }
    if file.bool("tokenizer.ggml.remove_extra_whitespaces") == Some(true) {
        found.push(Strip::new(true, true).into());
        let spaces = tokenizers::normalizers::replace::ReplacePattern::Regex(" {2,}".to_owned());
        found.push(Replace::new(spaces, " ").map_err(|e| e.to_string())?.into());
    }
    Ok(found)
}
