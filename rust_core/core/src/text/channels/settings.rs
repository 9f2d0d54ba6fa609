//! Channels: what one request's answers are parsed by.

use std::collections::HashMap;
use std::sync::Arc;

use crate::text::channels::envelope::{Arguments, Body};
use crate::text::channels::format::ChannelFormat;
use crate::text::channels::schema::ArgumentTypes;

/// See `_core.pyi`.
#[derive(Debug)]
pub struct Channels {
    pub(crate) format: Arc<ChannelFormat>,
    pub(crate) in_reasoning: bool,
    pub(crate) has_calls: bool,
    pub(crate) has_reasoning: bool,
    /// By name; without types where the envelope tells them.
    tools: HashMap<String, ArgumentTypes>,
}

impl Channels {
    /// `tools`: names and JSON schemas of the parameters. O(schemas).
    #[must_use]
    pub fn new(
        format: Arc<ChannelFormat>,
        in_reasoning: bool,
        has_calls: bool,
        has_reasoning: bool,
        tools: &[(String, String)],
    ) -> Self {
        let is_typed = format.calls.as_ref().is_some_and(|calls| {
            let body = &calls.envelope.body;
            matches!(
                body,
                Body::Fields {
                    arguments: Arguments::Tags(_),
                    ..
                }
            )
        });
        let types = |schema: &str| match is_typed {
            true => ArgumentTypes::new(schema),
            false => ArgumentTypes::default(),
        };
        let tools = tools
            .iter()
            .map(|(name, schema)| (name.clone(), types(schema)));
        Self {
            in_reasoning: in_reasoning && has_reasoning,
            has_calls: has_calls && (format.calls.is_some() || format.is_harmony),
            has_reasoning: has_reasoning && (format.reasoning.is_some() || format.is_harmony),
            tools: tools.collect(),
            format,
        }
    }

    /// The format.
    #[must_use]
    pub fn format(&self) -> &Arc<ChannelFormat> {
        &self.format
    }

    /// False for the name of a function that is none of the tools, where there are any.
    pub(crate) fn may_call(&self, name: &str) -> bool {
        self.tools.is_empty() || self.tools.contains_key(name)
    }

    /// The types of a tool's parameters.
    pub(crate) fn types(&self, name: &str) -> Option<&ArgumentTypes> {
        self.tools.get(name)
    }
}
