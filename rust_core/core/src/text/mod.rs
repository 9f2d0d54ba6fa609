//! Text to token ids and back: tokenizers, incremental detokenizing, stop strings, channels,
//! grammars, SSE chunks, JSON sizes.

mod ascii_words;
pub mod channels;
pub mod detokenizer;
mod gguf_end_tokens;
mod gguf_tokenizer;
mod gguf_unigram;
mod gguf_vocabulary;
mod gguf_word_piece;
pub mod json_size;
pub mod matcher;
mod splitting;
pub mod sse;
mod stop_strings;
mod text_parts;
mod token_table;
pub mod tokenizer;
mod tokenizer_changes;
mod word_encoder;
