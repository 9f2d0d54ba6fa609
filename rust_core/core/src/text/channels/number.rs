//! Numbers as models write them, as JSON's.

/// A number in JSON; None if the word is none. JSON's own stay as they are; also understood are
/// leading zeros, signs and points, `1_000`, `1.` and `0x1f`.
pub(crate) fn json_number(word: &str) -> Option<String> {
    if is_json_number(word) {
        return Some(word.to_owned());
    }
    let bare = word.replace('_', "");
    let (sign, digits) = match bare.strip_prefix('-') {
        Some(digits) => ("-", digits),
        None => ("", bare.strip_prefix('+').unwrap_or(&bare)),
    };
    let hex = digits.strip_prefix("0x").or(digits.strip_prefix("0X"));
    if let Some(hex) = hex {
        return Some(format!("{sign}{}", u64::from_str_radix(hex, 16).ok()?));
    }
    let has_digit = digits.contains(|c: char| c.is_ascii_digit());
    if !has_digit || !digits.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
        return None;
    }
    let digits = match digits.trim_start_matches('0') {
        "" => "0".to_owned(),
        rest if rest.starts_with(|c: char| c.is_ascii_digit()) => rest.to_owned(),
        rest => format!("0{rest}"),
    };
    let fixed = match digits.strip_suffix('.') {
        Some(whole) => format!("{sign}{whole}.0"),
        None => format!("{sign}{}", digits.replace(".e", ".0e").replace(".E", ".0E")),
    };
    is_json_number(&fixed).then_some(fixed)
}

/// RFC 8259's grammar of numbers.
fn is_json_number(word: &str) -> bool {
    let digits = |text: &mut &str| {
        let rest = text.trim_start_matches(|c: char| c.is_ascii_digit());
        let found = rest.len() < text.len();
        *text = rest;
        found
    };
    let mut rest = word.strip_prefix('-').unwrap_or(word);
    match rest.strip_prefix('0') {
        Some(after) => rest = after,
        None if !digits(&mut rest) => return false,
        None => {}
    }
    if let Some(mut fraction) = rest.strip_prefix('.') {
        if !digits(&mut fraction) {
            return false;
        }
        rest = fraction;
    }
    if let Some(exponent) = rest.strip_prefix(['e', 'E']) {
        let mut exponent = exponent.strip_prefix(['+', '-']).unwrap_or(exponent);
        return digits(&mut exponent) && exponent.is_empty();
    }
    rest.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_become_jsons() {
        for same in [
            "0",
            "-0",
            "12",
            "1.50",
            "1e5",
            "-1.5E-07",
            "12345678901234567890123",
        ] {
            assert_eq!(json_number(same).as_deref(), Some(same));
        }
        for (word, expected) in [
            ("007", "7"),
            ("+1", "1"),
            (".5", "0.5"),
            ("-.5", "-0.5"),
            ("1.", "1.0"),
            ("1_000", "1000"),
            ("0x1F", "31"),
            ("00", "0"),
            ("1.e3", "1.0e3"),
        ] {
            assert_eq!(json_number(word).as_deref(), Some(expected), "{word}");
        }
        for word in ["", "-", "abc", "1a", "1.2.3", "1e", "--1", ".", "e5", "1-2"] {
            assert_eq!(json_number(word), None, "{word}");
        }
    }
}
