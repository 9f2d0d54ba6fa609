//! GgufFile: a checkpoint in GGUF (versions 2 and 3, little-endian), mapped into memory.
//!
//! A checkpoint may be split into several files, as llama.cpp's `gguf-split` does: the first has
//! the metadata, each has some of the tensors.
//!
//! Every count and length in the file is untrusted: each is checked against the bytes that are
//! left before anything is allocated, so no input makes the parser panic or take more memory than
//! a small multiple of the file's size. Errors are one line: the file, the key or tensor, what is
//! wrong.
//!
//! Costs: [`GgufFile::open`] is O(keys + array items of strings + tensors) and touches only the
//! header's pages; look-ups are O(1); arrays stay in the map and are read on demand, O(items).

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::path::Path;

use memmap2::Mmap;

use crate::dequantize;

/// Nested arrays deeper than this are refused: parsing recurses once a level.
const MAX_ARRAY_DEPTH: usize = 4;
/// As in ggml: no tensor has more dimensions.
const MAX_DIMS: u32 = 4;
const DEFAULT_ALIGNMENT: u64 = 32;

/// What is wrong with a GGUF file, in one line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufError(pub String);

impl fmt::Display for GgufError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for GgufError {}

type Result<T> = std::result::Result<T, GgufError>;

/// A tensor's storage: how many elements make a block and how many bytes a block takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorKind {
    /// The number in the file.
    pub id: u32,
    /// As in `Q4_1`.
    pub name: &'static str,
    /// Elements of a block.
    pub block_len: u64,
    /// Bytes of a block.
    pub block_bytes: u64,
}

const fn kind(id: u32, name: &'static str, block_len: u64, block_bytes: u64) -> TensorKind {
    TensorKind {
        id,
        name,
        block_len,
        block_bytes,
    }
}

/// Every kind whose size is known; `dequantize` reads fewer.
pub const TENSOR_KINDS: &[TensorKind] = &[
    kind(0, "F32", 1, 4),
    kind(1, "F16", 1, 2),
    kind(2, "Q4_0", 32, 18),
    kind(3, "Q4_1", 32, 20),
    kind(6, "Q5_0", 32, 22),
    kind(7, "Q5_1", 32, 24),
    kind(8, "Q8_0", 32, 34),
    kind(10, "Q2_K", 256, 84),
    kind(11, "Q3_K", 256, 110),
    kind(12, "Q4_K", 256, 144),
    kind(13, "Q5_K", 256, 176),
    kind(14, "Q6_K", 256, 210),
    kind(16, "IQ2_XXS", 256, 66),
    kind(17, "IQ2_XS", 256, 74),
    kind(18, "IQ3_XXS", 256, 98),
    kind(19, "IQ1_S", 256, 50),
    kind(20, "IQ4_NL", 32, 18),
    kind(21, "IQ3_S", 256, 110),
    kind(22, "IQ2_S", 256, 82),
    kind(23, "IQ4_XS", 256, 136),
    kind(24, "I8", 1, 1),
    kind(25, "I16", 1, 2),
    kind(26, "I32", 1, 4),
    kind(27, "I64", 1, 8),
    kind(28, "F64", 1, 8),
    kind(29, "IQ1_M", 256, 56),
    kind(30, "BF16", 1, 2),
    kind(34, "TQ1_0", 256, 54),
    kind(35, "TQ2_0", 256, 66),
    kind(39, "MXFP4", 32, 17),
];

/// One tensor: where its bytes lie.
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

/// The type of a metadata value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)] // the names say it
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
    fn from_id(id: u32) -> Option<Self> {
        use ValueType::*;
        let types = [
            U8, I8, U16, I16, U32, I32, F32, Bool, String, Array, U64, I64, F64,
        ];
        types.get(id as usize).copied()
    }

    /// Bytes of a fixed-size value; None for strings and arrays.
    fn size(self) -> Option<usize> {
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
    /// How many items.
    pub len: usize,
    range: Range<usize>,
}

enum Bytes {
    Map(Mmap),
    Owned(Vec<u8>),
}

