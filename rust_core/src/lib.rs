//! The octavo core: bookkeeping, text and CPU arithmetic. It knows no torch, and Python only
//! behind the `python` feature, in `python.rs`.
//!
//! The crate is usable without Python: `cargo test` and the benches drive it directly.

#[cfg(feature = "python")]
mod python;
