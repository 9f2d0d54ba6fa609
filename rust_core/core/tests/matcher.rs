//! Grammars over a vocabulary of bytes and a few longer tokens, and constrained samples in the engine.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use octavo_core::engine::outbox::Delivery;
use octavo_core::engine::{AddRequest, EngineCore, Sampled};
use octavo_core::scheduler::batch::{ScheduledBatch, Staging};
use octavo_core::scheduler::request::FinishReason;
use octavo_core::scheduler::{LongPrefill, Policy, SchedulerConfig, StateConfig};
use octavo_core::text::matcher::{
    Accepted, Constraint, Grammar, GrammarKind, GrammarOptions, GrammarSource, Grammars,
    GrammarsConfig, Matcher, ReasoningTokens, Trigger, TriggerTexts,
};
use octavo_core::text::tokenizer::Tokenizer;
use proptest::prelude::*;

const EOS: u32 = 262;
const TOOL: u32 = 263;
const THINK: u32 = 264;
const THOUGHT: u32 = 265;
const SPECIAL: [&str; 4] = ["<|end|>", "<tool>", "<think>", "</think>"];
/// Longer tokens, each a merge of two that come before.
const MERGES: [(&str, &str); 6] = [
    ("a", "b"),
    ("ab", "c"),
    ("{", "\""),
    ("t", "r"),
    ("u", "e"),
    ("tr", "ue"),
];
const WIDTH: usize = 300;

/// The letters that byte-level vocabularies write bytes as.
fn letters() -> Vec<char> {
    let prints = |byte: u32| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let mut next = 256;
    (0..256)
        .map(|byte| {
            let code = if prints(byte) {
                byte
            } else {
                next += 1;
                next - 1
            };
            char::from_u32(code).unwrap()
        })
        .collect()
}

fn tokenizer() -> Arc<Tokenizer> {
    let letters = letters();
    let mut vocab = serde_json::Map::new();
    for (byte, letter) in letters.iter().enumerate() {
        vocab.insert(letter.to_string(), byte.into());
    }
    for (number, (a, b)) in MERGES.iter().enumerate() {
        vocab.insert(format!("{a}{b}"), (256 + number).into());
    }
    let merges: Vec<String> = MERGES.iter().map(|(a, b)| format!("{a} {b}")).collect();
    let added: Vec<serde_json::Value> = SPECIAL
        .iter()
        .enumerate()
        .map(|(number, content)| {
            serde_json::json!({"id": EOS as usize + number, "content": content, "single_word": false,
                "lstrip": false, "rstrip": false, "normalized": false, "special": true})
        })
        .collect();
    let byte_level = serde_json::json!({"type": "ByteLevel", "add_prefix_space": false,
        "trim_offsets": true, "use_regex": false});
    let json = serde_json::json!({"version": "1.0", "truncation": null, "padding": null,
        "added_tokens": added, "normalizer": null, "pre_tokenizer": byte_level,
        "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
            "byte_fallback": false, "ignore_merges": false, "vocab": vocab, "merges": merges}});
    Arc::new(Tokenizer::new(json.to_string().parse().unwrap()))
}

fn grammars() -> Grammars {
    Grammars::new(tokenizer(), WIDTH, &[EOS], GrammarsConfig::default())
}

fn source(kind: GrammarKind, text: &str) -> GrammarSource {
    GrammarSource {
        kind,
        text: text.into(),
        options: GrammarOptions::default(),
    }
}

fn compile(kind: GrammarKind, text: &str) -> Arc<Grammar> {
    grammars()
        .compile(&source(kind, text))
        .unwrap_or_else(|error| panic!("{text}: {error}"))
}

fn refusal(kind: GrammarKind, text: &str) -> String {
    let result = grammars().compile(&source(kind, text));
    result.expect_err(text).to_string()
}

/// The mask as ids; None where there is none.
fn allowed(matcher: &mut Matcher) -> Option<Vec<u32>> {
    let mut row = vec![u32::MAX; WIDTH.div_ceil(32)];
    matcher.fill_mask(&mut row).ok()?;
    let ids = 0..WIDTH as u32;
    Some(
        ids.filter(|&id| row[id as usize / 32] >> (id % 32) & 1 == 1)
            .collect(),
    )
}

/// True if a text is a whole one of the grammar; special tokens are written as they are spelled.
fn accepts(grammar: &Arc<Grammar>, text: &str) -> bool {
    let mut matcher = grammar.open();
    let mut rest = text;
    let mut is_complete = false;
    while !rest.is_empty() {
        let special = SPECIAL.iter().position(|name| rest.starts_with(name));
        let (len, ids) = match special {
            Some(number) => (SPECIAL[number].len(), vec![EOS + number as u32]),
            None => {
                let len = rest.chars().next().map_or(1, char::len_utf8);
                (len, rest[..len].bytes().map(u32::from).collect())
            }
        };
        for id in ids {
            if is_complete {
                return false;
            }
            match matcher.accept(id) {
                Ok(complete) => is_complete = complete,
                Err(_) => return false,
            }
        }
        rest = &rest[len..];
    }
    is_complete || matcher.is_accepting().unwrap_or(false)
}

#[track_caller]
fn check(grammar: &Arc<Grammar>, good: &[&str], bad: &[&str]) {
    for text in good {
        assert!(accepts(grammar, text), "{text:?} belongs to the grammar");
    }
    for text in bad {
        assert!(!accepts(grammar, text), "{text:?} is not of the grammar");
    }
}

/// Bytes of a token that is no special one.
fn token_bytes(id: u32) -> Vec<u8> {
    match id {
        0..256 => vec![id as u8],
        _ => MERGES
            .get(id as usize - 256)
            .map_or(Vec::new(), |(a, b)| format!("{a}{b}").into_bytes()),
    }
}

// ----------------------------------------------------------------------------------- kinds

