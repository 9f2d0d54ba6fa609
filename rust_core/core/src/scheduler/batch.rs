//! One step's plan, and how it is written into a staging buffer.
//!
//! Writing is O(scheduled tokens + block updates) and does not allocate.

use slab::Slab;

use crate::error::{Error, Result};
use crate::scheduler::block_pool::BlockId;
use crate::scheduler::request::{Request, Slot};
use crate::scheduler::shared_prefixes::{GROUP_FIELDS, SharedPrefixes};

/// The input id of a token that is still on the device.
pub const ON_DEVICE: i32 = -1;

/// No checkpoint.
pub const NO_CHECKPOINT: u32 = u32::MAX;

/// One request's part of a step.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// Index of the request in the scheduler's slab.
    pub index: u32,
    /// The caller's name for it.
    pub request_id: u64,
    /// Its slot.
    pub slot: Slot,
    /// Position of its first query token.
    pub start: u32,
    /// Query tokens.
    pub count: u32,
    /// A decode's input id.
    pub input_id: i32,
    /// A decode's slot_mapping.
    pub mapping: i32,
    /// The last query token's logits are sampled.
    pub sample: bool,
    /// The checkpoint that its state is saved to after the step, or NO_CHECKPOINT.
    pub save: u32,
    /// A decode's block to find those by that share its prefix, or NO_KEY.
    pub prefix_key: BlockId,
}

/// The scheduler's plan of one step; buffers keep their capacity from step to step.
#[derive(Debug, Default)]
pub struct Plan {
    /// The step's number.
    pub step_id: u64,
    /// Decodes first, then prefill chunks.
    pub entries: Vec<Entry>,
    /// Number of entries that are decodes.
    pub num_decodes: usize,
    /// Query tokens in all.
    pub num_tokens: usize,
    /// The newest step that samples a token which this one computes with.
    pub awaited_step: Option<u64>,
    /// Flat indices into `block_table[max_num_seqs, max_blocks_per_seq]`.
    pub update_rows: Vec<u32>,
    /// The block ids that go there.
    pub update_ids: Vec<BlockId>,
    /// (slot, request_id, number of output tokens) of the slots to write anew: those of requests admitted in
    /// this step, and of requests whose device has sampled what was given up.
    pub new_slots: Vec<(Slot, u64, u32)>,
    /// Slab indices of the same.
    pub admitted: Vec<u32>,
    /// Rows of states to copy before the step, (from, to): checkpoints into slots.
    pub restores: Vec<(u32, u32)>,
    /// The same after the step: slots into checkpoints.
    pub saves: Vec<(u32, u32)>,
    /// Of a step of decodes alone.
    pub shared: SharedPrefixes,
}

impl Plan {
    /// Empties the plan, keeping its buffers.
    pub fn clear(&mut self) {
        self.entries.clear();
        self.num_decodes = 0;
        self.num_tokens = 0;
        self.awaited_step = None;
        self.update_rows.clear();
        self.update_ids.clear();
        self.new_slots.clear();
        self.admitted.clear();
        self.restores.clear();
        self.saves.clear();
        self.shared.clear();
    }

    /// Records that a request's logical block got a physical one.
    pub fn update_block(&mut self, row: u32, id: BlockId) {
        self.update_rows.push(row);
        self.update_ids.push(id);
    }
}

/// Limits that fix the size of a staging buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StagingLimits {
    /// Most query tokens of one step.
    pub max_num_batched_tokens: usize,
    /// Most requests of one step; also the slot of padding rows.
    pub max_num_seqs: usize,
    /// Columns of the block table.
    pub max_blocks_per_seq: usize,
    /// Most block updates of one step. Admission stops before it overflows.
    pub max_block_updates: usize,
    /// Most copies of states before a step, and after it; 0 without states.
    pub max_state_copies: usize,
    /// Most groups of requests that share a prefix; 0: the device reads it for each of them.
    pub max_shared_groups: usize,
}

