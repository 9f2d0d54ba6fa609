//! Tokenizer, Detokenizer, `json_size`. See `_core.pyi`.

use std::borrow::Cow;
use std::sync::Arc;

use octavo_core::text::detokenizer::Detokenizer;
use octavo_core::text::json_size;
use octavo_core::text::tokenizer::{AddedToken, PrefixSpace, Tokenizer, TokenizerError};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::PyBytes;

use crate::error::value_error;
use crate::files::PyGgufFile;
use crate::token_ids::PyTokenIds;

pub(crate) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<PyTokenizer>()?;
    m.add_class::<PyDetokenizer>()?;
    m.add_function(wrap_pyfunction!(count_json, m)?)
}

#[pyfunction]
#[pyo3(name = "json_size", text_signature = "(text)")]
fn count_json(py: Python<'_>, text: &[u8]) -> (usize, usize) {
    let size = py.detach(|| json_size::json_size(text));
    (size.num_nodes, size.num_commas)
}

/// Texts of more bytes than this are encoded without the GIL: the event loop must not
/// wait for those. Shorter ones are done before a detached thread is back.
const DETACH_BYTES: usize = 2048;

/// Runs `work` on `num_bytes` of text.
fn run<T: Send>(
    py: Python<'_>,
    num_bytes: usize,
    work: impl FnOnce() -> Result<T, TokenizerError> + Send,
) -> PyResult<T> {
    let done = if num_bytes > DETACH_BYTES {
        py.detach(work)
    } else {
        work()
    };
    done.map_err(value_error)
}

/// content, special, normalized, lstrip, rstrip, single_word
type AddedTokenTuple = (String, bool, bool, bool, bool, bool);

fn added_token(tuple: AddedTokenTuple) -> AddedToken {
    let (content, special, normalized, lstrip, rstrip, single_word) = tuple;
    AddedToken::from(content, special)
        .normalized(normalized)
        .lstrip(lstrip)
        .rstrip(rstrip)
        .single_word(single_word)
}

#[pyclass(frozen, name = "Tokenizer", module = "octavo._core")]
pub(crate) struct PyTokenizer {
    pub(crate) inner: Arc<Tokenizer>,
}

