//! The size of a JSON text in values, counted before anything is made of them.
//!
//! O(bytes), without allocation. The text may be no JSON at all: the counts are then of
//! characters alone.

/// Counts of the values that a parser would make.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct JsonSize {
    /// Objects, arrays, and members of objects: each costs a parser an allocation or more.
    pub num_nodes: usize,
    /// Commas: one less than the elements, summed over objects and arrays.
    pub num_commas: usize,
}

/// Counts outside of strings.
#[must_use]
pub fn json_size(text: &[u8]) -> JsonSize {
    let mut size = JsonSize::default();
    let mut bytes = text.iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b'[' | b'{' | b':' => size.num_nodes += 1,
            b',' => size.num_commas += 1,
            b'"' => skip_string(&mut bytes),
            _ => {}
        }
    }
    size
}

/// Moves past a string whose first quote has been read.
fn skip_string(bytes: &mut std::slice::Iter<'_, u8>) {
    while let Some(byte) = bytes.next() {
        match byte {
            b'"' => return,
            // Whatever is escaped does not end the string.
            b'\\' => _ = bytes.next(),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(text: &str) -> (usize, usize) {
        let size = json_size(text.as_bytes());
        (size.num_nodes, size.num_commas)
    }

    #[test]
    fn containers_members_and_elements_are_counted() {
        assert_eq!(sizes("[]"), (1, 0));
        assert_eq!(sizes(r#"{"a": 1, "b": [1, 2, 3]}"#), (4, 3));
        assert_eq!(sizes(&"[".repeat(100)), (100, 0));
        assert_eq!(sizes(""), (0, 0));
    }

    #[test]
    fn what_strings_hold_is_not() {
        assert_eq!(sizes(r#"["[{:,", "\"[", "\\", ","]"#), (1, 3));
        assert_eq!(sizes(r#"{"a:b[": "}{"#), (2, 0));
        assert_eq!(sizes(r#""\"#), (0, 0));
    }
}
