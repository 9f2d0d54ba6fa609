//! One sample's state, as the scheduler has it. A state owns what it needs: blocks exist only
//! inside a [`Seat`], and replacing the status gives them back.

use std::sync::{Arc, OnceLock};

use crate::scheduler::block_pool::BlockId;
use crate::scheduler::block_table::BlockTable;
use crate::scheduler::prefix_cache::{BlockHash, BlockHasher};

/// Index of a request's rows on the device, stable while it is seated.
pub type Slot = u32;

/// No slot.
pub const NO_SLOT: Slot = u32::MAX;

/// Not part of a group (n = 1).
pub const NO_GROUP: u32 = u32::MAX;

/// The reason of a sample's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// An EOS token, a stop token or a stop string.
    Stop,
    /// max_tokens or max_model_len.
    Length,
    /// The client went away.
    Abort,
    /// The step's computation failed.
    Error,
}

impl FinishReason {
    /// All reasons, in the order of their discriminants.
    pub const ALL: [FinishReason; 4] = [Self::Stop, Self::Length, Self::Abort, Self::Error];

    /// The word the API uses.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Abort => "abort",
            Self::Error => "error",
        }
    }
}

/// The cause of a stop other than EOS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StopReason {
    /// One of the request's stop tokens.
    Token(u32),
    /// One of the request's stop strings.
    Text(Arc<str>),
}

/// The order of service: lower priority values first, then by arrival. Unique per request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rank {
    /// 0 under FCFS.
    pub priority: i64,
    /// Counts arrivals.
    pub sequence: u64,
}

/// A prompt, shared by its samples, with the names of its full blocks (hashed once, on demand).
#[derive(Debug)]
pub struct Prompt {
    /// The ids.
    pub tokens: Box<[u32]>,
    root: BlockHash,
    hashes: OnceLock<Box<[BlockHash]>>,
}

impl Prompt {
    /// A prompt whose first block follows `root`.
    #[must_use]
    pub fn new(tokens: Box<[u32]>, root: BlockHash) -> Self {
        Self {
            tokens,
            root,
            hashes: OnceLock::new(),
        }
    }

    /// The name that the first block's name continues.
    #[must_use]
    pub fn root(&self) -> BlockHash {
        self.root
    }

    fn hashes(&self, hasher: &BlockHasher, block_size: usize) -> &[BlockHash] {
        self.hashes.get_or_init(|| {
            let mut parent = self.root;
            self.tokens
                .chunks_exact(block_size)
                .map(|block| {
                    parent = hasher.extend(parent, block.iter().copied());
                    parent
                })
                .collect()
        })
    }
}

/// A request's blocks and progress while it is on the device.
#[derive(Debug)]
pub struct Seat {
    /// Its blocks.
    pub table: BlockTable,
    /// Tokens whose keys and values are computed, or will be by the steps in flight.
    pub num_computed: u32,
    /// Tokens whose step has come back. Only these blocks may be shared.
    pub num_confirmed: u32,
    /// `num_confirmed` at which the next full block gets its name.
    pub next_commit: u32,
    /// Tokens the table has room for.
    pub capacity: u32,
    /// `slot_mapping` of a position in the last block is `position + tail_base`.
    pub tail_base: i32,
    /// Still computing known tokens (the prompt, or all after a preemption).
    pub prefilling: bool,
    /// Its last token is scheduled; it only waits for the step to come back.
    pub closed: bool,
    /// Tokens at the last checkpoint of its state, or in the prefix it began with.
    pub last_saved: u32,
    /// The latest checkpoint of its answer, which the next one replaces.
    pub answer_save: Option<(BlockId, BlockHash)>,
    /// The block to find those by that share its prefix, or NO_KEY.
    pub prefix_key: BlockId,
}

/// A request's state, with all that it holds in it.
#[derive(Debug)]
pub enum RequestStatus {
    /// A sample that waits for its leader to compute the shared prompt; not in the queue.
    Parked,
    /// In the queue.
    Waiting,
    /// Admitted.
    Running(Seat),
    /// In the queue again, to be recomputed. May still be in a step in flight.
    Preempted,
    /// Over, but in a step in flight that still writes to its blocks (None: it had none).
    Finished(Option<Seat>),
}

