//! Parsing in any cut, and pieces as lines.

use std::sync::Arc;

use octavo_core::text::channels::{ChannelFormat, Channels, Machine, Piece, PieceKind};
use serde_json::{Map, Value};

/// Parameters of every kind.
pub(crate) const SCHEMA: &str = r##"{"type": "object", "$defs": {"n": {"type": "integer"}}, "properties": {
    "s": {"type": "string"}, "text": {"type": "string"}, "n": {"$ref": "#/$defs/n"},
    "x": {"type": "number"}, "b": {"type": "boolean"}, "o": {"type": "object"},
    "a": {"type": "array"}, "e": {"enum": ["red", "blue"]}
}}"##;

#[derive(Debug, Clone)]
pub(crate) struct Call {
    pub(crate) name: String,
    pub(crate) arguments: Map<String, Value>,
}

impl Call {
    pub(crate) fn new(name: &str, arguments: Value) -> Self {
        let Value::Object(arguments) = arguments else {
            panic!("arguments are an object")
        };
        Self {
            name: name.to_owned(),
            arguments,
        }
    }

    pub(crate) fn json(&self) -> String {
        Value::Object(self.arguments.clone()).to_string()
    }
}

pub(crate) fn machine(tool_calls: &str, reasoning: Option<&str>, in_reasoning: bool) -> Machine {
    let format = ChannelFormat::new(Some(tool_calls), reasoning, None).unwrap();
    let tool = |name: &str| (name.to_owned(), SCHEMA.to_owned());
    let tools = [tool("get_weather"), tool("f"), tool("ns.search-web")];
    Machine::new(Arc::new(Channels::new(
        Arc::new(format),
        in_reasoning,
        true,
        true,
        &tools,
    )))
}

/// The pieces of a text that arrives in these parts, joined where they are one.
pub(crate) fn fold(mut machine: Machine, parts: &[&str]) -> Vec<Piece> {
    let mut all: Vec<Piece> = Vec::new();
    let mut add = |pieces: Vec<Piece>| {
        for piece in pieces {
            let is_part = matches!(
                piece.kind,
                PieceKind::Text | PieceKind::Reasoning | PieceKind::Arguments
            );
            match all.last_mut() {
                Some(last) if is_part && (last.kind, last.call) == (piece.kind, piece.call) => {
                    last.text.push_str(&piece.text);
                }
                _ => all.push(piece),
            }
        }
    };
    for part in parts {
        let mut pieces = Vec::new();
        machine.push(part, &mut pieces);
        add(pieces);
    }
    let mut pieces = Vec::new();
    machine.finish(&mut pieces);
    add(pieces);
    all
}

/// As lines: `text: …`, `f({…})`, with `…` in place of the closing bracket of a call without an end.
pub(crate) fn lines(pieces: &[Piece]) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for piece in pieces {
        match piece.kind {
            PieceKind::Text => lines.push(format!("text: {}", piece.text)),
            PieceKind::Reasoning => lines.push(format!("reasoning: {}", piece.text)),
            PieceKind::Name => {
                let number = lines
                    .iter()
                    .filter(|line| line.starts_with("call: "))
                    .count();
                assert_eq!(piece.call as usize, number);
                lines.push(format!("call: {}(", piece.text));
            }
            PieceKind::Id => lines
                .last_mut()
                .unwrap()
                .push_str(&format!("#{} ", piece.text)),
            PieceKind::Arguments => lines.last_mut().unwrap().push_str(&piece.text),
            PieceKind::End => lines.last_mut().unwrap().push(')'),
        }
    }
    lines
}

pub(crate) fn chars(text: &str) -> Vec<&str> {
    let ends = text.char_indices().map(|(at, c)| (at, at + c.len_utf8()));
    ends.map(|(at, end)| &text[at..end]).collect()
}

/// The lines of a text, the same for every way to cut it.
pub(crate) fn parse(
    tool_calls: &str,
    reasoning: Option<&str>,
    in_reasoning: bool,
    text: &str,
) -> Vec<String> {
    let make = || machine(tool_calls, reasoning, in_reasoning);
    let whole = fold(make(), &[text]);
    assert_eq!(
        whole,
        fold(make(), &chars(text)),
        "cut in characters: {text}"
    );
    for size in [2, 3, 7] {
        let parts: Vec<String> = chars(text).chunks(size).map(|part| part.concat()).collect();
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        assert_eq!(whole, fold(make(), &parts), "cut in {size}: {text}");
    }
    lines(&whole)
}

/// The calls of folded pieces: name, arguments as JSON, whether there was an end.
pub(crate) fn calls_of(pieces: &[Piece]) -> Vec<(String, String, bool)> {
    let mut calls: Vec<(String, String, bool)> = Vec::new();
    for piece in pieces {
        match piece.kind {
            PieceKind::Name => calls.push((piece.text.clone(), String::new(), false)),
            PieceKind::Arguments => calls[piece.call as usize].1.push_str(&piece.text),
            PieceKind::End => calls[piece.call as usize].2 = true,
            _ => {}
        }
    }
    calls
}

pub(crate) fn text_of(pieces: &[Piece], kind: PieceKind) -> String {
    let pieces = pieces.iter().filter(|piece| piece.kind == kind);
    pieces.map(|piece| piece.text.as_str()).collect()
}
