//! Structured output: the tokens that may come next, by a grammar.
//!
//! A request's constraint is a [`GrammarSource`]: a JSON schema, a regular expression, a grammar and
//! the like, all of them lowered to Lark or JSON for the crate `llguidance`. [`Grammars`] compiles
//! sources on threads of their own and keeps what it has compiled; each sample opens a [`Matcher`] of a
//! [`Grammar`], advances it by the sample's tokens, and asks it for masks. A [`Constraint`] is a
//! sample's whole state: reasoning that comes first, then the matcher, and words that must not come. With a
//! [`Trigger`] the grammar lies dormant, and costs nothing, until that text comes.
//! [`MaskBatch`] fills the masks of a step's rows on several threads.
//!
//! Costs: a model's first grammar takes O(vocabulary) for its tables; a schema some milliseconds, a mask
//! tens of microseconds, a token some (`cargo bench -p octavo-core --bench matcher`).

mod bad_words;
mod constraint;
mod disjoint;
mod gbnf;
mod gbnf_tokens;
mod grammars;
mod lark;
mod masks;
mod matching;
mod options;
mod reference;
mod schema;
mod source;
mod structural_tag;
mod trigger;
mod vocabulary;

pub use self::constraint::{Accepted, Constraint, ReasoningTokens};
pub use self::grammars::{Grammars, GrammarsConfig};
pub use self::masks::{MaskBatch, MaskItem};
pub use self::matching::{Grammar, Matcher};
pub use self::options::GrammarOptions;
pub use self::source::{GrammarKind, GrammarSource};
pub use self::trigger::{Trigger, TriggerTexts};
