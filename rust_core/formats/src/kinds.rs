//! TensorKind: the size of every kind of tensor that a GGUF file may hold.

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

/// Every kind of known size; `dequantize` reads those of weights.
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

/// Kinds that no file holds: weights of safetensors files as rows of blocks (`kernels/cpu/blocks.py`).
/// A block has a float32 factor, two for FP4_16; a zero point for INT; and a byte for each element.
const ROW_KINDS: &[TensorKind] = &[
    kind(NO_ID, "INT4_32", 32, 4 + 1 + 32),
    kind(NO_ID, "INT4_128", 128, 4 + 1 + 128),
    kind(NO_ID, "INT8_32", 32, 4 + 1 + 32),
    kind(NO_ID, "INT8_128", 128, 4 + 1 + 128),
    kind(NO_ID, "FP8_32", 32, 4 + 32),
    kind(NO_ID, "FP8_128", 128, 4 + 128),
    kind(NO_ID, "FP4_16", 32, 8 + 32),
    kind(NO_ID, "NF4_64", 64, 4 + 64),
];

/// Of a kind that no file holds.
const NO_ID: u32 = u32::MAX;

/// The kind of this name.
///
/// # Panics
/// When there is none.
pub(crate) const fn named(name: &str) -> TensorKind {
    match (find(TENSOR_KINDS, name), find(ROW_KINDS, name)) {
        (Some(kind), _) | (None, Some(kind)) => kind,
        (None, None) => panic!("a kind of the tables"),
    }
}

const fn find(kinds: &[TensorKind], name: &str) -> Option<TensorKind> {
    let mut i = 0;
    while i < kinds.len() {
        let (a, b) = (kinds[i].name.as_bytes(), name.as_bytes());
        let mut same = 0;
        while same < a.len() && same < b.len() && a[same] == b[same] {
            same += 1;
        }
        if same == a.len() && same == b.len() {
            return Some(kinds[i]);
        }
        i += 1;
    }
    None
}