#[test]
fn schemas() {
    let schema = r#"{"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", null]}},
        "required": ["a"], "additionalProperties": false}"#;
    let grammar = compile(GrammarKind::Json, schema);
    check(
        &grammar,
        &[r#"{"a":1}"#, r#"{"a": 12, "b": null}"#, "{\n \"a\" : -3}"],
        &[
            r#"{"a":1.5}"#,
            r#"{"b":null}"#,
            r#"{"a":1,"c":2}"#,
            r#"{"a":1"#,
            "[]",
            "",
        ],
    );
    let spaces = " ".repeat(21);
    check(&grammar, &[], &[&format!("{{{spaces}\"a\":1}}")]);
    let reference = r##"{"$ref": "#/$defs/tree", "$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}}"##;
    check(
        &compile(GrammarKind::Json, reference),
        &["[[], [[]]]"],
        &["[1]", "[[]"],
    );
    check(
        &compile(GrammarKind::Json, "true"),
        &["1", "{\"a\": []}"],
        &["nul"],
    );
    check(
        &compile(GrammarKind::JsonObject, ""),
        &["{}", "{\"a\": [1, {}]}"],
        &["[]", "1"],
    );
}

#[test]
fn whitespace_as_asked_for() {
    let grammars = grammars();
    let mut asked = source(
        GrammarKind::Json,
        r#"{"type": "array", "items": {"type": "integer"}}"#,
    );
    asked.options.disable_any_whitespace = true;
    let grammar = grammars.compile(&asked).unwrap();
    check(&grammar, &["[1,2]"], &["[1, 2]", "[ 1]"]);
    asked.options.disable_any_whitespace = false;
    asked.options.whitespace_pattern = Some("[ ]{0,2}".into());
    let grammar = grammars.compile(&asked).unwrap();
    check(&grammar, &["[1,2]", "[1,  2]"], &["[1,   2]", "[\n1]"]);
    assert_eq!(grammars.num_cached(), 2);
}

#[test]
fn patterns_and_choices() {
    check(
        &compile(GrammarKind::Regex, r"^\d{2}-[a-c]+$"),
        &["12-abc"],
        &["12-", "1-a", "12-abd"],
    );
    check(
        &compile(GrammarKind::Regex, "a/b|é+"),
        &["a/b", "éé"],
        &["a", "/b"],
    );
    let grammar = compile(GrammarKind::Choice, r#"["yes", "yes!", "no\n", "日本"]"#);
    check(
        &grammar,
        &["yes", "yes!", "no\n", "日本"],
        &["ye", "no", "yesno", "日"],
    );
}

#[test]
fn grammars_of_both_languages() {
    let lark = "start: pair+\npair: \"(\" pair* \")\"";
    check(
        &compile(GrammarKind::Grammar, lark),
        &["()", "(()())()"],
        &["(", ")", "(()"],
    );
    let gbnf = "root ::= object\nobject ::= \"{\" ws (member (\",\" ws member)*)? \"}\" ws\nmember ::= [a-z]+ \":\" ws value\nvalue ::= object | [0-9]+ ws\nws ::= [ \\t\\n]*\n";
    check(
        &compile(GrammarKind::Grammar, gbnf),
        &["{}", "{a:1}", "{ ab: {c:12 }, d: 3}"],
        &["{a}", "{a:1", "{A:1}"],
    );
    let regular = "root ::= (\"a\" | \"ab\") \"b\" word{2}\nword ::= [^a-z\\n] .";
    check(
        &compile(GrammarKind::Grammar, regular),
        &["abAxBy", "abb1-2-"],
        &["abax", "b1a2b"],
    );
}

#[test]
fn structural_tags() {
    let tag = r#"{"structures": [{"begin": "<f>", "schema": {"type": "array", "items": {"type": "integer"}}, "end": "</f>"}],
        "triggers": ["<f"]}"#;
    let grammar = compile(GrammarKind::StructuralTag, tag);
    check(
        &grammar,
        &["", "free text", "so <f>[1,2]</f> and <f>[]</f>!", "1 < 2"],
        &["so <f>[a]</f>", "so <f>[1]", "<fx>"],
    );
    // A trigger that is a special token, and one call at least.
    let calls = r#"{"type": "structural_tag", "format": {"type": "triggered_tags", "triggers": ["<tool>"],
        "tags": [{"begin": "<tool>f", "content": {"type": "json_schema", "json_schema": {"type": "boolean"}}, "end": ";"}],
        "at_least_one": true, "stop_after_first": true}}"#;
    let grammar = compile(GrammarKind::StructuralTag, calls);
    check(
        &grammar,
        &["<tool>ftrue;"],
        &["", "x<tool>ftrue;", "<tool>g", "<tool>ftrue;x"],
    );
    let parts = r#"{"type": "structural_tag", "format": {"type": "sequence", "elements": [
        {"type": "tag", "begin": "[", "content": {"type": "any_text"}, "end": ["]", "."]},
        {"type": "or", "elements": [{"type": "const_string", "value": "x"}, {"type": "regex", "pattern": "[0-9]+"}]},
        {"type": "optional", "content": {"type": "grammar", "grammar": "root ::= \"-\" [a-z]"}},
        {"type": "repeat", "min": 1, "max": 2, "content": {"type": "token", "token": "<tool>"}}]}}"#;
    check(
        &compile(GrammarKind::StructuralTag, parts),
        &["[any {thing}]12<tool>", "[a.x-b<tool><tool>"],
        &["[a]x", "[a]y<tool>", "[a]x<tool><tool><tool>"],
    );
    let separated = r#"{"type": "structural_tag", "format": {"type": "tags_with_separator", "separator": ",", "at_least_one": true,
        "tags": [{"begin": "<", "content": {"type": "any_text", "excludes": ["!"]}, "end": ">"}]}}"#;
    check(
        &compile(GrammarKind::StructuralTag, separated),
        &["<a>", "<a>,<b>"],
        &["", "<a!>", "<a><b>"],
    );
    let dispatch = r#"{"format": {"type": "dispatch", "excludes": ["!"], "rules": [
        ["@", {"type": "regex", "pattern": "[0-9]"}], ["<tool>", {"type": "const_string", "value": "f;"}]]}}"#;
    check(
        &compile(GrammarKind::StructuralTag, dispatch),
        &["", "free", "a @1 b<tool>f; c", "@1@2"],
        &["a!", "a @x", "<tool>g", "@"],
    );
    let once = dispatch.replace("\"rules\"", "\"loop\": false, \"rules\"");
    check(
        &compile(GrammarKind::StructuralTag, &once),
        &["", "free", "a @1", "<tool>f;"],
        &["@1 b", "@1@2", "@x"],
    );
    let tokens = r#"{"format": {"type": "token_dispatch", "exclude_tokens": ["<think>"], "rules": [
        ["<tool>", {"type": "const_string", "value": "f;"}]]}}"#;
    check(
        &compile(GrammarKind::StructuralTag, tokens),
        &["", "free", "a<tool>f; c<tool>f;"],
        &["<tool>g", "a<think>", "<tool>"],
    );
    let triggered = r#"{"format": {"type": "token_triggered_tags", "trigger_tokens": ["<tool>"], "tags": [
        {"begin": {"type": "token", "token": "<tool>"}, "content": {"type": "regex", "pattern": "[0-9]"}, "end": ";"}]}}"#;
    check(
        &compile(GrammarKind::StructuralTag, triggered),
        &["", "a<tool>1;b<tool>2;"],
        &["<tool>x", "<tool>1"],
    );
    let one = triggered.replace(
        "\"tags\"",
        "\"at_least_one\": true, \"stop_after_first\": true, \"tags\"",
    );
    check(
        &compile(GrammarKind::StructuralTag, &one),
        &["<tool>1;"],
        &["", "a<tool>1;", "<tool>1;b"],
    );
    for (tag, why) in [
        (
            r#"{"format": {"type": "magic"}}"#,
            "\"magic\" is not supported",
        ),
        (
            r#"{"format": {"type": "tag", "begin": 1}}"#,
            "begin must be",
        ),
        (
            r#"{"format": {"type": "dispatch", "rules": [["a"]]}}"#,
            "pairs of a pattern",
        ),
        (
            r#"{"format": {"type": "token_dispatch", "rules": [["a", {"type": "any_text"}]]}}"#,
            "no special token",
        ),
        (
            r#"{"structures": [{"begin": "<a>", "schema": {}, "end": ""}], "triggers": ["<b"]}"#,
            "triggers",
        ),
        (
            r#"{"format": {"type": "json_schema", "json_schema": {"not": {"type": "null"}}}}"#,
            "not is not supported",
        ),
        ("{}", "neither format nor structures"),
    ] {
        let found = refusal(GrammarKind::StructuralTag, tag);
        assert!(found.contains(why), "{tag}: {found}");
    }
}

