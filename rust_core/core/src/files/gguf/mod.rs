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

mod cursor;
mod header;
mod value;

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::path::Path;

use memmap2::Mmap;
use octavo_formats::dequantize::dequantize;

use self::cursor::{Cursor, shown};
use self::header::{Metadata, parse};
pub use self::value::{ArrayInfo, TensorInfo, Value, ValueType};

/// An error in a GGUF file, in one line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufError(pub String);

impl fmt::Display for GgufError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for GgufError {}

type Result<T> = std::result::Result<T, GgufError>;

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

    /// Join the open files of a split checkpoint, as [`GgufFile::open_split`].
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

    /// Check a file's place in its checkpoint. A whole one has no keys, or a count of 1.
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
        dequantize(tensor.kind, self.data(name)?, out)
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

    /// The bytes of an array of them. None if absent or another type. O(1).
    pub fn bytes(&self, key: &str) -> Option<&[u8]> {
        match self.get(key)? {
            Value::Array(array) if matches!(array.item, ValueType::U8 | ValueType::I8) => {
                Some(&self.slice()[array.range.clone()])
            }
            _ => None,
        }
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
