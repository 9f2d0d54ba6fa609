//! Sampled: one step's tokens, as the sampler hands them over.

use crate::error::{Error, Result};

/// One step's tokens.
#[derive(Debug, Clone, Copy)]
pub struct Sampled<'a> {
    /// One per sample of the step.
    pub token_ids: &'a [i32],
    /// Rows for the same samples.
    pub logprobs: Option<SampledLogprobs<'a>>,
}

/// Per sample, `width` ids and log-probabilities: the chosen token, then the best ones in order.
#[derive(Debug, Clone, Copy)]
pub struct SampledLogprobs<'a> {
    /// `[num_samples, width]`.
    pub ids: &'a [i32],
    /// `[num_samples, width]`.
    pub values: &'a [f32],
    /// Ranks of the chosen tokens, `[num_samples]`; 1 is the best.
    pub ranks: &'a [i32],
    /// 1 + k.
    pub width: usize,
}

impl Sampled<'_> {
    pub(super) fn validate(&self, num_samples: usize) -> Result<()> {
        if self.token_ids.len() != num_samples {
            return Err(Error::invalid(format!(
                "{} token ids for {num_samples} samples",
                self.token_ids.len()
            )));
        }
        if let Some(logprobs) = &self.logprobs {
            let cells = num_samples * logprobs.width;
            if (logprobs.ids.len(), logprobs.values.len()) != (cells, cells)
                || logprobs.ranks.len() != num_samples
                || logprobs.width == 0
            {
                return Err(Error::invalid(format!(
                    "logprobs of shapes {} {} {} for {num_samples} samples",
                    logprobs.ids.len(),
                    logprobs.values.len(),
                    logprobs.ranks.len()
                )));
            }
        }
        Ok(())
    }
}
