//! TokenIds. See `_core.pyi`.
//!
//! A long prompt as a Python list costs the event loop milliseconds to build, to check and to read
//! back. As a buffer it costs nothing after the tokenizer.

use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::Arc;

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyBufferError, PyIndexError, PyTypeError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyInt, PyIterator, PyList, PySequence, PySlice};

pub(crate) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<PyTokenIds>()?;
    PySequence::register::<PyTokenIds>(m.py())
}

#[pyclass(frozen, name = "TokenIds", module = "octavo._core")]
pub(crate) struct PyTokenIds {
    /// None is over `i32::MAX`.
    ids: Arc<[u32]>,
    /// A buffer's shape is a pointer to it.
    len: ffi::Py_ssize_t,
}

impl PyTokenIds {
    pub(crate) fn new(ids: impl Into<Arc<[u32]>>) -> Self {
        let ids = ids.into();
        debug_assert!(ids.iter().all(|&id| id <= i32::MAX as u32));
        let len = ids.len() as ffi::Py_ssize_t;
        Self { ids, len }
    }

    pub(crate) fn as_slice(&self) -> &[u32] {
        &self.ids
    }
}

#[pymethods]
impl PyTokenIds {
    #[new]
    #[pyo3(signature = (ids, /))]
    fn py_new(ids: &Bound<'_, PyAny>) -> PyResult<Self> {
        Ok(Self::new(token_ids(ids)?))
    }

    fn max(&self) -> PyResult<u32> {
        let max = self.ids.iter().max().copied();
        max.ok_or_else(|| PyValueError::new_err("there are no token ids"))
    }

    fn tolist(&self) -> Vec<u32> {
        self.ids.to_vec()
    }

    fn __len__(&self) -> usize {
        self.ids.len()
    }

    fn __getitem__<'py>(
        &self,
        py: Python<'py>,
        index: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        if let Ok(slice) = index.cast::<PySlice>() {
            let at = slice.indices(self.len)?;
            let ids: Vec<u32> = (0..at.slicelength)
                .map(|i| self.ids[(at.start + i as isize * at.step) as usize])
                .collect();
            return Ok(Bound::new(py, Self::new(ids))?.into_any());
        }
        let index: isize = index.extract()?;
        let index = if index < 0 { index + self.len } else { index };
        let id = usize::try_from(index).ok().and_then(|i| self.ids.get(i));
        match id {
            Some(id) => Ok(id.into_pyobject(py)?.into_any()),
            None => Err(PyIndexError::new_err("index out of range")),
        }
    }

    fn __iter__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyIterator>> {
        PyList::new(py, &*self.ids)?.try_iter()
    }

    fn __eq__(&self, other: &Bound<'_, PyAny>) -> bool {
        if let Ok(other) = other.cast::<Self>() {
            return self.ids == other.get().ids;
        }
        let others = other.extract::<Vec<i64>>();
        others.is_ok_and(|others| {
            others
                .iter()
                .copied()
                .eq(self.ids.iter().map(|&id| i64::from(id)))
        })
    }

    fn __repr__(&self) -> String {
        format!("TokenIds({:?})", self.ids)
    }

    /// # Safety
    /// Called by Python's buffer protocol, which passes a valid `view`.
    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        if flags & ffi::PyBUF_WRITABLE != 0 {
            return Err(PyBufferError::new_err("token ids are read-only"));
        }
        let wants = |flag: c_int| flags & flag == flag;
        let this = slf.get();
        let (data, shape) = (this.ids.as_ptr(), ptr::from_ref(&this.len));
        // SAFETY: `view` is valid (the protocol's promise). What it points to belongs to `slf`,
        // which does not change and of which the view takes a reference; the format is static; an
        // id is an int32 of the same bits, as none is over i32::MAX. The strides of one dimension
        // are the item size, which lies in the view itself.
        unsafe {
            (*view).buf = data.cast_mut().cast::<c_void>();
            (*view).len = this.len * size_of::<i32>() as ffi::Py_ssize_t;
            (*view).itemsize = size_of::<i32>() as ffi::Py_ssize_t;
            (*view).readonly = 1;
            (*view).ndim = 1;
            (*view).format = match wants(ffi::PyBUF_FORMAT) {
                true => c"i".as_ptr().cast_mut(),
                false => ptr::null_mut(),
            };
            (*view).shape = match wants(ffi::PyBUF_ND) {
                true => shape.cast_mut(),
                false => ptr::null_mut(),
            };
            (*view).strides = match wants(ffi::PyBUF_STRIDES) {
                true => &raw mut (*view).itemsize,
                false => ptr::null_mut(),
            };
            (*view).suboffsets = ptr::null_mut();
            (*view).internal = ptr::null_mut();
            (*view).obj = slf.into_ptr();
        }
        Ok(())
    }
}

/// TokenIds, an int32 buffer, or any iterable of integers.
pub(crate) fn token_ids(object: &Bound<'_, PyAny>) -> PyResult<Arc<[u32]>> {
    if let Ok(ids) = object.cast::<PyTokenIds>() {
        return Ok(Arc::clone(&ids.get().ids));
    }
    if let Ok(list) = object.cast::<PyList>() {
        return list.iter().map(|item| token_id(&item)).collect();
    }
    if let Ok(ids) = PyBuffer::<i32>::get(object)
        && ids.is_c_contiguous()
    {
        let ids = ids.to_vec(object.py())?;
        return ids.into_iter().map(|id| checked(id.into())).collect();
    }
    let ids: PyResult<Vec<u32>> = object.try_iter()?.map(|item| token_id(&item?)).collect();
    Ok(ids?.into())
}

/// An integer, of whatever class but bool: JSON's `true` is no token.
fn token_id(item: &Bound<'_, PyAny>) -> PyResult<u32> {
    if item.is_instance_of::<PyBool>() {
        return Err(PyTypeError::new_err("a bool is no token id"));
    }
    if let Ok(id) = item.cast::<PyInt>() {
        // Too large for an i64 is too large for a token.
        return checked(id.extract().unwrap_or(i64::MAX));
    }
    checked(item.extract()?)
}

fn checked(id: i64) -> PyResult<u32> {
    match i32::try_from(id) {
        Ok(id) if id >= 0 => Ok(id as u32),
        _ => Err(PyValueError::new_err(format!(
            "token id {id} is not a non-negative int32"
        ))),
    }
}
