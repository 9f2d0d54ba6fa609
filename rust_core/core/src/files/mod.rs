//! Checkpoint files that are read without Python.

pub mod formats;
pub mod gguf;
