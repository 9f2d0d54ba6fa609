//! Constrained samples: their masks for a step, and their end.
//!
//! A step's masks are due when all tokens before it are known. The constraints are then taken out of the
//! core, advanced by their last tokens and asked for masks on several threads, without the core, and given
//! back. All that waits for a mask waits for this alone: what else a token brings about comes later.

use std::sync::Arc;

use super::{AddRequest, EngineCore, Sample};
use crate::error::{Error, Result};
use crate::scheduler::batch::Plan;
use crate::scheduler::request::FinishReason;
use crate::text::matcher::{Constraint, MaskBatch, MaskItem, Trigger, TriggerTexts};
use crate::text::tokenizer::Tokenizer;

/// A constraint per sample, where the request has any.
///
/// # Errors
/// [`Error::Panic`]: a matcher cannot be opened; [`Error::InvalidArgument`]: a trigger that is empty, or
/// without a tokenizer.
pub(super) fn open_constraints(
    new: &AddRequest<'_>,
    tokenizer: Option<&Arc<Tokenizer>>,
) -> Result<Vec<Option<Box<Constraint>>>> {
    let trigger = match (&new.trigger, tokenizer) {
        (None, _) => None,
        (Some(texts), _) if !has_texts(texts) => {
            return Err(Error::invalid("trigger is empty"));
        }
        (Some(_), None) => return Err(Error::invalid("a trigger needs a tokenizer")),
        (Some(texts), Some(tokenizer)) => Some(Arc::new(Trigger::new(texts, tokenizer.clone()))),
    };
    let bad_words = new.bad_words.iter().map(|word| word.as_slice().into());
    let bad_words: Arc<[Box<[u32]>]> = bad_words.collect();
    let open = || {
        let grammar = new.grammar.as_ref();
        let trigger = trigger.as_ref();
        let constraint = Constraint::new(
            grammar,
            trigger,
            new.reasoning,
            &bad_words,
            new.stop_token_ids,
        );
        constraint.map(Box::new)
    };
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        new.request_ids.iter().map(|_| open()).collect()
    }))
    .map_err(|_| Error::Panic("the grammar cannot be followed".into()))
}

/// True if there are texts, and none is empty.
fn has_texts(trigger: &TriggerTexts<'_>) -> bool {
    let mut all = trigger.anywhere.iter().chain(&trigger.at_start).peekable();
    all.peek().is_some() && all.all(|text| !text.is_empty())
}

impl EngineCore {
    /// The samples of a plan whose tokens may need a mask. O(entries).
    pub(super) fn count_constrained(&self, plan: &Plan) -> usize {
        let samples = plan.entries.iter().filter(|entry| entry.sample);
        samples
            .filter_map(|entry| self.samples[entry.index as usize].as_ref())
            .filter(|sample| sample.is_constrained())
            .count()
    }

    /// Takes the constraints of a step's samples, for [`MaskBatch::fill`]; `return_masks` is to follow.
    ///
    /// The masks follow from the tokens before, and are due when those are known: of the oldest step in
    /// flight, or with the `tokens` that the oldest has sampled, of the one behind it. `update` then
    /// finds those tokens taken.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if it is another step's turn, or the number of tokens is wrong.
    pub fn take_masks(&mut self, step_id: u64, tokens: Option<&[i32]>) -> Result<MaskBatch> {
        let Some(step) = self.steps.get(usize::from(tokens.is_some())) else {
            return Err(Error::invalid(format!("step {step_id} is not in flight")));
        };
        if step.id != step_id {
            return Err(Error::invalid(format!(
                "step {step_id}: the tokens before it are not known"
            )));
        }
        let mut items = Vec::new();
        if let Some(tokens) = tokens {
            let oldest = &self.steps[0];
            if tokens.len() != oldest.num_samples {
                return Err(Error::invalid("token_ids are not the oldest step's"));
            }
            self.new_tokens.clear();
            self.new_tokens.resize(self.samples.len(), None);
            let entries = oldest.plan.entries.iter().filter(|entry| entry.sample);
            for (entry, &token) in entries.zip(tokens).filter(|_| !oldest.is_void) {
                self.new_tokens[entry.index as usize] = Some(token);
            }
        }
        let samples = step.plan.entries.iter().filter(|entry| entry.sample);
        for (row, entry) in samples.enumerate().filter(|_| !step.is_void) {
            let index = entry.index as usize;
            let new_token = tokens.and_then(|_| self.new_tokens[index]);
            // A sample that is given up adds no token; what it is followed by has its constraint in place.
            let is_void = self.scheduler.is_void(entry.index);
            let token = match new_token.map(u32::try_from) {
                _ if is_void => None,
                None => None,
                Some(Ok(token)) => Some(token),
                // It is about to end.
                Some(Err(_)) => continue,
            };
            if is_void && new_token.is_none() {
                continue;
            }
            // One that has ended in flight has left nothing there.
            let sample = self.samples[index].as_mut();
            let Some(sample) = sample.filter(|sample| sample.is_constrained()) else {
                continue;
            };
            if let Some(constraint) = sample.constraint.take() {
                items.push(MaskItem {
                    index: entry.index,
                    row: row as i32,
                    constraint,
                    token,
                    may_force: sample.may_force,
                });
            }
        }
        Ok(MaskBatch { items })
    }

    /// Gives the samples back what `take_masks` took. Nothing may happen to them in between.
    pub fn return_masks(&mut self, batch: MaskBatch) {
        for item in batch.items {
            if let Some(Some(sample)) = self.samples.get_mut(item.index as usize) {
                sample.constraint = Some(item.constraint);
            }
        }
    }

    /// Accounts for the end of a sample; what its grammar has learned is kept if it ended well.
    pub(super) fn close_constraint(&mut self, sample: &mut Sample, reason: FinishReason) {
        if let Some(constraint) = sample.constraint.take() {
            self.num_constrained = self.num_constrained.saturating_sub(1);
            if matches!(reason, FinishReason::Stop | FinishReason::Length) {
                constraint.close();
            }
        }
    }
}

impl Sample {
    /// True if its next token may need a mask.
    fn is_constrained(&self) -> bool {
        let constraint = self.constraint.as_ref();
        constraint.is_some_and(|constraint| constraint.is_active())
    }
}