impl StagingLimits {
    /// The limits of an engine.
    ///
    /// Every decode may cross a block boundary and one admission may fill a whole row; beyond that
    /// there is room for a step's worth of prefilled blocks and for a few long prefix hits, so that
    /// a burst of short or cached prompts is not held back.
    #[must_use]
    pub fn new(
        max_num_batched_tokens: usize,
        max_num_seqs: usize,
        max_model_len: usize,
        block_size: usize,
        has_state: bool,
        max_shared_groups: usize,
    ) -> Self {
        let max_blocks_per_seq = max_model_len.div_ceil(block_size);
        Self {
            max_num_batched_tokens,
            max_num_seqs,
            max_blocks_per_seq,
            max_block_updates: 2 * max_num_seqs
                + max_num_batched_tokens.div_ceil(block_size)
                + 4 * max_blocks_per_seq,
            // A request begins once a step, and is saved once.
            max_state_copies: if has_state { max_num_seqs } else { 0 },
            max_shared_groups,
        }
    }

    /// Elements of a buffer that holds any step.
    #[must_use]
    pub fn required_len(&self) -> usize {
        let (tokens, requests) = (self.max_num_batched_tokens, self.max_num_seqs);
        let shared = match self.max_shared_groups {
            0 => 0,
            groups => GROUP_FIELDS * groups + 2 * requests,
        };
        3 * tokens
            + 5 * requests
            + 1
            + 2 * self.max_block_updates
            + shared
            + 4 * self.max_state_copies
    }
}

/// The counts of one step and the offsets of its sections; see `_core.pyi`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[allow(missing_docs)] // named and explained in _core.pyi
pub struct ScheduledBatch {
    pub step_id: u64,
    pub awaited_step: Option<u64>,
    pub num_tokens: usize,
    pub num_reqs: usize,
    pub num_decodes: usize,
    pub num_samples: usize,
    /// Written by the engine: samples whose token waits for a mask.
    pub num_constrained: usize,
    pub num_block_updates: usize,
    pub num_shared_groups: usize,
    pub num_state_restores: usize,
    pub num_state_saves: usize,
    pub max_query_len: usize,
    pub max_seq_len: usize,
    pub packed_len: usize,
    pub input_ids_offset: usize,
    pub positions_offset: usize,
    pub slot_mapping_offset: usize,
    pub slots_offset: usize,
    pub seq_lens_offset: usize,
    pub query_start_loc_offset: usize,
    pub sample_rows_offset: usize,
    pub sample_slots_offset: usize,
    pub block_updates_offset: usize,
    pub shared_groups_offset: usize,
    pub shared_members_offset: usize,
    pub shared_tokens_offset: usize,
    pub state_restores_offset: usize,
    pub state_saves_offset: usize,
}

impl ScheduledBatch {
    fn with_layout(mut self, limits: &StagingLimits) -> Self {
        let mut at = 0;
        let mut section = |len: usize| {
            let offset = at;
            at += len;
            offset
        };
        self.input_ids_offset = section(self.num_tokens);
        self.positions_offset = section(self.num_tokens);
        self.slot_mapping_offset = section(self.num_tokens);
        self.slots_offset = section(self.num_reqs);
        self.seq_lens_offset = section(self.num_reqs);
        self.query_start_loc_offset = section(self.num_reqs + 1);
        self.sample_rows_offset = section(self.num_reqs);
        self.sample_slots_offset = section(self.num_reqs);
        self.block_updates_offset = section(2 * self.num_block_updates);
        // Of one size in every step that has them, whatever the number of groups.
        let (groups, rows) = match self.num_shared_groups {
            0 => (0, 0),
            _ => (limits.max_shared_groups, self.num_reqs),
        };
        self.shared_groups_offset = section(GROUP_FIELDS * groups);
        self.shared_members_offset = section(rows);
        self.shared_tokens_offset = section(rows);
        self.state_restores_offset = section(2 * self.num_state_restores);
        self.state_saves_offset = section(2 * self.num_state_saves);
        self.packed_len = section(0);
        self
    }
}

/// A step's destination.
#[derive(Debug)]
pub struct Staging<'a> {
    /// At least [`StagingLimits::required_len`] elements.
    pub buffer: &'a mut [i32],
}

