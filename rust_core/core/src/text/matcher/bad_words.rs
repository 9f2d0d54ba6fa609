//! BadWords: sequences of several tokens that must not come, the simplest of constraints.

use std::sync::Arc;

/// A request's sequences, shared by its samples.
#[derive(Debug)]
pub(super) struct BadWords {
    words: Arc<[Box<[u32]>]>,
    /// The tokens so far, as many as the longest word holds before its last.
    recent: Vec<u32>,
}

impl BadWords {
    /// None without words of two tokens or more.
    pub(super) fn new(words: &Arc<[Box<[u32]>]>) -> Option<Self> {
        let has_any = words.iter().any(|word| word.len() > 1);
        has_any.then(|| Self {
            words: words.clone(),
            recent: Vec::new(),
        })
    }

    /// The tokens that would complete a word. O(length of all words).
    pub(super) fn banned(&self) -> impl Iterator<Item = u32> {
        self.words.iter().filter_map(|word| match &**word {
            [head @ .., last] if !head.is_empty() => self.recent.ends_with(head).then_some(*last),
            _ => None,
        })
    }

    /// Takes the next token.
    pub(super) fn accept(&mut self, token: u32) {
        let most = self.words.iter().map(|word| word.len()).max().unwrap_or(1) - 1;
        if self.recent.len() == most {
            self.recent.remove(0);
        }
        self.recent.push(token);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_breaks_off_before_its_last_token() {
        let words: Arc<[Box<[u32]>]> = [&[3, 3, 4][..], &[5], &[4, 1]].map(Box::from).into();
        let mut bad = BadWords::new(&words).unwrap();
        let mut found = Vec::new();
        for token in [3, 3, 0, 3, 3, 4] {
            bad.accept(token);
            found.push(bad.banned().collect::<Vec<_>>());
        }
        assert_eq!(found, [vec![], vec![4], vec![], vec![], vec![4], vec![1]]);
        assert!(BadWords::new(&[Box::from([5])].into()).is_none());
    }
}
