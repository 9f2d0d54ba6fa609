//! Speed of the CPU kernels without Python: `cargo bench --bench cpu`; OCTAVO_CPU_LEVEL=avx512 etc.
//! chooses the instruction set, `-- Q4_K Q6_K` the kinds.

use std::time::Instant;

use octavo_cpu::float::DType;
use octavo_cpu::level::Level;
use octavo_cpu::linear::{Linear, Packed, Rounding};
use octavo_cpu::pool;
use octavo_cpu::simd::{Kernel, Simd};
use octavo_cpu::tensor::{Rows, RowsMut};

/// The best of several runs of `f`, in seconds.
fn best(mut f: impl FnMut()) -> f64 {
    let start = Instant::now();
    let mut best = f64::INFINITY;
    let mut runs = 0;
    while runs < 5 || start.elapsed().as_secs_f64() < 0.3 {
        let t = Instant::now();
        f();
        best = best.min(t.elapsed().as_secs_f64());
        runs += 1;
    }
    best
}

/// Reads memory as a kernel does: whole vectors, several sums.
struct Sweep<'a>(&'a [f32]);

impl Kernel for Sweep<'_> {
    type Out = f32;
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) -> f32 {
        let mut sums = [s.zero(); 8];
        for part in self.0.chunks_exact(8 * S::LANES) {
            for (i, sum) in sums.iter_mut().enumerate() {
                // SAFETY: the part holds 8 vectors.
                *sum = s.max(*sum, unsafe { s.load(part.as_ptr().add(i * S::LANES)) });
            }
        }
        s.hmax(sums.into_iter().fold(s.zero(), |a, b| s.max(a, b)))
    }
}

/// GB/s of reading `bytes` again and again, on all threads.
fn read_bandwidth(level: Level, bytes: usize) -> f64 {
    let buffer = vec![1f32; bytes / 4];
    let step = 1 << 15;
    let t = best(|| {
        pool::run(buffer.len() / step, |task| {
            // SAFETY: the slice vouches for its memory.
            let high = unsafe { level.run(Sweep(&buffer[task * step..(task + 1) * step])) };
            std::hint::black_box(high);
        });
    });
    buffer.len() as f64 * 4.0 / t / 1e9
}

fn random_bytes(len: usize) -> Vec<u8> {
    let mut state = 1u64;
    (0..len)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 56) as u8
        })
        .collect()
}

fn kind(name: &str) -> Packed {
    Packed::parse(name).expect("a kind that is read")
}

/// A weight's rows as a file has them: small numbers of every kind, none of them subnormal: those
/// take many times as long.
fn file_rows(kind: Packed, n: usize, k: usize) -> Vec<u8> {
    let mut rows = random_bytes(kind.file_row_bytes(k) * n);
    rows.iter_mut().for_each(|b| *b = *b & 0x0b | 0x30);
    rows
}

fn weight(level: Level, kind: Packed, n: usize, k: usize, source: &[u8]) -> Linear {
    assert_eq!(source.len(), kind.file_row_bytes(k) * n);
    let mut w = Linear::new(level, k, &[(kind, n)]).expect("a valid shape");
    // SAFETY: `source` holds n rows.
    unsafe { w.pack_rows(0, n, source.as_ptr(), kind, None) }.expect("it fits");
    w
}

