//! Time of whole decoder steps: `cargo bench -p octavo-cpu --bench decoder`.
//!
//! The model has the shapes of SmolLM2-135M with Q4_1 weights and a bfloat16 cache, or, of `-- int8`,
//! one of int8. `-- N` sets the number of layers. OCTAVO_CPU_LEVEL chooses the instruction set; where a debugger or a simulator
//! counts instructions, `-- 2 once` runs each step once.

use std::sync::Arc;
use std::time::Instant;

use octavo_cpu::activation::Activation;
use octavo_cpu::decoder::{Decoder, Layer, Step};
use octavo_cpu::float::DType;
use octavo_cpu::kv_cache::{Byte, Cache, CacheType};
use octavo_cpu::level::Level;
use octavo_cpu::linear::{Linear, Packed, Rounding};
use octavo_cpu::pool;
use octavo_cpu::projection::{Projection, Weight};
use octavo_cpu::tensor::Rows;

const HIDDEN: usize = 576;
const HEADS: usize = 9;
const KV_HEADS: usize = 3;
const HEAD_DIM: usize = 64;
const INTERMEDIATE: usize = 1536;
const BLOCK_SIZE: usize = 16;
/// Blocks of a request: 1,024 tokens.
const BLOCKS: usize = 64;
/// Requests that the caches have room for.
const REQUESTS: usize = 16;

fn projection(level: Level, n: usize, k: usize) -> Projection {
    let kind = Packed::parse("Q4_1").expect("a kind that is read");
    let mut state = 1u32;
    let source: Vec<u8> = (0..kind.file_row_bytes(k) * n)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            // Small numbers of which none is subnormal.
            (state >> 24) as u8 & 0x0b | 0x10
        })
        .collect();
    let mut weight = Linear::new(level, k, &[(kind, n)]).expect("a valid shape");
    // SAFETY: `source` holds n rows.
    unsafe { weight.pack_rows(0, n, source.as_ptr(), kind, None) }.expect("it fits");
    Projection {
        weight: Weight::Packed {
            linear: Arc::new(weight),
            rounding: Rounding::Fine,
        },
        bias: None,
    }
}

/// One layer's keys or values, in memory that is never freed.
fn cache(dtype: CacheType) -> Cache {
    let num_blocks = BLOCKS * REQUESTS;
    let rows = num_blocks * KV_HEADS * BLOCK_SIZE;
    let elements = vec![0x3c00u16; rows * (HEAD_DIM + 2)].leak();
    // In elements.
    let scale = match dtype {
        CacheType::Float(_) => 0,
        CacheType::Scaled(_) => size_of::<f32>(),
    };
    Cache {
        ptr: elements.as_mut_ptr().cast(),
        dtype,
        num_blocks,
        num_kv_heads: KV_HEADS,
        block_size: BLOCK_SIZE,
        head_dim: HEAD_DIM,
        block_stride: rows / num_blocks * (HEAD_DIM + scale),
    }
}

