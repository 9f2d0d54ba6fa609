//! Costs of the text half: a token, an encoding, a chunk, a weight.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use octavo_core::files::gguf::GgufFile;
use octavo_core::text::detokenizer::Detokenizer;
use octavo_core::text::sse::{SseTemplate, write_chunk};
use octavo_core::text::tokenizer::Tokenizer;
use octavo_formats::dequantize::dequantize;
use octavo_formats::kinds::TENSOR_KINDS;

const TEXT: &str = "The octavo is a book of sixteen pages: \"eight leaves\", folded 3 times. \
    Das Wörterbuch, 漢字かな交じり文 and 😀 emoji take more bytes a token.\n";

/// The model named by OCTAVO_BENCH_GGUF; the benches that need a vocabulary are skipped without.
fn model() -> Option<GgufFile> {
    let path = std::env::var("OCTAVO_BENCH_GGUF").ok()?;
    Some(GgufFile::open(path).expect("OCTAVO_BENCH_GGUF is a GGUF file"))
}

fn tokens(c: &mut Criterion) {
    let Some(file) = model() else {
        eprintln!("OCTAVO_BENCH_GGUF is not set: no tokenizer benches");
        return;
    };
    c.bench_function("tokenizer_from_gguf", |b| {
        b.iter(|| Tokenizer::from_gguf(&file).unwrap());
    });
    let tokenizer = Arc::new(Tokenizer::from_gguf(&file).unwrap());
    let text = TEXT.repeat(50);
    let mut group = c.benchmark_group("encode");
    group.throughput(Throughput::Bytes(text.len() as u64));
    group.bench_function("8kb", |b| {
        b.iter(|| tokenizer.encode(&text, false).unwrap())
    });
    group.finish();

    let ids = tokenizer.encode(&text, false).unwrap();
    let mut group = c.benchmark_group("detokenize");
    group.throughput(Throughput::Elements(ids.len() as u64));
    for (name, stops) in [
        ("no_stop", vec![]),
        ("one_stop", vec!["\n\n".to_owned()]),
        (
            "four_stops",
            ["User:", "\n\n", "</s>", "### "]
                .map(str::to_owned)
                .to_vec(),
        ),
    ] {
        let mut detokenizer = Detokenizer::new(Arc::clone(&tokenizer), stops, false, true);
        let mut out = String::new();
        group.bench_function(name, |b| {
            b.iter(|| {
                out.clear();
                for &id in &ids {
                    black_box(detokenizer.push(id, &mut out));
                }
            });
        });
    }
    group.finish();
}

fn chunks(c: &mut Criterion) {
    let part = |len: usize| vec![b'x'; len].into();
    let template = SseTemplate {
        around_text: [part(150), part(90)],
        ..SseTemplate::default()
    };
    let mut out = Vec::new();
    c.bench_function("write_chunk", |b| {
        b.iter(|| {
            out.clear();
            write_chunk(&template, black_box(" \"token\"\n"), &mut out);
        });
    });
}

fn weights(c: &mut Criterion) {
    let num_elements = 1 << 22;
    let mut out = vec![0.0; num_elements];
    let mut group = c.benchmark_group("dequantize");
    group.throughput(Throughput::Elements(num_elements as u64));
    for name in [
        "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K",
    ] {
        let kind = *TENSOR_KINDS.iter().find(|kind| kind.name == name).unwrap();
        let num_bytes = num_elements as u64 / kind.block_len * kind.block_bytes;
        let data = vec![0x35; num_bytes as usize];
        group.bench_function(name, |b| {
            b.iter(|| dequantize(kind, &data, &mut out).unwrap())
        });
    }
    group.finish();
}

criterion_group!(benches, tokens, chunks, weights);
criterion_main!(benches);
