//! Expect: one of a few markers, white space in front of it free.

/// A marker under way.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Expect {
    /// A marker that fits what was read, and so many of its bytes.
    fits: usize,
    matched: usize,
}

/// Outcome of a character.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Match {
    /// It was read; no marker is complete.
    More,
    /// It completed this marker.
    Found(usize),
    /// This marker was complete before it; it was not read.
    Before(usize),
    /// No marker fits; it was not read.
    Not,
}

impl Expect {
    /// Number of bytes of a marker that have been read.
    pub(crate) fn num_matched(&self) -> usize {
        self.matched
    }

    /// Reads a character. Of two markers that begin alike the longer one is found.
    pub(crate) fn step<S: AsRef<str>>(&mut self, markers: &[S], c: char) -> Match {
        if self.matched == 0 && matches!(c, ' ' | '\n' | '\r' | '\t') {
            return Match::More;
        }
        let text = |number: usize| markers[number].as_ref();
        let read = match markers.is_empty() {
            true => "",
            false => &text(self.fits)[..self.matched],
        };
        let find = |fits: &dyn Fn(&str) -> bool| markers.iter().position(|m| fits(m.as_ref()));
        let goes_on = |m: &str| m.strip_prefix(read).is_some_and(|rest| rest.starts_with(c));
        let Some(fits) = find(&goes_on) else {
            return match find(&|m| m == read).filter(|_| self.matched > 0) {
                Some(complete) => {
                    *self = Self::default();
                    Match::Before(complete)
                }
                None => Match::Not,
            };
        };
        let matched = self.matched + c.len_utf8();
        let read = &text(fits)[..matched];
        let is_longer = |m: &str| m.len() > matched && m.starts_with(read);
        match find(&|m| m == read) {
            Some(complete) if find(&is_longer).is_none() => {
                *self = Self::default();
                Match::Found(complete)
            }
            _ => {
                *self = Self { fits, matched };
                Match::More
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(markers: &[&str], text: &str) -> (usize, Match) {
        let mut expect = Expect::default();
        for (at, c) in text.char_indices() {
            match expect.step(markers, c) {
                Match::More => {}
                Match::Found(found) => return (at + c.len_utf8(), Match::Found(found)),
                other => return (at, other),
            }
        }
        (text.len(), Match::More)
    }

    #[test]
    fn the_longest_marker_is_found() {
        let markers = ["<a", "</b>", "<a>c", "｜x"];
        assert_eq!(run(&markers, " \n<ab"), (4, Match::Before(0)));
        assert_eq!(run(&markers, "<a>c"), (4, Match::Found(2)));
        assert_eq!(run(&markers, "</b>"), (4, Match::Found(1)));
        assert_eq!(run(&markers, "</c>"), (2, Match::Not));
        assert_eq!(run(&markers, "｜x"), (4, Match::Found(3)));
        assert_eq!(run(&markers, "｝"), (0, Match::Not));
        assert_eq!(run(&markers, "<a>"), (3, Match::More));
        assert_eq!(run(&markers, "<a>d"), (3, Match::Not));
    }
}
