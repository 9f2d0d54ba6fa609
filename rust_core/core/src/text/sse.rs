//! The bytes of a streamed answer: JSON strings, and one server-sent event around a delta.
//!
//! Nothing here allocates but the growth of `out`. O(bytes).

/// The fixed bytes around a stream's changing parts. See `SseTemplate` in `_core.pyi`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SseTemplate {
    /// Around text, finish_reason and stop_reason.
    pub parts: [Box<[u8]>; 4],
    /// Before the first chunk.
    pub first: Box<[u8]>,
    /// After the last one.
    pub last: Box<[u8]>,
}

/// The cause of a text's end, besides EOS and its length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopReason<'a> {
    /// A stop string.
    Text(&'a str),
    /// A stop token.
    Token(u32),
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

/// Append `text` as a JSON string.
pub fn write_json_string(text: &str, out: &mut Vec<u8>) {
    out.push(b'"');
    escape_json(text, out);
    out.push(b'"');
}

/// Append one chunk: `text`, and JSON null or the reasons.
pub fn write_chunk(
    template: &SseTemplate,
    text: &str,
    finish: Option<&str>,
    stop_reason: Option<StopReason<'_>>,
    out: &mut Vec<u8>,
) {
    const NULL: &[u8] = b"null";
    let [before, after_text, after_finish, after_stop] = &template.parts;
    out.extend_from_slice(before);
    escape_json(text, out);
    out.extend_from_slice(after_text);
    match finish {
        Some(reason) => write_json_string(reason, out),
        None => out.extend_from_slice(NULL),
    }
    out.extend_from_slice(after_finish);
    match stop_reason {
        Some(StopReason::Text(stop)) => write_json_string(stop, out),
        Some(StopReason::Token(id)) => write_decimal(id, out),
        None => out.extend_from_slice(NULL),
    }
    out.extend_from_slice(after_stop);
}

fn write_decimal(mut number: u32, out: &mut Vec<u8>) {
    let mut digits = [0; 10];
    let mut at = digits.len();
    loop {
        at -= 1;
        digits[at] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            break;
        }
    }
    out.extend_from_slice(&digits[at..]);
}
