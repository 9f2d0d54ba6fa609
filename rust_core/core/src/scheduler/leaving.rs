//! Requests that leave: ended, or put back after a failed plan, with the blocks and slots they hold.

use super::{GroupDone, Scheduler};
use crate::scheduler::batch::Plan;
use crate::scheduler::request::{NO_SLOT, Rank, RequestStatus, Seat};

impl Scheduler {
    /// Ends a request. In flight, it keeps what it holds until its steps came back.
    ///
    /// Returns the group's totals once the last of its samples has ended.
    pub fn end(&mut self, index: u32) -> Option<GroupDone> {
        let request = &self.requests[index as usize];
        let (request_id, num_output) = (request.request_id, request.outputs.len() as u32);
        self.index_of.remove(&request_id);
        let status = std::mem::replace(
            &mut self.requests[index as usize].status,
            RequestStatus::Parked,
        );
        let seat = match status {
            RequestStatus::Running(seat) => {
                // Put back for detach, which needs to see the seat.
                self.requests[index as usize].status = RequestStatus::Running(seat);
                Some(self.detach(index))
            }
            RequestStatus::Waiting | RequestStatus::Preempted => {
                self.waiting.remove(&self.requests[index as usize].rank);
                None
            }
            RequestStatus::Parked => {
                self.num_parked -= 1;
                None
            }
            RequestStatus::Finished(_) => unreachable!("request {request_id} ends twice"),
        };
        let done = self.leave_group(index, num_output);
        let request = &mut self.requests[index as usize];
        if request.num_in_flight == 0 {
            drop(seat);
            request.status = RequestStatus::Finished(None);
            self.remove(index);
        } else {
            self.num_leaving += usize::from(seat.is_some());
            request.status = RequestStatus::Finished(seat);
        }
        done
    }

    /// Undoes a half-made plan after a panic: what it touched is recomputed.
    pub(crate) fn abandon(&mut self, plan: &mut Plan) {
        self.closing.clear();
        for entry in plan.entries.drain(..) {
            self.abandon_save(&entry);
            let request = &mut self.requests[entry.index as usize];
            request.num_in_flight -= 1;
            request.num_pending -= u32::from(entry.sample);
            if matches!(request.status, RequestStatus::Running(_)) {
                self.preempt(entry.index);
            }
        }
        // The rest were given blocks that the device has not been told about.
        let columns = self.limits.max_blocks_per_seq;
        for i in 0..plan.update_rows.len() {
            let slot = plan.update_rows[i] / columns as u32;
            let owner = self
                .running
                .iter()
                .map(|&(_, index)| index)
                .find(|&index| self.requests[index as usize].slot == slot);
            if let Some(index) = owner {
                self.preempt(index);
            }
        }
        plan.clear();
    }

    /// Takes the seat from a running request and corrects the counts.
    pub(super) fn detach(&mut self, index: u32) -> Seat {
        let request = &mut self.requests[index as usize];
        let rank = request.rank;
        let RequestStatus::Running(seat) =
            std::mem::replace(&mut request.status, RequestStatus::Parked)
        else {
            unreachable!("request {} has no seat to leave", request.request_id)
        };
        self.num_running -= 1;
        self.num_prefilling -= usize::from(seat.prefilling);
        if seat.closed {
            self.num_leaving -= 1;
        } else {
            self.remove_from_running(rank);
        }
        seat
    }

    /// The last token of a running request is scheduled.
    pub(super) fn leave_running(&mut self, index: u32) {
        let request = &mut self.requests[index as usize];
        if let RequestStatus::Running(seat) = &mut request.status {
            seat.closed = true;
            self.num_leaving += 1;
            let rank = request.rank;
            self.remove_from_running(rank);
        }
    }

    fn remove_from_running(&mut self, rank: Rank) {
        match self.running.binary_search_by_key(&rank, |&(rank, _)| rank) {
            Ok(at) => {
                self.running.remove(at);
            }
            Err(_) => unreachable!("{rank:?} is not running"),
        }
    }

    pub(super) fn free_slot(&mut self, index: u32) {
        let request = &mut self.requests[index as usize];
        if request.slot != NO_SLOT {
            self.free_slots
                .push(std::mem::replace(&mut request.slot, NO_SLOT));
        }
    }

    /// Drops a request that ended and is in flight no more.
    pub(super) fn remove(&mut self, index: u32) {
        self.free_slot(index);
        let request = self.requests.remove(index as usize);
        if matches!(request.status, RequestStatus::Finished(Some(_))) {
            self.num_leaving -= 1;
        }
    }
}
