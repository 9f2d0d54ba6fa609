//! The octavo core: scheduling, text and checkpoint files. It knows no torch and no Python.
//!
//! `scheduler` plans steps over paged KV blocks, `engine` surrounds it with stop rules, text and
//! delivery, `text` goes from text to ids and back, `files` reads checkpoints.

pub mod engine;
pub mod error;
pub mod files;
pub mod scheduler;
pub mod text;
