//! Whatever the decoder and however a sequence is cut, the pieces make the one-shot text.

use std::sync::{Arc, LazyLock};

use octavo_core::text::detokenizer::Detokenizer;
use octavo_core::text::tokenizer::Tokenizer;
use proptest::prelude::*;
use proptest::sample::select;
use serde_json::{Value, json};

/// Tokens that make and break characters, words and stop strings.
fn vocabulary(byte_tokens: bool) -> Vec<String> {
    let mut tokens: Vec<String> = if byte_tokens {
        (0..=255).map(|byte| format!("<0x{byte:02X}>")).collect()
    } else {
        // GPT-2's alphabet: printable bytes as they are, the others from U+0100 on.
        let mut next = 256;
        (0..=255u8)
            .map(|byte| match byte {
                b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte).to_string(),
                _ => {
                    next += 1;
                    char::from_u32(next - 1).unwrap().to_string()
                }
            })
            .collect()
    };
    let words = [
        "ab", "abc", "bca", "##a", "##b", "a</w>", "b</w>", "Ġa", "▁a", "▁▁", "▁", "a▁b", "Ċ",
        "åĲ", "ðŁĺ", "Ģ", "叫", "é", "don", "'t", ".", " .", "|", "<pad>", "<0xZZ>", "<0x+5>",
    ];
    for word in words {
        if !tokens.iter().any(|token| token == word) {
            tokens.push(word.to_owned());
        }
    }
    tokens
}

fn tokenizer(byte_tokens: bool, decoder: Value) -> Arc<Tokenizer> {
    let tokens = vocabulary(byte_tokens);
    let num_tokens = tokens.len();
    let vocab: serde_json::Map<String, Value> = tokens
        .into_iter()
        .enumerate()
        .map(|(id, token)| (token, json!(id)))
        .collect();
    let added = |id: usize, content: &str, special: bool| {
        json!({"id": id, "content": content, "special": special, "single_word": false,
               "lstrip": false, "rstrip": false, "normalized": false})
    };
    let file = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [
            added(num_tokens, "<|end|>", true),
            added(num_tokens + 1, "<user>", false),
            // Ids may have holes.
            added(num_tokens + 7, "<late>", true),
        ],
        "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": decoder,
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "unk_token": null},
    });
    let inner = tokenizers::Tokenizer::from_bytes(file.to_string()).unwrap();
    Arc::new(Tokenizer::new(inner))
}

/// Every decoder of the crate, and the sequences that models ship with.
static TOKENIZERS: LazyLock<Vec<Arc<Tokenizer>>> = LazyLock::new(|| {
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
                            "use_regex": true});
    let replace = json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "});
    let fallback = json!({"type": "ByteFallback"});
    let fuse = json!({"type": "Fuse"});
    let strip = json!({"type": "Strip", "content": " ", "start": 1, "stop": 0});
    let metaspace = |scheme: &str| json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": true});
    let sequence = |steps: &[&Value]| json!({"type": "Sequence", "decoders": steps});
    vec![
        tokenizer(false, byte_level.clone()),
        tokenizer(false, sequence(&[&byte_level, &fuse, &strip])),
        tokenizer(true, sequence(&[&replace, &fallback, &fuse, &strip])),
        tokenizer(true, sequence(&[&replace, &fallback, &fuse])),
        tokenizer(true, sequence(&[&metaspace("first"), &fallback])),
        tokenizer(true, metaspace("always")),
        tokenizer(true, metaspace("never")),
        tokenizer(
            true,
            json!({"type": "WordPiece", "prefix": "##", "cleanup": true}),
        ),
        tokenizer(
            true,
            json!({"type": "WordPiece", "prefix": "##", "cleanup": false}),
        ),
        tokenizer(true, json!({"type": "BPEDecoder", "suffix": "</w>"})),
        tokenizer(true, Value::Null),
        tokenizer(
            true,
            json!({"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|",
                   "cleanup": true}),
        ),
    ]
});

/// Ids around the vocabulary, mostly of tokens that interact.
fn ids() -> impl Strategy<Value = Vec<u32>> {
    let id = prop_oneof![
        4 => 97..100u32, // a, b, c
        2 => 0..256u32,
        2 => select(vec![0xe5, 0x8f, 0xab, 0xf0, 0x9f, 0x98, 0x80, 0xc3, 0x20, 0x0a]),
        4 => 256..300u32,
        1 => any::<u32>(),
    ];
    prop::collection::vec(id, 0..40)
}

/// Few letters, so that stop strings begin again and again.
fn letters() -> impl Strategy<Value = Vec<u32>> {
    prop::collection::vec(97..100u32, 0..40)
}

