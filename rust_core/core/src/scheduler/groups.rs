//! Samples of one prompt (n > 1).
//!
//! The leader computes the prompt. When that has come back, the group takes references on the
//! prompt's full blocks and its other samples join the queue, each to start after those blocks;
//! the last admission drops the group's references. The references are a courtesy: when memory is
//! short they are revoked before anyone is preempted or kept waiting, and samples then compute (or
//! find in the prefix cache) for themselves. A leader that ends early hands over to the next.

use super::{GroupDone, Scheduler};
use crate::scheduler::block_table::BlockTable;
use crate::scheduler::request::{NO_GROUP, RequestStatus};

/// References to what the samples of a prompt begin with.
#[derive(Debug)]
pub(super) struct SharedPrefix {
    /// The blocks.
    pub table: BlockTable,
    /// One checkpoint, where layers have state.
    pub state: Option<BlockTable>,
}

/// See the module doc.
#[derive(Debug)]
pub(super) struct Group {
    /// Computes the prompt; None once that is done.
    pub leader: Option<u32>,
    /// Wait for the leader, in order of rank.
    pub parked: Vec<u32>,
    /// Were parked and wait for their first admission.
    pub num_queued: u32,
    /// The prompt's full blocks, for those.
    pub prefix: Option<SharedPrefix>,
    num_samples: u32,
    num_unfinished: u32,
    max_output: u32,
}

impl Scheduler {
    /// Queues the samples of one new request.
    pub(super) fn queue_new(&mut self, indices: &[u32]) {
        let leader = indices[0];
        self.waiting
            .insert(self.requests[leader as usize].rank, leader);
        if indices.len() == 1 {
            return;
        }
        let shareable = self.num_shareable(leader) > 0;
        let group = self.groups.insert(Group {
            leader: shareable.then_some(leader),
            parked: if shareable {
                indices[1..].to_vec()
            } else {
                Vec::new()
            },
            num_queued: 0,
            prefix: None,
            num_samples: indices.len() as u32,
            num_unfinished: indices.len() as u32,
            max_output: 0,
        }) as u32;
        for &index in indices {
            let request = &mut self.requests[index as usize];
            request.group = group;
            if index == leader {
                continue;
            }
            if shareable {
                request.status = RequestStatus::Parked;
                self.num_parked += 1;
            } else {
                self.waiting.insert(request.rank, index);
            }
        }
    }

    /// Full blocks of the prompt, less the one that holds its last token; with states, up to the prompt's
    /// last checkpoint.
    fn num_shareable(&self, index: u32) -> usize {
        let num_prompt = self.requests[index as usize].num_prompt;
        let end = match &self.states {
            Some(states) => states.last_border(num_prompt),
            None => num_prompt - 1,
        };
        end as usize / self.config.block_size
    }

    /// A reference to the checkpoint of a request's first `num_blocks` blocks, where layers have state.
    /// None: there should be one, and is none.
    fn shared_state(&mut self, index: u32, num_blocks: usize) -> Option<Option<BlockTable>> {
        let Some(states) = &self.states else {
            return Some(None);
        };
        let request = &mut self.requests[index as usize];
        let hash = request.block_hash(&self.hasher, self.config.block_size, num_blocks - 1);
        let checkpoint = states.lookup(hash)?;
        let mut table = BlockTable::with_capacity(states.pool.clone(), 1);
        table.share(&[checkpoint]);
        Some(Some(table))
    }

    /// The prompt of `index` is computed: if it leads a group, the others may start.
    pub(super) fn share_prompt(&mut self, index: u32) {
        let group_id = self.requests[index as usize].group;
        if group_id == NO_GROUP || self.groups[group_id as usize].leader != Some(index) {
            return;
        }
        let num_shareable = self.num_shareable(index);
        let group = &mut self.groups[group_id as usize];
        group.leader = None;
        let parked = std::mem::take(&mut group.parked);
        if parked.is_empty() {
            return;
        }
        group.num_queued = parked.len() as u32;
        let state = self.shared_state(index, num_shareable);
        if let (Some(seat), Some(state)) = (self.requests[index as usize].seat(), state) {
            let mut table = BlockTable::with_capacity(self.pool.clone(), num_shareable);
            table.share(&seat.table.block_ids()[..num_shareable]);
            self.groups[group_id as usize].prefix = Some(SharedPrefix { table, state });
            self.sharing.push(group_id);
        }
        for index in parked {
            self.requests[index as usize].unparked = true;
            self.unpark(index);
        }
    }

    fn unpark(&mut self, index: u32) {
        let request = &mut self.requests[index as usize];
        request.status = RequestStatus::Waiting;
        self.waiting.insert(request.rank, index);
        self.num_parked -= 1;
    }

    /// One sample fewer is in need of the group's references.
    pub(super) fn sibling_left_queue(&mut self, group_id: u32) {
        let group = &mut self.groups[group_id as usize];
        group.num_queued -= 1;
        if group.num_queued == 0 && group.prefix.take().is_some() {
            self.sharing.retain(|&id| id != group_id);
        }
    }

    /// Gives up all groups' references but one's; whether there were any.
    pub(super) fn revoke_shared(&mut self, except: u32) -> bool {
        let before = self.sharing.len();
        let groups = &mut self.groups;
        self.sharing.retain(|&id| {
            if id != except {
                groups[id as usize].prefix = None;
            }
            id == except
        });
        self.sharing.len() < before
    }

    /// A sample ended.
    pub(super) fn leave_group(&mut self, index: u32, num_output: u32) -> Option<GroupDone> {
        let request = &mut self.requests[index as usize];
        let group_id = request.group;
        if group_id == NO_GROUP {
            return Some(GroupDone {
                num_samples: 1,
                max_output: num_output,
            });
        }
        if std::mem::replace(&mut request.unparked, false) {
            self.sibling_left_queue(group_id);
        }
        let group = &mut self.groups[group_id as usize];
        group.parked.retain(|&parked| parked != index);
        group.num_unfinished -= 1;
        group.max_output = group.max_output.max(num_output);
        if group.leader == Some(index) {
            group.leader = None;
            if !group.parked.is_empty() {
                let next = group.parked.remove(0);
                group.leader = Some(next);
                self.unpark(next);
            }
        }
        let group = &self.groups[group_id as usize];
        if group.num_unfinished > 0 {
            return None;
        }
        let group = self.groups.remove(group_id as usize);
        Some(GroupDone {
            num_samples: group.num_samples,
            max_output: group.max_output,
        })
    }
}
