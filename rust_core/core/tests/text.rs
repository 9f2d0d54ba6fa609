//! The engine with a tokenizer: text, stop strings, server-sent events.

use std::sync::Arc;

use octavo_core::engine::outbox::{Delivery, Delta};
use octavo_core::engine::{AddRequest, EngineCore, Sampled};
use octavo_core::scheduler::batch::Staging;
use octavo_core::scheduler::request::{FinishReason, StopReason};
use octavo_core::scheduler::{LongPrefill, Policy, SchedulerConfig};
use octavo_core::text::sse::SseTemplate;
use octavo_core::text::tokenizer::Tokenizer;

/// A byte-level vocabulary: id `i` is the `i`-th letter; 26 is a blank, 27 and 28 the two halves of
/// "é", 29 special.
fn tokenizer() -> Arc<Tokenizer> {
    let mut vocab: Vec<String> = ('a'..='z').map(String::from).collect();
    vocab.extend(["Ġ", "Ã", "©"].map(String::from));
    let vocab: Vec<String> = vocab
        .iter()
        .enumerate()
        .map(|(id, token)| format!("\"{token}\": {id}"))
        .collect();
    let json = format!(
        r#"{{"version": "1.0", "truncation": null, "padding": null,
            "added_tokens": [{{"id": 29, "content": "<end>", "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true}}],
            "normalizer": null,
            "pre_tokenizer": {{"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                "use_regex": false}},
            "post_processor": null,
            "decoder": {{"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                "use_regex": false}},
            "model": {{"type": "BPE", "dropout": null, "unk_token": null,
                "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
                "byte_fallback": false, "ignore_merges": false, "vocab": {{{}}}, "merges": []}}}}"#,
        vocab.join(", ")
    );
    let inner = json.parse().expect("a valid tokenizer");
    Arc::new(Tokenizer::new(inner))
}

fn core() -> EngineCore {
    let config = SchedulerConfig {
        num_blocks: 64,
        block_size: 4,
        max_num_seqs: 4,
        max_num_batched_tokens: 64,
        max_model_len: 64,
        enable_prefix_caching: true,
        enable_chunked_prefill: true,
        long_prefill: LongPrefill::default(),
        max_step_s: 0.0,
        padded_prompts: Vec::new(),
        policy: Policy::Fcfs,
        num_stages: 1,
        state: None,
        prefix_sharing: None,
    };
    EngineCore::new(config, 1, Some(tokenizer())).unwrap()
}

/// Runs request 0 on a model that samples `tokens`, draining after each step whose bit is set.
fn run(new: AddRequest<'_>, tokens: &[u32], drains: u64) -> Vec<Delta> {
    let mut core = core();
    core.add_request(AddRequest {
        request_ids: &[0],
        prompt: &[1, 2, 3],
        ..new
    })
    .unwrap();
    let mut buffer = vec![0; core.scheduler().limits().required_len()];
    let mut deltas = Vec::new();
    for (step, &token) in tokens.iter().enumerate() {
        let mut staging = Staging {
            buffer: &mut buffer,
        };
        let Some(batch) = core.schedule(&mut staging, 0.0).unwrap() else {
            break;
        };
        let sampled = Sampled {
            token_ids: &[token as i32],
            logprobs: None,
        };
        core.update(batch.step_id, sampled, 0.0).unwrap();
        core.check_integrity().unwrap();
        if drains >> step & 1 == 1 {
            deltas.extend(core.outbox().drain());
        }
    }
    deltas.extend(core.outbox().drain());
    assert!(!core.has_work());
    deltas
}

fn spell(text: &str) -> Vec<u32> {
    let mut ids = Vec::new();
    for letter in text.chars() {
        match letter {
            ' ' => ids.push(26),
            'é' => ids.extend([27, 28]),
            '!' => ids.push(29),
            letter => ids.push(letter as u32 - 'a' as u32),
        }
    }
    ids
}

fn wish<'a>(stop: &'a [String], delivery: Delivery) -> AddRequest<'a> {
    AddRequest {
        max_tokens: 20,
        stop,
        skip_special_tokens: true,
        eos_token_ids: &[29],
        deliveries: vec![delivery],
        ..AddRequest::default()
    }
}

fn text(deltas: &[Delta]) -> String {
    deltas.iter().map(|delta| delta.text.as_str()).collect()
}

#[test]
fn the_text_is_the_same_however_it_is_drained() {
    let stop = ["lo w".to_owned(), "zzz".to_owned()];
    for drains in [0, u64::MAX, 0x5555, 0x1248] {
        for delivery in [Delivery::Final, Delivery::Delta] {
            let deltas = run(wish(&stop, delivery), &spell("héllo world!"), drains);
            assert_eq!(text(&deltas), "hél");
            let last = deltas.last().unwrap();
            assert_eq!(last.finish_reason, Some(FinishReason::Stop));
            assert_eq!(last.stop_reason, Some(StopReason::Text("lo w".into())));
            let ids: Vec<u32> = deltas
                .iter()
                .flat_map(|d| d.token_ids.iter().copied())
                .collect();
            assert_eq!(ids, spell("héllo w"));
            assert_eq!(last.num_output_tokens as usize, ids.len());
        }
    }
}

#[test]
fn eos_counts_as_a_token_but_leaves_no_text() {
    let deltas = run(wish(&[], Delivery::Final), &spell("hi!"), 0);
    assert_eq!(text(&deltas), "hi");
    assert_eq!(deltas[0].token_ids, spell("hi!"));
    assert_eq!(
        (deltas[0].finish_reason, &deltas[0].stop_reason),
        (Some(FinishReason::Stop), &None)
    );
}

#[test]
fn a_stop_token_that_is_a_letter_leaves_no_text_either() {
    let new = AddRequest {
        stop_token_ids: &[8],
        ..wish(&[], Delivery::Final)
    };
    let deltas = run(new, &spell("hi!"), 0);
    assert_eq!(text(&deltas), "h");
    assert_eq!(deltas[0].stop_reason, Some(StopReason::Token(8)));
}

#[test]
fn the_stop_string_can_be_kept() {
    let stop = ["ll".to_owned()];
    let new = AddRequest {
        include_stop_str_in_output: true,
        ..wish(&stop, Delivery::Final)
    };
    assert_eq!(text(&run(new, &spell("hello!"), 0)), "hell");
}

#[test]
fn stop_strings_do_not_count_before_min_tokens() {
    let stop = ["l".to_owned()];
    let new = AddRequest {
        min_tokens: 4,
        ..wish(&stop, Delivery::Final)
    };
    let deltas = run(new, &spell("hello!"), 0);
    assert_eq!(text(&deltas), "hel");
    let new = AddRequest {
        min_tokens: 5,
        ..wish(&stop, Delivery::Final)
    };
    let deltas = run(new, &spell("hello!"), 0);
    assert_eq!(
        (text(&deltas).as_str(), &deltas[0].stop_reason),
        ("hello", &None)
    );
}

#[test]
fn what_was_held_back_comes_at_the_end() {
    let stop = ["lozenge".to_owned()];
    let new = AddRequest {
        max_tokens: 5,
        ..wish(&stop, Delivery::Delta)
    };
    let deltas = run(new, &spell("hello world"), u64::MAX);
    assert_eq!(text(&deltas), "hello");
    assert_eq!(deltas.last().unwrap().text, "lo");
    assert_eq!(
        deltas.last().unwrap().finish_reason,
        Some(FinishReason::Length)
    );
}

#[test]
fn events_are_valid_json_and_whole_characters() {
    let part = |text: &str| text.as_bytes().into();
    let template = Arc::new(SseTemplate {
        around_text: [part("data: {\"text\": \""), part("\"}\n\n")],
        around_reasoning: None,
        first: part("data: {\"role\": 1}\n\n"),
    });
    for drains in [0, u64::MAX, 0b10110] {
        let new = wish(&[], Delivery::Sse(template.clone()));
        let deltas = run(new, &spell("é o!"), drains);
        let mut bytes = Vec::new();
        for delta in &deltas {
            let sse = delta.sse.as_ref().expect("an sse delta");
            assert!(std::str::from_utf8(sse).is_ok());
            bytes.extend_from_slice(sse);
        }
        let stream = String::from_utf8(bytes).unwrap();
        assert!(stream.starts_with("data: {\"role\": 1}\n\n"));
        assert!(stream.ends_with("}\n\n"));
        let mut said: String = stream
            .split("data: ")
            .filter_map(|event| event.strip_prefix("{\"text\": \""))
            .map(|event| event.split('"').next().unwrap_or_default())
            .collect();
        // The last text is the end's, which has no frame yet.
        said += &deltas.last().unwrap().text;
        assert_eq!(said, "é o");
    }
}

#[test]
fn text_without_stop_strings_is_the_same_however_it_is_drained() {
    for drains in [0, u64::MAX, 0x5555, 0x1248] {
        for delivery in [Delivery::Final, Delivery::Delta] {
            let said = spell("héllo wé!");
            let deltas = run(wish(&[], delivery.clone()), &said, drains);
            assert_eq!(text(&deltas), "héllo wé");
            let last = deltas.last().unwrap();
            assert_eq!(last.finish_reason, Some(FinishReason::Stop));
            let ids = deltas.iter().flat_map(|delta| &delta.token_ids);
            assert!(ids.eq(&said));
            // Cut in the middle of a character.
            let new = AddRequest {
                max_tokens: 2,
                ..wish(&[], delivery)
            };
            assert_eq!(text(&run(new, &said, drains)), "h\u{fffd}");
        }
    }
}

#[test]
fn half_a_character_is_no_event_and_the_rest_does_not_wait_for_the_interval() {
    let template = Arc::new(SseTemplate::default());
    for (interval, expected) in [(1, ["a", "b", "é", "c", ""]), (3, ["a", "bé", "c", "", ""])] {
        let new = AddRequest {
            stream_interval: Some(interval),
            ..wish(&[], Delivery::Sse(template.clone()))
        };
        let deltas = run(new, &spell("abéc!"), u64::MAX);
        let texts: Vec<&str> = deltas.iter().map(|delta| delta.text.as_str()).collect();
        let expected: Vec<&str> = expected[..texts.len()].to_vec();
        assert_eq!(texts, expected);
        assert!(deltas.iter().all(|delta| !delta.token_ids.is_empty()));
    }
}
