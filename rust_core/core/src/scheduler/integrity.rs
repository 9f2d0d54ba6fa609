//! The scheduler's invariants, checked one by one. O(everything it holds): for tests, and for
//! production when idle.

use std::collections::HashMap;

use super::Scheduler;
use crate::error::{Error, Result};
use crate::scheduler::batch::{Entry, NO_CHECKPOINT};
use crate::scheduler::block_table::BlockTable;
use crate::scheduler::request::{NO_GROUP, NO_SLOT, Request, RequestStatus};

macro_rules! ensure {
    ($condition:expr, $($message:tt)*) => {
        if !$condition {
            return Err(Error::integrity(format!($($message)*)));
        }
    };
}

impl Scheduler {
    /// Checks every invariant against the entries of the steps in flight.
    pub fn check_integrity<'a>(&self, in_flight: impl Iterator<Item = &'a Entry>) -> Result<()> {
        let in_flight: Vec<&Entry> = in_flight.collect();
        self.check_requests(in_flight.iter().copied())?;
        self.check_checkpoints(&in_flight)?;
        self.check_queues()?;
        self.check_slots()?;
        self.check_groups()?;
        self.check_blocks()
    }

    fn check_requests<'a>(&self, in_flight: impl Iterator<Item = &'a Entry>) -> Result<()> {
        let mut steps: HashMap<u32, (u32, u32, u32)> = HashMap::new();
        for entry in in_flight {
            let (count, samples, tokens) = steps.entry(entry.index).or_default();
            *count += 1;
            *samples += u32::from(entry.sample);
            *tokens += entry.count;
        }
        for (index, request) in &self.requests {
            let id = request.request_id;
            let (count, samples, tokens) = steps.remove(&(index as u32)).unwrap_or_default();
            ensure!(
                (
                    request.num_in_flight,
                    request.num_pending + request.num_void
                ) == (count, samples),
                "request {id}: {} steps and {} + {} samples in flight, counted {count} and {samples}",
                request.num_in_flight,
                request.num_pending,
                request.num_void
            );
            ensure!(
                request.num_tokens as usize == request.prompt.tokens.len() + request.outputs.len(),
                "request {id}: num_tokens {}",
                request.num_tokens
            );
            ensure!(
                request.num_tokens + request.num_pending <= request.max_len,
                "request {id}: scheduled past its max_len {}",
                request.max_len
            );
            let over = matches!(request.status, RequestStatus::Finished(_));
            ensure!(
                !over || count > 0,
                "request {id} is over, not in flight, and still here"
            );
            ensure!(
                self.index_of.get(&id).copied() == (!over).then_some(index as u32),
                "request {id}: the map of ids disagrees"
            );
            if let RequestStatus::Running(seat) = &request.status {
                let room = seat.table.block_ids().len() * self.config.block_size;
                ensure!(
                    seat.num_confirmed + tokens == seat.num_computed + request.num_void,
                    "request {id}: {} confirmed and {tokens} in flight, {} of them void, but {} computed",
                    seat.num_confirmed,
                    request.num_void,
                    seat.num_computed
                );
                ensure!(
                    seat.capacity as usize == room && seat.num_computed as usize <= room,
                    "request {id}: {} tokens computed in room for {room}",
                    seat.num_computed
                );
                let known = request.num_tokens + request.num_pending;
                ensure!(
                    seat.prefilling == (seat.num_computed < request.num_tokens)
                        || seat.num_computed + 1 == known,
                    "request {id}: prefilling {} at {} of {known}",
                    seat.prefilling,
                    seat.num_computed
                );
                ensure!(
                    seat.closed == (known >= request.max_len && !seat.prefilling),
                    "request {id}: closed {} at {known}",
                    seat.closed
                );
            }
        }
        ensure!(
            steps.is_empty(),
            "steps in flight of requests that are gone"
        );
        Ok(())
    }

    fn check_queues(&self) -> Result<()> {
        ensure!(self.running.is_sorted(), "running is out of order");
        for &(rank, index) in &self.running {
            let request = self.requests.get(index as usize);
            ensure!(
                request.is_some_and(|r| r.rank == rank
                    && matches!(&r.status, RequestStatus::Running(seat) if !seat.closed)),
                "running holds {index}, which does not run"
            );
        }
        for (rank, &index) in &self.waiting {
            let request = self.requests.get(index as usize);
            ensure!(
                request.is_some_and(|r| r.rank == *rank
                    && matches!(r.status, RequestStatus::Waiting | RequestStatus::Preempted)),
                "the queue holds {index}, which does not wait"
            );
        }
        let count = |test: &dyn Fn(&Request) -> bool| {
            self.requests
                .iter()
                .filter(|(_, request)| test(request))
                .count()
        };
        let seat_is = |test: fn(&crate::scheduler::request::Seat) -> bool| {
            count(&|r| matches!(&r.status, RequestStatus::Running(seat) if test(seat)))
        };
        let finished = count(&|r| matches!(r.status, RequestStatus::Finished(Some(_))));
        let queued =
            count(&|r| matches!(r.status, RequestStatus::Waiting | RequestStatus::Preempted));
        for (name, have, counted) in [
            ("running", self.running.len(), seat_is(|seat| !seat.closed)),
            ("waiting", self.waiting.len(), queued),
            ("num_running", self.num_running, seat_is(|_| true)),
            (
                "num_prefilling",
                self.num_prefilling,
                seat_is(|seat| seat.prefilling),
            ),
            (
                "num_leaving",
                self.num_leaving,
                seat_is(|seat| seat.closed) + finished,
            ),
            (
                "num_parked",
                self.num_parked,
                count(&|r| matches!(r.status, RequestStatus::Parked)),
            ),
        ] {
            ensure!(have == counted, "{name} is {have}, counted {counted}");
        }
        Ok(())
    }

    fn check_slots(&self) -> Result<()> {
        let mut owners = vec![0; self.config.max_num_seqs];
        let held = self
            .requests
            .iter()
            .map(|(_, r)| r.slot)
            .filter(|&slot| slot != NO_SLOT);
        for slot in held.chain(self.free_slots.iter().copied()) {
            ensure!(
                (slot as usize) < owners.len(),
                "slot {slot} is out of range"
            );
            owners[slot as usize] += 1;
        }
        for (slot, &count) in owners.iter().enumerate() {
            ensure!(count == 1, "slot {slot} has {count} owners");
        }
        for (_, request) in &self.requests {
            let needs = request.seat().is_some();
            let may = needs || request.num_in_flight > 0;
            ensure!(
                if request.slot == NO_SLOT { !needs } else { may },
                "request {}: slot {} with {:?} in flight",
                request.request_id,
                request.slot,
                request.num_in_flight
            );
        }
        Ok(())
    }

    fn check_checkpoints(&self, in_flight: &[&Entry]) -> Result<()> {
        let (Some(states), Some(config)) = (&self.states, self.config.state) else {
            ensure!(
                in_flight.iter().all(|entry| entry.save == NO_CHECKPOINT),
                "a state is saved where there is none"
            );
            return Ok(());
        };
        let mut references = vec![0; config.num_checkpoints];
        let prefixes = self.groups.iter().filter_map(|(_, g)| g.prefix.as_ref());
        for prefix in prefixes {
            let checkpoints = prefix.state.iter().flat_map(BlockTable::block_ids);
            ensure!(
                checkpoints.clone().count() == 1,
                "a group shares blocks without their state"
            );
            for &id in checkpoints {
                references[id as usize] += 1;
            }
        }
        let saved = in_flight.iter().filter(|entry| entry.save != NO_CHECKPOINT);
        for entry in saved {
            references[entry.save as usize] += 1;
        }
        states.pool.lock().check_integrity(&references)
    }

    fn check_groups(&self) -> Result<()> {
        for (id, group) in &self.groups {
            let id = id as u32;
            let members: Vec<_> = self
                .requests
                .iter()
                .filter(|(_, r)| r.group == id)
                .collect();
            let queued = members.iter().filter(|(_, r)| r.unparked).count();
            ensure!(
                group.num_queued as usize == queued,
                "group {id}: {queued} queued samples"
            );
            ensure!(
                group.prefix.is_some() == self.sharing.contains(&id),
                "group {id}: the list of sharing groups disagrees"
            );
            ensure!(
                group.prefix.is_none() || queued > 0,
                "group {id} shares with nobody"
            );
            ensure!(
                group.parked.is_empty() || group.leader.is_some(),
                "group {id}: parked samples without a leader"
            );
            for &index in &group.parked {
                ensure!(
                    matches!(
                        self.requests.get(index as usize).map(|r| &r.status),
                        Some(RequestStatus::Parked)
                    ),
                    "group {id}: {index} is not parked"
                );
            }
        }
        for (_, request) in &self.requests {
            let over = matches!(request.status, RequestStatus::Finished(_));
            ensure!(
                over || request.group == NO_GROUP || self.groups.contains(request.group as usize),
                "request {}: its group is gone",
                request.request_id
            );
        }
        Ok(())
    }

    fn check_blocks(&self) -> Result<()> {
        let block_size = self.config.block_size;
        let mut references = vec![0; self.config.num_blocks];
        // Per block: one owner's logical index and request, to compare the others with.
        let mut seen: Vec<Option<(usize, &Request)>> = vec![None; self.config.num_blocks];
        let mut count = |table: &BlockTable| {
            for &id in table.block_ids() {
                references[id as usize] += 1;
            }
        };
        for (_, group) in &self.groups {
            group.prefix.iter().for_each(|prefix| count(&prefix.table));
        }
        for (_, request) in &self.requests {
            if let Some(seat) = request.seat() {
                count(&seat.table);
            }
        }
        let pool = self.pool.lock();
        for (_, request) in &self.requests {
            let Some(seat) = request.seat() else { continue };
            let id = request.request_id;
            for (block, &physical) in seat.table.block_ids().iter().enumerate() {
                let end = (block + 1) * block_size;
                let tokens = || (0..end).map(|i| request.token(i));
                if let Some((other_block, other)) = seen[physical as usize] {
                    ensure!(
                        block == other_block
                            && end <= request.num_tokens as usize
                            && end <= other.num_tokens as usize
                            && tokens().eq((0..end).map(|i| other.token(i))),
                        "block {physical} is in the tables of {id} and {} by mistake",
                        other.request_id
                    );
                }
                seen[physical as usize] = Some((block, request));
                if let Some(hash) = pool.hash_of(physical) {
                    ensure!(
                        end <= request.num_tokens as usize,
                        "request {id}: partial block {physical} has a name"
                    );
                    let mut parent = request.prompt.root();
                    for first in (0..end).step_by(block_size) {
                        let tokens = (first..first + block_size).map(|i| request.token(i));
                        parent = self.hasher.extend(parent, tokens);
                    }
                    ensure!(
                        parent == hash,
                        "request {id}: block {physical} has another's name"
                    );
                }
            }
        }
        pool.check_integrity(&references)
    }
}
