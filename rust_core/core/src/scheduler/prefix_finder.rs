//! Finds requests of a step of decodes whose block tables begin with the same blocks.
//!
//! A device may read what they share once for all of them. Equal blocks at one place of two tables
//! hold the same tokens from the begin to there, since a block is named by all tokens up to its end:
//! so one place tells whether two requests share a prefix, and a binary search how much of it.

use slab::Slab;

use crate::scheduler::batch::Entry;
use crate::scheduler::block_pool::BlockId;
use crate::scheduler::config::PrefixSharing;
use crate::scheduler::request::Request;
use crate::scheduler::shared_prefixes::{NO_KEY, PrefixGroup, SharedPrefixes};

/// Finds the groups of one step after another.
#[derive(Debug)]
pub(super) struct PrefixFinder {
    sharing: PrefixSharing,
    block_size: usize,
    /// By block: entries of the step at hand that have it as their key. All zero between steps.
    counts: Vec<u32>,
}

impl PrefixFinder {
    /// For a pool of `num_blocks`.
    #[must_use]
    pub(super) fn new(sharing: PrefixSharing, num_blocks: usize, block_size: usize) -> Self {
        Self {
            sharing,
            block_size,
            counts: vec![0; num_blocks],
        }
    }

    /// The block by which a request is compared with others: of a prompt of `num_tokens`, whose
    /// blocks these are.
    #[must_use]
    pub(super) fn key(&self, blocks: &[BlockId], num_tokens: usize) -> BlockId {
        let place = self.sharing.min_tokens.div_ceil(self.block_size);
        if num_tokens / self.block_size < place {
            return NO_KEY;
        }
        blocks.get(place - 1).copied().unwrap_or(NO_KEY)
    }

    /// Fills `found` with the groups of a step of decodes.
    pub(super) fn find(
        &mut self,
        entries: &[Entry],
        requests: &Slab<Request>,
        found: &mut SharedPrefixes,
    ) {
        found.clear();
        let mut most = 0;
        for (row, entry) in entries.iter().enumerate() {
            if entry.prefix_key != NO_KEY {
                found.keyed.push((entry.prefix_key, row as u32));
                let count = &mut self.counts[entry.prefix_key as usize];
                *count += 1;
                most = most.max(*count);
            }
        }
        for &(key, _) in &found.keyed {
            self.counts[key as usize] = 0;
        }
        if most < 2 {
            return;
        }
        let mut keyed = std::mem::take(&mut found.keyed);
        keyed.sort_unstable();
        let table = |row: u32| {
            requests[entries[row as usize].index as usize]
                .seat()
                .map_or(&[][..], |seat| seat.table.block_ids())
        };
        for members in keyed.chunk_by(|a, b| a.0 == b.0) {
            let first = table(members[0].1);
            let blocks = members
                .iter()
                .map(|&(_, row)| {
                    let whole = entries[row as usize].start as usize / self.block_size;
                    common_blocks(first, table(row)).min(whole)
                })
                .min()
                .unwrap_or(0);
            let saved = (members.len() - 1) * blocks * self.block_size;
            let sharing = &self.sharing;
            // Less than what the key promises, where a block was computed twice and one copy evicted.
            if members.len() < 2
                || blocks * self.block_size < sharing.min_tokens
                || saved < sharing.min_saved_tokens
                || found.groups.len() == sharing.max_groups
            {
                continue;
            }
            found.groups.push(PrefixGroup {
                first: found.members.len() as u32,
                count: members.len() as u32,
                blocks: blocks as u32,
            });
            found.members.extend(members.iter().map(|&(_, row)| row));
        }
        found.keyed = keyed;
    }
}

/// Blocks that two tables begin with.
fn common_blocks(a: &[BlockId], b: &[BlockId]) -> usize {
    let (mut low, mut high) = (0, a.len().min(b.len()));
    // All before `low` are equal, none from `high` on.
    while low < high {
        let middle = low + (high - low) / 2;
        if a[middle] == b[middle] {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    low
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_compared_to_where_they_part() {
        assert_eq!(common_blocks(&[1, 2, 3, 4], &[1, 2, 3, 9, 5]), 3);
        assert_eq!(common_blocks(&[1, 2], &[1, 2]), 2);
        assert_eq!(common_blocks(&[7], &[8, 9]), 0);
        assert_eq!(common_blocks(&[], &[8]), 0);
    }

    #[test]
    fn only_a_long_prompt_has_a_key() {
        let sharing = PrefixSharing {
            max_groups: 2,
            min_tokens: 512,
            min_saved_tokens: 0,
        };
        let finder = PrefixFinder::new(sharing, 100, 16);
        let blocks: Vec<BlockId> = (40..80).collect();
        assert_eq!(finder.key(&blocks, 511), NO_KEY);
        assert_eq!(finder.key(&blocks, 512), blocks[31]);
    }
}
