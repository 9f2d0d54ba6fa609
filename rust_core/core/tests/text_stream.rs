//! Streamed chunks are JSON that reads back as what was put in.

use octavo_core::text::sse::{SseTemplate, escape_json, write_chunk};
use proptest::prelude::*;

fn template() -> SseTemplate {
    let part = |text: &str| text.as_bytes().into();
    SseTemplate {
        around_text: [part("data: {\"text\":\""), part("\"}\n\n")],
        around_reasoning: None,
        first: part(""),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

    #[test]
    fn escaped_text_reads_back(text in any::<String>()) {
        let mut out = Vec::new();
        escape_json(&text, &mut out);
        let quoted = [b"\"", &out[..], b"\""].concat();
        prop_assert_eq!(serde_json::from_slice::<String>(&quoted).unwrap(), text);
        prop_assert!(!out.iter().any(|byte| *byte < 0x20), "an event must stay one line");
    }

    #[test]
    fn a_chunk_reads_back(text in any::<String>()) {
        let mut out = b"before".to_vec();
        write_chunk(&template(), &text, &mut out);
        let chunk = out.strip_prefix(b"beforedata: ").unwrap();
        let chunk: serde_json::Value = serde_json::from_slice(chunk).unwrap();
        prop_assert_eq!(chunk["text"].as_str(), Some(text.as_str()));
    }
}

#[test]
fn every_control_character_is_escaped_as_json_says() {
    let all: String = (0..0x80u8).map(char::from).collect();
    let mut out = Vec::new();
    escape_json(&all, &mut out);
    let text = String::from_utf8(out).unwrap();
    assert!(text.starts_with(r"\u0000\u0001"), "{text}");
    assert!(text.contains(r#"\b\t\n\u000b\f\r\u000e"#), "{text}");
    assert!(
        text.contains(r##" !\"#"##) && text.contains(r"[\\]"),
        "{text}"
    );
    let mut out = Vec::new();
    escape_json("\u{2028}\u{2029}é😀", &mut out);
    assert_eq!(out, "\u{2028}\u{2029}é😀".as_bytes(), "left as they are");
}