#[test]
fn what_is_wrong_is_an_error() {
    for (kind, text) in [
        (GrammarKind::Json, "{"),
        (GrammarKind::Json, "3"),
        (GrammarKind::Json, r#"{"type": "nonsense"}"#),
        (GrammarKind::Json, "false"),
        (
            GrammarKind::Json,
            r#"{"type": "string", "pattern": "(?=a)b"}"#,
        ),
        (
            GrammarKind::Json,
            r#"{"type": "integer", "minimum": 3, "maximum": 2}"#,
        ),
        (GrammarKind::Regex, "("),
        (GrammarKind::Regex, ""),
        (GrammarKind::Regex, r"a\b"),
        (GrammarKind::Choice, "[]"),
        (GrammarKind::Grammar, "start: missing"),
        (GrammarKind::Grammar, " "),
        (GrammarKind::Grammar, "start: <unknown>"),
        (GrammarKind::Grammar, "root ::= ("),
        (GrammarKind::StructuralTag, "[]"),
    ] {
        let why = refusal(kind, text);
        assert!(!why.contains('\n') && why.len() < 500, "{text}: {why}");
    }
}

// ----------------------------------------------------------------------------------- masks

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// After each prefix of a text, the mask is what trying every token finds.
    #[test]
    fn masks_of_texts_are_brute_force(
        texts in prop::collection::vec("[abc{\"true]{1,6}", 1..6), pick in any::<prop::sample::Index>(),
    ) {
        let all: Vec<String> = texts.iter().map(|text| serde_json::to_string(text).unwrap()).collect();
        let lark = format!("%llguidance {{\"no_forcing\": true}}\nstart: T\nT: {}", all.join(" | "));
        let mut matcher = compile(GrammarKind::Grammar, &lark).open();
        let text = pick.get(&texts).as_bytes();
        let mut at = 0;
        loop {
            let expected: Vec<u32> = (0..WIDTH as u32).filter(|&id| {
                if id == EOS {
                    return texts.iter().any(|one| one.as_bytes() == &text[..at]);
                }
                let bytes = token_bytes(id);
                let next = [&text[..at], &bytes].concat();
                !bytes.is_empty() && texts.iter().any(|one| one.as_bytes().starts_with(&next))
            }).collect();
            prop_assert_eq!(allowed(&mut matcher).unwrap_or_default(), expected);
            if at == text.len() {
                break;
            }
            // The longest token, to come past the others.
            let id = (0..WIDTH as u32)
                .filter(|&id| !token_bytes(id).is_empty() && text[at..].starts_with(&token_bytes(id)))
                .max_by_key(|&id| token_bytes(id).len())
                .unwrap();
            at += token_bytes(id).len();
            if matcher.accept(id).unwrap() {
                prop_assert_eq!(at, text.len());
                break;
            }
        }
    }

    /// The same for nested brackets, which no finite set of texts is.
    #[test]
    fn masks_of_brackets_are_brute_force(steps in prop::collection::vec(any::<bool>(), 0..30)) {
        let lark = "%llguidance {\"no_forcing\": true}\nstart: \"{\" start* \"a\"";
        let mut matcher = compile(GrammarKind::Grammar, lark).open();
        let mut depth = 0;
        let mut has_begun = false;
        for opens in steps {
            let expected: Vec<u32> = (0..256)
                .filter(|&id| id == u32::from(b'{') || (depth > 0 && id == u32::from(b'a')))
                .collect();
            prop_assert_eq!(allowed(&mut matcher).unwrap(), expected);
            let opens = opens || !has_begun;
            has_begun = true;
            depth += if opens { 1 } else { -1 };
            let is_complete = matcher.accept(u32::from(if opens { b'{' } else { b'a' })).unwrap();
            prop_assert_eq!(is_complete, depth == 0);
            if is_complete {
                break;
            }
        }
    }

    /// A grammar that other samples have followed has the masks of one that is new.
    #[test]
    fn what_was_learned_changes_no_mask(choices in prop::collection::vec(any::<u32>(), 1..40)) {
        let schema = r#"{"type": "object", "properties": {"abc": {"type": "string", "maxLength": 8},
            "n": {"type": "array", "items": {"type": "boolean"}}}, "required": ["abc", "n"]}"#;
        let used = compile(GrammarKind::Json, schema);
        let fresh = compile(GrammarKind::Json, schema);
        for _ in 0..2 {
            let (mut one, mut other) = (used.open(), fresh.open());
            for choice in &choices {
                let ids = allowed(&mut one).unwrap();
                prop_assert_eq!(&ids, &allowed(&mut other).unwrap());
                let id = ids[*choice as usize % ids.len()];
                let is_complete = one.accept(id).unwrap();
                prop_assert_eq!(is_complete, other.accept(id).unwrap());
                if is_complete {
                    break;
                }
            }
            one.close();
        }
    }
}

