//! GGUF's tensor formats: sizes, the integers and scales of a block, and conversion to float32.
//!
//! Files and kernels both need them and neither needs the other, so they are a crate of their own.
//! A new block format is a row of `kinds`, one of `blocks!` and its arms of `read_scales` and
//! `read_group` there.

#[macro_use]
pub mod blocks;
pub mod dequantize;
pub mod floats;
mod grids;
pub mod kinds;
