//! Whatever a grammar of calls allows, the parser reads as calls: random walks through llguidance's masks.

use std::sync::Arc;

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use octavo_core::text::channels::{
    ChannelFormat, Channels, Extent, GrammarOptions, Machine, PieceKind, tool_call_formats,
};
use serde_json::{Value, json};

use crate::families::render;
use crate::support::{Call, calls_of};

const SCHEMA: &str = r##"{"type": "object", "properties": {
    "s": {"type": "string"}, "n": {"$ref": "#/$defs/n"}, "e": {"enum": ["red", "blue"]},
    "b": {"type": "boolean"}, "a": {"type": "array", "items": {"type": "integer"}},
    "u": {"type": ["string", "null"]}
}, "required": ["n", "s"], "additionalProperties": false,
"$defs": {"n": {"type": "integer", "minimum": 0, "maximum": 99}}}"##;

/// The end of a value that is free text.
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

/// A text that the grammar allows, `ends_early`: to where it first may end; None if the walk does not
/// end.
fn walk(
    matcher: &mut Matcher,
    vocabulary: &Vocabulary,
    random: &mut Random,
    ends_early: bool,
) -> Option<String> {
    let mut bytes = Vec::new();
    for _ in 0..MAX_TOKENS {
        let mask = matcher.compute_mask_or_eos().unwrap();
        let mut allowed: Vec<u32> = (0..=vocabulary.end())
            .filter(|&id| mask.is_allowed(id))
            .collect();
        let may_end = allowed.contains(&vocabulary.end());
        allowed.retain(|&id| id != vocabulary.end());
        if may_end && (allowed.is_empty() || ends_early || random.below(4) == 0) {
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

fn matcher(vocabulary: &Vocabulary, grammar: &str, name: &str) -> Matcher {
    let mut factory = ParserFactory::new_simple(&vocabulary.env()).unwrap();
    factory.quiet();
    let parser = factory.create_parser(TopLevelGrammar::from_lark(grammar.to_owned()));
    let parser = parser.unwrap_or_else(|error| panic!("{name}: {error}\n{grammar}"));
    Matcher::new(Ok(parser))
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

fn check(name: &str, has_special: bool, options: (Extent, bool, bool, bool)) {
    let (extent, at_least_one, at_most_one, is_strict) = options;
    let format = Arc::new(ChannelFormat::new(Some(name), None, None).unwrap());
    let vocabulary = Vocabulary::new(&format, has_special);
    let tool = |name: &str, schema: &str| (name.to_owned(), schema.to_owned());
    let tools = [
        tool("get_weather", SCHEMA),
        tool("f", r#"{"properties": {}}"#),
    ];
    let options = GrammarOptions {
        extent,
        at_least_one,
        at_most_one,
        strict: if is_strict { None } else { Some(&[]) },
        special_tokens: &vocabulary.special_tokens,
    };
    let grammar = format.grammar(&tools, &options).unwrap();
    let prototype = matcher(&vocabulary, &grammar, name);
    let (mut num_texts, mut num_calls) = (0, 0);
    for seed in 1..=6 {
        let mut random = Random(seed * 7919);
        let mut matcher = prototype.deep_clone();
        let mut begin = String::new();
        if extent == Extent::Calls {
            let triggers = format.triggers(&["get_weather", "f"]);
            let triggers = [triggers.anywhere, triggers.at_start].concat();
            begin = triggers[random.below(triggers.len())].clone();
            matcher
                .consume_tokens(&tokens_of(&vocabulary, &begin))
                .unwrap();
        }
        let Some(text) = walk(
            &mut matcher,
            &vocabulary,
            &mut random,
            extent == Extent::Calls,
        ) else {
            continue;
        };
        let text = format!("{begin}{text}");
        let channels = Channels::new(Arc::clone(&format), false, true, true, &tools);
        let mut machine = Machine::new(Arc::new(channels));
        let mut pieces = Vec::new();
        machine.push(&text, &mut pieces);
        machine.finish(&mut pieces);
        let calls = calls_of(&pieces);
        let context = format!("{name}: {text}\n{pieces:?}\n{grammar}");
        num_texts += 1;
        num_calls += calls.len();
        if at_least_one || extent == Extent::Calls {
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
                (Extent::Answer, true, true, true),
                (Extent::Answer, true, false, true),
                (Extent::Answer, true, false, false),
                (Extent::Answer, false, false, true),
                (Extent::Answer, false, true, true),
                (Extent::Calls, false, false, true),
                (Extent::Calls, false, false, false),
            ] {
                let format = ChannelFormat::new(Some(name), None, None).unwrap();
                if options.0 == Extent::Calls && format.is_bare() && options.3 {
                    continue; // strict calls without a marker are bound from the answer's start
                }
                check(name, has_special, options);
            }
        }
    }
}

/// A text's tokens: bytes, and markers that are special.
fn tokens_of(vocabulary: &Vocabulary, text: &str) -> Vec<u32> {
    let mut tokens = Vec::new();
    let mut rest = text;
    while let Some(&byte) = rest.as_bytes().first() {
        let mut special = vocabulary.special_tokens.iter();
        let found = special.find(|(marker, _)| rest.starts_with(marker.as_str()));
        let (token, length) = match found {
            Some((marker, id)) => (*id, marker.len()),
            None => (u32::from(byte), 1),
        };
        tokens.push(token);
        match rest.get(length..) {
            Some(after) => rest = after,
            None => {
                // The bytes of one character.
                let c = rest.chars().next().map_or(1, char::len_utf8);
                tokens.extend(rest.as_bytes()[1..c].iter().map(|&byte| u32::from(byte)));
                rest = &rest[c..];
            }
        }
    }
    tokens
}

/// The part of a text that a grammar takes, and whether it may end there; `ends_early`: where it first may.
fn taken(
    prototype: &Matcher,
    vocabulary: &Vocabulary,
    text: &str,
    ends_early: bool,
) -> (String, bool) {
    let mut matcher = prototype.deep_clone();
    let mut bytes = Vec::new();
    for token in tokens_of(vocabulary, text) {
        if matcher.try_consume_tokens(&[token]).unwrap() == 0 {
            break;
        }
        let read = &vocabulary.tokens[token as usize];
        bytes.extend(read.strip_prefix(b"\xff").unwrap_or(read));
        if ends_early && matcher.is_accepting().unwrap() {
            break;
        }
    }
    let is_complete = matcher.is_accepting().unwrap();
    (String::from_utf8_lossy(&bytes).into_owned(), is_complete)
}

/// The same by a grammar of calls, which holds from each trigger on until its calls may end.
fn taken_by_calls(
    format: &ChannelFormat,
    names: &[&str],
    prototype: &Matcher,
    vocabulary: &Vocabulary,
    text: &str,
) -> (String, bool) {
    let mut num_read = 0;
    let mut num_armed = 0;
    loop {
        let rest = &text[num_read..];
        let triggers = format.triggers(names);
        let places = triggers.anywhere.iter().filter_map(|text| rest.find(text));
        let starts = triggers.at_start.iter().filter(|_| num_armed == 0);
        let places = places.chain(starts.filter_map(|text| rest.starts_with(text).then_some(0)));
        let Some(at) = places.min() else {
            return (text.to_owned(), num_armed > 0);
        };
        num_armed += 1;
        let (read, is_complete) = taken(prototype, vocabulary, &rest[at..], true);
        num_read += at + read.len();
        if !is_complete {
            return (text[..num_read].to_owned(), false);
        }
    }
}

#[test]
fn a_grammar_allows_what_its_family_writes() {
    let calls = [
        Call::new(
            "get_weather",
            json!({"s": "São \"Paulo\" {x}\n\\d é 🦊", "n": 3, "x": -1.5, "b": true,
                   "o": {"k": ["v", null, {"z": "}"}]}, "a": [1, "]"], "e": "red"}),
        ),
        Call::new("f", json!({})),
        Call::new("ns.search-web", json!({"s": "", "text": " <x> \n\n"})),
    ];
    let schema = crate::support::SCHEMA.to_owned();
    let tools: Vec<_> = calls
        .iter()
        .map(|c| (c.name.clone(), schema.clone()))
        .collect();
    let names: Vec<&str> = calls.iter().map(|call| call.name.as_str()).collect();
    let mut wrong = Vec::new();
    for name in tool_call_formats() {
        let format = Arc::new(ChannelFormat::new(Some(name), None, None).unwrap());
        for has_special in [false, true] {
            if name == "openai" && !has_special {
                continue;
            }
            let vocabulary = Vocabulary::new(&format, has_special);
            for (extent, at_least_one, is_strict) in [
                (Extent::Answer, true, true),
                (Extent::Answer, true, false),
                (Extent::Answer, false, false),
                (Extent::Calls, false, true),
                (Extent::Calls, false, false),
            ] {
                let options = GrammarOptions {
                    extent,
                    at_least_one,
                    at_most_one: false,
                    strict: if is_strict { None } else { Some(&[]) },
                    special_tokens: &vocabulary.special_tokens,
                };
                let grammar = format.grammar(&tools, &options).unwrap();
                let prototype = matcher(&vocabulary, &grammar, name);
                let unknown = render(name, &[Call::new("unknown", json!({}))]);
                let (_, is_taken) = match extent {
                    Extent::Answer if !at_least_one => (String::new(), false),
                    Extent::Answer => taken(&prototype, &vocabulary, &unknown, false),
                    Extent::Calls => {
                        taken_by_calls(&format, &names, &prototype, &vocabulary, &unknown)
                    }
                };
                assert!(!is_taken, "{name} {extent:?}: {unknown}");
                for count in 1..=calls.len() {
                    let text = render(name, &calls[..count]);
                    let (read, is_complete) = match extent {
                        Extent::Answer => taken(&prototype, &vocabulary, &text, false),
                        Extent::Calls => {
                            taken_by_calls(&format, &names, &prototype, &vocabulary, &text)
                        }
                    };
                    if read != text || !is_complete {
                        wrong.push(format!(
                            "{name} special={has_special} {extent:?} required={at_least_one} strict={is_strict} {count}: {read}⇩{}",
                            &text[read.len().min(text.len())..]
                        ));
                        break;
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
