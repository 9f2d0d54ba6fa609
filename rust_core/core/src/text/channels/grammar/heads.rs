//! Heads: the markers by which an envelope's calls are told in a text.

use crate::text::channels::envelope::{Envelope, marker};

/// The section that a marker begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Head {
    Section,
    Call,
}

/// True if a call may begin without a marker of its own.
pub(super) fn has_bare_calls(envelope: &Envelope) -> bool {
    envelope.is_bare || !envelope.prompted.is_empty()
}

/// The markers by which calls are told in a text.
pub(super) fn heads(envelope: &Envelope) -> impl Iterator<Item = (&str, Head)> {
    let section = envelope.section.iter().flat_map(|(open, _)| open);
    let section = section.map(|text| (marker(text), Head::Section));
    let call = envelope.open.iter().map(|text| (marker(text), Head::Call));
    let mut seen = Vec::new();
    section.chain(call).filter(move |&(text, _)| {
        let is_new = !text.is_empty() && !seen.contains(&text);
        seen.push(text);
        is_new
    })
}
