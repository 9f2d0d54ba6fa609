//! Tensors as arguments: address, element type and shape in one tuple.
//!
//! A tensor in another's place is thereby an error of its type or of its shape, and never memory read
//! beyond its end. The addresses themselves are trusted.

use octavo_cpu::float::DType;
use octavo_cpu::kv_cache::{Byte, Cache, CacheType};
use octavo_cpu::tensor::{Rows, RowsMut, load_one};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

/// The type of a tensor's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Element {
    Float(DType),
    I8,
    E4m3,
    E5m2,
    U8,
    I32,
    I64,
}

impl<'a, 'py> FromPyObject<'a, 'py> for Element {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        Ok(match object.extract::<&str>()? {
            "F32" => Element::Float(DType::F32),
            "BF16" => Element::Float(DType::Bf16),
            "F16" => Element::Float(DType::F16),
            "I8" => Element::I8,
            "E4M3" => Element::E4m3,
            "E5M2" => Element::E5m2,
            "U8" => Element::U8,
            "I32" => Element::I32,
            "I64" => Element::I64,
            name => return Err(PyTypeError::new_err(format!("element type {name:?}"))),
        })
    }
}

/// Rust's type for elements that are read as a slice.
pub(super) trait Plain: Copy {
    /// Its name.
    const ELEMENT: Element;
}

impl Plain for f32 {
    const ELEMENT: Element = Element::Float(DType::F32);
}
impl Plain for u8 {
    const ELEMENT: Element = Element::U8;
}
impl Plain for i32 {
    const ELEMENT: Element = Element::I32;
}
impl Plain for i64 {
    const ELEMENT: Element = Element::I64;
}

/// A contiguous vector: address, element type, elements.
#[derive(Clone, Copy)]
pub(super) struct Vector(usize, Element, usize);

/// A contiguous matrix: address, element type, rows, columns.
#[derive(Clone, Copy)]
pub(super) struct Matrix(usize, Element, usize, usize);

/// One layer's keys and values: their addresses, element type, and shape (blocks, heads, block size,
/// head_dim, elements from block to block).
#[derive(Clone, Copy)]
pub(super) struct KvCache(usize, usize, Element, (usize, usize, usize, usize, usize));

/// Extraction from a tuple, item by item: half the time of the derived one, which takes a reference to
/// each item first.
macro_rules! from_tuple {
    ($name:ident, $($item:ident),*) => {
        impl<'a, 'py> FromPyObject<'a, 'py> for $name {
            type Error = PyErr;

            fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
                let ($($item),*) = object.extract()?;
                Ok($name($($item),*))
            }
        }
    };
}

from_tuple!(Vector, address, element, len);
from_tuple!(Matrix, address, element, rows, cols);
from_tuple!(KvCache, keys, values, element, shape);

fn wrong_element(found: Element, wanted: &str) -> PyErr {
    PyTypeError::new_err(format!("a tensor of {found:?} in the place of {wanted}"))
}

fn wrong_shape(found: &[usize], wanted: &[usize]) -> PyErr {
    PyValueError::new_err(format!(
        "a tensor of shape {found:?} in the place of {wanted:?}"
    ))
}

impl Element {
    fn float(self) -> PyResult<DType> {
        match self {
            Element::Float(dtype) => Ok(dtype),
            _ => Err(wrong_element(self, "floats")),
        }
    }
}

/// The address of `len` elements of type T, which is null only if there are none.
fn address<T: Plain>(ptr: usize, element: Element, len: usize) -> PyResult<*mut T> {
    if element != T::ELEMENT {
        return Err(wrong_element(element, &format!("{:?}", T::ELEMENT)));
    }
    if len == 0 {
        return Ok(std::ptr::dangling_mut());
    }
    if ptr == 0 || !ptr.is_multiple_of(align_of::<T>()) {
        return Err(PyValueError::new_err(format!(
            "a tensor at the misaligned address {ptr:#x}"
        )));
    }
    Ok(ptr as *mut T)
}

impl Vector {
    /// Elements.
    pub(super) fn len(self) -> usize {
        self.2
    }

    /// The same vector, checked to have `len` elements.
    pub(super) fn of_len(self, len: usize) -> PyResult<Self> {
        if self.2 != len {
            return Err(wrong_shape(&[self.2], &[len]));
        }
        Ok(self)
    }

    /// One row of floats.
    pub(super) fn row(self) -> PyResult<Rows> {
        Matrix(self.0, self.1, 1, self.2).read()
    }

    /// A copy as float32.
    ///
    /// # Safety
    /// The vector exists.
    pub(super) unsafe fn to_floats(self) -> PyResult<Vec<f32>> {
        let row = self.row()?;
        // SAFETY: the caller's.
        let read = |i| unsafe { load_one(row.at(0, i), row.dtype) };
        Ok((0..row.cols).map(read).collect())
    }

