//! BERT's WordPiece from GGUF metadata: words, and the pieces that continue them.
//!
//! llama.cpp writes a word with a space mark in front and a continuation bare, where BERT's own
//! files mark the latter. Texts are lower-cased unless the file says otherwise or has capitals.

use tokenizers::Tokenizer;
use tokenizers::decoders::wordpiece::WordPiece as WordPieceDecoder;
use tokenizers::models::wordpiece::WordPiece;
use tokenizers::normalizers::BertNormalizer;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::processors::template::{SpecialToken, TemplateProcessing};

use crate::files::gguf::GgufFile;
use crate::text::gguf_vocabulary::{Result, SPACE_MARK, Tokens};

const CONTINUATION: &str = "##";
// Of BERT: a longer word is unknown.
const MAX_WORD_CHARS: usize = 100;

pub(super) fn build(file: &GgufFile) -> Result<Tokenizer> {
    let mut tokens = Tokens::read(file)?;
    let is_cased = tokens
        .normal()
        .any(|text| text.chars().any(char::is_uppercase));
    tokens.rename(|text| match text.strip_prefix(SPACE_MARK) {
        Some(word) => word.to_owned(),
        None => format!("{CONTINUATION}{text}"),
    })?;
    let [class, end, unknown] = [
        (["cls", "bos"], "[CLS]"),
        (["seperator", "eos"], "[SEP]"),
        (["unknown", "unk"], "[UNK]"),
    ]
    .map(|(names, spelling)| tokens.special(file, &names, spelling));
    let (unknown, _) = unknown?;
    let model = WordPiece::builder()
        .vocab(tokens.ids())
        .unk_token(unknown)
        .continuing_subword_prefix(CONTINUATION.to_owned())
        .max_input_chars_per_word(MAX_WORD_CHARS)
        .build()
        .map_err(|e| e.to_string())?;
    let lowers = file
        .bool("tokenizer.ggml.normalizer.lowercase")
        .unwrap_or(!is_cased);
    let strips = file.bool("tokenizer.ggml.normalizer.strip_accents");
    let mut tokenizer = Tokenizer::new(model);
    tokenizer
        .with_normalizer(Some(BertNormalizer::new(true, true, strips, lowers)))
        .map_err(|e| e.to_string())?;
    tokenizer.with_pre_tokenizer(Some(BertPreTokenizer));
    tokenizer.with_decoder(Some(WordPieceDecoder::new(CONTINUATION.to_owned(), true)));
    let special = [("class", class?), ("end", end?)].map(|(name, (text, id))| {
        SpecialToken::new(name.to_owned(), vec![id], vec![text]).map_err(|e| e.to_string())
    });
    let [class, end] = special;
    let processor = TemplateProcessing::builder()
        .try_single("class $A end")
        .map_err(|e| e.to_string())?
        .special_tokens(vec![class?, end?])
        .build()
        .map_err(|e| e.to_string())?;
    tokenizer.with_post_processor(Some(processor));
    tokenizer
        .add_tokens(tokens.added(|_| false, false))
        .map_err(|e| e.to_string())?;
    Ok(tokenizer)
}