#[test]
fn forced_texts_are_spelled_as_the_tokenizer_spells_them() {
    let mut matcher = compile(GrammarKind::Choice, r#"["abc true"]"#).open();
    // "abc" and "true" are tokens.
    for id in [257, 32, 261] {
        assert_eq!(allowed(&mut matcher), Some(vec![id]));
        matcher.accept(id).unwrap();
    }
}

/// A vocabulary as Llama 2's: words begin with a mark, a text's first one too, and bytes fall back to
/// tokens of their own.
fn sentence_piece() -> Arc<Tokenizer> {
    let mut vocab = serde_json::Map::new();
    vocab.insert("<unk>".into(), 0.into());
    for byte in 0..256 {
        vocab.insert(format!("<0x{byte:02X}>"), (byte + 1).into());
    }
    for piece in ["a", "b", "c", "\u{2581}", "ab", "\u{2581}c", "\u{2581}ab"] {
        let id = vocab.len();
        vocab.insert(piece.into(), id.into());
    }
    let merges = ["a b", "\u{2581} c", "\u{2581} ab"];
    let mark =
        serde_json::json!({"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"});
    let json = serde_json::json!({"version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u{2581}"}, mark]},
        "pre_tokenizer": null, "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>",
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true,
            "byte_fallback": true, "ignore_merges": false, "vocab": vocab, "merges": merges}});
    Arc::new(Tokenizer::new(json.to_string().parse().unwrap()))
}

#[test]
fn words_in_the_middle_of_a_text_are_spelled_as_there() {
    let tokenizer = sentence_piece();
    let id = |piece: &str| tokenizer.token_to_id(piece).unwrap();
    let grammars = Grammars::new(tokenizer.clone(), 270, &[], GrammarsConfig::default());
    let choice = source(GrammarKind::Choice, "[\"ab c!\"]");
    let mut matcher = grammars.compile(&choice).unwrap().open();
    for piece in ["ab", "\u{2581}c", "<0x21>"] {
        assert_eq!(allowed(&mut matcher), Some(vec![id(piece)]), "{piece}");
        matcher.accept(id(piece)).unwrap();
    }
    // Where there is a choice, a byte may come as such and as a letter.
    let regex = source(GrammarKind::Regex, "[ab]{2}");
    let mut matcher = grammars.compile(&regex).unwrap().open();
    let mut expected: Vec<u32> = ["<0x61>", "<0x62>", "a", "b", "ab"].map(id).into();
    expected.sort_unstable();
    assert_eq!(allowed(&mut matcher), Some(expected));
}