impl Staging<'_> {
    /// Checks the buffer against the engine's limits. O(1).
    pub fn validate(&self, limits: &StagingLimits) -> Result<()> {
        let required = limits.required_len();
        if self.buffer.len() < required {
            return Err(Error::invalid(format!(
                "the staging buffer has {} elements, this engine needs {required}",
                self.buffer.len()
            )));
        }
        Ok(())
    }

    /// Writes `plan` and returns its counts. The buffer must have been validated.
    pub fn fill(
        &mut self,
        plan: &Plan,
        requests: &Slab<Request>,
        limits: &StagingLimits,
        block_size: usize,
    ) -> ScheduledBatch {
        let num_reqs = plan.entries.len();
        let batch = ScheduledBatch {
            num_tokens: plan.num_tokens,
            num_reqs,
            num_decodes: plan.num_decodes,
            num_block_updates: plan.update_ids.len(),
            step_id: plan.step_id,
            awaited_step: plan.awaited_step,
            num_shared_groups: plan.shared.groups.len(),
            num_state_restores: plan.restores.len(),
            num_state_saves: plan.saves.len(),
            ..ScheduledBatch::default()
        };
        let mut batch = batch.with_layout(limits);

        let rest = &mut self.buffer[..batch.packed_len];
        let (input_ids, rest) = rest.split_at_mut(plan.num_tokens);
        let (positions, rest) = rest.split_at_mut(plan.num_tokens);
        let (slot_mapping, rest) = rest.split_at_mut(plan.num_tokens);
        let (slots, rest) = rest.split_at_mut(num_reqs);
        let (seq_lens, rest) = rest.split_at_mut(num_reqs);
        let (query_start_loc, rest) = rest.split_at_mut(num_reqs + 1);
        let (sample_rows, rest) = rest.split_at_mut(num_reqs);
        let (sample_slots, rest) = rest.split_at_mut(num_reqs);
        let (block_updates, rest) = rest.split_at_mut(2 * plan.update_ids.len());
        let (shared, rest) =
            rest.split_at_mut(batch.state_restores_offset - batch.shared_groups_offset);
        let (restores, saves) = rest.split_at_mut(2 * plan.restores.len());

        let mut at = 0;
        let mut num_samples = 0;
        query_start_loc[0] = 0;
        for (i, entry) in plan.entries.iter().enumerate() {
            let (start, count) = (entry.start as usize, entry.count as usize);
            if i < plan.num_decodes {
                input_ids[at] = entry.input_id;
                positions[at] = entry.start as i32;
                slot_mapping[at] = entry.mapping;
            } else {
                let request = &requests[entry.index as usize];
                let table = request
                    .seat()
                    .map_or(&[][..], |seat| seat.table.block_ids());
                let prompt = &request.prompt.tokens;
                let from_prompt = prompt.get(start..).unwrap_or(&[]);
                let from_outputs = &request.outputs[start.saturating_sub(prompt.len())..];
                let tokens = from_prompt.iter().chain(from_outputs);
                for (id, &token) in input_ids[at..at + count].iter_mut().zip(tokens) {
                    *id = token as i32;
                }
                for (k, position) in (start..start + count).enumerate() {
                    positions[at + k] = position as i32;
                    let block = table[position / block_size] as usize;
                    slot_mapping[at + k] = (block * block_size + position % block_size) as i32;
                }
                batch.max_query_len = batch.max_query_len.max(count);
            }
            at += count;
            slots[i] = entry.slot as i32;
            seq_lens[i] = (entry.start + entry.count) as i32;
            query_start_loc[i + 1] = at as i32;
            batch.max_seq_len = batch.max_seq_len.max(start + count);
            if entry.sample {
                sample_rows[num_samples] = at as i32 - 1;
                sample_slots[num_samples] = entry.slot as i32;
                num_samples += 1;
            }
        }
        batch.max_query_len = batch.max_query_len.max(num_reqs.min(1));
        batch.num_samples = num_samples;

        sample_rows[num_samples..].fill(0);
        sample_slots[num_samples..].fill(limits.max_num_seqs as i32);

        let (rows, ids) = block_updates.split_at_mut(plan.update_ids.len());
        for (out, &row) in rows.iter_mut().zip(&plan.update_rows) {
            *out = row as i32;
        }
        for (out, &id) in ids.iter_mut().zip(&plan.update_ids) {
            *out = id as i32;
        }
        if !plan.shared.groups.is_empty() {
            write_shared(shared, &plan.shared, num_reqs, block_size);
        }
        write_copies(restores, &plan.restores);
        write_copies(saves, &plan.saves);
        batch
    }
}

