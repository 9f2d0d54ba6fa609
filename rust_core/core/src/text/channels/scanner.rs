//! Scanner: the first of several markers in a text that arrives in pieces.
//!
//! An Aho-Corasick automaton: each byte is read once, and its state tells how much of the text's end
//! may be a marker's beginning. Built once a format; scanning allocates nothing.

use std::collections::VecDeque;

const ROOT: u32 = 0;

/// See the module's page.
#[derive(Debug, Clone)]
pub(crate) struct Scanner {
    nodes: Vec<Node>,
    /// By byte: whether a marker begins with it.
    begins: Box<[bool; 256]>,
}

#[derive(Debug, Clone, Default)]
struct Node {
    next: Vec<(u8, u32)>,
    /// The node of the longest shorter suffix that begins a marker.
    fallback: u32,
    /// The number of bytes of a marker that have been read.
    depth: usize,
    /// The marker that ends here, and its length.
    found: Option<(usize, usize)>,
}

/// A place in a scanner's automaton, between two pieces of text.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Place(u32);

/// A marker that was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Found {
    /// Its number.
    pub(crate) marker: usize,
    /// Its length in bytes.
    pub(crate) len: usize,
    /// One past its end, in the piece that completed it.
    pub(crate) end: usize,
}

impl Scanner {
    /// Of equal markers the first is found; empty ones never are.
    pub(crate) fn new<S: AsRef<str>>(markers: impl IntoIterator<Item = S>) -> Self {
        let mut scanner = Self {
            nodes: vec![Node::default()],
            begins: Box::new([false; 256]),
        };
        for (number, marker) in markers.into_iter().enumerate() {
            scanner.add(number, marker.as_ref().as_bytes());
        }
        scanner.link();
        scanner
    }

    fn add(&mut self, number: usize, marker: &[u8]) {
        let Some(&first) = marker.first() else {
            return;
        };
        self.begins[usize::from(first)] = true;
        let mut at = ROOT;
        for (index, &byte) in marker.iter().enumerate() {
            at = match self.child(at, byte) {
                Some(next) => next,
                None => {
                    let next = self.nodes.len() as u32;
                    self.nodes.push(Node {
                        depth: index + 1,
                        ..Node::default()
                    });
                    self.nodes[at as usize].next.push((byte, next));
                    next
                }
            };
        }
        self.nodes[at as usize]
            .found
            .get_or_insert((number, marker.len()));
    }

    /// Sets the fallbacks, nearest nodes first.
    fn link(&mut self) {
        let mut queue: VecDeque<u32> = VecDeque::from([ROOT]);
        while let Some(at) = queue.pop_front() {
            for (byte, child) in self.nodes[at as usize].next.clone() {
                let fallback = match at {
                    ROOT => ROOT,
                    _ => self.step(self.nodes[at as usize].fallback, byte),
                };
                let found = self.nodes[fallback as usize].found;
                let node = &mut self.nodes[child as usize];
                node.fallback = fallback;
                node.found = node.found.or(found);
                queue.push_back(child);
            }
        }
    }

    #[inline]
    fn child(&self, at: u32, byte: u8) -> Option<u32> {
        let next = &self.nodes[at as usize].next;
        next.iter()
            .find(|(label, _)| *label == byte)
            .map(|(_, child)| *child)
    }

    #[inline]
    fn step(&self, mut at: u32, byte: u8) -> u32 {
        loop {
            if let Some(child) = self.child(at, byte) {
                return child;
            }
            if at == ROOT {
                return ROOT;
            }
            at = self.nodes[at as usize].fallback;
        }
    }

