//! CPU kernels: the op set of `kernels/reference.py`, compiled per instruction set.
//!
//! `level` finds the instruction set, `simd` is what kernels are written in, `pool` splits work
//! over threads, `tensor` names memory. Each op has a module of its own. Functions take addresses
//! and sizes, check the sizes against each other, and trust the addresses: `kernels/cpu.py` takes
//! them from tensors it has validated.

pub mod activation;
pub mod attention;
pub mod decoder;
pub mod encoder;
mod encoder_attention;
pub mod float;
pub mod kv_cache;
pub mod level;
pub mod linear;
pub mod logits;
pub mod norm;
pub mod pool;
pub mod projection;
pub mod recurrent;
pub mod rope;
mod scratch;
pub mod simd;
pub mod tensor;
