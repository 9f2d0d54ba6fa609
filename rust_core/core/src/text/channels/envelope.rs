//! Envelope: how a family of models writes tool calls and reasoning, as data.
//!
//! The same data drives the parser, which takes any white space around a marker, and the grammar,
//! which writes the markers as they stand here.

use std::sync::LazyLock;

use crate::text::channels::value::Dialect;

/// A family's tool calls.
#[derive(Debug, Clone)]
pub(crate) struct Envelope {
    pub(crate) name: String,
    /// Around all calls: opening and closing markers; the first of each is written.
    pub(crate) section: Option<(Vec<String>, Vec<String>)>,
    /// Around one call.
    pub(crate) open: Vec<String>,
    pub(crate) close: Vec<String>,
    /// Each call has a section of its own.
    pub(crate) has_own_section: bool,
    /// Between two calls.
    pub(crate) separator: String,
    pub(crate) body: Body,
    /// A call may begin without a marker, where the answer begins.
    pub(crate) is_bare: bool,
    /// Markers around an answer's text, which are not part of it.
    pub(crate) frames: Vec<String>,
    /// A marker that the prompt ends with.
    pub(crate) prompted: String,
    /// Tokens that are part of the markers above, where a marker is no token by itself.
    pub(crate) tokens: Vec<String>,
}

/// The content between a call's markers.
#[derive(Debug, Clone)]
pub(crate) enum Body {
    /// `{"name": …, "arguments": …}`.
    Object {
        keys: Keys,
        /// Written as an array, of all calls.
        in_array: bool,
    },
    /// Fields of text, the name among them, and then the arguments.
    Fields {
        fields: Vec<Field>,
        arguments: Arguments,
    },
    /// `f(a=1, b="x")`.
    Python {
        /// Written as a list, of all calls.
        in_list: bool,
    },
}

/// The keys of a call object; the first of each is written.
#[derive(Debug, Clone)]
pub(crate) struct Keys {
    pub(crate) name: Vec<String>,
    pub(crate) arguments: Vec<String>,
    pub(crate) id: Vec<String>,
    /// The function's name is the object's only key, and the arguments are its value.
    pub(crate) name_is_key: bool,
    /// Where the id is written.
    pub(crate) id_place: IdPlace,
}

/// The place of an id among a call object's keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum IdPlace {
    None,
    /// A number.
    First,
    /// Nine letters and digits.
    Last,
}

fn texts(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|&text| text.to_owned()).collect()
}

impl Keys {
    /// The keys that most families use, and those that their models slip into.
    pub(crate) fn new(name: &str, arguments: &str, id: &str) -> Self {
        let first = |first: &str, others: &[&str]| {
            let others = others.iter().copied().filter(|&other| other != first);
            let all = std::iter::once(first).chain(others);
            all.filter(|key| !key.is_empty())
                .map(str::to_owned)
                .collect()
        };
        Self {
            name: first(name, &["name", "tool_name"]),
            arguments: first(arguments, &["arguments", "parameters", "args"]),
            id: first(id, &["id", "tool_call_id"]),
            name_is_key: false,
            id_place: IdPlace::None,
        }
    }

    /// With an id written in this place.
    pub(crate) fn with_id(self, id_place: IdPlace) -> Self {
        Self { id_place, ..self }
    }

    /// As [`Keys::new`], made once.
    pub(crate) fn usual() -> &'static Self {
        static USUAL: LazyLock<Keys> = LazyLock::new(|| Keys::new("name", "arguments", ""));
        &USUAL
    }
}

impl Envelope {
    /// Without markers.
    pub(crate) fn new(name: &str, body: Body) -> Self {
        Self {
            name: name.to_owned(),
            section: None,
            open: Vec::new(),
            close: Vec::new(),
            has_own_section: false,
            separator: String::new(),
            body,
            is_bare: false,
            frames: Vec::new(),
            prompted: String::new(),
            tokens: Vec::new(),
        }
    }

