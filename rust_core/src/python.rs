//! The binding: the only module that names pyo3. Here text and checkpoint files; `engine.rs` has
//! the engine, `cpu.rs` the CPU kernels.

mod cpu;
mod delivery;
mod engine;
mod token_ids;

use std::borrow::Cow;
use std::ffi::c_int;
use std::sync::Arc;

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::{PyBytes, PyDict, PyList, PyMemoryView, PyTuple};

use self::token_ids::PyTokenIds;
use crate::detokenizer::Detokenizer;
use crate::gguf::{GgufError, GgufFile, Value};
use crate::tokenizer::{AddedToken, PrefixSpace, Tokenizer, TokenizerError};

/// The compiled half of octavo. See `_core.pyi` for the contract.
#[pymodule]
fn _core(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("__version__", env!("CARGO_PKG_VERSION"))?;
    engine::register(m)?;
    delivery::register(m)?;
    token_ids::register(m)?;
    register_text(m)?;
    register_gguf(m)?;
    cpu::register_cpu(m)?;
    Ok(())
}

// ==================================================================================== text

fn register_text(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<PyTokenizer>()?;
    m.add_class::<PyDetokenizer>()
}

/// Texts of more bytes than this are encoded without the GIL: it takes about a millisecond, which
/// the event loop must not wait for. Shorter ones are done before a detached thread is back.
const DETACH_BYTES: usize = 2048;

impl From<TokenizerError> for PyErr {
    fn from(error: TokenizerError) -> Self {
        PyValueError::new_err(error.0)
    }
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
        let inner = py.detach(|| Tokenizer::from_file(path))?;
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    #[staticmethod]
    fn from_gguf(py: Python<'_>, file: &PyGgufFile) -> PyResult<Self> {
        let inner = py.detach(|| Tokenizer::from_gguf(&file.inner))?;
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
        let inner = py.detach(|| self.inner.changed(&added, prefix_space))?;
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
        self.inner.table().is_none()
    }

    #[pyo3(signature = (text, add_special_tokens=true))]
    fn encode(&self, py: Python<'_>, text: &str, add_special_tokens: bool) -> PyResult<Vec<u32>> {
        let encode = || self.inner.encode(text, add_special_tokens);
        Ok(if text.len() > DETACH_BYTES {
            py.detach(encode)
        } else {
            encode()
        }?)
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
        let encode = || self.inner.encode_pair(first, second, most);
        Ok(if first.len() + second.len() > DETACH_BYTES {
            py.detach(encode)
        } else {
            encode()
        }?)
    }

