//! GgufFile and the buffers of its tensors. See `_core.pyi`.

use std::ffi::c_int;
use std::sync::Arc;

use octavo_core::files::gguf::{GgufFile, Value};
use octavo_core::text::tokenizer::Tokenizer;
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyMemoryView, PyTuple};

use crate::error::value_error;

pub(crate) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<PyGgufFile>()
}

/// Longer arrays (vocabularies, merges) are not turned into Python objects.
const MAX_METADATA_ITEMS: usize = 256;

#[pyclass(frozen, name = "GgufFile", module = "octavo._core")]
pub(crate) struct PyGgufFile {
    pub(crate) inner: Arc<GgufFile>,
}

#[pymethods]
impl PyGgufFile {
    #[new]
    #[pyo3(signature = (path, *more), text_signature = "(path, *more)")]
    fn new(py: Python<'_>, path: String, more: Vec<String>) -> PyResult<Self> {
        let paths = [vec![path], more].concat();
        let inner = py
            .detach(|| GgufFile::open_split(&paths))
            .map_err(value_error)?;
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
        self.inner.tensor(name).map_err(value_error)?;
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
        })
        .map_err(value_error)
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
        let bytes = this.file.data(&this.name).map_err(value_error)?;
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
