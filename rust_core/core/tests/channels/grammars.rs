//! What a grammar of calls allows, the parser reads as calls: random walks through llguidance's masks.

use std::sync::Arc;

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use octavo_core::text::channels::{
    ChannelFormat, Channels, GrammarOptions, Machine, PieceKind, tool_call_formats,
};
use serde_json::Value;

use crate::support::calls_of;

const SCHEMA: &str = r##"{"type": "object", "properties": {
    "s": {"type": "string"}, "n": {"$ref": "#/$defs/n"}, "e": {"enum": ["red", "blue"]},
    "b": {"type": "boolean"}, "a": {"type": "array", "items": {"type": "integer"}},
    "u": {"type": ["string", "null"]}
}, "required": ["n", "s"], "additionalProperties": false,
"$defs": {"n": {"type": "integer", "minimum": 0, "maximum": 99}}}"##;

/// What ends a value that is free text.
const VALUE_ENDS: [&str; 9] = [
    "</parameter>",
    "</arg_value>",
    "</cofl:tool_param>",
    "</param>",
    "<|tool_arg:end|>",
    "</｜DSML｜parameter>",
    "</steptml:parameter>",
    "<|\"|>",
    "<escape>",
];

/// The longest walk, in tokens; what is not over by then is given up.
const MAX_TOKENS: usize = 1500;

/// A vocabulary of bytes, words and special tokens, and the end of the text.
struct Vocabulary {
    tokens: Vec<Vec<u8>>,
    special_tokens: Vec<(String, u32)>,
    /// Words that lead out of free text.
    closing: Vec<u32>,
}

impl Vocabulary {
    fn new(format: &ChannelFormat, has_special: bool) -> Self {
        let markers = format.markers();
        let is_special = |marker: &&str| {
            let is_tag = |open, close| marker.starts_with(open) && marker.ends_with(close);
            has_special
                && (is_tag('<', '>') || is_tag('[', ']'))
                && marker.matches(['<', '[']).count() == 1
                && !marker.contains(['"', '\n'])
        };
        let (special, plain): (Vec<&str>, Vec<&str>) = markers.into_iter().partition(is_special);
        let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
        let mut closing = vec![u32::from(b'"')];
        let on_lines = format.tool_calls() == Some("qwen3_coder");
        for marker in plain.iter().filter(|marker| marker.len() > 1) {
            for text in [(*marker).to_owned(), format!("\n{marker}")] {
                let ends_value = VALUE_ENDS.iter().any(|end| marker.ends_with(end));
                if ends_value && (!on_lines || text.starts_with('\n')) {
                    closing.push(tokens.len() as u32);
                }
                tokens.push(text.into_bytes());
            }
        }
        let mut special_tokens = Vec::new();
        for marker in special {
            special_tokens.push((marker.to_owned(), tokens.len() as u32));
            closing.push(tokens.len() as u32);
            // The mark of special tokens, which keeps them out of texts.
            tokens.push([b"\xff", marker.as_bytes()].concat());
        }
        tokens.push(b"\xff<|the end|>".to_vec());
        Self {
            tokens,
            special_tokens,
            closing,
        }
    }

    fn end(&self) -> u32 {
        self.tokens.len() as u32 - 1
    }

    fn env(&self) -> TokEnv {
        let info = TokRxInfo::new(self.tokens.len() as u32, self.end());
        Arc::new(ApproximateTokEnv::new(TokTrie::from(&info, &self.tokens)))
    }
}

/// Xorshift: a walk is the same every time.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }

    fn choose(&mut self, from: &[u32]) -> u32 {
        from[self.below(from.len())]
    }
}

/// A text that the grammar allows; None if the walk does not end.
fn walk(matcher: &mut Matcher, vocabulary: &Vocabulary, random: &mut Random) -> Option<String> {
    let mut bytes = Vec::new();
    for _ in 0..MAX_TOKENS {
        let mask = matcher.compute_mask_or_eos().unwrap();
        let mut allowed: Vec<u32> = (0..=vocabulary.end())
            .filter(|&id| mask.is_allowed(id))
            .collect();
        let may_end = allowed.contains(&vocabulary.end());
        allowed.retain(|&id| id != vocabulary.end());
        if may_end && (allowed.is_empty() || random.below(4) == 0) {
            return String::from_utf8(bytes).ok();
        }
        let pick = |fits: &dyn Fn(u32) -> bool| -> Vec<u32> {
            allowed.iter().copied().filter(|&id| fits(id)).collect()
        };
        let letters = pick(&|id| matches!(id, 97..=122));
        let closing = pick(&|id| vocabulary.closing.contains(&id));
        // Little white space and no exponents, where there is a choice.
        let solid = pick(&|id| !matches!(id, 9 | 13 | 32 | 69 | 101));
        // In free text: letters, and at times the way out.
        let is_free = letters.len() == 26 && (!closing.is_empty() || random.below(3) > 0);
        let others = match (is_free, solid.is_empty()) {
            (true, _) => &letters,
            (false, true) => &allowed,
            (false, false) => &solid,
        };
        let closes = !closing.is_empty() && random.below(if is_free { 3 } else { 2 }) == 0;
        let token = random.choose(if closes { &closing } else { others });
        matcher.consume_token(token).unwrap();
        let text = &vocabulary.tokens[token as usize];
        bytes.extend(text.strip_prefix(b"\xff").unwrap_or(text));
    }
    None
}

