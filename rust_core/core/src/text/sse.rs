//! The bytes of a streamed answer: JSON strings, and one frame around a piece of text.
//!
//! Nothing here allocates but the growth of `out`. O(bytes).

/// The fixed bytes around a stream's text. See `SseTemplate` in `_core.pyi`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SseTemplate {
    /// Before and after a piece of text.
    pub around_text: [Box<[u8]>; 2],
    /// The same for reasoning, which stands between each two of these parts: a frame may name it
    /// more than once. None: it is left out.
    pub around_reasoning: Option<Vec<Box<[u8]>>>,
    /// Before the first frame.
    pub first: Box<[u8]>,
}

/// Append `text` as the inside of a JSON string, without its quotes.
///
/// Escapes what JSON requires and nothing else: quote, backslash, control characters. Everything
/// else leaves as UTF-8, U+2028 and U+2029 too.
pub fn escape_json(text: &str, out: &mut Vec<u8>) {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    let bytes = text.as_bytes();
    let mut copied = 0;
    for (at, &byte) in bytes.iter().enumerate() {
        let short = match byte {
            b'"' | b'\\' => byte,
            b'\n' => b'n',
            b'\r' => b'r',
            b'\t' => b't',
            0x08 => b'b',
            0x0c => b'f',
            0..0x20 => b'u',
            _ => continue,
        };
        out.extend_from_slice(&bytes[copied..at]);
        out.extend_from_slice(&[b'\\', short]);
        if short == b'u' {
            out.extend_from_slice(&[
                b'0',
                b'0',
                HEX[usize::from(byte >> 4)],
                HEX[usize::from(byte & 15)],
            ]);
        }
        copied = at + 1;
    }
    out.extend_from_slice(&bytes[copied..]);
}

/// Append one frame of `text`.
pub fn write_chunk(template: &SseTemplate, text: &str, out: &mut Vec<u8>) {
    write_frame(&template.around_text, text, out);
}

/// Append one frame of reasoning, where the template has one.
pub fn write_reasoning(template: &SseTemplate, text: &str, out: &mut Vec<u8>) {
    if let Some(around) = &template.around_reasoning {
        write_frame(around, text, out);
    }
}

/// The parts, with the text between each two of them.
fn write_frame(parts: &[Box<[u8]>], text: &str, out: &mut Vec<u8>) {
    for (index, part) in parts.iter().enumerate() {
        if index > 0 {
            escape_json(text, out);
        }
        out.extend_from_slice(part);
    }
}
