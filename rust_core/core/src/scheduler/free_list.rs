//! A doubly linked list over the indices `0..capacity`, linked inside two flat arrays.
//!
//! Push at either end, pop and removal from the middle are O(1) and never allocate: a block that a
//! prefix hit revives leaves the middle of the list. Each index is in the list at most once.

use crate::error::{Error, Result};

/// Marks an index that is not in the list.
const ABSENT: u32 = u32::MAX;

/// See the module doc. The sentinel node is at index `capacity`.
#[derive(Debug, Clone)]
pub(super) struct FreeList {
    next: Vec<u32>,
    prev: Vec<u32>,
    len: usize,
}

impl FreeList {
    /// A list that holds every index in ascending order. O(capacity).
    ///
    /// # Panics
    /// If `capacity` does not leave room for the two reserved index values.
    #[must_use]
    pub(super) fn full(capacity: usize) -> Self {
        assert!(capacity < ABSENT as usize - 1, "free list of {capacity}");
        let nodes = capacity as u32 + 1;
        Self {
            next: (0..nodes).map(|i| (i + 1) % nodes).collect(),
            prev: (0..nodes).map(|i| (i + nodes - 1) % nodes).collect(),
            len: capacity,
        }
    }

    /// Number of indices in the list.
    #[must_use]
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// True if `index` is in the list. O(1).
    #[must_use]
    pub(super) fn contains(&self, index: u32) -> bool {
        self.next[index as usize] != ABSENT
    }

    /// Takes the first index. O(1).
    pub(super) fn pop_front(&mut self) -> Option<u32> {
        let first = self.next[self.sentinel() as usize];
        if first == self.sentinel() {
            return None;
        }
        self.remove(first);
        Some(first)
    }

    /// Adds an index at the end. O(1).
    pub(super) fn push_back(&mut self, index: u32) {
        self.link(index, self.prev[self.sentinel() as usize], self.sentinel());
    }

    /// Adds an index at the start. O(1).
    pub(super) fn push_front(&mut self, index: u32) {
        self.link(index, self.sentinel(), self.next[self.sentinel() as usize]);
    }

    /// Takes `index` out, wherever it is. O(1).
    ///
    /// # Panics
    /// If it is not in the list.
    pub(super) fn remove(&mut self, index: u32) {
        assert!(
            self.contains(index),
            "index {index} is not in the free list"
        );
        let (before, after) = (self.prev[index as usize], self.next[index as usize]);
        self.next[before as usize] = after;
        self.prev[after as usize] = before;
        self.next[index as usize] = ABSENT;
        self.prev[index as usize] = ABSENT;
        self.len -= 1;
    }

    /// The indices from first to last.
    #[cfg(test)]
    fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        let sentinel = self.sentinel();
        let first = Some(self.next[sentinel as usize]).filter(|&i| i != sentinel);
        std::iter::successors(first, move |&i| {
            Some(self.next[i as usize]).filter(|&i| i != sentinel)
        })
    }

    /// Checks the links both ways. O(capacity).
    pub(super) fn check_integrity(&self) -> Result<()> {
        let mut seen = 0;
        let mut at = self.sentinel();
        loop {
            let next = self.next[at as usize];
            if next == ABSENT || self.prev[next as usize] != at {
                return Err(Error::integrity(format!(
                    "free list: {at} -> {next} has no way back"
                )));
            }
            if next == self.sentinel() {
                break;
            }
            seen += 1;
            if seen > self.len {
                break;
            }
            at = next;
        }
        let linked = (0..self.sentinel()).filter(|&i| self.contains(i)).count();
        if seen != self.len || linked != self.len {
            return Err(Error::integrity(format!(
                "free list: length {}, {seen} reachable, {linked} linked",
                self.len
            )));
        }
        Ok(())
    }

    fn sentinel(&self) -> u32 {
        (self.next.len() - 1) as u32
    }

    fn link(&mut self, index: u32, before: u32, after: u32) {
        assert!(index < self.sentinel(), "index {index} is out of range");
        assert!(
            !self.contains(index),
            "index {index} is in the free list already"
        );
        self.prev[index as usize] = before;
        self.next[index as usize] = after;
        self.next[before as usize] = index;
        self.prev[after as usize] = index;
        self.len += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    #[test]
    fn starts_full_and_in_order() {
        let mut list = FreeList::full(3);
        assert_eq!(list.iter().collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(
            std::iter::from_fn(|| list.pop_front()).collect::<Vec<_>>(),
            [0, 1, 2]
        );
        assert_eq!(list.len(), 0);
        list.check_integrity().unwrap();
    }

    #[test]
    fn empty_capacity() {
        let mut list = FreeList::full(0);
        assert_eq!(list.pop_front(), None);
        assert_eq!(list.iter().count(), 0);
        list.check_integrity().unwrap();
    }

    #[test]
    #[should_panic(expected = "already")]
    fn double_push_panics() {
        FreeList::full(2).push_back(1);
    }

    #[test]
    #[should_panic(expected = "not in the free list")]
    fn double_remove_panics() {
        let mut list = FreeList::full(2);
        list.remove(1);
        list.remove(1);
    }

    proptest! {
        #[test]
        fn behaves_like_a_deque(ops in prop::collection::vec((0u8..4, 0u32..8), 0..100)) {
            let mut list = FreeList::full(8);
            let mut model: VecDeque<u32> = (0..8).collect();
            for (op, index) in ops {
                let at = model.iter().position(|&i| i == index);
                match (op, at) {
                    (0, _) => prop_assert_eq!(list.pop_front(), model.pop_front()),
                    (1, None) => { list.push_back(index); model.push_back(index); }
                    (2, None) => { list.push_front(index); model.push_front(index); }
                    (3, Some(at)) => { list.remove(index); model.remove(at); }
                    _ => prop_assert_eq!(list.contains(index), at.is_some()),
                }
                list.check_integrity().unwrap();
                prop_assert_eq!(list.iter().collect::<VecDeque<_>>(), model.clone());
                prop_assert_eq!(list.len(), model.len());
            }
        }
    }
}