impl Bytes {
    fn as_slice(&self) -> &[u8] {
        match self {
            Bytes::Map(map) => map,
            Bytes::Owned(bytes) => bytes,
        }
    }
}

/// A parsed GGUF file and the map it lies in. See the module's page.
pub struct GgufFile {
    path: String,
    bytes: Bytes,
    /// Those of a split checkpoint's further files, which hold nothing but tensors.
    more_bytes: Vec<Bytes>,
    metadata: Metadata,
    tensors: Vec<TensorInfo>,
    metadata_index: HashMap<String, usize>,
    tensor_index: HashMap<String, usize>,
}

impl fmt::Debug for GgufFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GgufFile")
            .field("path", &self.path)
            .field("num_keys", &self.metadata.len())
            .field("num_tensors", &self.tensors.len())
            .finish_non_exhaustive()
    }
}

impl GgufFile {
    /// Map and parse a file. O(header).
    ///
    /// # Errors
    /// The file cannot be read, or is not a GGUF file this parser takes.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let shown = path.as_ref().display().to_string();
        let io = |e: std::io::Error| GgufError(format!("{shown}: {e}"));
        let file = File::open(path.as_ref()).map_err(io)?;
        if file.metadata().map_err(io)?.is_dir() {
            return Err(GgufError(format!("{shown}: is a directory")));
        }
        // SAFETY: the map is read-only and private to this value. Nothing in this process writes
        // the file; whoever rewrites a checkpoint in place while it is served can tear the weights
        // that are read, which no check here could prevent, but every access stays in the map.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        Self::parse(shown.clone(), Bytes::Map(map))
    }

    /// Map and parse the files of a split checkpoint, the first of which has the metadata.
    /// O(headers).
    ///
    /// # Errors
    /// As [`GgufFile::open`]; the files are not all of one checkpoint's, in its order.
    pub fn open_split(paths: &[impl AsRef<Path>]) -> Result<Self> {
        let files = paths.iter().map(Self::open).collect::<Result<Vec<_>>>()?;
        Self::join(files)
    }

    /// What [`GgufFile::open_split`] does, of files that are open.
    ///
    /// # Errors
    /// As [`GgufFile::open_split`]; there are none.
    pub fn join(files: Vec<Self>) -> Result<Self> {
        let count = files.len() as u64;
        let mut files = files.into_iter();
        let Some(mut whole) = files.next() else {
            return Err(GgufError("no GGUF file is given".to_owned()));
        };
        whole.check_part(0, count)?;
        for (part, file) in (1..).zip(files) {
            file.check_part(part as u64, count)?;
            for mut tensor in file.tensors {
                tensor.part = part;
                let (name, index) = (tensor.name.clone(), whole.tensors.len());
                if whole.tensor_index.insert(name, index).is_some() {
                    return Err(GgufError(format!(
                        "{}: tensor {} is in another part, too",
                        file.path,
                        shown(&tensor.name)
                    )));
                }
                whole.tensors.push(tensor);
            }
            whole.more_bytes.push(file.bytes);
        }
        match whole.unsigned("split.tensors.count") {
            Some(n) if count > 1 && n != whole.tensors.len() as u64 => Err(whole.error(format!(
                "says that all parts hold {n} tensors; they hold {}",
                whole.tensors.len()
            ))),
            _ => Ok(whole),
        }
    }

    /// A file that is whole has no key, or says that it is one of one.
    fn check_part(&self, part: u64, count: u64) -> Result<()> {
        let said = self.unsigned("split.count").unwrap_or(1).max(1);
        let number = self.unsigned("split.no").unwrap_or(0);
        if said == count && number == part {
            return Ok(());
        }
        let found = if said == 1 {
            "is a whole model".to_owned()
        } else {
            format!("is part {} of {said}", number.saturating_add(1))
        };
        Err(self.error(format!(
            "{found}; it was opened as part {} of {count}",
            part + 1
        )))
    }

    /// Parse bytes in memory; `name` stands for the path in messages.
    ///
    /// # Errors
    /// As [`GgufFile::open`].
    pub fn from_bytes(name: &str, bytes: Vec<u8>) -> Result<Self> {
        Self::parse(name.to_owned(), Bytes::Owned(bytes))
    }

    fn parse(path: String, bytes: Bytes) -> Result<Self> {
        let at = |what: String| GgufError(format!("{path}: {what}"));
        let (metadata, tensors) = parse(bytes.as_slice()).map_err(at)?;
        let mut metadata_index = HashMap::with_capacity(metadata.len());
        for (i, (key, _)) in metadata.iter().enumerate() {
            if metadata_index.insert(key.clone(), i).is_some() {
                return Err(at(format!("key {} appears twice", shown(key))));
            }
        }
        let mut tensor_index = HashMap::with_capacity(tensors.len());
        for (i, tensor) in tensors.iter().enumerate() {
            if tensor_index.insert(tensor.name.clone(), i).is_some() {
                return Err(at(format!("tensor {} appears twice", shown(&tensor.name))));
            }
        }
        Ok(Self {
            path,
            bytes,
            more_bytes: Vec::new(),
            metadata,
            tensors,
            metadata_index,
            tensor_index,
        })
    }

    /// As given to [`GgufFile::open`].
    pub fn path(&self) -> &str {
        &self.path
    }

    /// All keys, in the file's order.
    pub fn metadata(&self) -> &[(String, Value)] {
        &self.metadata
    }

    /// All tensors, in the file's order.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// One value. O(1).
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata_index.get(key).map(|&i| &self.metadata[i].1)
    }

    /// One tensor. O(1).
    ///
    /// # Errors
    /// No tensor has this name.
    pub fn tensor(&self, name: &str) -> Result<&TensorInfo> {
        match self.tensor_index.get(name) {
            Some(&i) => Ok(&self.tensors[i]),
            None => Err(self.error(format!("no tensor is named {}", shown(name)))),
        }
    }

    /// A tensor's bytes, in the map. O(1).
    ///
    /// # Errors
    /// No tensor has this name.
    pub fn data(&self, name: &str) -> Result<&[u8]> {
        let tensor = self.tensor(name)?;
        let bytes = match tensor.part {
            0 => &self.bytes,
            part => &self.more_bytes[part - 1],
        };
        let start = tensor.offset as usize; // parse() checked both against the file's size
        Ok(&bytes.as_slice()[start..start + tensor.num_bytes as usize])
    }

    /// Let go of the maps' pages in memory: what is read again comes from the file again.
    ///
    /// Weights are packed into memory of their own, and the pages they came from would otherwise
    /// count as this process's until memory is short. A system that refuses keeps them.
    pub fn release_pages(&self) {
        #[cfg(unix)]
        for bytes in std::iter::once(&self.bytes).chain(&self.more_bytes) {
            if let Bytes::Map(map) = bytes {
                // SAFETY: the map is shared, read-only and backed by a file, so that dropped pages
                // come back with the same contents.
                let _ = unsafe { map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
            }
        }
    }

    /// Write a tensor as float32, with all cores when it is large. O(elements).
    ///
    /// # Errors
    /// An unknown name, a kind that is not read, `out` of another length.
    pub fn dequantize(&self, name: &str, out: &mut [f32]) -> Result<()> {
        let tensor = self.tensor(name)?;
        if out.len() as u64 != tensor.num_elements {
            return Err(self.error(format!(
                "tensor {}: out has {} elements, the tensor {}",
                shown(name),
                out.len(),
                tensor.num_elements
            )));
        }
        dequantize::dequantize(tensor.kind, self.data(name)?, out)
            .map_err(|what| self.error(format!("tensor {}: {what}", shown(name))))
    }

    /// A scalar string; bytes that are not UTF-8 become U+FFFD. None if absent or another type.
    pub fn str(&self, key: &str) -> Option<Cow<'_, str>> {
        match self.get(key)? {
            Value::String(range) => Some(String::from_utf8_lossy(&self.slice()[range.clone()])),
            _ => None,
        }
    }

    /// An integer that is not negative. None if absent or another type.
    pub fn unsigned(&self, key: &str) -> Option<u64> {
        match *self.get(key)? {
            Value::Unsigned(value) => Some(value),
            Value::Signed(value) => u64::try_from(value).ok(),
            _ => None,
        }
    }

    /// None if absent or another type.
    pub fn bool(&self, key: &str) -> Option<bool> {
        match *self.get(key)? {
            Value::Bool(value) => Some(value),
            _ => None,
        }
    }

    /// The strings of an array. O(items).
    ///
    /// # Errors
    /// The key is absent or of another type, or an item is not UTF-8.
    pub fn strings(&self, key: &str) -> Result<Vec<&str>> {
        let array = self.array(key, "strings", &[ValueType::String])?;
        let mut cursor = Cursor::new(&self.slice()[array.range.clone()]);
        let mut items = Vec::with_capacity(array.len);
        for i in 0..array.len {
            let range = cursor.string().map_err(|e| self.error(e))?;
            let bytes = &self.slice()[array.range.clone()][range];
            items.push(
                std::str::from_utf8(bytes).map_err(|_| {
                    self.error(format!("key {}: item {i} is not UTF-8", shown(key)))
                })?,
            );
        }
        Ok(items)
    }

    /// The numbers of an array of 32-bit floats or integers. O(items).
    ///
    /// # Errors
    /// The key is absent or of another type.
    pub fn floats(&self, key: &str) -> Result<Vec<f32>> {
        let array = self.array(key, "numbers", &[ValueType::F32, ValueType::I32])?;
        let (words, _) = self.slice()[array.range.clone()].as_chunks::<4>();
        Ok(match array.item {
            ValueType::F32 => words.iter().map(|w| f32::from_le_bytes(*w)).collect(),
            _ => words
                .iter()
                .map(|w| i32::from_le_bytes(*w) as f32)
                .collect(),
        })
    }

    /// The numbers of an array of 32-bit integers. O(items).
    ///
    /// # Errors
    /// The key is absent or of another type.
    pub fn integers(&self, key: &str) -> Result<Vec<i32>> {
        let array = self.array(key, "integers", &[ValueType::I32, ValueType::U32])?;
        let (words, _) = self.slice()[array.range.clone()].as_chunks::<4>();
        Ok(words.iter().map(|w| i32::from_le_bytes(*w)).collect())
    }

    /// The items of an array as values. O(items).
    pub fn items(&self, array: &ArrayInfo) -> Vec<Value> {
        let mut cursor = Cursor::new(self.slice());
        cursor.at = array.range.start;
        (0..array.len)
            .map_while(|_| cursor.value(array.item, 0).ok())
            .collect()
    }

    /// The text of a [`Value::String`]; bytes that are not UTF-8 become U+FFFD.
    pub fn text(&self, range: &Range<usize>) -> Cow<'_, str> {
        String::from_utf8_lossy(self.slice().get(range.clone()).unwrap_or_default())
    }

    fn slice(&self) -> &[u8] {
        self.bytes.as_slice()
    }

    fn array(&self, key: &str, what: &str, items: &[ValueType]) -> Result<&ArrayInfo> {
        match self.get(key) {
            None => Err(self.error(format!("key {} is absent", shown(key)))),
            Some(Value::Array(array)) if items.contains(&array.item) => Ok(array),
            Some(_) => Err(self.error(format!("key {} is not an array of {what}", shown(key)))),
        }
    }

    fn error(&self, what: String) -> GgufError {
        GgufError(format!("{}: {what}", self.path))
    }
}

