//! Cursor: checked reads of untrusted bytes.

use std::ops::Range;

use octavo_formats::kinds::TENSOR_KINDS;

use super::value::{ArrayInfo, TensorInfo, Value, ValueType};

/// Nested arrays deeper than this are refused: parsing recurses once a level.
const MAX_ARRAY_DEPTH: usize = 4;
/// As in ggml: no tensor has more dimensions.
const MAX_DIMS: u32 = 4;

pub(super) type Parsed<T> = std::result::Result<T, String>;

/// A reading position in untrusted bytes; every read is checked.
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    pub(super) at: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    /// An empty vector for `count` items of at least `min_bytes` bytes each in the file.
    pub(super) fn vec_for<T>(&self, count: u64, min_bytes: u64, what: &str) -> Parsed<Vec<T>> {
        match count.checked_mul(min_bytes) {
            Some(n) if n <= self.left() as u64 => Ok(Vec::with_capacity(count as usize)),
            _ => Err(format!(
                "claims {count} {what}, more than its {} remaining bytes can hold",
                self.left()
            )),
        }
    }

    pub(super) fn take(&mut self, len: usize) -> Parsed<&'a [u8]> {
        if len > self.left() {
            return Err(format!("the file ends at byte {}", self.bytes.len()));
        }
        let taken = &self.bytes[self.at..self.at + len];
        self.at += len;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Parsed<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    pub(super) fn u32(&mut self) -> Parsed<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(super) fn u64(&mut self) -> Parsed<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// The place of a length-prefixed string.
    pub(super) fn string(&mut self) -> Parsed<Range<usize>> {
        let len = self.u64()?;
        if len > self.left() as u64 {
            return Err(format!(
                "a string of {len} bytes passes the end of the file"
            ));
        }
        let start = self.at;
        self.at += len as usize;
        Ok(start..self.at)
    }

    pub(super) fn name(&mut self) -> Parsed<String> {
        let range = self.string()?;
        match std::str::from_utf8(&self.bytes[range]) {
            Ok(name) => Ok(name.to_owned()),
            Err(_) => Err("its name is not UTF-8".to_owned()),
        }
    }

    fn value_type(&mut self) -> Parsed<ValueType> {
        let id = self.u32()?;
        ValueType::from_id(id).ok_or_else(|| format!("has the unknown value type {id}"))
    }

    pub(super) fn typed_value(&mut self) -> Parsed<Value> {
        let kind = self.value_type()?;
        self.value(kind, 0)
    }

    pub(super) fn value(&mut self, kind: ValueType, depth: usize) -> Parsed<Value> {
        Ok(match kind {
            ValueType::U8 => Value::Unsigned(u8::from_le_bytes(self.array()?).into()),
            ValueType::U16 => Value::Unsigned(u16::from_le_bytes(self.array()?).into()),
            ValueType::U32 => Value::Unsigned(self.u32()?.into()),
            ValueType::U64 => Value::Unsigned(self.u64()?),
            ValueType::I8 => Value::Signed(i8::from_le_bytes(self.array()?).into()),
            ValueType::I16 => Value::Signed(i16::from_le_bytes(self.array()?).into()),
            ValueType::I32 => Value::Signed(i32::from_le_bytes(self.array()?).into()),
            ValueType::I64 => Value::Signed(i64::from_le_bytes(self.array()?)),
            ValueType::F32 => Value::Float(f32::from_le_bytes(self.array()?).into()),
            ValueType::F64 => Value::Float(f64::from_le_bytes(self.array()?)),
            ValueType::Bool => match self.array::<1>()? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [n] => return Err(format!("has {n} for a boolean")),
            },
            ValueType::String => Value::String(self.string()?),
            ValueType::Array => Value::Array(self.array_info(depth)?),
        })
    }

    /// Walk over an array, checking that all of it is there.
    fn array_info(&mut self, depth: usize) -> Parsed<ArrayInfo> {
        if depth == MAX_ARRAY_DEPTH {
            return Err(format!(
                "arrays are nested more than {MAX_ARRAY_DEPTH} deep"
            ));
        }
        let item = self.value_type()?;
        let len = self.u64()?;
        let too_long = |left: usize| {
            format!("an array claims {len} items, more than its {left} remaining bytes can hold")
        };
        let min_bytes = match item {
            ValueType::String => 8,
            ValueType::Array => 12,
            scalar => scalar.size().unwrap_or(1) as u64,
        };
        if len
            .checked_mul(min_bytes)
            .is_none_or(|n| n > self.left() as u64)
        {
            return Err(too_long(self.left()));
        }
        let start = self.at;
        match item {
            ValueType::String => {
                for _ in 0..len {
                    self.string()?;
                }
            }
            ValueType::Array => {
                for _ in 0..len {
                    self.array_info(depth + 1)?;
                }
            }
            ValueType::Bool => {
                if let Some(n) = self.take(len as usize)?.iter().find(|n| **n > 1) {
                    return Err(format!("has {n} for a boolean"));
                }
            }
            _ => {
                self.take((len * min_bytes) as usize)?;
            }
        }
        Ok(ArrayInfo {
            item,
            len: len as usize,
            range: start..self.at,
        })
    }

    /// A tensor's entry after its name; `offset` is still relative to the data's start.
    pub(super) fn tensor(&mut self, name: &str, alignment: u64) -> Parsed<TensorInfo> {
        let num_dims = self.u32()?;
        if num_dims > MAX_DIMS {
            return Err(format!(
                "has {num_dims} dimensions; at most {MAX_DIMS} are read"
            ));
        }
        let mut shape = Vec::with_capacity(num_dims as usize);
        for _ in 0..num_dims {
            shape.push(self.u64()?);
        }
        let kind_id = self.u32()?;
        let kind = *TENSOR_KINDS
            .iter()
            .find(|kind| kind.id == kind_id)
            .ok_or_else(|| format!("has the unknown kind {kind_id}"))?;
        let offset = self.u64()?;
        if !offset.is_multiple_of(alignment) {
            return Err(format!(
                "its offset {offset} is not a multiple of {alignment}"
            ));
        }
        // Blocks lie within rows: the file's first dimension is a whole number of them.
        let row = shape.first().copied().unwrap_or(1);
        if !row.is_multiple_of(kind.block_len) {
            return Err(format!(
                "rows of {row} elements are no whole number of {} blocks of {}",
                kind.name, kind.block_len
            ));
        }
        let too_large = || "has more elements than a file can hold".to_owned();
        let num_elements = shape
            .iter()
            .try_fold(1u64, |n, &dim| n.checked_mul(dim))
            .ok_or_else(too_large)?;
        let num_bytes = (num_elements / kind.block_len)
            .checked_mul(kind.block_bytes)
            .ok_or_else(too_large)?;
        shape.reverse();
        Ok(TensorInfo {
            name: name.to_owned(),
            shape,
            kind,
            part: 0,
            offset,
            num_bytes,
            num_elements,
        })
    }
}

/// A name from the file, quoted, escaped and cut, so that a message stays one line.
pub(super) fn shown(name: &str) -> String {
    let mut quoted = format!("{:?}", name.chars().take(80).collect::<String>());
    if name.chars().nth(80).is_some() {
        quoted.push_str("...");
    }
    quoted
}
