//! A step of the admitted requests: decodes, chunks of prefills, memory to grow into.

use super::{LongPrefill, Scheduler};
use crate::scheduler::batch::{Entry, NO_CHECKPOINT, ON_DEVICE, Plan};
use crate::scheduler::prompt_room::Room;
use crate::scheduler::request::{NO_GROUP, RequestStatus};
use crate::scheduler::shared_prefixes::NO_KEY;

impl Scheduler {
    /// Decodes whose input is known, or sampled at least `lag` steps before this one.
    pub(super) fn schedule_decodes(&mut self, plan: &mut Plan, budget: &mut usize, lag: u64) {
        let num_decoding = self.running.len() - self.num_prefilling;
        let most = num_decoding.div_ceil(self.config.num_stages);
        let mut i = 0;
        while i < self.running.len() && *budget > 0 {
            let index = self.running[i].1;
            self.current = Some(index);
            let request = &mut self.requests[index as usize];
            let RequestStatus::Running(seat) = &mut request.status else {
                unreachable!(
                    "request {} is in `running` without a seat",
                    request.request_id
                )
            };
            if seat.prefilling {
                // Room for forced tokens; a prompt has all it needs.
                if seat.capacity < request.num_tokens {
                    match self.grow(index, plan) {
                        Growth::Grown => continue,
                        Growth::Wait | Growth::Preempted => return,
                    }
                }
                i += 1;
                continue;
            }
            let is_early = request.num_pending > 0 && request.sampled_in + lag > self.num_steps;
            if is_early || plan.entries.len() == most {
                i += 1;
                continue;
            }
            if seat.num_computed == seat.capacity {
                match self.grow(index, plan) {
                    Growth::Grown => {}
                    // Blocks come back with a step in flight, and lower ranks compete for them.
                    Growth::Wait => return,
                    Growth::Preempted => return,
                }
            }
            let request = &mut self.requests[index as usize];
            let RequestStatus::Running(seat) = &mut request.status else {
                unreachable!()
            };
            let start = seat.num_computed;
            seat.num_computed += 1;
            let input_id = if request.num_pending > 0 {
                plan.awaited_step = plan.awaited_step.max(Some(request.sampled_in));
                ON_DEVICE
            } else {
                request.last_token as i32
            };
            let save = match &self.states {
                Some(states) if self.config.enable_prefix_caching => {
                    states.save_answer(seat, request.slot, plan)
                }
                _ => NO_CHECKPOINT,
            };
            plan.entries.push(Entry {
                index,
                request_id: request.request_id,
                slot: request.slot,
                start,
                count: 1,
                input_id,
                mapping: start as i32 + seat.tail_base,
                sample: true,
                save,
                prefix_key: seat.prefix_key,
            });
            request.num_in_flight += 1;
            request.num_pending += 1;
            request.sampled_in = self.num_steps;
            if request.num_tokens + request.num_pending >= request.max_len {
                self.closing.push(index);
            }
            *budget -= 1;
            plan.num_tokens += 1;
            i += 1;
        }
    }

    pub(super) fn schedule_prefills(&mut self, plan: &mut Plan, room: &mut Room) {
        for i in 0..self.running.len() {
            if room.tokens == 0 {
                return;
            }
            let index = self.running[i].1;
            if self.requests[index as usize]
                .seat()
                .is_some_and(|seat| seat.prefilling)
            {
                self.schedule_chunk(index, plan, room);
            }
        }
    }

    /// Most tokens of one prompt in this step.
    fn longest_chunk(&self) -> usize {
        let LongPrefill {
            threshold,
            is_adaptive,
        } = self.config.long_prefill;
        let num_requests = self.num_running + self.num_waiting();
        if threshold == 0 || num_requests < 2 || !self.config.enable_chunked_prefill {
            return usize::MAX;
        }
        if is_adaptive {
            threshold.max(self.config.max_num_batched_tokens / num_requests)
        } else {
            threshold
        }
    }

    /// Schedules as much of a prefill as the room and the other requests leave.
    pub(super) fn schedule_chunk(&mut self, index: u32, plan: &mut Plan, room: &mut Room) {
        self.current = Some(index);
        let request = &self.requests[index as usize];
        let Some(seat) = request.seat() else {
            unreachable!("request {} prefills without a seat", request.request_id)
        };
        let start = seat.num_computed;
        let most = self.most_tokens(room, start as usize);
        let most = most.min(self.longest_chunk()) as u32;
        let count = (request.num_tokens - start).min(most);
        let (count, is_saved) = self.cut_chunk(request, seat, count);
        self.take_room(room, start as usize, count as usize);
        plan.num_tokens += count as usize;
        let request = &mut self.requests[index as usize];
        let RequestStatus::Running(seat) = &mut request.status else {
            unreachable!()
        };
        seat.num_computed += count;
        let complete = seat.num_computed == request.num_tokens;
        let sample = complete && request.num_tokens < request.max_len;
        plan.entries.push(Entry {
            index,
            request_id: request.request_id,
            slot: request.slot,
            start,
            count,
            input_id: 0,
            mapping: 0,
            sample,
            save: NO_CHECKPOINT,
            prefix_key: NO_KEY,
        });
        request.num_in_flight += 1;
        if complete {
            seat.prefilling = false;
            self.num_prefilling -= 1;
            request.num_pending += u32::from(sample);
            request.sampled_in = self.num_steps;
            if request.num_tokens + request.num_pending >= request.max_len {
                self.closing.push(index);
            }
        }
        if is_saved {
            let save = self.save_chunk(index, plan);
            if let Some(entry) = plan.entries.last_mut() {
                entry.save = save;
            }
        }
    }

    /// Gives a sample its next block, at the cost of lower ranks if need be.
    fn grow(&mut self, index: u32, plan: &mut Plan) -> Growth {
        let block_size = self.config.block_size as u32;
        loop {
            let request = &mut self.requests[index as usize];
            let RequestStatus::Running(seat) = &mut request.status else {
                unreachable!()
            };
            if let Some(id) = seat.table.grow() {
                seat.tail_base = (id * block_size) as i32 - seat.capacity as i32;
                seat.capacity += block_size;
                let column = seat.table.block_ids().len() - 1;
                let row = request.slot as usize * self.limits.max_blocks_per_seq + column;
                plan.update_block(row as u32, id);
                return Growth::Grown;
            }
            if self.revoke_shared(NO_GROUP) {
                continue;
            }
            if self.num_leaving > 0 {
                return Growth::Wait;
            }
            let (_, victim) = *self
                .running
                .last()
                .expect("the request that grows is running");
            self.preempt(victim);
            if victim == index {
                return Growth::Preempted;
            }
        }
    }
}

enum Growth {
    Grown,
    /// Memory comes back with a step in flight.
    Wait,
    /// The request itself was the last in rank.
    Preempted,
}