    /// Reads `text` up to the end of the first marker, or all of it.
    pub(crate) fn scan(&self, place: &mut Place, text: &str) -> Option<Found> {
        let bytes = text.as_bytes();
        let mut at = place.0;
        let mut index = 0;
        while index < bytes.len() {
            if at == ROOT {
                // Most of a text begins no marker.
                let begin = |byte: &u8| self.begins[usize::from(*byte)];
                match bytes[index..].iter().position(begin) {
                    Some(skipped) => index += skipped,
                    None => break,
                }
            }
            at = self.step(at, bytes[index]);
            index += 1;
            if let Some((marker, len)) = self.nodes[at as usize].found {
                *place = Place::default();
                return Some(Found {
                    marker,
                    len,
                    end: index,
                });
            }
        }
        *place = Place(at);
        None
    }

    /// The number of bytes at the text's end that may be a marker's beginning.
    pub(crate) fn num_held(&self, place: Place) -> usize {
        self.nodes[place.0 as usize].depth
    }
}

/// A text on its way past a scanner: what may be a marker's beginning is held.
#[derive(Debug, Clone, Default)]
pub(crate) struct Held {
    place: Place,
    text: String,
}

impl Held {
    /// Reads `text` up to the first marker's end, hands what is in front of it to `pass`, or all that
    /// cannot be a marker's beginning. Returns the marker.
    pub(crate) fn scan(
        &mut self,
        scanner: &Scanner,
        text: &str,
        mut pass: impl FnMut(&str),
    ) -> Option<Found> {
        let found = scanner.scan(&mut self.place, text);
        let (num_read, num_kept) = match found {
            Some(found) => (found.end, found.len),
            None => (text.len(), scanner.num_held(self.place)),
        };
        let num_free = self.text.len() + num_read - num_kept;
        if num_free >= self.text.len() {
            let free = num_free - self.text.len();
            if !self.text.is_empty() {
                pass(&self.text);
                self.text.clear();
            }
            if free > 0 {
                pass(&text[..free]);
            }
            if found.is_none() {
                self.text.push_str(&text[free..]);
            }
        } else {
            if num_free > 0 {
                pass(&self.text[..num_free]);
                self.text.drain(..num_free);
            }
            match found {
                Some(_) => self.text.clear(),
                None => self.text.push_str(text),
            }
        }
        found
    }

    /// True if nothing is held.
    pub(crate) fn is_empty(&self) -> bool {
        self.text.is_empty()
    }

    /// Takes what is held: it is no marker.
    pub(crate) fn take(&mut self) -> String {
        self.place = Place::default();
        std::mem::take(&mut self.text)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The text that passes, and the markers found, in order.
    fn run(scanner: &Scanner, parts: &[&str]) -> (String, Vec<usize>) {
        let mut held = Held::default();
        let (mut passed, mut markers) = (String::new(), Vec::new());
        for part in parts {
            let mut rest = *part;
            while let Some(found) = held.scan(scanner, rest, |text| passed.push_str(text)) {
                markers.push(found.marker);
                passed.push('#');
                rest = &rest[found.end..];
            }
        }
        passed.push_str(&held.take());
        (passed, markers)
    }

    #[test]
    fn markers_are_found_and_their_beginnings_held() {
        let scanner = Scanner::new(["<think>", "<thick>", "<｜x｜>", "\n</p>", "</p>"]);
        let (passed, markers) = run(
            &scanner,
            &["a <th", "in<thic", "k>b\n", "</p></p><｜", "x｜><"],
        );
        assert_eq!(passed, "a <thin#b###<");
        assert_eq!(markers, [1, 3, 4, 2]);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

        #[test]
        fn cuts_change_nothing(text in "[ab<｜]{0,30}", cut in prop::collection::vec(0..30usize, 0..5)) {
            let scanner = Scanner::new(["<a", "ab<b", "<｜b", "b<｜a", "aa"]);
            let mut cuts: Vec<usize> = cut.into_iter().filter(|&at| text.is_char_boundary(at)).collect();
            cuts.extend([0, text.len()]);
            cuts.retain(|&at| at <= text.len());
            cuts.sort_unstable();
            let parts: Vec<&str> = cuts.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect();
            prop_assert_eq!(run(&scanner, &parts), run(&scanner, &[&text]));
        }
    }
}
