//! The octavo core: bookkeeping, text and CPU arithmetic. It knows no torch, and Python only
//! behind the `python` feature, in `python.rs`.
//!
//! The crate is usable without Python: `cargo test` and the benches drive it directly.

// Arithmetic.
pub mod cpu;

// Scheduling.
pub mod batch;
pub mod block_pool;
pub mod block_table;
pub mod engine_core;
pub mod error;
pub mod free_list;
pub mod metrics;
pub mod outbox;
pub mod prefix_cache;
pub mod request;
pub mod scheduler;

// Text and checkpoint files.
mod ascii_words;
pub mod dequantize;
pub mod detokenizer;
pub mod gguf;
mod gguf_end_tokens;
mod gguf_tokenizer;
mod splitting;
mod stop_strings;
pub mod stream;
mod text_parts;
mod token_table;
pub mod tokenizer;
mod tokenizer_changes;
mod word_encoder;

#[cfg(feature = "python")]
mod python;