    #[pyo3(signature = (texts, add_special_tokens=true))]
    fn encode_batch(
        &self,
        py: Python<'_>,
        texts: Vec<PyBackedStr>,
        add_special_tokens: bool,
    ) -> PyResult<Vec<PyTokenIds>> {
        let num_bytes: usize = texts.iter().map(|text| text.len()).sum();
        let encode = || self.inner.encode_batch(&texts, add_special_tokens);
        let ids = if num_bytes > DETACH_BYTES {
            py.detach(encode)
        } else {
            encode()
        }?;
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
        let decode = || self.inner.decode(&token_ids, skip_special_tokens);
        Ok(if token_ids.len() > DETACH_BYTES {
            py.detach(decode)
        } else {
            decode()
        }?)
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    fn id_to_token(&self, token_id: u32) -> Option<String> {
        self.inner.id_to_token(token_id)
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

// ==================================================================================== gguf

fn register_gguf(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<PyGgufFile>()
}

/// Longer arrays (vocabularies, merges) are not turned into Python objects.
const MAX_METADATA_ITEMS: usize = 256;

impl From<GgufError> for PyErr {
    fn from(error: GgufError) -> Self {
        PyValueError::new_err(error.0)
    }
}

#[pyclass(frozen, name = "GgufFile", module = "octavo._core")]
struct PyGgufFile {
    inner: Arc<GgufFile>,
}

#[pymethods]
impl PyGgufFile {
    #[new]
    #[pyo3(signature = (path, *more), text_signature = "(path, *more)")]
    fn new(py: Python<'_>, path: String, more: Vec<String>) -> PyResult<Self> {
        let paths = [vec![path], more].concat();
        let inner = py.detach(|| GgufFile::open_split(&paths))?;
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    #[getter]
    fn path(&self) -> &str {
        self.inner.path()
    }

    fn metadata<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        for (key, value) in self.inner.metadata() {
            if let Some(value) = metadata_value(py, &self.inner, value)? {
                dict.set_item(key, value)?;
            }
        }
        Ok(dict)
    }

    fn tensors<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        for tensor in self.inner.tensors() {
            let shape = PyTuple::new(py, &tensor.shape)?;
            let entry = (shape, tensor.kind.name, tensor.offset, tensor.num_bytes);
            dict.set_item(&tensor.name, entry)?;
        }
        Ok(dict)
    }

    fn data<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyMemoryView>> {
        self.inner.tensor(name)?;
        let owner = TensorBytes {
            file: Arc::clone(&self.inner),
            name: name.to_owned(),
        };
        PyMemoryView::from(Bound::new(py, owner)?.as_any())
    }

    fn end_token_ids(&self) -> Vec<u32> {
        Tokenizer::end_tokens_of_gguf(&self.inner)
    }

    fn release_pages(&self) {
        self.inner.release_pages();
    }

    fn dequantize(&self, py: Python<'_>, name: &str, out: &Bound<'_, PyAny>) -> PyResult<()> {
        let out = PyBuffer::<f32>::get(out)
            .map_err(|_| PyTypeError::new_err("out is not a buffer of float32"))?;
        if out.readonly() || !out.is_c_contiguous() {
            return Err(PyValueError::new_err(
                "out is not writable and C-contiguous",
            ));
        }
        let (pointer, len) = (out.buf_ptr() as usize, out.item_count());
        py.detach(|| {
            if len == 0 {
                return self.inner.dequantize(name, &mut []);
            }
            // SAFETY: `out` holds the buffer until the end of this function; it is writable,
            // contiguous and aligned (PyBuffer checks format and alignment) and has `len` > 0
            // floats, so its pointer is not null. Python code that touches the array meanwhile
            // reads unfinished numbers, as with any array that a thread fills.
            let out = unsafe { std::slice::from_raw_parts_mut(pointer as *mut f32, len) };
            self.inner.dequantize(name, out)
        })?;
        Ok(())
    }

    fn __repr__(&self) -> String {
        format!(
            "GgufFile({:?}, {} tensors)",
            self.inner.path(),
            self.inner.tensors().len()
        )
    }
}

/// None for arrays that stay inside.
fn metadata_value<'py>(
    py: Python<'py>,
    file: &GgufFile,
    value: &Value,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    Ok(Some(match value {
        Value::Unsigned(n) => n.into_pyobject(py)?.into_any(),
        Value::Signed(n) => n.into_pyobject(py)?.into_any(),
        Value::Float(x) => x.into_pyobject(py)?.into_any(),
        Value::Bool(b) => b.into_pyobject(py)?.to_owned().into_any(),
        Value::String(range) => file.text(range).into_pyobject(py)?.into_any(),
        Value::Array(array) if array.len > MAX_METADATA_ITEMS => return Ok(None),
        Value::Array(array) => {
            let list = PyList::empty(py);
            for item in file.items(array) {
                match metadata_value(py, file, &item)? {
                    Some(item) => list.append(item)?,
                    None => return Ok(None),
                }
            }
            list.into_any()
        }
    }))
}

/// One tensor's bytes as a buffer; keeps the file's map alive.
#[pyclass(frozen)]
struct TensorBytes {
    file: Arc<GgufFile>,
    name: String,
}

#[pymethods]
impl TensorBytes {
    /// # Safety
    /// Called by Python's buffer protocol, which passes a valid `view`.
    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        let this = slf.get();
        let bytes = this.file.data(&this.name)?;
        let pointer = bytes.as_ptr().cast_mut().cast();
        let len = bytes.len() as ffi::Py_ssize_t;
        // SAFETY: `view` is valid (the protocol's promise). The bytes live as long as the file,
        // which `slf` owns and of which PyBuffer_FillInfo takes a reference; read-only is 1, so
        // that writable requests are refused.
        match unsafe { ffi::PyBuffer_FillInfo(view, slf.as_ptr(), pointer, len, 1, flags) } {
            0 => Ok(()),
            _ => Err(PyErr::fetch(slf.py())),
        }
    }
}
