//! Channels of an answer: text, reasoning and tool calls, told apart while the text arrives.
//!
//! A family's forms are data (`envelope`, the tables `tool_calls` and `reasoning`); a
//! [`ChannelFormat`] makes them ready once a model, [`Channels`] are what one request asks for, and
//! each of its samples has a [`Machine`]. The grammar that constrains calls is made of the same data.

mod call;
mod elements;
mod envelope;
mod expect;
mod format;
mod grammar;
mod harmony;
mod machine;
mod number;
mod object;
mod overrides;
mod piece;
mod python;
mod reasoning;
mod rules;
mod scanner;
mod schema;
mod settings;
mod stream;
mod tags;
mod tool_calls;
mod value;

pub use self::format::{
    ChannelFormat, canonical_reasoning, canonical_tool_calls, reasoning_aliases, reasoning_formats,
    tool_call_aliases, tool_call_formats,
};
pub use self::grammar::{Extent, GrammarOptions, Triggers};
pub use self::machine::Machine;
pub use self::piece::{Piece, PieceKind};
pub use self::settings::Channels;
pub use self::stream::ChannelStream;
