//! A file's header: its metadata and its tensors, parsed in order.

use super::cursor::{Cursor, Parsed, shown};
use super::value::{TensorInfo, Value};

const DEFAULT_ALIGNMENT: u64 = 32;

pub(super) type Metadata = Vec<(String, Value)>;

/// Every key and every tensor, whose offsets are from the start of the file.
pub(super) fn parse(bytes: &[u8]) -> Parsed<(Metadata, Vec<TensorInfo>)> {
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
