//! Grammars, Grammar, Matcher. See `_core.pyi`.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use octavo_core::text::matcher::{
    Grammar, GrammarKind, GrammarOptions, GrammarSource, Grammars, GrammarsConfig, Matcher,
    ReasoningTokens, TriggerTexts,
};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::error::{engine_error, value_error};
use crate::text::PyTokenizer;

pub(crate) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<PyGrammars>()?;
    m.add_class::<PyGrammar>()?;
    m.add_class::<PyMatcher>()
}

/// (texts anywhere, is repeated, texts at the start)
pub(crate) type TriggerTuple = (Vec<String>, bool, Vec<String>);

pub(crate) fn trigger_texts((anywhere, is_repeated, at_start): &TriggerTuple) -> TriggerTexts<'_> {
    TriggerTexts {
        anywhere: anywhere.iter().map(String::as_str).collect(),
        at_start: at_start.iter().map(String::as_str).collect(),
        is_repeated: *is_repeated,
    }
}

/// (open, close, is open, budget)
pub(crate) type ReasoningTuple = (Option<u32>, u32, bool, Option<u32>);

pub(crate) fn reasoning_tokens(tuple: ReasoningTuple) -> ReasoningTokens {
    let (open, close, is_open, budget) = tuple;
    ReasoningTokens {
        open,
        close,
        is_open,
        budget,
    }
}

fn source(
    kind: &str,
    text: String,
    disable_any_whitespace: bool,
    disable_additional_properties: bool,
    whitespace_pattern: Option<String>,
) -> PyResult<GrammarSource> {
    let kind = match kind {
        "json" => GrammarKind::Json,
        "json_object" => GrammarKind::JsonObject,
        "regex" => GrammarKind::Regex,
        "choice" => GrammarKind::Choice,
        "grammar" => GrammarKind::Grammar,
        "structural_tag" => GrammarKind::StructuralTag,
        other => {
            let message = format!("{other:?} is no kind of grammar");
            return Err(PyValueError::new_err(message));
        }
    };
    Ok(GrammarSource {
        kind,
        text,
        options: GrammarOptions {
            disable_any_whitespace,
            disable_additional_properties,
            whitespace_pattern,
        },
    })
}

#[pyclass(frozen, name = "Grammars", module = "octavo._core")]
struct PyGrammars {
    inner: Grammars,
}

#[pymethods]
impl PyGrammars {
    #[new]
    #[pyo3(signature = (tokenizer, vocab_size, eos_token_ids, *, max_bytes=None, deadline_s=None))]
    fn new(
        tokenizer: &PyTokenizer,
        vocab_size: usize,
        eos_token_ids: Vec<u32>,
        max_bytes: Option<usize>,
        deadline_s: Option<f64>,
    ) -> PyResult<Self> {
        let mut config = GrammarsConfig::default();
        if let Some(max_bytes) = max_bytes {
            config.max_bytes = max_bytes;
        }
        if let Some(deadline_s) = deadline_s {
            config.deadline = Duration::try_from_secs_f64(deadline_s).map_err(value_error)?;
        }
        let tokenizer = Arc::clone(&tokenizer.inner);
        Ok(Self {
            inner: Grammars::new(tokenizer, vocab_size, &eos_token_ids, config),
        })
    }

    #[pyo3(signature = (
        kind, text, *, disable_any_whitespace=false, disable_additional_properties=false,
        whitespace_pattern=None
    ))]
    fn find(
        &self,
        kind: &str,
        text: String,
        disable_any_whitespace: bool,
        disable_additional_properties: bool,
        whitespace_pattern: Option<String>,
    ) -> PyResult<Option<PyGrammar>> {
        let source = source(
            kind,
            text,
            disable_any_whitespace,
            disable_additional_properties,
            whitespace_pattern,
        )?;
        Ok(self.inner.find(&source).map(|inner| PyGrammar { inner }))
    }

    #[pyo3(signature = (
        kind, text, *, disable_any_whitespace=false, disable_additional_properties=false,
        whitespace_pattern=None
    ))]
    #[allow(clippy::too_many_arguments)] // keyword arguments of the Python method
    fn compile(
        &self,
        py: Python<'_>,
        kind: &str,
        text: String,
        disable_any_whitespace: bool,
        disable_additional_properties: bool,
        whitespace_pattern: Option<String>,
    ) -> PyResult<PyGrammar> {
        let source = source(
            kind,
            text,
            disable_any_whitespace,
            disable_additional_properties,
            whitespace_pattern,
        )?;
        let inner = py
            .detach(|| self.inner.compile(&source))
            .map_err(engine_error)?;
        Ok(PyGrammar { inner })
    }

    #[getter]
    fn num_cached(&self) -> usize {
        self.inner.num_cached()
    }
}

#[pyclass(frozen, name = "Grammar", module = "octavo._core")]
pub(crate) struct PyGrammar {
    pub(crate) inner: Arc<Grammar>,
}

#[pymethods]
impl PyGrammar {
    #[getter]
    fn num_bytes(&self) -> usize {
        self.inner.num_bytes()
    }
}

#[pyclass(frozen, name = "Matcher", module = "octavo._core")]
struct PyMatcher {
    inner: Mutex<Matcher>,
    num_words: usize,
}

#[pymethods]
impl PyMatcher {
    #[new]
    fn new(grammar: &PyGrammar, vocab_size: usize) -> Self {
        Self {
            inner: Mutex::new(grammar.inner.open()),
            num_words: vocab_size.div_ceil(32),
        }
    }

    fn mask<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let mut words = vec![0; self.num_words];
        let mut matcher = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        matcher.fill_mask(&mut words).map_err(engine_error)?;
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        Ok(PyBytes::new(py, &bytes))
    }

    fn accept(&self, token_id: u32) -> PyResult<bool> {
        let mut matcher = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        matcher.accept(token_id).map_err(engine_error)
    }

    fn is_accepting(&self) -> PyResult<bool> {
        let mut matcher = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        matcher.is_accepting().map_err(engine_error)
    }
}
