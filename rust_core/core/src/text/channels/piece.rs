//! Piece: a part of an answer and the channel it belongs to.

/// The channel of a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PieceKind {
    /// The answer's text.
    Text,
    /// The model's reasoning.
    Reasoning,
    /// A call begins; the text is the function's name.
    Name,
    /// The id that the model gave the call.
    Id,
    /// A part of the call's arguments, which are one JSON value.
    Arguments,
    /// The call is complete.
    End,
}

impl PieceKind {
    /// The name in `_core.pyi`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Reasoning => "reasoning",
            Self::Name => "name",
            Self::Id => "id",
            Self::Arguments => "arguments",
            Self::End => "end",
        }
    }

    /// True for pieces of a call.
    #[must_use]
    pub const fn is_call(self) -> bool {
        !matches!(self, Self::Text | Self::Reasoning)
    }
}

/// A part of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Its channel.
    pub kind: PieceKind,
    /// The call's number, from 0; 0 for text and reasoning.
    pub call: u32,
    /// Its text; empty for [`PieceKind::End`].
    pub text: String,
}

/// Appends a piece; a part of what the last piece is part of joins it. Empty parts are dropped.
pub(crate) fn append(pieces: &mut Vec<Piece>, kind: PieceKind, call: u32, text: &str) {
    let is_part = matches!(
        kind,
        PieceKind::Text | PieceKind::Reasoning | PieceKind::Arguments
    );
    if is_part {
        if text.is_empty() {
            return;
        }
        if let Some(last) = pieces.last_mut()
            && (last.kind, last.call) == (kind, call)
        {
            last.text.push_str(text);
            return;
        }
    }
    pieces.push(Piece {
        kind,
        call,
        text: text.to_owned(),
    });
}

/// Appends `text` as the inside of a JSON string, without its quotes.
pub(crate) fn escape(text: &str, out: &mut String) {
    let mut rest = text;
    while let Some(at) = rest
        .bytes()
        .position(|b| matches!(b, b'"' | b'\\' | 0..0x20))
    {
        out.push_str(&rest[..at]);
        match rest.as_bytes()[at] {
            b'\n' => out.push_str("\\n"),
            b'\r' => out.push_str("\\r"),
            b'\t' => out.push_str("\\t"),
            byte @ (b'"' | b'\\') => {
                out.push('\\');
                out.push(char::from(byte));
            }
            byte => {
                out.push_str("\\u00");
                for digit in [byte >> 4, byte & 15] {
                    out.push(char::from_digit(u32::from(digit), 16).unwrap_or('0'));
                }
            }
        }
        rest = &rest[at + 1..];
    }
    out.push_str(rest);
}

/// Appends `text` as a JSON string.
pub(crate) fn quote(text: &str, out: &mut String) {
    out.push('"');
    escape(text, out);
    out.push('"');
}