fn stops() -> impl Strategy<Value = Vec<String>> {
    let stop = prop_oneof![
        "[ab]{2,6}",
        "[abc]{1,4}",
        select(vec![
            "\u{fffd}", "a b", " ", "\n", "叫", "é", "aab", "ba.", "", "<|end|>"
        ])
        .prop_map(str::to_owned),
    ];
    prop::collection::vec(stop, 0..4)
}

/// The whole text, cut at the stop string that is complete first, then the longest.
fn cut(text: &str, stops: &[String], include: bool) -> (String, Option<usize>) {
    let mut best: Option<(usize, std::cmp::Reverse<usize>, usize)> = None;
    for (index, stop) in stops
        .iter()
        .enumerate()
        .filter(|(_, stop)| !stop.is_empty())
    {
        // The first end, not the first start: occurrences of one string keep their order.
        if let Some(start) = text.find(stop.as_str()) {
            let found = (start + stop.len(), std::cmp::Reverse(stop.len()), index);
            best = Some(best.map_or(found, |best| best.min(found)));
        }
    }
    match best {
        None => (text.to_owned(), None),
        Some((end, std::cmp::Reverse(len), index)) => {
            let end = if include { end } else { end - len };
            (text[..end].to_owned(), Some(index))
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..Default::default() })]

    #[test]
    fn pieces_make_the_one_shot_text(
        which in 0..12usize,
        ids in prop_oneof![ids(), letters()],
        stops in stops(),
        include in any::<bool>(),
        skip_special in any::<bool>(),
    ) {
        let tokenizer = &TOKENIZERS[which];
        let whole = tokenizer.decode(&ids, skip_special).unwrap();
        let (expected, expected_stop) = cut(&whole, &stops, include);

        let mut detokenizer =
            Detokenizer::new(Arc::clone(tokenizer), stops, include, skip_special);
        let mut text = String::new();
        let mut found = None;
        for id in ids {
            let len = text.len();
            let was_over = found.is_some();
            let stop = detokenizer.push(id, &mut text);
            prop_assert!(!was_over || (stop.is_none() && text.len() == len));
            prop_assert!(expected.starts_with(&text), "{text:?} is no beginning of {expected:?}");
            found = found.or(stop);
        }
        found = found.or(detokenizer.finish(&mut text));
        prop_assert_eq!(text, expected);
        prop_assert_eq!(found, expected_stop);
    }

    #[test]
    fn a_middle_token_adds_its_token_bytes(which in 0..4usize, ids in ids()) {
        let tokenizer = &TOKENIZERS[which];
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| tokenizer.token_bytes(id)).collect();
        if let Ok(text) = String::from_utf8(bytes) {
            // These decoders drop at most one leading space.
            let whole = tokenizer.decode(&ids, false).unwrap();
            prop_assert!(text == whole || text == format!(" {whole}"), "{text:?} {whole:?}");
        }
    }
}

#[test]
fn text_leaves_as_soon_as_it_is_certain() {
    let byte_level = &TOKENIZERS[0];
    let mut detokenizer =
        Detokenizer::new(Arc::clone(byte_level), vec!["abca".to_owned()], false, true);
    let mut push = |id: u32| {
        let mut out = String::new();
        let stop = detokenizer.push(id, &mut out);
        (out, stop)
    };
    let (a, b, c) = (97, 98, 99);
    assert_eq!(push(c), ("c".to_owned(), None));
    assert_eq!(push(a), (String::new(), None));
    assert_eq!(push(b), (String::new(), None));
    // "ab" cannot begin the stop string any more, the second "a" can.
    assert_eq!(push(a), ("ab".to_owned(), None));
    assert_eq!(push(0xf0), (String::new(), None));
    assert_eq!(push(0x9f), (String::new(), None));
    assert_eq!(push(0x98), (String::new(), None));
    // The character shows that the held "a" was no beginning.
    assert_eq!(push(0x80), ("a😀".to_owned(), None));
    for id in [a, b, c] {
        assert_eq!(push(id), (String::new(), None));
    }
    assert_eq!(push(a), (String::new(), Some(0)));
    assert_eq!(push(a), (String::new(), None));
}

#[test]
fn text_before_min_tokens_is_no_stop_string() {
    let mut detokenizer = Detokenizer::new(
        Arc::clone(&TOKENIZERS[0]),
        vec!["ab".to_owned()],
        false,
        true,
    );
    let mut out = String::new();
    for id in [97, 98, 97] {
        detokenizer.push_without_stop(id, &mut out);
    }
    assert_eq!(out, "aba");
    assert_eq!(
        detokenizer.push(98, &mut out),
        None,
        "its beginning did not count"
    );
    assert_eq!(detokenizer.push(97, &mut out), None);
    assert_eq!(detokenizer.push(98, &mut out), Some(0));
    assert_eq!(out, "abab");
}