#[test]
fn a_matcher_that_has_failed_stays_so() {
    let mut matcher = compile(GrammarKind::Choice, r#"["a"]"#).open();
    assert!(matcher.accept(u32::from(b'z')).is_err());
    assert!(matcher.accept(u32::from(b'a')).is_err());
    assert!(allowed(&mut matcher).is_none());
    assert!(matcher.accept(WIDTH as u32 + 7).is_err());
}

// ----------------------------------------------------------------------------------- bounds

#[test]
fn the_cache_is_bounded_by_memory_and_keeps_what_is_used() {
    let config = GrammarsConfig {
        max_bytes: 3 << 20,
        ..GrammarsConfig::default()
    };
    let grammars = Grammars::new(tokenizer(), WIDTH, &[EOS], config);
    let often = source(GrammarKind::Regex, "often");
    grammars.compile(&often).unwrap();
    for number in 0..100 {
        let text = format!("[a-z]{{1,30}}{number}");
        grammars
            .compile(&source(GrammarKind::Regex, &text))
            .unwrap();
        assert!(grammars.find(&often).is_some());
    }
    assert!(
        (2..100).contains(&grammars.num_cached()),
        "{}",
        grammars.num_cached()
    );
}

#[test]
fn hostile_grammars_end_in_time() {
    let many: Vec<String> = (0..10_000).map(|i| format!("\"value {i}\"")).collect();
    let mut all_of = Vec::new();
    for i in 0..30 {
        let any_of: Vec<String> = (0..30)
            .map(|j| format!("{{\"properties\": {{\"p{i}\": {{\"const\": {j}}}}}}}"))
            .collect();
        all_of.push(format!("{{\"anyOf\": [{}]}}", any_of.join(",")));
    }
    let hostile = [
        (GrammarKind::Json, format!("{{\"enum\": [{}]}}", many.join(","))),
        (GrammarKind::Choice, format!("[{}]", many.join(","))),
        (GrammarKind::Json, format!("{{\"allOf\": [{}]}}", all_of.join(","))),
        (GrammarKind::Regex, "(a|b|ab)*(a|b|ab)*c{1000}d{1000}".into()),
        (GrammarKind::Regex, "(.*a){25}.*".into()),
        (GrammarKind::Regex, "((a{0,100}){0,100}){0,100}".into()),
        (GrammarKind::Regex, "(x+x+)+y".into()),
        (GrammarKind::Json, r#"{"type": "array", "minItems": 100000, "items": {"type": "array", "minItems": 100000}}"#.into()),
        (GrammarKind::Json, r#"{"type": "string", "minLength": 1000000, "maxLength": 2000000}"#.into()),
        (GrammarKind::Grammar, format!("start: {}\"a\"{}", "(".repeat(500), ")".repeat(500))),
        (GrammarKind::Grammar, "start: start start | \"a\"".into()),
        (GrammarKind::Grammar, format!("root ::= {}\"a\"{}", "(".repeat(5000), ")".repeat(5000))),
        (GrammarKind::Json, "[".repeat(100_000)),
        (GrammarKind::Json, format!("{{\"const\": \"{}\"}}", "x".repeat(300_000))),
    ];
    let grammars = grammars();
    grammars
        .compile(&source(GrammarKind::JsonObject, ""))
        .unwrap();
    for (kind, text) in hostile {
        let began = Instant::now();
        if let Ok(grammar) = grammars.compile(&source(kind, &text)) {
            let mut matcher = grammar.open();
            for _ in 0..20 {
                let Some(ids) = allowed(&mut matcher) else {
                    break;
                };
                if matcher.accept(ids[ids.len() / 2]).unwrap_or(true) {
                    break;
                }
            }
        }
        let limit = Duration::from_secs(if cfg!(debug_assertions) { 60 } else { 5 });
        assert!(
            began.elapsed() < limit,
            "{:.80}: {:?}",
            text,
            began.elapsed()
        );
    }
}

#[test]
fn compiling_is_given_up_at_the_deadline() {
    let config = GrammarsConfig {
        deadline: Duration::ZERO,
        ..GrammarsConfig::default()
    };
    let grammars = Grammars::new(tokenizer(), WIDTH, &[EOS], config);
    let error = grammars
        .compile(&source(GrammarKind::JsonObject, ""))
        .unwrap_err();
    assert!(error.to_string().contains("longer than"), "{error}");
}

// ------------------------------------------------------------------------------- reasoning

fn bits(constraint: &mut Constraint) -> Option<Vec<u32>> {
    let mut row = vec![0; WIDTH.div_ceil(32)];
    constraint.fill_mask(&mut row).then(|| {
        let ids = 0..WIDTH as u32;
        ids.filter(|&id| row[id as usize / 32] >> (id % 32) & 1 == 1)
            .collect()
    })
}

#[test]
fn nothing_is_constrained_while_reasoning_is_open() {
    let grammar = compile(GrammarKind::Choice, r#"["a"]"#);
    let a = u32::from(b'a');
    let mut tokens = ReasoningTokens {
        open: Some(THINK),
        close: THOUGHT,
        is_open: false,
        budget: None,
    };
    let mut constraint =
        Constraint::new(Some(&grammar), None, Some(tokens), &[].into(), &[]).unwrap();
    assert_eq!(bits(&mut constraint), Some(vec![a, THINK]));
    assert_eq!(constraint.accept(THINK), Accepted::Open);
    assert_eq!(bits(&mut constraint), None);
    assert_eq!(constraint.accept(u32::from(b'z')), Accepted::Open);
    assert_eq!(constraint.accept(THOUGHT), Accepted::Open);
    assert_eq!(bits(&mut constraint), Some(vec![a]));
    assert_eq!(constraint.accept(a), Accepted::Complete);

    let mut constraint =
        Constraint::new(Some(&grammar), None, Some(tokens), &[].into(), &[]).unwrap();
    assert_eq!(
        constraint.accept(a),
        Accepted::Complete,
        "without reasoning"
    );

    tokens.is_open = true;
    tokens.budget = Some(2);
    let mut constraint =
        Constraint::new(Some(&grammar), None, Some(tokens), &[].into(), &[]).unwrap();
    for _ in 0..2 {
        assert_eq!(bits(&mut constraint), None);
        assert_eq!(constraint.accept(u32::from(b'z')), Accepted::Open);
    }
    assert_eq!(bits(&mut constraint), Some(vec![THOUGHT]));
    assert_eq!(constraint.accept(THOUGHT), Accepted::Open);
    assert_eq!(bits(&mut constraint), Some(vec![a]));
    assert_eq!(constraint.accept(u32::from(b'z')), Accepted::Failed);
    assert!(constraint.failure().contains("leave no token"));

    // A budget holds without a grammar too, wherever reasoning begins.
    tokens.is_open = false;
    let mut constraint = Constraint::new(None, None, Some(tokens), &[].into(), &[]).unwrap();
    for token in [a, a, THINK, a, a] {
        assert_eq!(bits(&mut constraint), None);
        assert_eq!(constraint.accept(token), Accepted::Open);
    }
    assert_eq!(bits(&mut constraint), Some(vec![THOUGHT]));
    tokens.budget = None;
    assert!(Constraint::new(None, None, Some(tokens), &[].into(), &[]).is_none());
}

#[test]
fn stop_tokens_may_come_where_a_text_may_end() {
    let grammar = compile(GrammarKind::Regex, "a+");
    let mut constraint = Constraint::new(Some(&grammar), None, None, &[].into(), &[TOOL]).unwrap();
    assert!(!bits(&mut constraint).unwrap().contains(&TOOL));
    constraint.accept(u32::from(b'a'));
    let ids = bits(&mut constraint).unwrap();
    assert!(ids.contains(&TOOL) && ids.contains(&EOS), "{ids:?}");
}

#[test]
fn bad_words_are_banned_before_their_last_token() {
    let [a, b, c] = [b'a', b'b', b'c'].map(u32::from);
    let words = [Box::from([a, b]), Box::from([c])].into();
    let mut constraint = Constraint::new(None, None, None, &words, &[]).unwrap();
    assert_eq!(bits(&mut constraint), None);
    constraint.accept(a);
    let ids = bits(&mut constraint).unwrap();
    assert!(!ids.contains(&b) && ids.contains(&a) && ids.contains(&c));
    constraint.accept(c);
    assert_eq!(bits(&mut constraint), None);
    // Beside a grammar.
    let grammar = compile(GrammarKind::Regex, "a[abc]");
    let mut constraint = Constraint::new(Some(&grammar), None, None, &words, &[]).unwrap();
    constraint.accept(a);
    assert_eq!(bits(&mut constraint), Some(vec![a, c]));
    assert!(Constraint::new(None, None, None, &[Box::from([c])].into(), &[]).is_none());
}

// ---------------------------------------------------------------------------------- engine

struct Run {
    core: EngineCore,
    buffer: Vec<i32>,
    masks: Vec<u32>,
    random: u64,
    num_steps: usize,
    num_masked_steps: usize,
    /// Requests whose slots were written, with the numbers of their output tokens then.
    new_slots: Vec<(u64, u32)>,
    /// The samples at these places after a prompt of three tokens.
    script: Vec<u32>,
}

impl Run {
    fn new(num_blocks: usize) -> Self {
        Self::with_state(num_blocks, None)
    }

    fn with_state(num_blocks: usize, state: Option<StateConfig>) -> Self {
        let config = SchedulerConfig {
            num_blocks,
            block_size: 4,
            max_num_seqs: 8,
            max_num_batched_tokens: 32,
            max_model_len: 200,
            enable_prefix_caching: true,
            enable_chunked_prefill: true,
            long_prefill: LongPrefill::default(),
            max_step_s: 0.0,
            padded_prompts: Vec::new(),
            policy: Policy::Fcfs,
            num_stages: 1,
            state,
            prefix_sharing: None,
        };
        let core = EngineCore::new(config, 1, Some(tokenizer())).unwrap();
        let buffer = vec![0; core.scheduler().limits().required_len()];
        Self {
            core,
            buffer,
            masks: vec![0; 8 * WIDTH.div_ceil(32)],
            random: 7,
            num_steps: 0,
            num_masked_steps: 0,
            new_slots: Vec::new(),
            script: Vec::new(),
        }
    }

    fn next(&mut self, most: usize) -> usize {
        self.random = self
            .random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.random >> 33) as usize % most
    }

    /// Samples a step's tokens: at random among what its masks allow, and by the script where nothing
    /// is masked. `before`: the tokens of the step before, if that is still in flight.
    fn choose(&mut self, batch: &ScheduledBatch, before: Option<&[i32]>) -> Vec<i32> {
        let plan = self.core.plan(batch.step_id).unwrap();
        let entries = plan.entries.iter().filter(|entry| entry.sample);
        let places = entries.map(|entry| ((entry.start + entry.count) as usize).wrapping_sub(3));
        let places: Vec<usize> = places.collect();
        let mut ids = Vec::new();
        for at in places {
            let said = self.script.get(at).copied();
            ids.push(said.unwrap_or_else(|| self.next(256) as u32) as i32);
        }
        if batch.num_constrained == 0 {
            return ids;
        }
        self.num_masked_steps += 1;
        let words = WIDTH.div_ceil(32);
        let mut masks = self.core.take_masks(batch.step_id, before).unwrap();
        let mut rows = vec![-1; masks.items.len()];
        masks.fill(&mut rows, &mut self.masks, words);
        self.core.return_masks(masks);
        assert!(rows.len() <= batch.num_constrained);
        for (k, row) in rows.into_iter().enumerate().filter(|(_, row)| *row >= 0) {
            let mask = self.masks[k * words..(k + 1) * words].to_vec();
            let allowed: Vec<i32> = (0..WIDTH)
                .filter(|id| mask[id / 32] >> (id % 32) & 1 == 1)
                .map(|id| id as i32)
                .collect();
            ids[row as usize] = allowed[self.next(allowed.len())];
        }
        ids
    }

    /// Runs to the end, `ahead` steps in flight.
    fn finish(&mut self, ahead: usize) -> Vec<(u64, FinishReason, String)> {
        let mut in_flight: VecDeque<ScheduledBatch> = VecDeque::new();
        // The oldest one's.
        let mut ids: Vec<i32> = Vec::new();
        let mut ends = Vec::new();
        for _ in 0..5000 {
            let mut staging = Staging {
                buffer: &mut self.buffer,
            };
            let batch = self.core.schedule(&mut staging, 0.0).unwrap();
            let is_idle = batch.is_none();
            if let Some(batch) = &batch {
                let written = &self.core.plan(batch.step_id).unwrap().new_slots;
                let written = written
                    .iter()
                    .map(|&(_, id, num_outputs)| (id, num_outputs));
                self.new_slots.extend(written);
            }
            in_flight.extend(batch);
            let Some(oldest) = in_flight.front().copied() else {
                break;
            };
            if in_flight.len() == 1 && !is_idle {
                ids = self.choose(&oldest, None);
            }
            if in_flight.len() > ahead || is_idle {
                self.num_steps += 1;
                in_flight.pop_front();
                let next = in_flight.front().copied();
                let next_ids = next.map(|next| self.choose(&next, Some(&ids)));
                let sampled = Sampled {
                    token_ids: &ids,
                    logprobs: None,
                };
                self.core.update(oldest.step_id, sampled, 0.0).unwrap();
                self.core.check_integrity().unwrap();
                ids = next_ids.unwrap_or_default();
                for delta in self.core.outbox().drain() {
                    // While it runs, "length" stands for more to come.
                    let reason = delta.finish_reason.unwrap_or(FinishReason::Length);
                    ends.push((delta.request_id, reason, delta.text));
                }
            }
        }
        assert!(!self.core.has_work());
        ends
    }
}

#[test]
fn constrained_samples_follow_their_grammars_whatever_happens() {
    let schema = r#"{"type": "object", "properties": {"abc": {"type": "string", "maxLength": 12},
        "n": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3}},
        "required": ["abc", "n"], "additionalProperties": false}"#;
    let mut num_preemptions = 0;
    for ahead in [0, 1] {
        // Twelve blocks are few: samples are preempted.
        let mut run = Run::new(24);
        let grammar = compile(GrammarKind::Json, schema);
        for id in 0..6u64 {
            let is_free = id % 3 == 2;
            run.core
                .add_request(AddRequest {
                    request_ids: &[2 * id, 2 * id + 1],
                    prompt: &[1, 2, 3, 4, 5],
                    max_tokens: if is_free { 20 } else { 90 },
                    eos_token_ids: if id == 0 { &[] } else { &[EOS] },
                    min_tokens: 3,
                    grammar: (!is_free).then(|| grammar.clone()),
                    may_force: id % 2 == 0,
                    deliveries: vec![Delivery::Final; 2],
                    ..AddRequest::default()
                })
                .unwrap();
        }
        let ends = run.finish(ahead);
        num_preemptions += run.core.stats().num_preemptions;
        assert_eq!(ends.len(), 12);
        for (id, reason, text) in ends {
            if id / 2 % 3 == 2 {
                continue;
            }
            assert!(
                matches!(reason, FinishReason::Stop | FinishReason::Length),
                "{reason:?}"
            );
            if reason == FinishReason::Stop {
                let value: serde_json::Value = serde_json::from_str(&text).expect(&text);
                assert!(value["abc"].is_string() && value["n"].is_array(), "{text}");
            }
        }
    }
    assert!(num_preemptions > 0);
}