/// Time and bandwidth of one row through all matrices of SmolLM2-135M's Q4_1 file.
fn one_token(level: Level) {
    const LAYER: [(usize, usize); 4] = [(960, 576), (576, 576), (3072, 576), (576, 1536)];
    const HEAD: (usize, usize) = (49_152, 576);
    let sources = LAYER.map(|(n, k)| file_rows(kind("Q4_1"), n, k));
    let layer = LAYER.iter().zip(&sources);
    let layers = layer.cycle().take(30 * LAYER.len());
    let mut weights: Vec<_> = layers
        .map(|(&(n, k), source)| weight(level, kind("Q4_1"), n, k, source))
        .collect();
    let source = file_rows(kind("Q8_0"), HEAD.0, HEAD.1);
    weights.push(weight(level, kind("Q8_0"), HEAD.0, HEAD.1, &source));
    let x = vec![0.5f32; 1536];
    let mut y = vec![0f32; HEAD.0];
    let t = best(|| {
        for w in &weights {
            // SAFETY: x and y hold the largest of these sizes.
            unsafe {
                w.forward(
                    Rows::new(x.as_ptr().cast(), DType::F32, 1, w.k()),
                    None,
                    RowsMut::new(y.as_mut_ptr().cast(), DType::F32, 1, w.n()),
                    Rounding::Fine,
                );
            }
        }
    });
    let nbytes: usize = weights.iter().map(Linear::nbytes).sum();
    println!(
        "all matrices of SmolLM2-135M, Q4_1, one row: {:.2} ms, {:.1} GB/s",
        t * 1e3,
        nbytes as f64 / t / 1e9
    );
}

fn main() {
    let level = Level::preferred().expect("a level of this machine");
    println!("level {}, threads {}", level.name(), pool::num_threads());
    let mut empty = 0.0;
    for _ in 0..3 {
        let t = Instant::now();
        for _ in 0..10_000 {
            pool::run(8, |i| {
                std::hint::black_box(i);
            });
        }
        empty = t.elapsed().as_secs_f64() / 10_000.0;
    }
    println!("fork and join: {:.2} us", empty * 1e6);
    // As much as the weights below, and so much that no cache helps.
    for mib in [96, 1024] {
        let speed = read_bandwidth(level, mib << 20);
        println!("read {mib} MiB: {speed:.1} GB/s");
    }
    one_token(level);
    let only: Vec<String> = std::env::args().skip(1).collect();
    let only: Vec<&String> = only.iter().filter(|name| !name.starts_with('-')).collect();
    for name in [
        "Q2_K", "Q3_K", "Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_K", "Q6_K", "Q8_0", "IQ4_NL", "IQ4_XS",
        "MXFP4", "INT4_32", "INT4_128", "INT8_32", "INT8_128", "FP4_16", "NF4_64", "FP8_32",
        "FP8_128", "BF16", "F16", "F32",
    ] {
        let kind = kind(name);
        if !only.is_empty() && !only.iter().any(|o| *o == name) {
            continue;
        }
        for (n, k) in [(3072, 576), (576, 1536)] {
            let k: usize = k;
            let k = k.next_multiple_of(kind.elements());
            // Enough copies that they do not fit the last-level cache.
            let copies = (96 << 20) / (kind.file_row_bytes(k) * n) + 1;
            let source = file_rows(kind, n, k);
            let weights: Vec<_> = (0..copies)
                .map(|_| weight(level, kind, n, k, &source))
                .collect();
            for (rounding, label) in [
                (Rounding::Fine, ""),
                (Rounding::Coarse, "8 bits"),
                (Rounding::Exact, "exact"),
            ] {
                if rounding != Rounding::Fine && kind.elements() == 1 {
                    continue;
                }
                for m in [1usize, 4, 8, 16, 64, 128, 512] {
                    let x = vec![0.5f32; m * k];
                    let mut y = vec![0f32; m * n];
                    let uses = if m == 1 { copies } else { 1 };
                    let t = best(|| {
                        for w in &weights[..uses] {
                            // SAFETY: x and y are of these sizes.
                            unsafe {
                                w.forward(
                                    Rows::new(x.as_ptr().cast(), DType::F32, m, k),
                                    None,
                                    RowsMut::new(y.as_mut_ptr().cast(), DType::F32, m, n),
                                    rounding,
                                );
                            }
                        }
                    }) / uses as f64;
                    println!(
                        "{name:5} {:6} {m:4} x {n:5} x {k:5}: {:9.1} us {:7.1} GFLOP/s {:6.1} GB/s",
                        label,
                        t * 1e6,
                        2e-9 * (m * n * k) as f64 / t,
                        weights[0].nbytes() as f64 / t / 1e9
                    );
                }
            }
        }
    }
}
