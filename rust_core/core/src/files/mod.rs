//! Checkpoint files that are read without Python.

pub mod gguf;
