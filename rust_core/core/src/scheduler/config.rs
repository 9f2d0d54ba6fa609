//! The scheduler's fixed settings and their ranges.

use crate::error::{Error, Result};
use crate::scheduler::batch::StagingLimits;

/// Order of admission.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Policy {
    /// By arrival.
    #[default]
    Fcfs,
    /// Lower priority values first, then by arrival.
    Priority,
}

/// The share of a step that one prompt may take from the others' tokens and prompts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LongPrefill {
    /// Most tokens of a prompt in a step that other requests wait for or share; 0: no limit.
    pub threshold: usize,
    /// A prompt may take its even share of the step at least.
    pub is_adaptive: bool,
}

/// The checkpoints of a model whose layers have state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateConfig {
    /// Rows for checkpoints; 0: nothing is saved.
    pub num_checkpoints: usize,
    /// Tokens of a prompt between two checkpoints, rounded up to whole blocks.
    pub interval: usize,
}

impl StateConfig {
    pub(super) fn validate(&self) -> Result<()> {
        for (name, value, least) in [
            ("num_state_checkpoints", self.num_checkpoints, 0),
            ("state_checkpoint_interval", self.interval, 1),
        ] {
            // Rows and positions are int32 on the device.
            if value < least || value > 1 << 29 {
                return Err(Error::invalid(format!(
                    "{name} must be in {least}..=2**29, not {value}"
                )));
            }
        }
        Ok(())
    }
}

/// The groups of requests whose shared prefix a device reads once for all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrefixSharing {
    /// Most groups of a step.
    pub max_groups: usize,
    /// Tokens of a prefix below which each request reads it.
    pub min_tokens: usize,
    /// Tokens that a group need not read below which the device does not gain.
    pub min_saved_tokens: usize,
}

impl PrefixSharing {
    fn validate(&self) -> Result<()> {
        if self.max_groups == 0 || self.min_tokens == 0 {
            return Err(Error::invalid(
                "prefix_sharing needs a group and a token at least",
            ));
        }
        Ok(())
    }
}

/// The scheduler's fixed settings.
#[derive(Debug, Clone)]
pub struct SchedulerConfig {
    /// KV blocks in the pool.
    pub num_blocks: usize,
    /// Tokens of a block.
    pub block_size: usize,
    /// Most requests admitted at a time.
    pub max_num_seqs: usize,
    /// Most query tokens of a step.
    pub max_num_batched_tokens: usize,
    /// Most tokens of a request, prompt and output.
    pub max_model_len: usize,
    /// Reuse blocks of equal prefixes.
    pub enable_prefix_caching: bool,
    /// Split prompts over steps to fill them up. Off: a prompt waits for a step that holds it
    /// whole; only one that exceeds the budget by itself is split.
    pub enable_chunked_prefill: bool,
    /// Counts where prompts may be split.
    pub long_prefill: LongPrefill,
    /// Seconds that a step may take whose requests decode, so far as its prompts can be split; 0: no limit.
    pub max_step_s: f64,
    /// Tokens that the prompts of a step are padded to, ascending; what is more than the last is not padded.
    pub padded_prompts: Vec<usize>,
    /// Order of service.
    pub policy: Policy,
    /// Stages that the device works on different steps at: a token sampled in one step is the input
    /// of the step so many later.
    pub num_stages: usize,
    /// Of a model whose layers have state; None of one that keeps keys and values alone.
    pub state: Option<StateConfig>,
    /// None: the device reads what requests share for each of them.
    pub prefix_sharing: Option<PrefixSharing>,
}

impl SchedulerConfig {
    /// Checks the ranges, naming the field at fault.
    pub fn validate(&self) -> Result<()> {
        let positive = [
            ("num_blocks", self.num_blocks),
            ("block_size", self.block_size),
            ("max_num_seqs", self.max_num_seqs),
            ("max_num_batched_tokens", self.max_num_batched_tokens),
            ("max_model_len", self.max_model_len),
            ("num_stages", self.num_stages),
        ];
        for (name, value) in positive {
            // Positions, mappings and flat block-table indices are int32 on the device.
            if value == 0 || value > (1 << 30) {
                return Err(Error::invalid(format!(
                    "{name} must be in 1..=2**30, not {value}"
                )));
            }
        }
        if !self.max_step_s.is_finite() || self.max_step_s < 0.0 {
            return Err(Error::invalid(format!(
                "max_step_s must be at least 0, not {}",
                self.max_step_s
            )));
        }
        if !self.padded_prompts.is_sorted() {
            return Err(Error::invalid("padded_prompts must ascend"));
        }
        let columns = self.max_model_len.div_ceil(self.block_size);
        for (name, cells) in [
            ("num_blocks * block_size", self.num_blocks * self.block_size),
            (
                "max_num_seqs * blocks of max_model_len",
                self.max_num_seqs * columns,
            ),
        ] {
            if cells > i32::MAX as usize {
                return Err(Error::invalid(format!("{name} = {cells} exceeds int32")));
            }
        }
        self.state.map_or(Ok(()), |state| state.validate())?;
        self.prefix_sharing
            .map_or(Ok(()), |sharing| sharing.validate())
    }

    pub(super) fn limits(&self) -> StagingLimits {
        StagingLimits::new(
            self.max_num_batched_tokens,
            self.max_num_seqs,
            self.max_model_len,
            self.block_size,
            self.state.is_some(),
            self.prefix_sharing.map_or(0, |sharing| sharing.max_groups),
        )
    }
}