    pub(crate) fn section(mut self, open: &[&str], close: &[&str]) -> Self {
        self.section = Some((texts(open), texts(close)));
        self
    }

    /// A section around each call.
    pub(crate) fn sections(self, open: &[&str], close: &[&str]) -> Self {
        Self {
            has_own_section: true,
            ..self.section(open, close)
        }
    }

    /// Markers around one call.
    pub(crate) fn call(mut self, open: &[&str], close: &[&str]) -> Self {
        self.open = texts(open);
        self.close = texts(close);
        self
    }

    pub(crate) fn separator(mut self, separator: &str) -> Self {
        separator.clone_into(&mut self.separator);
        self
    }

    pub(crate) fn bare(mut self) -> Self {
        self.is_bare = true;
        self
    }

    pub(crate) fn frames(mut self, frames: &[&str]) -> Self {
        self.frames = texts(frames);
        self
    }

    pub(crate) fn prompted(mut self, marker: &str) -> Self {
        marker.clone_into(&mut self.prompted);
        self
    }

    pub(crate) fn tokens(mut self, tokens: &[&str]) -> Self {
        self.tokens = texts(tokens);
        self
    }
}

impl Field {
    pub(crate) fn new(kind: FieldKind, ends: &[(&str, usize)]) -> Self {
        let ends = ends.iter().map(|&(end, next)| (end.to_owned(), next));
        Self {
            kind,
            ends: ends.collect(),
        }
    }
}

impl Tags {
    /// Values on the tags' lines, parameters on lines of their own.
    pub(crate) fn new(open: &str, key_ends: &[(&str, Option<bool>)], close: &str) -> Self {
        let key_ends = key_ends
            .iter()
            .map(|&(end, is_text)| (end.to_owned(), is_text));
        Self {
            open: open.to_owned(),
            key_ends: key_ends.collect(),
            value_open: None,
            close: close.to_owned(),
            on_lines: false,
            separator: "\n".to_owned(),
            is_nested: false,
        }
    }
}

/// A field in front of a call's arguments.
#[derive(Debug, Clone)]
pub(crate) struct Field {
    pub(crate) kind: FieldKind,
    /// Its end, and the field that follows: its number, or the number of fields for the
    /// arguments. None: it ends where a name must.
    pub(crate) ends: Vec<(String, usize)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FieldKind {
    Name,
    Id,
    /// `functions.f:0`, which is the id.
    NameInId,
}

/// The form of a call's arguments.
#[derive(Debug, Clone)]
pub(crate) enum Arguments {
    /// One value.
    Value(Dialect),
    /// One tag a parameter.
    Tags(Tags),
}

/// Parameters between tags.
#[derive(Debug, Clone)]
pub(crate) struct Tags {
    pub(crate) open: String,
    /// The end of a parameter's name; and true for a string value, where it tells.
    pub(crate) key_ends: Vec<(String, Option<bool>)>,
    /// The text between name and value beyond that.
    pub(crate) value_open: Option<String>,
    /// `{key}` stands for the parameter's name.
    pub(crate) close: String,
    /// A line feed on each side of a value is not part of it.
    pub(crate) on_lines: bool,
    /// Written after each parameter, before the next.
    pub(crate) separator: String,
    /// A value may hold tags itself, named after the members of an object.
    pub(crate) is_nested: bool,
}

/// A family's reasoning.
#[derive(Debug, Clone)]
pub(crate) struct Reasoning {
    pub(crate) name: String,
    /// The first of each is the usual one.
    pub(crate) open: Vec<String>,
    pub(crate) close: Vec<String>,
    /// Markers around an answer's text, which are not part of it.
    pub(crate) frames: Vec<String>,
}

/// The part of a marker that is looked for: white space around it is free.
pub(crate) fn marker(text: &str) -> &str {
    text.trim_matches([' ', '\n', '\r', '\t'])
}
