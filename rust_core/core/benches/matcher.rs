//! Costs of grammars: compiling one, opening a matcher, a mask, a token.
//!
//! Over the vocabulary of the GGUF file that OCTAVO_BENCH_GGUF names; without one nothing is measured.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use octavo_core::files::gguf::GgufFile;
use octavo_core::text::matcher::{
    GrammarKind, GrammarOptions, GrammarSource, Grammars, GrammarsConfig, Matcher,
};
use octavo_core::text::tokenizer::Tokenizer;

const SCHEMA: &str = r#"{"type": "object", "properties": {
    "name": {"type": "string", "maxLength": 40}, "age": {"type": "integer", "minimum": 0},
    "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}},
    "email": {"type": "string", "format": "email"}, "active": {"type": "boolean"}},
    "required": ["name", "age", "tags", "email", "active"], "additionalProperties": false}"#;
const TEXT: &str = r#"{"name": "Ada Lovelace", "age": 36, "tags": ["red", "blue"],
    "email": "ada@example.org", "active": true}"#;

fn source(number: usize) -> GrammarSource {
    GrammarSource {
        kind: GrammarKind::Json,
        // Each number is another grammar.
        text: SCHEMA.replace("40", &(40 + number).to_string()),
        options: GrammarOptions::default(),
    }
}

fn matchers(c: &mut Criterion) {
    let Ok(path) = std::env::var("OCTAVO_BENCH_GGUF") else {
        eprintln!("OCTAVO_BENCH_GGUF is not set: no benches of matchers");
        return;
    };
    let file = GgufFile::open(path).expect("OCTAVO_BENCH_GGUF is a GGUF file");
    let tokenizer = Arc::new(Tokenizer::from_gguf(&file).unwrap());
    let vocab_size = tokenizer.vocab_size();
    let ids = tokenizer.encode(TEXT, false).unwrap();
    let config = GrammarsConfig::default();
    let grammars = Grammars::new(tokenizer, vocab_size, &[2], config);
    let grammar = grammars.compile(&source(0)).unwrap();

    let mut number = 0;
    c.bench_function("compile_schema", |b| {
        b.iter(|| {
            number += 1;
            grammars.compile(&source(number)).unwrap()
        });
    });
    c.bench_function("open", |b| b.iter(|| black_box(grammar.open())));
    // A whole text: a mask and a token each time.
    let mut row = vec![0; vocab_size.div_ceil(32)];
    let mut follow = |mut matcher: Matcher| {
        for &id in &ids {
            matcher.fill_mask(&mut row).unwrap();
            matcher.accept(id).unwrap();
        }
        matcher
    };
    let name = format!("masks_and_tokens_{}", ids.len());
    c.bench_function(&format!("{name}_first"), |b| {
        b.iter_batched(|| grammar.open(), &mut follow, BatchSize::SmallInput);
    });
    follow(grammar.open()).close();
    c.bench_function(&format!("{name}_learned"), |b| {
        b.iter_batched(|| grammar.open(), &mut follow, BatchSize::SmallInput);
    });
}

criterion_group!(benches, matchers);
criterion_main!(benches);