fn fits_schema(arguments: &Value) -> bool {
    let Value::Object(pairs) = arguments else {
        return false;
    };
    arguments["n"].as_u64().is_some_and(|n| n < 100)
        && arguments["s"].is_string()
        && pairs.iter().all(|(key, value)| match &**key {
            "s" | "n" | "u" => true,
            "e" => *value == "red" || *value == "blue",
            "b" => value.is_boolean(),
            "a" => value
                .as_array()
                .is_some_and(|items| items.iter().all(Value::is_number)),
            _ => false,
        })
}

fn check(name: &str, has_special: bool, options: (bool, bool, bool)) {
    let (at_least_one, at_most_one, is_strict) = options;
    let format = Arc::new(ChannelFormat::new(Some(name), None, None).unwrap());
    let vocabulary = Vocabulary::new(&format, has_special);
    let tool = |name: &str, schema: &str| (name.to_owned(), schema.to_owned());
    let tools = [
        tool("get_weather", SCHEMA),
        tool("f", r#"{"properties": {}}"#),
    ];
    let options = GrammarOptions {
        at_least_one,
        at_most_one,
        strict: if is_strict { None } else { Some(&[]) },
        special_tokens: &vocabulary.special_tokens,
    };
    let grammar = format.grammar(&tools, &options).unwrap();
    let mut factory = ParserFactory::new_simple(&vocabulary.env()).unwrap();
    factory.quiet();
    let parser = factory.create_parser(TopLevelGrammar::from_lark(grammar.clone()));
    let parser = parser.unwrap_or_else(|error| panic!("{name}: {error}\n{grammar}"));
    let prototype = Matcher::new(Ok(parser));
    let (mut num_texts, mut num_calls) = (0, 0);
    for seed in 1..=6 {
        let mut random = Random(seed * 7919);
        let Some(text) = walk(&mut prototype.deep_clone(), &vocabulary, &mut random) else {
            continue;
        };
        let channels = Channels::new(Arc::clone(&format), false, true, true, &tools);
        let mut machine = Machine::new(Arc::new(channels));
        let mut pieces = Vec::new();
        machine.push(&text, &mut pieces);
        machine.finish(&mut pieces);
        let calls = calls_of(&pieces);
        let context = format!("{name}: {text}\n{pieces:?}\n{grammar}");
        num_texts += 1;
        num_calls += calls.len();
        if at_least_one {
            assert!(!calls.is_empty(), "{context}");
            let mut kinds = pieces.iter().map(|piece| piece.kind);
            assert!(!kinds.any(|kind| kind == PieceKind::Text), "{context}");
        }
        assert!(calls.len() <= 1 || !at_most_one, "{context}");
        for (function, arguments, is_over) in calls {
            assert!(is_over, "{context}");
            assert!(["get_weather", "f"].contains(&&*function), "{context}");
            let arguments: Value = serde_json::from_str(&arguments).expect(&context);
            if is_strict && function == "get_weather" {
                assert!(fits_schema(&arguments), "{context}");
            }
        }
    }
    assert!(num_texts > 0, "{name}: no walk ended\n{grammar}");
    assert!(num_calls > 0 || !at_least_one, "{name}: no call\n{grammar}");
}

#[test]
fn what_a_grammar_allows_is_read() {
    for name in tool_call_formats() {
        for has_special in [false, true] {
            if name == "openai" && !has_special {
                continue; // its messages end with special tokens alone
            }
            for options in [
                (true, true, true),
                (true, false, true),
                (true, false, false),
                (false, false, true),
                (false, true, true),
            ] {
                check(name, has_special, options);
            }
        }
    }
}