#[test]
fn forced_tokens_come_several_a_step() {
    let schema = r#"{"type": "object", "properties": {"a long name": {"const": "and a long value"},
        "another one": {"type": "boolean"}}, "required": ["a long name", "another one"],
        "additionalProperties": false}"#;
    let mut source = source(GrammarKind::Json, schema);
    source.options.disable_any_whitespace = true;
    let grammar = grammars().compile(&source).unwrap();
    let mut found = Vec::new();
    let cases = [
        (false, 100, 0),
        (true, 100, 0),
        (true, 20, 0),
        (false, 100, 1),
        (true, 100, 1),
    ];
    for (may_force, max_tokens, ahead) in cases {
        let mut run = Run::new(64);
        run.core
            .add_request(AddRequest {
                request_ids: &[0],
                prompt: &[1, 2, 3],
                max_tokens,
                grammar: Some(grammar.clone()),
                may_force,
                deliveries: vec![Delivery::Delta],
                ..AddRequest::default()
            })
            .unwrap();
        let ends = run.finish(ahead);
        let text: String = ends.iter().map(|(_, _, text)| text.as_str()).collect();
        found.push((run.num_steps, text));
    }
    let whole =
        |value: &str| format!(r#"{{"a long name":"and a long value","another one":{value}}}"#);
    for (_, text) in [&found[..2], &found[3..]].concat().iter() {
        assert!([whole("true"), whole("false")].contains(text), "{text}");
    }
    assert!(found[0].0 > 40 && found[1].0 < 6, "{found:?}");
    // What is sampled ahead of them is given up.
    assert!(found[3].0 > 40 && found[4].0 < 10, "{found:?}");
    // They count as any others do.
    assert!(whole("true").starts_with(&found[2].1), "{:?}", found[2].1);
    assert!(found[2].1.len() >= 20);
}

