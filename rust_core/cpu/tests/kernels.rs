//! The CPU kernels at every level, with random shapes and strides, nothing to do, and odd
//! addresses, on memory that ends with the last element named: under `make sanitize` a read or
//! write beyond it is an error, and everywhere a wrong number is.
#![allow(unsafe_code)]

use octavo_cpu::activation::{Activation, activation};
use octavo_cpu::attention::{AttentionArgs, paged_attention};
use octavo_cpu::float::{DType, f32_to_bf16, f32_to_f16};
use octavo_cpu::kv_cache::{Cache, CacheType};
use octavo_cpu::level::Level;
use octavo_cpu::linear::{Linear, Packed, Rounding};
use octavo_cpu::norm::{Norm, norm};
use octavo_cpu::tensor::{Rows, RowsMut, load_one};
use octavo_formats::blocks::{BlockFormat, Codes, Scales};
use proptest::prelude::*;
use proptest::sample::select;

/// A matrix at `offset` bytes past the allocator's alignment, which ends with its last element.
struct Matrix {
    bytes: Box<[u8]>,
    offset: usize,
    dtype: DType,
    rows: usize,
    cols: usize,
    stride: usize,
}

impl Matrix {
    fn new(dtype: DType, rows: usize, cols: usize, gap: usize, offset: usize) -> Matrix {
        let stride = cols + gap;
        let elements = match rows {
            0 => 0,
            rows => (rows - 1) * stride + cols,
        };
        // NaN in every type, where a kernel does not write.
        let bytes = vec![0xff; offset + elements * dtype.size()].into();
        Matrix {
            bytes,
            offset,
            dtype,
            rows,
            cols,
            stride,
        }
    }

    fn filled(mut self, seed: u64) -> Matrix {
        let mut random = Random(seed);
        for row in 0..self.rows {
            for col in 0..self.cols {
                self.set(row, col, random.float());
            }
        }
        self
    }

    fn at(&self, row: usize, col: usize) -> usize {
        self.offset + (row * self.stride + col) * self.dtype.size()
    }

    fn set(&mut self, row: usize, col: usize, x: f32) {
        let at = self.at(row, col);
        match self.dtype {
            DType::F32 => self.bytes[at..at + 4].copy_from_slice(&x.to_ne_bytes()),
            DType::Bf16 => self.bytes[at..at + 2].copy_from_slice(&f32_to_bf16(x).to_ne_bytes()),
            DType::F16 => self.bytes[at..at + 2].copy_from_slice(&f32_to_f16(x).to_ne_bytes()),
        }
    }

    fn get(&self, row: usize, col: usize) -> f64 {
        let at = self.at(row, col);
        assert!(at + self.dtype.size() <= self.bytes.len());
        // SAFETY: just checked.
        f64::from(unsafe { load_one(self.bytes.as_ptr().add(at), self.dtype) })
    }

    fn read(&self) -> Rows {
        let ptr = self.bytes[self.offset..].as_ptr();
        Rows {
            stride: self.stride,
            ..Rows::new(ptr, self.dtype, self.rows, self.cols)
        }
    }

    fn write(&mut self) -> RowsMut {
        let ptr = self.bytes[self.offset..].as_mut_ptr();
        RowsMut {
            stride: self.stride,
            ..RowsMut::new(ptr, self.dtype, self.rows, self.cols)
        }
    }

    /// ‖self - want‖ / ‖want‖
    fn error(&self, want: impl Fn(usize, usize) -> f64) -> f64 {
        let (mut off, mut all) = (0.0, 1e-30);
        for row in 0..self.rows {
            for col in 0..self.cols {
                let want = want(row, col);
                off += (self.get(row, col) - want).powi(2);
                all += want * want;
            }
        }
        (off / all).sqrt()
    }
}

struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 32
    }

    /// In [-1, 1).
    fn float(&mut self) -> f32 {
        self.bits() as f32 / 2f32.powi(31) - 1.0
    }
}

/// Rows of a checkpoint, with scales of ordinary size.
fn weight_rows(kind: Packed, n: usize, k: usize, random: &mut Random) -> Box<[u8]> {
    if let Some(dtype) = kind.dtype() {
        return Matrix::new(dtype, n, k, 0, 0).filled(random.bits()).bytes;
    }
    let mut bytes: Box<[u8]> = (0..n * kind.file_row_bytes(k))
        .map(|_| random.bits() as u8)
        .collect();
    let Packed::Blocks(format) = kind else {
        unreachable!("a plain kind is done");
    };
    let shape = format.shape();
    let first = match format {
        BlockFormat::Q2_K => 80,
        BlockFormat::Q3_K => 108,
        BlockFormat::Q6_K => 208,
        _ => 0,
    };
    for block in bytes.chunks_exact_mut(shape.bytes) {
        for i in 0..shape.factors {
            let scale = random.float() / 8.0;
            if shape.single {
                block[first + 4 * i..][..4].copy_from_slice(&scale.to_le_bytes());
            } else {
                block[first + 2 * i..][..2].copy_from_slice(&f32_to_f16(scale).to_le_bytes());
            }
        }
        if shape.scales == Scales::Exponent {
            block[0] = 120 + block[0] % 8;
        } else if shape.single && shape.codes != Codes::E4m3 && shape.bits == 4 {
            // No file's block: a byte for each element, and before them for a zero point.
            for q in &mut block[shape.factor_bytes()..] {
                *q &= 15;
            }
        }
    }
    bytes
}