fn decoder(level: Level, num_layers: usize, dtype: CacheType, cos_sin: &[f32]) -> Decoder {
    let layers = (0..num_layers)
        .map(|_| Layer {
            input_norm: vec![1.0; HIDDEN],
            post_norm: vec![1.0; HIDDEN],
            qkv: projection(level, (HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
            o: projection(level, HIDDEN, HEADS * HEAD_DIM),
            gate_up: projection(level, 2 * INTERMEDIATE, HIDDEN),
            down: projection(level, HIDDEN, INTERMEDIATE),
            q_norm: None,
            k_norm: None,
            k_cache: cache(dtype),
            v_cache: cache(dtype),
            kv_scales: [Vec::new(), Vec::new()],
            sliding_window: 0,
        })
        .collect();
    Decoder {
        level,
        layers,
        final_norm: vec![1.0; HIDDEN],
        num_heads: HEADS,
        eps: 1e-5,
        weight_offset: 0.0,
        cos_sin: Rows::new(
            cos_sin.as_ptr().cast(),
            DType::F32,
            cos_sin.len() / HEAD_DIM,
            HEAD_DIM,
        ),
        scale: 0.125,
        softcap: 0.0,
        activation: Activation::Silu,
    }
}

/// Time of a step of `requests` requests of `queries` tokens after `past` others, in milliseconds.
///
/// Never inlined, so that a simulator can count by its name.
#[inline(never)]
fn step(model: &Decoder, requests: usize, queries: usize, past: usize, once: bool) -> f64 {
    let tokens = requests * queries;
    let seq_len = past + queries;
    let positions: Vec<i32> = (0..tokens).map(|t| (past + t % queries) as i32).collect();
    let blocks = if requests == 1 {
        BLOCKS * REQUESTS
    } else {
        BLOCKS
    };
    let block_table: Vec<i32> = (0..requests * blocks).map(|b| b as i32).collect();
    let slot_mapping: Vec<i32> = (0..tokens)
        .map(|t| (t / queries * BLOCKS * BLOCK_SIZE + past + t % queries) as i32)
        .collect();
    let slots: Vec<i32> = (0..requests).map(|r| r as i32).collect();
    let seq_lens = vec![seq_len as i32; requests];
    let starts: Vec<i32> = (0..=requests).map(|r| (r * queries) as i32).collect();
    let mut hidden = vec![0.0f32; tokens * HIDDEN];
    let mut out = vec![0.0f32; tokens * HIDDEN];
    let start = Instant::now();
    let (mut best, mut runs) = (f64::INFINITY, 0);
    while runs < 1 || !once && (runs < 5 || start.elapsed().as_secs_f64() < 3.0) {
        for (i, x) in hidden.iter_mut().enumerate() {
            *x = (i * 37 % 101) as f32 / 50.0 - 1.0;
        }
        let step = Step {
            positions: &positions,
            slot_mapping: &slot_mapping,
            block_table: &block_table,
            max_blocks: blocks,
            slots: &slots,
            seq_lens: &seq_lens,
            query_start_loc: &starts,
            ends_only: queries > 1,
        };
        let t = Instant::now();
        // SAFETY: hidden and out hold the tokens' rows; the caches are this model's own.
        unsafe { model.forward(hidden.as_mut_ptr(), out.as_mut_ptr(), tokens, step) }
            .expect("indices in range");
        best = best.min(t.elapsed().as_secs_f64() * 1e3);
        runs += 1;
    }
    let last = &out[(tokens - 1) * HIDDEN..];
    assert!(last.iter().all(|x| x.is_finite()), "a step gives numbers");
    best
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let num_layers = args.iter().find_map(|a| a.parse().ok()).unwrap_or(30);
    let once = args.iter().any(|a| a == "once");
    let dtype = if args.iter().any(|a| a == "int8") {
        CacheType::Scaled(Byte::Int8)
    } else {
        CacheType::Float(DType::Bf16)
    };
    let level = Level::preferred().expect("a level of this machine");
    println!(
        "level {}, threads {}, {num_layers} layers",
        level.name(),
        pool::num_threads()
    );
    let cos_sin: Vec<f32> = (0..REQUESTS * BLOCKS * BLOCK_SIZE * HEAD_DIM)
        .map(|i| {
            let angle = (i / HEAD_DIM) as f32 / (1 + i % (HEAD_DIM / 2)) as f32;
            if i % HEAD_DIM < HEAD_DIM / 2 {
                angle.cos()
            } else {
                angle.sin()
            }
        })
        .collect();
    let model = decoder(level, num_layers, dtype, &cos_sin);
    model.check().expect("sizes that fit");
    for (name, requests, queries, past) in [
        ("1 row after 511 tokens", 1, 1, 511),
        ("1 row after 1,000 tokens", 1, 1, 1000),
        ("1 row after 8,000 tokens", 1, 1, 8000),
        ("16 rows after 511 tokens", 16, 1, 511),
        ("a prompt of 512 tokens", 1, 512, 0),
    ] {
        let ms = step(&model, requests, queries, past, once);
        println!("{name:26} {ms:9.3} ms");
    }
}