/// A name from the file, quoted, escaped and cut, so that a message stays one line.
fn shown(name: &str) -> String {
    let mut quoted = format!("{:?}", name.chars().take(80).collect::<String>());
    if name.chars().nth(80).is_some() {
        quoted.push_str("...");
    }
    quoted
}

type Parsed<T> = std::result::Result<T, String>;

type Metadata = Vec<(String, Value)>;

fn parse(bytes: &[u8]) -> Parsed<(Metadata, Vec<TensorInfo>)> {
    let mut cursor = Cursor::new(bytes);
    if cursor.take(4).ok() != Some(b"GGUF".as_slice()) {
        return Err("is not a GGUF file (the first four bytes are not GGUF)".to_owned());
    }
    let version = cursor.u32()?;
    if version.swap_bytes() <= 3 && version != 0 {
        return Err("is big-endian GGUF, which is not read".to_owned());
    }
    if !(2..=3).contains(&version) {
        return Err(format!("is GGUF version {version}; 2 and 3 are read"));
    }
    let num_tensors = cursor.u64()?;
    let num_keys = cursor.u64()?;

    // A key takes 13 bytes at least (length, type, one byte of value), a tensor 24.
    let mut metadata = cursor.vec_for(num_keys, 13, "metadata keys")?;
    for i in 0..num_keys {
        let key = cursor
            .name()
            .map_err(|e| format!("metadata key {i} of {num_keys}: {e}"))?;
        let value = cursor
            .typed_value()
            .map_err(|e| format!("key {}: {e}", shown(&key)))?;
        metadata.push((key, value));
    }
    let alignment = match metadata.iter().find(|(key, _)| key == "general.alignment") {
        None => DEFAULT_ALIGNMENT,
        Some((_, Value::Unsigned(n))) if n.is_power_of_two() && *n <= 1 << 20 => *n,
        Some(_) => return Err("key \"general.alignment\": is not a power of two".to_owned()),
    };

    let mut tensors: Vec<TensorInfo> = cursor.vec_for(num_tensors, 24, "tensors")?;
    for i in 0..num_tensors {
        let name = cursor
            .name()
            .map_err(|e| format!("tensor {i} of {num_tensors}: {e}"))?;
        let tensor = cursor
            .tensor(&name, alignment)
            .map_err(|e| format!("tensor {}: {e}", shown(&name)))?;
        tensors.push(tensor);
    }

    // Offsets in the file count from the end of the header, rounded up.
    let base = (cursor.at as u64).next_multiple_of(alignment);
    for tensor in &mut tensors {
        let end = base
            .checked_add(tensor.offset)
            .and_then(|start| start.checked_add(tensor.num_bytes));
        match end {
            Some(end) if end <= bytes.len() as u64 => tensor.offset += base,
            // A tensor without bytes has no place to check.
            _ if tensor.num_bytes == 0 => tensor.offset = 0,
            _ => {
                return Err(format!(
                    "tensor {}: its {} bytes at offset {} pass the end of the file ({} bytes): \
                     cut short or damaged",
                    shown(&tensor.name),
                    tensor.num_bytes,
                    tensor.offset,
                    bytes.len()
                ));
            }
        }
    }
    Ok((metadata, tensors))
}

/// A reading position in untrusted bytes; every read is checked.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    /// An empty vector for `count` items of at least `min_bytes` bytes each in the file.
    fn vec_for<T>(&self, count: u64, min_bytes: u64, what: &str) -> Parsed<Vec<T>> {
        match count.checked_mul(min_bytes) {
            Some(n) if n <= self.left() as u64 => Ok(Vec::with_capacity(count as usize)),
            _ => Err(format!(
                "claims {count} {what}, more than its {} remaining bytes can hold",
                self.left()
            )),
        }
    }

    fn take(&mut self, len: usize) -> Parsed<&'a [u8]> {
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

    fn u32(&mut self) -> Parsed<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Parsed<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// The place of a length-prefixed string.
    fn string(&mut self) -> Parsed<Range<usize>> {
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

    fn name(&mut self) -> Parsed<String> {
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

    fn typed_value(&mut self) -> Parsed<Value> {
        let kind = self.value_type()?;
        self.value(kind, 0)
    }

    fn value(&mut self, kind: ValueType, depth: usize) -> Parsed<Value> {
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
    fn tensor(&mut self, name: &str, alignment: u64) -> Parsed<TensorInfo> {
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
