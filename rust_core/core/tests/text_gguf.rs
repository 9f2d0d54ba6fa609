//! No bytes make the GGUF parser panic or take memory beyond a small multiple of their number.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use octavo_core::files::gguf::{GgufFile, Value};
use octavo_core::text::tokenizer::Tokenizer;
use octavo_formats::kinds::TENSOR_KINDS;
use proptest::prelude::*;
use proptest::sample::Index;

thread_local! {
    /// This thread's largest single allocation since it was last reset.
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

struct Watched;

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.set(LARGEST.get().max(layout.size()));
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise, passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Watched = Watched;

#[derive(Default)]
struct Writer(Vec<u8>);

impl Writer {
    fn u32(&mut self, n: u32) -> &mut Self {
        self.0.extend(n.to_le_bytes());
        self
    }

    fn u64(&mut self, n: u64) -> &mut Self {
        self.0.extend(n.to_le_bytes());
        self
    }

    fn text(&mut self, text: &str) -> &mut Self {
        self.u64(text.len() as u64).0.extend(text.as_bytes());
        self
    }

    fn strings(&mut self, key: &str, items: &[&str]) -> &mut Self {
        self.text(key).u32(9).u32(8).u64(items.len() as u64);
        for item in items {
            self.text(item);
        }
        self
    }
}

/// A small file with every kind of value, a tokenizer, and a tensor of every kind.
fn valid(model: &str) -> Vec<u8> {
    let mut w = Writer::default();
    w.0.extend(b"GGUF");
    w.u32(3).u64(TENSOR_KINDS.len() as u64).u64(11);
    w.text("general.architecture").u32(8).text("llama");
    w.text("general.alignment").u32(4).u32(32);
    w.text("a.bool").u32(7).0.push(1);
    w.text("a.float").u32(12).0.extend(1.5f64.to_le_bytes());
    w.text("a.signed").u32(11).0.extend((-3i64).to_le_bytes());
    // An array of arrays of bytes.
    w.text("a.nested").u32(9).u32(9).u64(2);
    w.u32(0).u64(2).0.extend([1, 2]);
    w.u32(0).u64(1).0.push(3);
    w.text("tokenizer.ggml.model").u32(8).text(model);
    let tokens = ["a", "b", "ab", "<s>", "Ġ"];
    w.strings("tokenizer.ggml.tokens", &tokens);
    w.strings("tokenizer.ggml.merges", &["a b"]);
    w.text("tokenizer.ggml.scores").u32(9).u32(6).u64(5);
    for score in [0f32, -1.0, -2.0, 0.0, -3.0] {
        w.0.extend(score.to_le_bytes());
    }
    w.text("tokenizer.ggml.token_type").u32(9).u32(5).u64(5);
    for kind in [1, 1, 1, 3, 1] {
        w.u32(kind);
    }
    let mut offset = 0u64;
    for kind in TENSOR_KINDS {
        w.text(kind.name)
            .u32(2)
            .u64(256)
            .u64(2)
            .u32(kind.id)
            .u64(offset);
        offset += (512 / kind.block_len * kind.block_bytes).next_multiple_of(32);
    }
    let header = w.0.len().next_multiple_of(32);
    w.0.resize(header + offset as usize, 0x5a);
    w.0
}

/// Ask everything of a file; whether it parsed.
fn visit(bytes: Vec<u8>) -> Result<(), String> {
    let num_bytes = bytes.len();
    LARGEST.set(0);
    let parsed = GgufFile::from_bytes("small.gguf", bytes);
    let largest = LARGEST.get();
    assert!(
        largest <= 8 * num_bytes + 4096,
        "{largest} bytes for a file of {num_bytes}"
    );
    let file = match parsed {
        Ok(file) => file,
        Err(error) => {
            let message = error.to_string();
            assert!(message.starts_with("small.gguf: "), "{message}");
            assert!(!message.contains('\n') && message.len() < 500, "{message}");
            return Err(message);
        }
    };
    for (key, value) in file.metadata() {
        let _ = (file.str(key), file.unsigned(key), file.bool(key));
        let _ = (file.strings(key), file.floats(key), file.integers(key));
        if let Value::Array(array) = value {
            assert!(file.items(array).len() <= num_bytes);
        }
    }
    for tensor in file.tensors() {
        assert_eq!(
            file.data(&tensor.name).unwrap().len() as u64,
            tensor.num_bytes
        );
        if tensor.num_elements <= 1 << 16 {
            let mut out = vec![0.0; tensor.num_elements as usize];
            let _ = file.dequantize(&tensor.name, &mut out);
        }
    }
    if let Ok(tokenizer) = Tokenizer::from_gguf(&file) {
        let _ = tokenizer.encode("ab <s> b", true);
    }
    Ok(())
}

#[test]
fn the_valid_file_is_read() {
    for model in ["gpt2", "llama"] {
        let bytes = valid(model);
        visit(bytes.clone()).unwrap();
        let file = GgufFile::from_bytes("small.gguf", bytes).unwrap();
        assert_eq!(file.tensors().len(), TENSOR_KINDS.len());
        assert_eq!(file.tensor("F32").unwrap().shape, [2, 256]);
        assert_eq!(file.str("general.architecture").unwrap(), "llama");
        assert_eq!(file.get("a.signed"), Some(&Value::Signed(-3)));
        assert_eq!(file.get("a.float"), Some(&Value::Float(1.5)));
        assert_eq!(file.bool("a.bool"), Some(true));
        let tokenizer = Tokenizer::from_gguf(&file).unwrap();
        let ids = tokenizer.encode("ab<s>", false).unwrap();
        assert_eq!(ids.last(), Some(&3));
        assert!(ids.contains(&2));
    }
}

#[test]
fn messages_say_what_is_wrong_and_where() {
    let file = valid("gpt2");
    let with = |at: usize, patch: &[u8]| {
        let mut bytes = file.clone();
        bytes[at..at + patch.len()].copy_from_slice(patch);
        visit(bytes).unwrap_err()
    };
    let find = |text: &str| {
        file.windows(text.len())
            .position(|w| w == text.as_bytes())
            .unwrap()
    };
    assert!(with(0, b"GGML").contains("not a GGUF file"));
    assert!(with(4, &[9]).contains("version 9"));
    assert!(with(4, &[0, 0, 0, 3]).contains("big-endian"));
    assert!(with(8, &[0xff; 8]).contains("tensors"));
    assert!(with(16, &[0xff; 8]).contains("metadata keys"));
    let bool_at = find("a.bool");
    assert!(with(bool_at + 6, &[99]).contains("key \"a.bool\": has the unknown value type 99"));
    assert!(with(bool_at + 10, &[7]).contains("key \"a.bool\": has 7 for a boolean"));
    let q8 = find("Q8_0");
    assert!(with(q8 + 4, &[200]).contains("tensor \"Q8_0\": has 200 dimensions"));
    assert!(with(q8 + 8, &[9, 0]).contains("no whole number of Q8_0 blocks"));
    assert!(with(q8 + 16, &[0xff; 8]).contains("tensor \"Q8_0\""));
    assert!(with(q8 + 24, &[77]).contains("unknown kind 77"));
    assert!(with(q8 + 28, &[1]).contains("not a multiple of 32"));
    let cut = visit(file[..file.len() - 64].to_vec()).unwrap_err();
    assert!(cut.contains("pass the end of the file"), "{cut}");
    assert!(with(q8, b"Q5_1").contains("appears twice"));
    let error = GgufFile::from_bytes("x", file)
        .unwrap()
        .tensor("nope")
        .unwrap_err();
    assert_eq!(error.to_string(), "x: no tensor is named \"nope\"");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..Default::default() })]

    #[test]
    fn damaged_files_fail_in_order(
        model in prop::sample::select(vec!["bert", "gemma4", "gpt2", "llama", "t5"]),
        patches in prop::collection::vec((any::<Index>(), any::<u8>(), 0..4u8), 1..8),
        cut in any::<Index>(),
        is_cut in any::<bool>(),
        in_header in any::<bool>(),
    ) {
        let mut bytes = valid(model);
        let reach = if in_header { 2200.min(bytes.len()) } else { bytes.len() };
        for (at, byte, how) in patches {
            let at = at.index(reach);
            bytes[at] = match how {
                0 => byte,
                1 => bytes[at] ^ (1 << (byte % 8)),
                2 => 0xff,
                _ => bytes[at].wrapping_add(1),
            };
        }
        if is_cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        let _ = visit(bytes);
    }

    #[test]
    fn noise_is_refused(mut bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = visit(bytes.clone());
        let magic = b"GGUF\x03\0\0\0";
        let len = magic.len().min(bytes.len());
        bytes[..len].copy_from_slice(&magic[..len]);
        let _ = visit(bytes);
    }
}