#[test]
fn a_token_against_the_grammar_ends_that_sample_alone() {
    let mut run = Run::new(64);
    let grammar = compile(GrammarKind::Choice, r#"["ab"]"#);
    for id in 0..2 {
        run.core
            .add_request(AddRequest {
                request_ids: &[id],
                prompt: &[1],
                max_tokens: 4,
                grammar: (id == 0).then(|| grammar.clone()),
                deliveries: vec![Delivery::Final],
                ..AddRequest::default()
            })
            .unwrap();
    }
    let mut staging = Staging {
        buffer: &mut run.buffer,
    };
    let batch = run.core.schedule(&mut staging, 0.0).unwrap().unwrap();
    assert_eq!(batch.num_constrained, 1);
    assert!(run.core.take_masks(batch.step_id + 1, None).is_err());
    let sampled = Sampled {
        token_ids: &[i32::from(b'z'), i32::from(b'z')],
        logprobs: None,
    };
    run.core.update(batch.step_id, sampled, 0.0).unwrap();
    let ends = run.finish(0);
    let reasons: Vec<FinishReason> = ends.iter().map(|(_, reason, _)| *reason).collect();
    assert_eq!(reasons, [FinishReason::Error, FinishReason::Length]);
}

/// Any text, with calls in it that a special token begins.
const CALLS: &str = r#"start: TEXT (calls TEXT)*
TEXT: /(?s:.*)/
calls: <[263]> "{" name "}"
name: "ab" | "cd"
"#;

fn texts<'a>(anywhere: &[&'a str], is_repeated: bool) -> TriggerTexts<'a> {
    TriggerTexts {
        anywhere: anywhere.to_vec(),
        is_repeated,
        ..TriggerTexts::default()
    }
}

impl Run {
    /// The end of a request that says "hi" and begins a call, which the grammar then takes over.
    fn call(
        &mut self,
        grammar: &Arc<Grammar>,
        max_tokens: usize,
        ahead: usize,
    ) -> (FinishReason, String) {
        self.script = vec![u32::from(b'h'), u32::from(b'i'), TOOL];
        self.core
            .add_request(AddRequest {
                request_ids: &[0],
                prompt: &[1, 2, 3],
                max_tokens,
                eos_token_ids: &[EOS],
                skip_special_tokens: false,
                grammar: Some(grammar.clone()),
                trigger: Some(texts(&["<tool>"], false)),
                deliveries: vec![Delivery::Final],
                ..AddRequest::default()
            })
            .unwrap();
        let [(_, reason, text)] = <[_; 1]>::try_from(self.finish(ahead)).expect("one end");
        (reason, text)
    }
}

/// "hi", and a call of a tool that there is.
fn assert_calls(text: &str) {
    let call = text.strip_prefix("hi<tool>").expect(text);
    assert!(
        call.starts_with("{ab}") || call.starts_with("{cd}"),
        "{text:?}"
    );
}

#[test]
fn a_grammar_with_a_trigger_costs_nothing_until_it_comes() {
    let grammar = compile(GrammarKind::Grammar, CALLS);
    for (ahead, max_tokens) in [(0, 40), (1, 40), (0, 3), (1, 3), (0, 4), (1, 4)] {
        let mut run = Run::new(64);
        let (reason, text) = run.call(&grammar, max_tokens, ahead);
        if max_tokens <= 4 {
            assert_eq!(reason, FinishReason::Length);
            // A last token that is on its way already is not bound.
            let is_bound = max_tokens == 4 && ahead == 0;
            let known = if is_bound { "hi<tool>{" } else { "hi<tool>" };
            assert!(text.starts_with(known), "{text:?}");
            continue;
        }
        // The device has counted what was sampled behind the marker, until it is told anew.
        let renewed: &[(u64, u32)] = if ahead == 0 { &[] } else { &[(0, 3)] };
        assert_eq!(run.new_slots[0], (0, 0));
        assert_eq!(run.new_slots[1..], *renewed);
        assert_calls(&text);
        // None for "hi" and the marker; one for every token from there on.
        assert!(
            run.num_masked_steps + 3 <= run.num_steps,
            "{} {}",
            run.num_masked_steps,
            run.num_steps
        );
        assert!(run.num_masked_steps > 3);
    }
}

/// A state that has gone on is brought back, from a checkpoint or from the beginning.
#[test]
fn a_trigger_holds_where_layers_keep_a_state() {
    let grammar = compile(GrammarKind::Grammar, CALLS);
    for num_checkpoints in [0, 4] {
        for ahead in [0, 1] {
            let mut run = Run::with_state(
                64,
                Some(StateConfig {
                    num_checkpoints,
                    interval: 4,
                }),
            );
            let (_, text) = run.call(&grammar, 40, ahead);
            assert_calls(&text);
            assert_eq!(run.core.stats().num_preemptions, ahead as u64);
            assert_eq!(run.new_slots.len(), 1 + ahead);
        }
    }
}