    /// The elements.
    ///
    /// # Safety
    /// They exist, and are not written while the slice is used.
    pub(super) unsafe fn slice<'a, T: Plain>(self) -> PyResult<&'a [T]> {
        let ptr = address::<T>(self.0, self.1, self.2)?;
        // SAFETY: the caller's; aligned and not null.
        Ok(unsafe { std::slice::from_raw_parts(ptr, self.2) })
    }

    /// The elements, to write.
    ///
    /// # Safety
    /// They exist, and no one else uses them meanwhile.
    pub(super) unsafe fn slice_mut<'a, T: Plain>(self) -> PyResult<&'a mut [T]> {
        let ptr = address::<T>(self.0, self.1, self.2)?;
        // SAFETY: the caller's; aligned and not null.
        Ok(unsafe { std::slice::from_raw_parts_mut(ptr, self.2) })
    }
}

impl Matrix {
    /// Rows.
    pub(super) fn rows(self) -> usize {
        self.2
    }

    /// Columns.
    pub(super) fn cols(self) -> usize {
        self.3
    }

    /// The same matrix, checked to be rows x cols.
    pub(super) fn of_shape(self, rows: usize, cols: usize) -> PyResult<Self> {
        if (self.2, self.3) != (rows, cols) {
            return Err(wrong_shape(&[self.2, self.3], &[rows, cols]));
        }
        Ok(self)
    }

    /// The same matrix, checked to have another's element type and shape.
    pub(super) fn like(self, other: Matrix) -> PyResult<Self> {
        if self.1 != other.1 {
            return Err(wrong_element(self.1, &format!("{:?}", other.1)));
        }
        self.of_shape(other.2, other.3)
    }

    /// All elements, row after row.
    pub(super) fn flat(self) -> PyResult<Vector> {
        let len = self.2.checked_mul(self.3);
        let len = len.ok_or_else(|| PyValueError::new_err("a tensor larger than memory"))?;
        Ok(Vector(self.0, self.1, len))
    }

    /// Rows of floats, to read.
    pub(super) fn read(self) -> PyResult<Rows> {
        let dtype = self.1.float()?;
        if self.0 == 0 && self.flat()?.len() > 0 {
            return Err(PyValueError::new_err("a tensor without memory"));
        }
        Ok(Rows::new(self.0 as *const u8, dtype, self.2, self.3))
    }

    /// Rows of floats, to write.
    pub(super) fn write(self) -> PyResult<RowsMut> {
        let rows = self.read()?;
        Ok(RowsMut::new(
            rows.ptr.cast_mut(),
            rows.dtype,
            rows.rows,
            rows.cols,
        ))
    }
}

impl KvCache {
    /// Keys and values.
    pub(super) fn caches(self) -> PyResult<(Cache, Cache)> {
        let KvCache(keys, values, element, shape) = self;
        let (num_blocks, num_kv_heads, block_size, head_dim, block_stride) = shape;
        let dtype = match element {
            Element::I8 => CacheType::Scaled(Byte::Int8),
            Element::E4m3 => CacheType::Scaled(Byte::E4m3),
            Element::E5m2 => CacheType::Scaled(Byte::E5m2),
            _ => CacheType::Float(element.float()?),
        };
        let cache = |ptr: usize| Cache {
            ptr: ptr as *mut u8,
            dtype,
            num_blocks,
            num_kv_heads,
            block_size,
            head_dim,
            block_stride,
        };
        let (keys, values) = (cache(keys), cache(values));
        let block = num_kv_heads.saturating_mul(keys.head_stride());
        if block_size == 0 || (num_blocks > 1 && block_stride < block) {
            return Err(PyValueError::new_err("blocks of the KV cache overlap"));
        }
        let has_rows = num_blocks > 0 && num_kv_heads > 0 && head_dim > 0;
        if has_rows && (keys.ptr.is_null() || values.ptr.is_null()) {
            return Err(PyValueError::new_err("a tensor without memory"));
        }
        Ok((keys, values))
    }
}

/// Static scales of keys and of values, float32 [2, heads]; None: empty.
///
/// # Safety
/// They exist, and are not written while the slices are used.
pub(super) unsafe fn scales_of<'a>(
    scales: Option<Matrix>,
    heads: usize,
) -> PyResult<[&'a [f32]; 2]> {
    let Some(scales) = scales else {
        return Ok([&[], &[]]);
    };
    // SAFETY: the caller's.
    let all = unsafe { scales.of_shape(2, heads)?.flat()?.slice()? };
    let (keys, values) = all.split_at(heads);
    Ok([keys, values])
}