/// See the module doc.
#[derive(Debug)]
pub struct Request {
    /// See [`RequestStatus`].
    pub status: RequestStatus,
    /// [`NO_SLOT`] unless seated, or in flight after a preemption or the end.
    pub slot: Slot,
    /// Known tokens: prompt and output.
    pub num_tokens: u32,
    /// Tokens being sampled by steps in flight.
    pub num_pending: u32,
    /// Steps in flight whose sample is given up, the oldest ones: they count for nothing.
    pub num_void: u32,
    /// Steps in flight that this request is in.
    pub num_in_flight: u32,
    /// Number of the step that samples its last token, while that is on its way.
    pub sampled_in: u64,
    /// Times that it has been preempted.
    pub num_preemptions: u32,
    /// `num_tokens` at which it ends.
    pub max_len: u32,
    /// The last known token.
    pub last_token: u32,
    /// Prompt length.
    pub num_prompt: u32,
    /// The whole prompt has been computed at least once.
    pub prompt_done: bool,
    /// It waits for its first admission after having been parked.
    pub unparked: bool,
    /// The group of its siblings, or [`NO_GROUP`].
    pub group: u32,
    /// The caller's name for it.
    pub request_id: u64,
    /// Its place in the order of service.
    pub rank: Rank,
    /// Generated tokens.
    pub outputs: Vec<u32>,
    /// The prompt.
    pub prompt: Arc<Prompt>,
    /// Names of the full blocks after the prompt's.
    pub output_hashes: Vec<BlockHash>,
    /// Tokens that the first admission found in the cache or at a sibling.
    pub num_cached_tokens: u32,
    /// It was admitted before.
    pub was_admitted: bool,
}

impl Request {
    /// The known token at `index`.
    #[must_use]
    pub fn token(&self, index: usize) -> u32 {
        match self.prompt.tokens.get(index) {
            Some(&token) => token,
            None => self.outputs[index - self.prompt.tokens.len()],
        }
    }

    /// Appends a sampled token.
    #[inline]
    pub fn push_token(&mut self, token: u32) {
        self.outputs.push(token);
        self.last_token = token;
        self.num_tokens += 1;
    }

    /// Makes void the samples that steps in flight take for it.
    pub(super) fn give_up_pending(&mut self) {
        self.num_void += std::mem::take(&mut self.num_pending);
    }

    /// An admitted request's entry of [`Plan::new_slots`](crate::scheduler::batch::Plan::new_slots).
    pub(super) fn new_slot(&self) -> (Slot, u64, u32) {
        (self.slot, self.request_id, self.outputs.len() as u32)
    }

    /// The seat of an admitted request, and of one that ended in flight.
    #[must_use]
    pub fn seat(&self) -> Option<&Seat> {
        match &self.status {
            RequestStatus::Running(seat) | RequestStatus::Finished(Some(seat)) => Some(seat),
            _ => None,
        }
    }

    /// The name of full block `index`, whose tokens must be known. Amortised O(block_size).
    pub fn block_hash(
        &mut self,
        hasher: &BlockHasher,
        block_size: usize,
        index: usize,
    ) -> BlockHash {
        let of_prompt = self.prompt.hashes(hasher, block_size);
        if let Some(&hash) = of_prompt.get(index) {
            return hash;
        }
        let num_of_prompt = of_prompt.len();
        let mut parent = self
            .output_hashes
            .last()
            .or(of_prompt.last())
            .copied()
            .unwrap_or(self.prompt.root);
        for block in num_of_prompt + self.output_hashes.len()..=index {
            let tokens = block * block_size..(block + 1) * block_size;
            parent = hasher.extend(parent, tokens.map(|i| self.token(i)));
            self.output_hashes.push(parent);
        }
        self.output_hashes[index - num_of_prompt]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(prompt: &[u32]) -> Request {
        let hasher = BlockHasher::with_key((3, 4));
        Request {
            status: RequestStatus::Waiting,
            slot: NO_SLOT,
            num_tokens: prompt.len() as u32,
            num_pending: 0,
            num_void: 0,
            num_in_flight: 0,
            sampled_in: 0,
            num_preemptions: 0,
            max_len: 100,
            last_token: 0,
            num_prompt: prompt.len() as u32,
            prompt_done: false,
            unparked: false,
            group: NO_GROUP,
            request_id: 1,
            rank: Rank {
                priority: 0,
                sequence: 0,
            },
            outputs: Vec::new(),
            prompt: Arc::new(Prompt::new(prompt.into(), hasher.root(None))),
            output_hashes: Vec::new(),
            num_cached_tokens: 0,
            was_admitted: false,
        }
    }

    #[test]
    fn output_blocks_are_named_as_if_they_were_prompt() {
        let hasher = BlockHasher::with_key((3, 4));
        let mut long = request(&[1, 2, 3, 4, 5, 6, 7]);
        for split in 1..7 {
            let mut short = request(&[1, 2, 3, 4, 5, 6, 7][..split]);
            for token in split as u32 + 1..=7 {
                short.push_token(token);
            }
            assert_eq!(short.token(6), 7);
            for block in [2, 0, 1] {
                assert_eq!(
                    short.block_hash(&hasher, 2, block),
                    long.block_hash(&hasher, 2, block),
                    "split at {split}, block {block}"
                );
            }
        }
    }
}
