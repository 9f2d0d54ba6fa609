//! ChannelFormat, Channels, ChannelParser. See `_core.pyi`.

use std::sync::Arc;

use octavo_core::text::channels::{
    self, ChannelFormat, Channels, Extent, GrammarOptions, Machine, Piece,
};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

pub(crate) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    // An alias in the stub, for annotations.
    m.add("Piece", m.py().get_type::<PyTuple>())?;
    m.add_class::<PyChannelFormat>()?;
    m.add_class::<PyChannels>()?;
    m.add_class::<PyChannelParser>()?;
    m.add_function(wrap_pyfunction!(tool_call_formats, m)?)?;
    m.add_function(wrap_pyfunction!(tool_call_aliases, m)?)?;
    m.add_function(wrap_pyfunction!(reasoning_formats, m)?)?;
    m.add_function(wrap_pyfunction!(reasoning_aliases, m)?)
}

/// kind, call, text
pub(crate) type PieceTuple<'a> = (&'static str, u32, &'a str);

pub(crate) fn piece_tuple(piece: &Piece) -> PieceTuple<'_> {
    (piece.kind.as_str(), piece.call, &piece.text)
}

#[pyfunction]
fn tool_call_formats() -> Vec<&'static str> {
    channels::tool_call_formats()
}

#[pyfunction]
fn tool_call_aliases() -> Vec<(&'static str, &'static str)> {
    channels::tool_call_aliases().to_vec()
}

#[pyfunction]
fn reasoning_formats() -> Vec<&'static str> {
    channels::reasoning_formats()
}

#[pyfunction]
fn reasoning_aliases() -> Vec<(&'static str, &'static str)> {
    channels::reasoning_aliases().to_vec()
}

#[pyclass(frozen, name = "ChannelFormat", module = "octavo._core")]
struct PyChannelFormat {
    inner: Arc<ChannelFormat>,
}

#[pymethods]
impl PyChannelFormat {
    #[new]
    #[pyo3(signature = (tool_calls=None, reasoning=None, *, overrides=None))]
    fn new(
        tool_calls: Option<&str>,
        reasoning: Option<&str>,
        overrides: Option<&str>,
    ) -> PyResult<Self> {
        let inner =
            ChannelFormat::new(tool_calls, reasoning, overrides).map_err(PyValueError::new_err)?;
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    #[getter]
    fn tool_calls(&self) -> Option<&str> {
        self.inner.tool_calls()
    }

    #[getter]
    fn reasoning(&self) -> Option<&str> {
        self.inner.reasoning()
    }

    #[getter]
    fn markers(&self) -> Vec<&str> {
        self.inner.markers()
    }

    #[getter]
    fn reasoning_markers(&self) -> Option<(&str, &str)> {
        self.inner.reasoning_markers()
    }

    #[pyo3(text_signature = "($self, tools)")]
    fn triggers(&self, tools: Vec<String>) -> (Vec<String>, Vec<String>) {
        let tools: Vec<&str> = tools.iter().map(String::as_str).collect();
        let triggers = self.inner.triggers(&tools);
        (triggers.anywhere, triggers.at_start)
    }

    #[getter]
    fn is_bare(&self) -> bool {
        self.inner.is_bare()
    }

    #[pyo3(
        signature = (
            tools, *, at_least_one=false, at_most_one=false, calls_only=false, strict=None,
            special_tokens=Vec::new()
        ),
        text_signature = "($self, tools, *, at_least_one=False, at_most_one=False, \
                          calls_only=False, strict=None, special_tokens=())"
    )]
    fn grammar(
        &self,
        tools: Vec<(String, String)>,
        at_least_one: bool,
        at_most_one: bool,
        calls_only: bool,
        strict: Option<Vec<String>>,
        special_tokens: Vec<(String, u32)>,
    ) -> PyResult<String> {
        let options = GrammarOptions {
            extent: match calls_only {
                true => Extent::Calls,
                false => Extent::Answer,
            },
            at_least_one,
            at_most_one,
            strict: strict.as_deref(),
            special_tokens: &special_tokens,
        };
        self.inner
            .grammar(&tools, &options)
            .map_err(PyValueError::new_err)
    }

    fn __repr__(&self) -> String {
        format!(
            "ChannelFormat(tool_calls={:?}, reasoning={:?})",
            self.inner.tool_calls(),
            self.inner.reasoning()
        )
    }
}

#[pyclass(frozen, name = "Channels", module = "octavo._core")]
pub(crate) struct PyChannels {
    pub(crate) inner: Arc<Channels>,
}

#[pymethods]
impl PyChannels {
    #[new]
    #[pyo3(
        signature = (
            format, *, in_reasoning=false, parse_tool_calls=true, parse_reasoning=true,
            tools=Vec::new()
        ),
        text_signature = "(format, *, in_reasoning=False, parse_tool_calls=True, \
                          parse_reasoning=True, tools=())"
    )]
    fn new(
        format: &PyChannelFormat,
        in_reasoning: bool,
        parse_tool_calls: bool,
        parse_reasoning: bool,
        tools: Vec<(String, String)>,
    ) -> Self {
        let inner = Channels::new(
            Arc::clone(&format.inner),
            in_reasoning,
            parse_tool_calls,
            parse_reasoning,
            &tools,
        );
        Self {
            inner: Arc::new(inner),
        }
    }
}

#[pyclass(name = "ChannelParser", module = "octavo._core")]
struct PyChannelParser {
    machine: Machine,
    pieces: Vec<Piece>,
}

impl PyChannelParser {
    fn take(&mut self) -> Vec<(&'static str, u32, String)> {
        let pieces = self.pieces.drain(..);
        pieces
            .map(|piece| (piece.kind.as_str(), piece.call, piece.text))
            .collect()
    }
}

#[pymethods]
impl PyChannelParser {
    #[new]
    fn new(channels: &PyChannels) -> Self {
        Self {
            machine: Machine::new(Arc::clone(&channels.inner)),
            pieces: Vec::new(),
        }
    }

    fn push(&mut self, text: &str) -> Vec<(&'static str, u32, String)> {
        self.machine.push(text, &mut self.pieces);
        self.take()
    }

    fn finish(&mut self) -> Vec<(&'static str, u32, String)> {
        self.machine.finish(&mut self.pieces);
        self.take()
    }
}
