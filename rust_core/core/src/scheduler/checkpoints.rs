//! Checkpoints of recurrent state: what a prefix hit of a model with state begins from.
//!
//! Some layers keep, instead of keys and values of every token, one state of all tokens so far. A
//! running request's state is in its slot's row on the device, and each step writes it anew: what it
//! was earlier is gone. So that equal prefixes need not be computed again, the plan has states copied
//! to *checkpoints*, further rows behind those of the slots: when a chunk of a prompt ends at a border
//! that is due, and each time an answer has grown by some blocks. A hit is cut to the longest cached
//! prefix that has a checkpoint, and the request's row begins as a copy of that.
//!
//! A checkpoint is named as the block is that its tokens end with, once the step that saved it came
//! back, and kept until room is needed: the least recently used goes first. A step in flight holds a
//! reference on what it saves to. Nobody else has to: the device copies in the order of the plans.

use super::Scheduler;
use crate::scheduler::batch::{Entry, NO_CHECKPOINT, Plan};
use crate::scheduler::block_pool::{BlockId, SharedPool};
use crate::scheduler::config::StateConfig;
use crate::scheduler::prefix_cache::BlockHash;
use crate::scheduler::request::{NO_GROUP, Request, RequestStatus, Seat, Slot};

/// Part of the interval after which the state of a growing answer is saved again: the next turn
/// computes so much of this one's answer again at most.
const ANSWERS_PER_INTERVAL: usize = 8;

/// See the module doc.
#[derive(Debug)]
pub(super) struct Checkpoints {
    /// Its blocks are checkpoints.
    pub pool: SharedPool,
    /// Row of the first one.
    first_row: u32,
    block_size: u32,
    interval: u32,
    answer_interval: u32,
}

impl Checkpoints {
    pub(super) fn new(config: StateConfig, block_size: usize, max_num_seqs: usize) -> Self {
        let whole = |tokens: usize| tokens.next_multiple_of(block_size).max(block_size) as u32;
        Self {
            pool: SharedPool::new(config.num_checkpoints),
            // Behind the slots and the padding's row.
            first_row: max_num_seqs as u32 + 1,
            block_size: block_size as u32,
            interval: whole(config.interval),
            answer_interval: whole(config.interval / ANSWERS_PER_INTERVAL),
        }
    }

    fn row(&self, checkpoint: BlockId) -> u32 {
        self.first_row + checkpoint
    }

    /// The last border that a prompt's tokens are saved at. A block is left behind it: another turn
    /// often has other tokens where this prompt asks for an answer.
    pub(super) fn last_border(&self, num_tokens: u32) -> u32 {
        ((num_tokens - 1) / self.block_size).saturating_sub(1) * self.block_size
    }

    /// Where a chunk of tokens `start..end` ends, and whether it is saved there.
    fn chunk_end(&self, start: u32, end: u32, num_tokens: u32, last_saved: u32) -> (u32, bool) {
        let regular = (start / self.interval + 1) * self.interval;
        let last = self.last_border(num_tokens);
        let is_worth_it = last >= last_saved + self.answer_interval;
        let border = if last > start && is_worth_it {
            regular.min(last)
        } else {
            regular
        };
        if border <= end {
            (border, true)
        } else {
            (end, false)
        }
    }

    /// The checkpoint of a prefix that ends with the block of this name.
    pub(super) fn lookup(&self, hash: BlockHash) -> Option<BlockId> {
        self.pool.lock().lookup(hash)
    }

    /// Has a request's row begin as a copy of a checkpoint, which is used most recently now.
    pub(super) fn restore(&self, checkpoint: BlockId, slot: Slot, plan: &mut Plan) {
        let mut pool = self.pool.lock();
        pool.acquire(checkpoint);
        pool.release(checkpoint);
        plan.restores.push((self.row(checkpoint), slot));
    }

    /// Has a request's row saved after the step, if there is room.
    fn save(&self, slot: Slot, plan: &mut Plan) -> u32 {
        let Some(checkpoint) = self.pool.lock().allocate() else {
            return NO_CHECKPOINT;
        };
        plan.saves.push((slot, self.row(checkpoint)));
        checkpoint
    }

    /// A decode's checkpoint, where one is due.
    #[inline]
    pub(super) fn save_answer(&self, seat: &mut Seat, slot: Slot, plan: &mut Plan) -> u32 {
        if !seat.num_computed.is_multiple_of(self.answer_interval) {
            return NO_CHECKPOINT;
        }
        seat.last_saved = seat.num_computed;
        self.save(slot, plan)
    }
}

impl Scheduler {
    /// Cuts a chunk of `count` tokens where a checkpoint is due: its tokens, and whether it is.
    pub(super) fn cut_chunk(&self, request: &Request, seat: &Seat, count: u32) -> (u32, bool) {
        let Some(states) = &self.states else {
            return (count, false);
        };
        let has_parked = self
            .groups
            .get(request.group as usize)
            .is_some_and(|group| request.group != NO_GROUP && !group.parked.is_empty());
        if !self.config.enable_prefix_caching && !has_parked {
            return (count, false);
        }
        let start = seat.num_computed;
        let end = start + count;
        let (end, is_due) = states.chunk_end(start, end, request.num_tokens, seat.last_saved);
        (end - start, is_due)
    }

    /// Has the chunk that a request has just been given saved after the step.
    pub(super) fn save_chunk(&mut self, index: u32, plan: &mut Plan) -> u32 {
        let request = &mut self.requests[index as usize];
        let (Some(states), RequestStatus::Running(seat)) = (&self.states, &mut request.status)
        else {
            return NO_CHECKPOINT;
        };
        seat.last_saved = seat.num_computed;
        states.save(request.slot, plan)
    }

    /// Cuts the hits to the longest prefix whose state there is; returns its checkpoint.
    pub(super) fn cut_hits(&mut self, index: u32) -> Option<BlockId> {
        let states = self.states.as_ref()?;
        let request = &mut self.requests[index as usize];
        while let Some(last) = self.hits.len().checked_sub(1) {
            let hash = request.block_hash(&self.hasher, self.config.block_size, last);
            if let Some(checkpoint) = states.lookup(hash) {
                return Some(checkpoint);
            }
            self.hits.pop();
        }
        None
    }

    /// A step that saves to a checkpoint came back: if all is well it gets its name.
    pub(super) fn land_save(&mut self, entry: &Entry, is_good: bool) {
        let Some(states) = &self.states else { return };
        let end = entry.start + entry.count;
        if is_good {
            let request = &mut self.requests[entry.index as usize];
            let block = (end / states.block_size - 1) as usize;
            let hash = request.block_hash(&self.hasher, self.config.block_size, block);
            states.pool.lock().set_hash(entry.save, hash);
            // One of an answer takes the place of the one before.
            if end > request.num_prompt
                && let RequestStatus::Running(seat) = &mut request.status
            {
                let previous = seat.answer_save.replace((entry.save, hash));
                if let Some((id, name)) = previous {
                    let mut pool = states.pool.lock();
                    if pool.hash_of(id) == Some(name) {
                        pool.forget(id);
                    }
                }
            }
        }
        states.pool.lock().release(entry.save);
    }

    /// Gives up the checkpoint of an entry that never became a step.
    pub(super) fn abandon_save(&mut self, entry: &Entry) {
        if let Some(states) = &self.states
            && entry.save != NO_CHECKPOINT
        {
            states.pool.lock().release(entry.save);
        }
    }
}
