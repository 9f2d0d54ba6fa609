//! Metadata values and tensors, as places in a GGUF file.

use std::ops::Range;

use octavo_formats::kinds::TensorKind;

/// The type of a metadata value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)] // the names are the documentation
pub enum ValueType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

impl ValueType {
    pub(super) fn from_id(id: u32) -> Option<Self> {
        use ValueType::*;
        let types = [
            U8, I8, U16, I16, U32, I32, F32, Bool, String, Array, U64, I64, F64,
        ];
        types.get(id as usize).copied()
    }

    /// Bytes of a fixed-size value; None for strings and arrays.
    pub(super) fn size(self) -> Option<usize> {
        use ValueType::*;
        match self {
            U8 | I8 | Bool => Some(1),
            U16 | I16 => Some(2),
            U32 | I32 | F32 => Some(4),
            U64 | I64 | F64 => Some(8),
            String | Array => None,
        }
    }
}

/// A metadata value. Strings and arrays are places in the file.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Any unsigned integer.
    Unsigned(u64),
    /// Any signed integer.
    Signed(i64),
    /// f32, f64.
    Float(f64),
    /// Stored as 0 or 1.
    Bool(bool),
    /// The bytes' place; meant to be UTF-8.
    String(Range<usize>),
    /// Items one after another.
    Array(ArrayInfo),
}

/// An array's place in the file.
#[derive(Debug, Clone, PartialEq)]
pub struct ArrayInfo {
    /// The type of every item.
    pub item: ValueType,
    /// Number of items.
    pub len: usize,
    pub(super) range: Range<usize>,
}

/// The place, kind and shape of one tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Unique in the file.
    pub name: String,
    /// Rows first, as in torch (the file stores them the other way round).
    pub shape: Vec<u64>,
    /// Storage.
    pub kind: TensorKind,
    /// The file it lies in, counted from 0.
    pub part: usize,
    /// From the start of that file.
    pub offset: u64,
    /// Size in bytes.
    pub num_bytes: u64,
    /// Product of `shape`.
    pub num_elements: u64,
}
