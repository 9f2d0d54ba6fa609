//! The share of a step that prompts may take: by tokens, and beside decodes by time.

use super::Scheduler;
use crate::scheduler::batch::Plan;
use crate::scheduler::step_times::Chunks;

/// A step with prompts may take so many times as long as one of its decodes alone, where that is more than
/// `max_step_s`: less, and prompts would hardly advance where decodes are slow; more, and a decode's
/// slowest tokens would come at over three times its usual distance.
const LEAST_RATIO: f64 = 2.5;

/// Where more than so many prompts wait for each request that decodes, a step takes longer in proportion: one
/// stream must not halve the speed of a thousand prompts. Where fewer do, that would win no tokens a second
/// (bench/NOTES.md, "Prompts beside decodes").
const PROMPTS_PER_DECODE: usize = 4;

/// Steps in a row that may have prompts beside decodes: a hundredth of a prompt's time is what it takes to
/// know that of decodes alone; fewer where the number of decodes has changed by half.
const DECODES_ALONE_EVERY: u64 = 64;
const DECODES_ALONE_LEAST: u64 = 8;

/// Part of `max_num_batched_tokens` that prompts get in any step, however slow it is.
const LEAST_PART: usize = 128;

/// The rest of the share that prompts have of the step being planned.
#[derive(Debug, Clone, Copy)]
pub(super) struct Room {
    pub tokens: usize,
    /// None: as long as it takes.
    seconds: Option<f64>,
    /// No prompt has any of it yet.
    is_whole: bool,
}

impl Scheduler {
    /// The room for prompts in a step of which `tokens` are left. Decodes are limited by nothing.
    pub(super) fn prompt_room(&self, plan: &Plan, tokens: usize) -> Room {
        let seconds = self.prompt_seconds();
        let tokens = match seconds {
            Some(_) if self.is_decode_time_due(plan.num_decodes) => 0,
            _ => tokens,
        };
        Room {
            tokens,
            seconds,
            is_whole: true,
        }
    }

    /// True if this step goes without prompts, so that the time of its decodes alone is known.
    fn is_decode_time_due(&self, num_decodes: usize) -> bool {
        let (last_num, last_step) = self.measured_decodes;
        let since = self.num_steps - last_step;
        let (less, more) = (last_num.min(num_decodes), last_num.max(num_decodes));
        let is_due = last_num == 0
            || since >= DECODES_ALONE_EVERY
            || (since >= DECODES_ALONE_LEAST && 2 * more > 3 * less);
        num_decodes > 0 && is_due
    }

    /// Seconds that prompts may add to a step; None where no request decodes, or nothing limits it.
    fn prompt_seconds(&self) -> Option<f64> {
        let num_decoding = self.running.len() - self.num_prefilling;
        if self.config.max_step_s == 0.0 || num_decoding == 0 || !self.config.enable_chunked_prefill
        {
            return None;
        }
        let decodes_s = self.step_times.decodes_s();
        // Each of a pipeline's stages takes so long.
        let limit_s = self.config.max_step_s / self.config.num_stages as f64;
        let num_prompts = self.num_prefilling + self.waiting.len().min(self.free_slots.len());
        let crowd = num_prompts as f64 / (PROMPTS_PER_DECODE * num_decoding) as f64;
        Some(limit_s.max(LEAST_RATIO * decodes_s) * crowd.max(1.0) - decodes_s)
    }

    /// Most tokens that a prompt computed up to `start` may have of the room; less than a block only
    /// where there are fewer tokens left.
    pub(super) fn most_tokens(&self, room: &mut Room, start: usize) -> usize {
        let Some(seconds) = room.seconds else {
            return room.tokens;
        };
        let within = self.step_times.tokens_within(seconds, start);
        if std::mem::take(&mut room.is_whole) {
            let least =
                (self.config.max_num_batched_tokens / LEAST_PART).max(self.config.block_size);
            room.tokens = room.tokens.min(self.unpadded(within.max(least)));
            return room.tokens;
        }
        room.tokens.min(within.max(self.config.block_size))
    }

    /// The most tokens up to so many that no step has to be padded for.
    fn unpadded(&self, tokens: usize) -> usize {
        let sizes = &self.config.padded_prompts;
        match sizes.partition_point(|&size| size <= tokens) {
            at if at == sizes.len() || at == 0 => tokens,
            at => sizes[at - 1],
        }
    }

    /// Learns from a step that came back after `seconds` of its own.
    #[inline]
    pub fn observe_step(&mut self, plan: &Plan, seconds: f64) {
        let chunks = &plan.entries[plan.num_decodes..];
        if self.config.max_step_s == 0.0 {
            return;
        }
        if chunks.is_empty() {
            self.step_times.observe_decodes(seconds);
            return;
        }
        let each = chunks
            .iter()
            .map(|entry| Chunks::one(entry.start as usize, entry.count as usize));
        let all = each.fold(Chunks::default(), Chunks::and);
        self.step_times.observe(all, seconds, plan.num_decodes > 0);
    }

    /// Takes a prompt's chunk out of the room.
    pub(super) fn take_room(&self, room: &mut Room, start: usize, count: usize) {
        room.tokens -= count;
        if let Some(seconds) = &mut room.seconds {
            *seconds -= self.step_times.chunks_s(Chunks::one(start, count));
        }
    }
}
