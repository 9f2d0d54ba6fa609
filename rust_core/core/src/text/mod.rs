//! Text to token ids and back: tokenizers, incremental detokenizing, stop strings, SSE chunks.

mod ascii_words;
pub mod detokenizer;
mod gguf_tokenizer;
mod splitting;
pub mod sse;
mod stop_strings;
mod text_parts;
mod token_table;
pub mod tokenizer;
mod word_encoder;