#[test]
fn a_trigger_is_found_however_it_is_spelled() {
    let lark = r#"start: head /[0-9]+/
TEXT: /(?s:.*)/
head[lazy]: TEXT "<ab>"
"#;
    let grammar = compile(GrammarKind::Grammar, lark);
    let [less, a, b, ab, more] = [u32::from(b'<'), 97, 98, 256, u32::from(b'>')];
    let trigger = Arc::new(Trigger::new(&texts(&["<ab>"], false), tokenizer()));
    let digits: Vec<u32> = (u32::from(b'0')..=u32::from(b'9')).collect();
    for tokens in [
        vec![less, ab, more],
        vec![b, less, a, b, more],
        vec![less, less, ab, more],
        vec![less, a, less, ab, more],
        // Spelled once in vain, then again.
        vec![less, ab, b, less, ab, more],
    ] {
        let none = [].into();
        let mut constraint =
            Constraint::new(Some(&grammar), Some(&trigger), None, &none, &[]).unwrap();
        let (last, first) = tokens.split_last().unwrap();
        for &token in first {
            assert_eq!(constraint.accept(token), Accepted::Open);
            assert!(!constraint.is_active());
            assert_eq!(bits(&mut constraint), None);
        }
        assert_eq!(constraint.accept(*last), Accepted::Armed, "{tokens:?}");
        assert_eq!(bits(&mut constraint), Some(digits.clone()));
        constraint.release();
        assert_eq!(bits(&mut constraint), None);
    }
}

#[test]
fn a_repeated_trigger_holds_until_its_text_may_end() {
    let grammar = compile(
        GrammarKind::Grammar,
        "start: first \"d\"+ | second \"e\"\nTEXT: /(?s:.*)/\nfirst[lazy]: TEXT \"<ab>\"\n\
         second[lazy]: TEXT \"[b]\"\n",
    );
    let trigger = Arc::new(Trigger::new(&texts(&["<ab>", "[b]"], true), tokenizer()));
    let none = [].into();
    let mut constraint = Constraint::new(Some(&grammar), Some(&trigger), None, &none, &[]).unwrap();
    let mut take = |text: &str| {
        let mut last = Accepted::Open;
        for byte in text.bytes() {
            last = constraint.accept(u32::from(byte));
        }
        (last, bits(&mut constraint))
    };
    let only = |c: char| Some(vec![c as u32]);
    for _ in 0..2 {
        assert_eq!(take("x <[b"), (Accepted::Open, None));
        assert_eq!(take("]"), (Accepted::Armed, only('e')));
        assert_eq!(take("e"), (Accepted::Open, None));
        assert_eq!(take("<a<ab>"), (Accepted::Armed, only('d')));
        // It may end here, and is forgotten, though it might go on.
        assert_eq!(take("d"), (Accepted::Open, None));
        assert_eq!(take("dx"), (Accepted::Open, None));
    }
}

#[test]
fn a_trigger_whose_token_says_more_than_fits_arms_nothing() {
    // "abc" is one token, and nothing that ends with it fits.
    let grammar = compile(
        GrammarKind::Grammar,
        "start: head \"d\"\nTEXT: /[x-z]*/\nhead[lazy]: TEXT \"ab\"\n",
    );
    let trigger = Arc::new(Trigger::new(&texts(&["ab"], false), tokenizer()));
    let none = [].into();
    let mut constraint = Constraint::new(Some(&grammar), Some(&trigger), None, &none, &[]).unwrap();
    assert_eq!(constraint.accept(257), Accepted::Open);
    assert_eq!(bits(&mut constraint), None);
    // The next one may.
    assert_eq!(constraint.accept(256), Accepted::Armed);
    assert_eq!(bits(&mut constraint), Some(vec![u32::from(b'd')]));
}

#[test]
fn tokens_taken_ahead_are_taken_once() {
    let grammar = compile(GrammarKind::Regex, "ab?");
    let none = [].into();
    let mut constraint = Constraint::new(Some(&grammar), None, None, &none, &[]).unwrap();
    let [a, b] = [b'a', b'b'].map(u32::from);
    assert!(constraint.advance(a, true));
    assert_eq!(bits(&mut constraint), Some(vec![b, EOS]));
    assert_eq!(constraint.accept(a), Accepted::Open);
    assert!(!constraint.advance(b, true));
    assert_eq!(constraint.accept(b), Accepted::Complete);
}

#[test]
fn a_trigger_of_the_start_counts_where_an_answer_begins() {
    let grammar = compile(
        GrammarKind::Grammar,
        r#"start: /\s*/ "[ab" /[0-9]/ "]" /(?s:.*)/"#,
    );
    let trigger = Arc::new(Trigger::new(
        &TriggerTexts {
            at_start: vec!["[ab"],
            is_repeated: true,
            ..TriggerTexts::default()
        },
        tokenizer(),
    ));
    let none: Arc<[Box<[u32]>]> = Arc::new([]);
    let reasoning = ReasoningTokens {
        open: None,
        close: TOOL,
        is_open: true,
        budget: None,
    };
    // Tokens are bytes, but for `ab`.
    let bytes = |text: &str| text.bytes().map(u32::from).collect::<Vec<_>>();
    for (before, thought, is_armed) in [
        ("", None, true),
        (" \n", None, true),
        ("x", None, false),
        ("[a [", None, false),
        ("", Some("Hm. [x"), true),
        ("\n\n", Some("[ab1]"), true),
        ("so ", Some("Hm."), false),
    ] {
        let open = thought.map(|_| reasoning);
        let mut constraint =
            Constraint::new(Some(&grammar), Some(&trigger), open, &none, &[]).unwrap();
        let mut tokens = Vec::new();
        if let Some(thought) = thought {
            tokens.extend(bytes(thought));
            tokens.push(TOOL);
        }
        tokens.extend(bytes(before));
        tokens.extend(bytes("[a"));
        for token in tokens {
            assert!(
                matches!(constraint.accept(token), Accepted::Open),
                "{before:?}"
            );
        }
        let accepted = constraint.accept(u32::from(b'b'));
        assert_eq!(matches!(accepted, Accepted::Armed), is_armed, "{before:?}");
        let mut row = vec![0; 16];
        assert_eq!(constraint.fill_mask(&mut row), is_armed);
        if is_armed {
            assert_ne!(row[1] & 1 << (b'7' - 32), 0);
            assert_eq!(row[1] & 1 << (b']' % 32), 0);
            // Behind the call all is free.
            for token in bytes("7] and [ab") {
                constraint.accept(token);
            }
            assert!(!constraint.fill_mask(&mut row));
        }
    }
}
