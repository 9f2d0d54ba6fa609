//! References within a schema, as JSON pointers.

/// The JSON pointer of a reference within its schema; None for one that leaves it.
pub(super) fn target(reference: &str) -> Option<String> {
    let fragment = percent_decoded(reference.strip_prefix('#')?)?;
    match fragment.as_str() {
        "" | "/" => Some(String::new()),
        pointer if pointer.starts_with('/') => Some(pointer.to_owned()),
        _ => None,
    }
}

fn percent_decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        if byte == b'%' {
            let digits = str::from_utf8(tail.get(..2)?).ok()?;
            bytes.push(u8::from_str_radix(digits, 16).ok()?);
            rest = &tail[2..];
        } else {
            bytes.push(byte);
            rest = tail;
        }
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_of_references_are_read() {
        assert_eq!(target("#/a%20b").unwrap(), "/a b");
        assert_eq!(target("#").unwrap(), "");
        assert_eq!(target("#%"), None);
    }
}