#[pymethods]
impl PyTokenizer {
    #[staticmethod]
    fn from_file(py: Python<'_>, path: &str) -> PyResult<Self> {
        let inner = py
            .detach(|| Tokenizer::from_file(path))
            .map_err(value_error)?;
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    #[staticmethod]
    fn from_gguf(py: Python<'_>, file: &PyGgufFile) -> PyResult<Self> {
        let inner = py
            .detach(|| Tokenizer::from_gguf(&file.inner))
            .map_err(value_error)?;
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    fn changed(
        &self,
        py: Python<'_>,
        added: Vec<AddedTokenTuple>,
        prefix_space: Option<(&str, bool)>,
    ) -> PyResult<Self> {
        let prefix_space = match prefix_space {
            None => None,
            Some(("ByteLevel", add)) => Some(PrefixSpace::ByteLevel(add)),
            Some(("Metaspace", add)) => Some(PrefixSpace::Metaspace(add)),
            Some((other, _)) => {
                let message = format!("prefix_space: {other:?} is neither ByteLevel nor Metaspace");
                return Err(PyValueError::new_err(message));
            }
        };
        let added: Vec<AddedToken> = added.into_iter().map(added_token).collect();
        let inner = py
            .detach(|| self.inner.changed(&added, prefix_space))
            .map_err(value_error)?;
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    fn added_tokens(&self) -> Vec<(u32, AddedTokenTuple)> {
        let tuple = |token: AddedToken| {
            (
                token.content,
                token.special,
                token.normalized,
                token.lstrip,
                token.rstrip,
                token.single_word,
            )
        };
        let tokens = self.inner.added_tokens();
        tokens.into_iter().map(|(id, t)| (id, tuple(t))).collect()
    }

    #[getter]
    fn vocab_size(&self) -> usize {
        self.inner.vocab_size()
    }

    #[getter]
    fn spaces_tokens(&self) -> bool {
        self.inner.spaces_tokens()
    }

    #[pyo3(signature = (text, add_special_tokens=true))]
    fn encode(&self, py: Python<'_>, text: &str, add_special_tokens: bool) -> PyResult<Vec<u32>> {
        run(py, text.len(), || {
            self.inner.encode(text, add_special_tokens)
        })
    }

    #[pyo3(signature = (text, add_special_tokens=true))]
    fn encode_ids(
        &self,
        py: Python<'_>,
        text: &str,
        add_special_tokens: bool,
    ) -> PyResult<PyTokenIds> {
        let ids = self.encode(py, text, add_special_tokens)?;
        Ok(PyTokenIds::new(ids))
    }

    #[pyo3(signature = (first, second, most=None))]
    fn encode_pair(
        &self,
        py: Python<'_>,
        first: &str,
        second: &str,
        most: Option<usize>,
    ) -> PyResult<(Vec<u32>, usize)> {
        run(py, first.len() + second.len(), || {
            self.inner.encode_pair(first, second, most)
        })
    }

    #[pyo3(signature = (texts, add_special_tokens=true))]
    fn encode_batch(
        &self,
        py: Python<'_>,
        texts: Vec<PyBackedStr>,
        add_special_tokens: bool,
    ) -> PyResult<Vec<PyTokenIds>> {
        let num_bytes: usize = texts.iter().map(|text| text.len()).sum();
        let ids = run(py, num_bytes, || {
            self.inner.encode_batch(&texts, add_special_tokens)
        })?;
        Ok(ids.into_iter().map(PyTokenIds::new).collect())
    }

    #[pyo3(signature = (token_ids, skip_special_tokens=true))]
    fn decode(
        &self,
        py: Python<'_>,
        token_ids: &Bound<'_, PyAny>,
        skip_special_tokens: bool,
    ) -> PyResult<String> {
        let token_ids: Cow<'_, [u32]> = match token_ids.cast::<PyTokenIds>() {
            Ok(ids) => Cow::Borrowed(ids.get().as_slice()),
            Err(_) => Cow::Owned(token_ids.extract()?),
        };
        run(py, token_ids.len(), || {
            self.inner.decode(&token_ids, skip_special_tokens)
        })
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    fn id_to_token(&self, token_id: u32) -> Option<String> {
        self.inner.id_to_token(token_id)
    }

    fn to_json(&self) -> PyResult<String> {
        self.inner.to_json().map_err(value_error)
    }

    fn token_bytes<'py>(&self, py: Python<'py>, token_id: u32) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.inner.token_bytes(token_id))
    }

    fn __repr__(&self) -> String {
        format!("Tokenizer(vocab_size={})", self.inner.vocab_size())
    }
}

#[pyclass(name = "Detokenizer", module = "octavo._core")]
struct PyDetokenizer {
    inner: Detokenizer,
    stop: Vec<String>,
}

#[pymethods]
impl PyDetokenizer {
    #[new]
    #[pyo3(
        signature = (
            tokenizer, *, stop=Vec::new(), include_stop_str_in_output=false,
            skip_special_tokens=true
        ),
        text_signature = "(tokenizer, *, stop=(), include_stop_str_in_output=False, \
                          skip_special_tokens=True)"
    )]
    fn new(
        tokenizer: &PyTokenizer,
        stop: Vec<String>,
        include_stop_str_in_output: bool,
        skip_special_tokens: bool,
    ) -> Self {
        let inner = Detokenizer::new(
            Arc::clone(&tokenizer.inner),
            stop.clone(),
            include_stop_str_in_output,
            skip_special_tokens,
        );
        Self { inner, stop }
    }

    fn push(&mut self, token_ids: Vec<u32>) -> (String, Option<&str>) {
        let mut text = String::new();
        let mut stop = None;
        for token in token_ids {
            stop = stop.or(self.inner.push(token, &mut text));
        }
        (text, stop.map(|index| self.stop[index].as_str()))
    }

    fn finish(&mut self) -> String {
        let mut text = String::new();
        self.inner.finish(&mut text);
        text
    }
}
