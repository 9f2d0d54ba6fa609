//! From the queue onto the device: prefix lookup, memory, slot.

use super::{HEADROOM_TOKENS, Scheduler};
use crate::scheduler::batch::Plan;
use crate::scheduler::block_table::BlockTable;
use crate::scheduler::prompt_room::Room;
use crate::scheduler::request::{NO_GROUP, RequestStatus, Seat};
use crate::scheduler::shared_prefixes::NO_KEY;

impl Scheduler {
    /// Admits from the head of the queue while room, slots and memory last. Never skips the head,
    /// or a large request could wait for ever while small ones pass it.
    pub(super) fn admit(&mut self, plan: &mut Plan, room: &mut Room) {
        while room.tokens > 0 && !self.free_slots.is_empty() {
            let Some((&rank, &index)) = self.waiting.first_key_value() else {
                return;
            };
            self.current = Some(index);
            let request = &self.requests[index as usize];
            // Preempted, and its last token is still on the device.
            if request.num_in_flight > 0 {
                return;
            }
            let num_free = self.pool.lock().num_free();
            if self
                .blocked
                .is_some_and(|(who, had)| who == rank && num_free <= had)
            {
                return;
            }
            let num_tokens = request.num_tokens as usize;
            let num_blocks = num_tokens.div_ceil(self.config.block_size);
            if plan.update_ids.len() + num_blocks > self.limits.max_block_updates {
                return;
            }
            self.find_prefix(index);
            let remaining = num_tokens - self.hits.len() * self.config.block_size;
            if !self.config.enable_chunked_prefill
                && remaining > room.tokens
                && remaining <= self.config.max_num_batched_tokens
            {
                return;
            }
            let Some(table) = self.allocate(index, num_blocks) else {
                let group = self.requests[index as usize].group;
                if self.revoke_shared(group) {
                    continue;
                }
                self.blocked = Some((rank, num_free));
                return;
            };
            self.blocked = None;
            self.seat(index, table, plan);
            self.schedule_chunk(index, plan, room);
        }
    }

    /// Fills `self.hits` with blocks that hold a prefix of the request's tokens. At least the last
    /// token is left to compute, or there would be nothing to sample from.
    fn find_prefix(&mut self, index: u32) {
        self.hits.clear();
        self.hit_state = None;
        let request = &mut self.requests[index as usize];
        let block_size = self.config.block_size;
        if request.unparked
            && let Some(group) = self.groups.get(request.group as usize)
            && let Some(prefix) = &group.prefix
        {
            self.hits.extend_from_slice(prefix.table.block_ids());
            let state = prefix.state.as_ref();
            self.hit_state = state.and_then(|table| table.block_ids().first().copied());
            return;
        }
        if !self.config.enable_prefix_caching {
            return;
        }
        let pool = self.pool.lock();
        for block in 0..(request.num_tokens as usize - 1) / block_size {
            let hash = request.block_hash(&self.hasher, block_size, block);
            let Some(id) = pool.lookup(hash) else { break };
            self.hits.push(id);
        }
        drop(pool);
        self.hit_state = self.cut_hits(index);
    }

    /// The hits and fresh blocks for the rest, or None if memory does not suffice.
    fn allocate(&self, index: u32, num_blocks: usize) -> Option<BlockTable> {
        let fresh = num_blocks - self.hits.len();
        {
            let pool = self.pool.lock();
            let revived = self
                .hits
                .iter()
                .filter(|&&id| pool.ref_count(id) == 0)
                .count();
            // A little slack lets the running requests grow before anyone must be preempted.
            let slack = if self.num_running > 0 {
                self.config.num_blocks / 100
            } else {
                0
            };
            if fresh + revived + slack > pool.num_free() {
                return None;
            }
        }
        let request = &self.requests[index as usize];
        let longest = (request.max_len as usize).div_ceil(self.config.block_size);
        let headroom = HEADROOM_TOKENS.div_ceil(self.config.block_size);
        let capacity = longest.min(num_blocks + headroom).max(num_blocks);
        let mut table = BlockTable::with_capacity(self.pool.clone(), capacity);
        table.share(&self.hits);
        table.grow_by(fresh).then_some(table)
    }

    fn seat(&mut self, index: u32, table: BlockTable, plan: &mut Plan) {
        let block_size = self.config.block_size as u32;
        let slot = self.free_slots.pop().expect("the caller has checked");
        let num_hits = self.hits.len() as u32;
        let num_cached = num_hits * block_size;

        let request = &mut self.requests[index as usize];
        self.waiting.remove(&request.rank);
        let first_row = slot as usize * self.limits.max_blocks_per_seq;
        for (column, &id) in table.block_ids().iter().enumerate() {
            plan.update_block((first_row + column) as u32, id);
        }
        plan.admitted.push(index);
        if let (Some(states), Some(checkpoint)) = (&self.states, self.hit_state.take()) {
            states.restore(checkpoint, slot, plan);
        }

        let capacity = table.block_ids().len() as u32 * block_size;
        let tail = table.block_ids().last().copied().unwrap_or(0);
        let prefix_key = match &self.prefixes {
            Some(finder) => finder.key(table.block_ids(), request.num_tokens as usize),
            None => NO_KEY,
        };
        request.slot = slot;
        plan.new_slots.push(request.new_slot());
        request.status = RequestStatus::Running(Seat {
            num_computed: num_cached,
            num_confirmed: num_cached,
            next_commit: if self.config.enable_prefix_caching {
                num_cached + block_size
            } else {
                u32::MAX
            },
            tail_base: (tail * block_size) as i32 - (capacity - block_size) as i32,
            capacity,
            prefilling: true,
            closed: false,
            last_saved: num_cached,
            answer_save: None,
            prefix_key,
            table,
        });
        let to_come = (request.max_len - request.num_tokens) as usize;
        request.outputs.reserve(to_come.min(HEADROOM_TOKENS));
        let hashes = to_come.min(HEADROOM_TOKENS) / block_size as usize + 1;
        request.output_hashes.reserve(hashes);
        let first_time = !std::mem::replace(&mut request.was_admitted, true);
        let from_sibling = std::mem::replace(&mut request.unparked, false);
        if first_time {
            request.num_cached_tokens = num_cached;
            if self.config.enable_prefix_caching && !from_sibling {
                self.prefix_queries += u64::from(request.num_prompt);
                self.prefix_hits += u64::from(num_cached);
            }
        }
        let (rank, group) = (request.rank, request.group);
        let at = self.running.partition_point(|&(other, _)| other < rank);
        self.running.insert(at, (rank, index));
        self.num_running += 1;
        self.num_prefilling += 1;
        if from_sibling && group != NO_GROUP {
            self.sibling_left_queue(group);
        }
    }
}