/// The groups, the rows of the step that belong to them, and the tokens that each row shares.
fn write_shared(out: &mut [i32], shared: &SharedPrefixes, num_reqs: usize, block_size: usize) {
    out.fill(0);
    let (groups, rows) = out.split_at_mut(out.len() - 2 * num_reqs);
    let (members, tokens) = rows.split_at_mut(num_reqs);
    for (member, &row) in members.iter_mut().zip(&shared.members) {
        *member = row as i32;
    }
    for (fields, group) in groups.chunks_exact_mut(GROUP_FIELDS).zip(&shared.groups) {
        let length = group.blocks as usize * block_size;
        fields.copy_from_slice(&[group.first as i32, group.count as i32, length as i32]);
        for &row in &shared.members[group.first as usize..][..group.count as usize] {
            tokens[row as usize] = length as i32;
        }
    }
}

/// The rows that are read, then those that are written.
fn write_copies(out: &mut [i32], copies: &[(u32, u32)]) {
    let (from, to) = out.split_at_mut(copies.len());
    for (i, copy) in copies.iter().enumerate() {
        (from[i], to[i]) = (copy.0 as i32, copy.1 as i32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::shared_prefixes::{NO_KEY, PrefixGroup};

    fn decode(slot: Slot, start: u32) -> Entry {
        Entry {
            index: 0,
            request_id: 0,
            slot,
            start,
            count: 1,
            input_id: -1,
            mapping: 7,
            sample: true,
            save: NO_CHECKPOINT,
            prefix_key: NO_KEY,
        }
    }

    #[test]
    fn a_step_of_decodes_is_written_without_gaps() {
        let limits = StagingLimits::new(16, 4, 32, 4, true, 2);
        let mut buffer = vec![99; limits.required_len()];
        let mut plan = Plan {
            entries: vec![decode(2, 5), decode(0, 9)],
            num_decodes: 2,
            num_tokens: 2,
            ..Plan::default()
        };
        plan.update_block(17, 3);
        plan.restores.push((6, 0));
        plan.saves.extend([(2, 7), (0, 5)]);
        plan.shared.members.extend([1, 0]);
        plan.shared.groups.push(PrefixGroup {
            first: 0,
            count: 2,
            blocks: 1,
        });
        let requests = Slab::new();
        let mut staging = Staging {
            buffer: &mut buffer,
        };
        staging.validate(&limits).unwrap();
        let batch = staging.fill(&plan, &requests, &limits, 4);
        let expected = [
            &[-1, -1][..],
            &[5, 9],
            &[7, 7],
            &[2, 0],
            &[6, 10],
            &[0, 1, 2],
            &[0, 1],
            &[2, 0],
            &[17, 3],
            &[0, 2, 4, 0, 0, 0],
            &[1, 0],
            &[4, 4],
            &[6, 0],
            &[2, 0, 7, 5],
        ]
        .concat();
        assert_eq!(batch.packed_len, expected.len());
        assert_eq!(buffer[..batch.packed_len], expected);
        assert_eq!(buffer[batch.packed_len], 99);
        assert_eq!(
            (batch.num_samples, batch.max_query_len, batch.max_seq_len),
            (2, 1, 10)
        );
    }

    #[test]
    fn short_buffers_are_refused() {
        let limits = StagingLimits::new(16, 4, 32, 4, false, 0);
        let mut buffer = vec![0; limits.required_len()];
        let short = Staging {
            buffer: &mut buffer[1..],
        };
        assert!(short.validate(&limits).is_err());
    }
}