fn kinds() -> impl Strategy<Value = Packed> {
    let plain = [DType::F32, DType::Bf16, DType::F16].map(Packed::Plain);
    let blocks = BlockFormat::ALL.iter().copied().map(Packed::Blocks);
    select(plain.into_iter().chain(blocks).collect::<Vec<_>>())
}

fn dtypes() -> impl Strategy<Value = DType> {
    select(vec![DType::F32, DType::Bf16, DType::F16])
}

fn rounding(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 1e-5,
        DType::Bf16 => 4e-3,
        DType::F16 => 1e-3,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..Default::default() })]

    #[test]
    fn linear(
        kind in kinds(),
        (m, n, groups, odd) in (0usize..20, 1usize..70, 1usize..12, 0usize..32),
        (x_type, y_type, bias_type) in (dtypes(), dtypes(), dtypes()),
        (gap, offset, turned) in (0usize..5, 0usize..8, any::<bool>()),
        activations in select(&[Rounding::Exact, Rounding::Fine, Rounding::Coarse]),
        seed in any::<u64>(),
    ) {
        let plain = kind.dtype().is_some();
        let k = match kind.elements() {
            1 => groups * 32 - odd,
            elements => groups.div_ceil(elements / 32) * elements,
        };
        let mut random = Random(seed);
        let source = weight_rows(kind, n, k, &mut random);
        let order: Vec<i64> = (0..n as i64).rev().collect();
        let x = Matrix::new(x_type, m, k, gap, offset).filled(random.bits());
        let bias = Matrix::new(bias_type, 1, n, 0, offset).filled(random.bits());
        for level in Level::available() {
            let mut w = Linear::new(level, k, &[(kind, n)]).expect("a valid shape");
            // SAFETY: `source` holds n rows.
            unsafe { w.pack_rows(0, n, source.as_ptr(), kind, Some(&order)) }.expect("it fits");
            if turned {
                let columns: Vec<i64> = (0..k as i64).map(|i| (i + 7) % k as i64).collect();
                w.set_columns(&columns).expect("a permutation");
            }
            let weights: Vec<Vec<f32>> = (0..n)
                .map(|row| {
                    let mut out = vec![0.0; k];
                    w.read_row(row, 1.0, &mut out);
                    out
                })
                .collect();
            let mut y = Matrix::new(y_type, m, n, gap, offset);
            // SAFETY: the matrices are of these sizes.
            unsafe { w.forward(x.read(), Some(bias.read()), y.write(), activations) };
            let error = y.error(|row, col| {
                let dot: f64 = (0..k).map(|i| x.get(row, i) * f64::from(weights[col][i])).sum();
                dot + bias.get(0, col)
            });
            // Several rows are rounded to int16 there.
            let wide = ["avx2", "avxvnni"].contains(&level.name()) && m >= 4;
            let bound = match activations {
                _ if plain => 1e-5,
                Rounding::Exact => 1e-5,
                Rounding::Fine if wide => 1e-3,
                Rounding::Fine => 2e-2,
                Rounding::Coarse => 2e-1,
            } + rounding(y_type);
            // Products of many rows may round activations to pieces of bfloat16.
            prop_assert!(error < bound + 5e-5, "{}: {error}", level.name());

            let ids: Vec<i32> = (0..n as i32).step_by(3).collect();
            let mut rows = Matrix::new(y_type, ids.len(), k, gap, offset);
            // SAFETY: the matrix is of this size.
            unsafe { w.embedding(&ids, 2.0, rows.write()) }.expect("ids are in range");
            let error = rows.error(|row, col| 2.0 * f64::from(weights[3 * row][col]));
            prop_assert!(error < rounding(y_type), "{}: {error}", level.name());
        }
    }

    #[test]
    fn norms_and_activations(
        (m, d) in (0usize..6, 1usize..90),
        (x_type, y_type, w_type) in (dtypes(), dtypes(), dtypes()),
        (gap, offset, seed) in (0usize..5, 0usize..8, any::<u64>()),
    ) {
        let x = Matrix::new(x_type, m, 2 * d, gap, offset).filled(seed);
        let weight = Matrix::new(w_type, 1, 2 * d, 0, offset).filled(seed + 1);
        for level in Level::available() {
            let mut y = Matrix::new(y_type, m, 2 * d, gap, offset);
            let kind = Norm::Rms { weight_offset: 1.0 };
            // SAFETY: the matrices are of these sizes.
            unsafe { norm(level, x.read(), None, weight.read(), kind, 1e-5, y.write()) };
            let error = y.error(|row, col| {
                let squares: f64 = (0..2 * d).map(|i| x.get(row, i).powi(2)).sum();
                let scale = (squares / (2 * d) as f64 + 1e-5).sqrt();
                x.get(row, col) / scale * (1.0 + weight.get(0, col))
            });
            prop_assert!(error < rounding(y_type), "norm, {}: {error}", level.name());

            let mut y = Matrix::new(x_type, m, d, gap, offset);
            // SAFETY: the matrices are of these sizes.
            unsafe { activation(level, Activation::Silu, true, x.read(), y.write()) };
            let error = y.error(|row, col| {
                let gate = x.get(row, col);
                gate / (1.0 + (-gate).exp()) * x.get(row, d + col)
            });
            prop_assert!(error < rounding(x_type), "silu, {}: {error}", level.name());
        }
    }

    #[test]
    fn attention(
        (group, kv_heads, dim) in (1usize..4, 1usize..3, select(vec![8usize, 40, 64])),
        lens in prop::collection::vec((1usize..4, 0usize..40), 0..4),
        (cache_type, block_size) in (dtypes(), select(vec![4usize, 16])),
        (offset, seed) in (0usize..8, any::<u64>()),
    ) {
        // Requests of some new tokens after some old ones.
        let heads = group * kv_heads;
        let tokens: usize = lens.iter().map(|l| l.0).sum();
        let seq_lens: Vec<i32> = lens.iter().map(|l| (l.0 + l.1) as i32).collect();
        let mut starts = vec![0i32];
        for l in &lens {
            starts.push(starts[starts.len() - 1] + l.0 as i32);
        }
        let max_blocks = 44usize.div_ceil(block_size);
        let blocks = lens.len() * max_blocks;
        let table: Vec<i32> = (0..blocks as i32).rev().collect();
        let slots: Vec<i32> = (0..lens.len() as i32).collect();
        let q = Matrix::new(DType::F32, tokens, heads * dim, 0, offset).filled(seed);
        let rows = blocks * kv_heads * block_size;
        let mut keys = Matrix::new(cache_type, rows, dim, 0, 0).filled(seed + 1);
        let mut values = Matrix::new(cache_type, rows, dim, 0, 0).filled(seed + 2);
        for level in Level::available() {
            let cache = |m: &mut Matrix| Cache {
                ptr: m.write().ptr,
                dtype: CacheType::Float(cache_type),
                num_blocks: blocks,
                num_kv_heads: kv_heads,
                block_size,
                head_dim: dim,
                block_stride: kv_heads * block_size * dim,
            };
            let mut out = Matrix::new(DType::F32, tokens, heads * dim, 0, offset);
            let args = AttentionArgs {
                q: q.read(),
                k_cache: cache(&mut keys),
                v_cache: cache(&mut values),
                block_table: &table,
                max_blocks,
                slots: &slots,
                seq_lens: &seq_lens,
                query_start_loc: &starts,
                scale: 0.3,
                sliding_window: 0,
                softcap: 0.0,
                causal: true,
                sinks: &[],
                slopes: &[],
                shares: &[],
                out: out.write(),
            };
            // SAFETY: everything is of these sizes.
            unsafe { paged_attention(level, args) }.expect("indices are in range");
            let error = out.error(|row, col| {
                let request = starts.iter().rposition(|&s| s as usize <= row).expect("starts at 0");
                let (new, old) = lens[request];
                let seen = old + row - starts[request] as usize + 1;
                assert!(seen <= new + old);
                let (head, column) = (col / dim, col % dim);
                let at = |key: usize| {
                    let block = table[request * max_blocks + key / block_size] as usize;
                    (block * kv_heads + head / group) * block_size + key % block_size
                };
                let weights: Vec<f64> = (0..seen)
                    .map(|key| {
                        let dot: f64 = (0..dim)
                            .map(|i| q.get(row, head * dim + i) * keys.get(at(key), i))
                            .sum();
                        (0.3 * dot).exp()
                    })
                    .collect();
                let sum: f64 = weights.iter().sum();
                let weighted: f64 = (0..seen).map(|key| weights[key] * values.get(at(key), column)).sum();
                weighted / sum
            });
            // Queries and probabilities may be rounded to what the cache holds.
            let bound = if cache_type == DType::Bf16 { 2e-2 } else { 1e-5 };
            prop_assert!(error < bound, "{}: {error}", level.name());
        }
    }
}
