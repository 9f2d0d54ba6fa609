//! StopStrings: where a text that arrives in pieces must end.
//!
//! One Knuth-Morris-Pratt automaton a stop string: each byte is read once, O(bytes x stop
//! strings), whatever the pieces. Text that may be a stop string's beginning is held back; nothing
//! is allocated once `held` has grown to the longest stop string and piece.

/// Matches stop strings. Of several, the one that is complete first wins, so that the result does
/// not depend on how the text is cut; of those complete at the same byte, the longest.
#[derive(Debug)]
pub(crate) struct StopStrings {
    stops: Vec<Stop>,
    /// By byte: whether a stop string begins with it.
    begins: [bool; 256],
    held: String,
    include_stop: bool,
    is_over: bool,
}

#[derive(Debug)]
struct Stop {
    text: Box<[u8]>,
    /// By length of a match so far: the longest shorter one that is its suffix.
    fallback: Box<[usize]>,
    matched: usize,
}

impl Stop {
    fn new(text: &str) -> Self {
        let text: Box<[u8]> = text.as_bytes().into();
        let mut fallback = vec![0; text.len() + 1];
        let mut matched = 0;
        for i in 1..text.len() {
            while matched > 0 && text[i] != text[matched] {
                matched = fallback[matched];
            }
            if text[i] == text[matched] {
                matched += 1;
            }
            fallback[i + 1] = matched;
        }
        Self {
            text,
            fallback: fallback.into(),
            matched: 0,
        }
    }

    /// Take one byte; whether the string is complete. An empty one never is.
    #[inline]
    fn advance(&mut self, byte: u8) -> bool {
        if self.text.is_empty() {
            return false;
        }
        while self.matched > 0 && self.text[self.matched] != byte {
            self.matched = self.fallback[self.matched];
        }
        if self.text[self.matched] == byte {
            self.matched += 1;
        }
        self.matched == self.text.len()
    }
}

impl StopStrings {
    /// Empty strings are never found.
    pub(crate) fn new(stops: &[String], include_stop: bool) -> Self {
        let mut begins = [false; 256];
        for stop in stops {
            if let Some(&byte) = stop.as_bytes().first() {
                begins[usize::from(byte)] = true;
            }
        }
        Self {
            stops: stops.iter().map(|stop| Stop::new(stop)).collect(),
            begins,
            held: String::new(),
            include_stop,
            is_over: false,
        }
    }

    /// True if there are no stop strings.
    pub(crate) fn is_empty(&self) -> bool {
        self.stops.is_empty()
    }

    /// True if a stop string was found; the text is complete.
    pub(crate) fn is_over(&self) -> bool {
        self.is_over
    }

    /// Take text; append to `out` what may leave. The index of the stop string that ended it.
    pub(crate) fn push(&mut self, text: &str, out: &mut String) -> Option<usize> {
        if self.is_over {
            return None;
        }
        // Nothing held means that no match is under way.
        if self.held.is_empty() && !text.bytes().any(|byte| self.begins[usize::from(byte)]) {
            out.push_str(text);
            return None;
        }
        let num_held = self.held.len();
        self.held.push_str(text);
        for at in num_held..self.held.len() {
            let byte = self.held.as_bytes()[at];
            let mut complete: Option<usize> = None;
            for i in 0..self.stops.len() {
                let len = self.stops[i].text.len();
                if self.stops[i].advance(byte)
                    && complete.is_none_or(|best| len > self.stops[best].text.len())
                {
                    complete = Some(i);
                }
            }
            if let Some(i) = complete {
                let end = at + 1;
                let len = self.stops[i].text.len();
                let cut = if self.include_stop { end } else { end - len };
                out.push_str(&self.held[..cut]);
                self.held.clear();
                self.is_over = true;
                return Some(i);
            }
        }
        // A match under way starts with a whole character, and so does what is held.
        let num_held = self
            .stops
            .iter()
            .map(|stop| stop.matched)
            .max()
            .unwrap_or(0);
        let num_free = self.held.len() - num_held;
        out.push_str(&self.held[..num_free]);
        self.held.drain(..num_free);
        None
    }

    /// Let go what is held, and forget matches under way.
    pub(crate) fn release(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
        for stop in &mut self.stops {
            stop.matched = 0;
        }
    }
}
