//! A step's groups of requests whose block tables begin with the same blocks, as the device has them.

use crate::scheduler::block_pool::BlockId;

/// No block: the request's prompt is too short to share anything worth the while.
pub const NO_KEY: BlockId = BlockId::MAX;

/// Fields of a group as the device has it: the first of its members, their number, tokens shared.
pub const GROUP_FIELDS: usize = 3;

/// Some requests of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrefixGroup {
    /// The first of its rows in [`SharedPrefixes::members`].
    pub first: u32,
    /// Its rows.
    pub count: u32,
    /// Blocks that all their tables begin with.
    pub blocks: u32,
}

/// A step's groups; none in most steps. Finding none is O(entries) and touches nothing else.
#[derive(Debug, Default)]
pub struct SharedPrefixes {
    /// At most as many as the device takes.
    pub groups: Vec<PrefixGroup>,
    /// Rows of the step, group by group.
    pub members: Vec<u32>,
    pub(super) keyed: Vec<(BlockId, u32)>,
}

impl SharedPrefixes {
    /// Forgets the groups, keeping the buffers.
    pub fn clear(&mut self) {
        self.groups.clear();
        self.members.clear();
        self.keyed.clear();
    }
}
