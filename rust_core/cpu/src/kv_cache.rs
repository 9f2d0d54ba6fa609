//! Cache: one layer's keys or values in blocks, of floats or of a byte an element with a scale a row.
//!
//! In memory each head of a block has its rows and, where elements are bytes, a float32 a row behind
//! them, by which the row's elements are multiplied: `kernels/kv_cache.py` makes such caches.

use crate::float::{DType, f32_to_e4m3, f32_to_e5m2};
use crate::simd::Simd;
use crate::tensor::load_some;

/// Largest head.
pub const MAX_HEAD_DIM: usize = 640;
/// Bytes of a row's scale.
const SCALE: usize = size_of::<f32>();
/// The least row's largest element, of rows of zeros too.
const LEAST: f32 = 1e-12;
/// Most lanes of a vector.
const MAX_LANES: usize = 16;

/// The type of a cache's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheType {
    /// Without scales.
    Float(DType),
    /// A byte.
    Scaled(Byte),
}

/// The types of a byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Byte {
    /// Whole numbers from -127 to 127.
    Int8,
    /// Floats of 4 bits of exponent and 3 of mantissa, to 448.
    E4m3,
    /// Floats of 5 bits of exponent and 2 of mantissa, to 57344.
    E5m2,
}

impl CacheType {
    /// Bytes of one element.
    #[inline(always)]
    pub fn size(self) -> usize {
        match self {
            CacheType::Float(dtype) => dtype.size(),
            CacheType::Scaled(_) => 1,
        }
    }
}

impl Byte {
    /// The largest number that is used.
    fn largest(self) -> f32 {
        match self {
            Byte::Int8 => 127.0,
            Byte::E4m3 => 448.0,
            Byte::E5m2 => 57_344.0,
        }
    }

    /// The value of an element, in units of those that `Elements::load` gives.
    pub(crate) fn unit(self) -> f32 {
        match self {
            Byte::E4m3 => 256.0,
            Byte::Int8 | Byte::E5m2 => 1.0,
        }
    }

    /// Store the first min(n, LANES) lanes of v, numbers of this type's range.
    ///
    /// # Safety
    /// They exist.
    #[inline(always)]
    unsafe fn store<S: Simd>(self, s: S, p: *mut u8, v: S::V, n: usize) {
        let mut bytes = [0u8; MAX_LANES];
        let mut lanes = [0.0f32; MAX_LANES];
        // SAFETY: the caller's; both hold LANES.
        unsafe {
            if self == Byte::Int8 {
                s.store_i8(bytes.as_mut_ptr().cast(), s.round(v));
            } else {
                s.store(lanes.as_mut_ptr(), v);
                let round = match self {
                    Byte::E5m2 => f32_to_e5m2,
                    _ => f32_to_e4m3,
                };
                for (byte, &lane) in bytes.iter_mut().zip(&lanes) {
                    *byte = round(lane);
                }
            }
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), p, n.min(S::LANES));
        }
    }
}

/// A way to read elements, so that a kernel is compiled for each type of a byte.
pub(crate) trait Elements: Copy {
    /// Bytes of one.
    fn size(self) -> usize;
    /// The first `n` elements at p (at most LANES are read), zero in the other lanes; of bytes
    /// without their scale, over `Byte::unit`.
    ///
    /// # Safety
    /// min(n, LANES) elements exist.
    unsafe fn load<S: Simd>(self, s: S, p: *const u8, n: usize) -> S::V;
}

/// `DType` as types.
#[derive(Clone, Copy)]
pub(crate) struct F32;
#[derive(Clone, Copy)]
pub(crate) struct Bf16;
#[derive(Clone, Copy)]
pub(crate) struct F16;

macro_rules! elements_of_floats {
    ($name:ident, $dtype:expr) => {
        impl Elements for $name {
            #[inline(always)]
            fn size(self) -> usize {
                $dtype.size()
            }
            #[inline(always)]
            unsafe fn load<S: Simd>(self, s: S, p: *const u8, n: usize) -> S::V {
                // SAFETY: the caller's.
                unsafe { load_some(s, p, $dtype, n) }
            }
        }
    };
}

elements_of_floats!(F32, DType::F32);
elements_of_floats!(Bf16, DType::Bf16);
elements_of_floats!(F16, DType::F16);

/// `Byte` as types.
#[derive(Clone, Copy)]
pub(crate) struct Int8;
#[derive(Clone, Copy)]
pub(crate) struct E4m3;
#[derive(Clone, Copy)]
pub(crate) struct E5m2;

macro_rules! elements_of_a_byte {
    ($name:ident, $load:ident) => {
        impl Elements for $name {
            #[inline(always)]
            fn size(self) -> usize {
                1
            }
            #[inline(always)]
            unsafe fn load<S: Simd>(self, s: S, p: *const u8, n: usize) -> S::V {
                // SAFETY: the caller's; the copy has LANES.
                unsafe {
                    if n >= S::LANES {
                        return s.$load(p.cast());
                    }
                    let mut bytes = [0u8; MAX_LANES];
                    std::ptr::copy_nonoverlapping(p, bytes.as_mut_ptr(), n);
                    s.$load(bytes.as_ptr().cast())
                }
            }
        }
    };
}

elements_of_a_byte!(Int8, load_i8);
elements_of_a_byte!(E4m3, load_e4m3);
elements_of_a_byte!(E5m2, load_e5m2);

/// One layer's keys or values: [num_blocks, num_kv_heads, block_size, head_dim], a head's rows
/// contiguous.
#[derive(Clone, Copy)]
pub struct Cache {
    /// First element.
    pub ptr: *mut u8,
    /// Type of the elements.
    pub dtype: CacheType,
    /// Blocks.
    pub num_blocks: usize,
    /// Heads.
    pub num_kv_heads: usize,
    /// Tokens in a block.
    pub block_size: usize,
    /// Elements of a token of a head.
    pub head_dim: usize,
    /// Elements from one block to the next.
    pub block_stride: usize,
}

// SAFETY: it only names memory; whoever reads or writes it vouches that it may, in `unsafe` code.
unsafe impl Sync for Cache {}
// SAFETY: as above.
unsafe impl Send for Cache {}

impl Cache {
    /// Elements from a block's head to the next.
    #[inline(always)]
    pub fn head_stride(&self) -> usize {
        let scale = match self.dtype {
            CacheType::Float(_) => 0,
            CacheType::Scaled(_) => SCALE,
        };
        self.block_size * (self.head_dim + scale)
    }

    /// Address of a token of a head.
    ///
    /// # Safety
    /// The indices are in range.
    #[inline(always)]
    pub unsafe fn at(&self, block: usize, head: usize, offset: usize) -> *mut u8 {
        let element =
            block * self.block_stride + head * self.head_stride() + offset * self.head_dim;
        // SAFETY: the caller's.
        unsafe { self.ptr.add(element * self.dtype.size()) }
    }

    /// Address of its scale; those of a head's tokens follow one another, at any alignment.
    ///
    /// # Safety
    /// The indices are in range; elements are of a byte.
    #[inline(always)]
    pub(crate) unsafe fn scale_at(&self, block: usize, head: usize, offset: usize) -> *mut f32 {
        let head = block * self.block_stride + head * self.head_stride();
        let byte = head + self.block_size * self.head_dim + offset * SCALE;
        // SAFETY: the caller's.
        unsafe { self.ptr.add(byte).cast() }
    }

    /// Store a row in bytes, of `scale` or, where that is None, of the row's own.
    ///
    /// # Safety
    /// The indices are in range; `row` has head_dim floats; nobody else uses this row of the cache.
    #[inline(always)]
    pub(crate) unsafe fn store_bytes<S: Simd>(
        &self,
        s: S,
        byte: Byte,
        place: (usize, usize, usize),
        row: *const f32,
        scale: Option<f32>,
    ) {
        let (block, head, offset) = place;
        let largest = byte.largest();
        // SAFETY: the caller's.
        unsafe {
            let scale = scale.unwrap_or_else(|| {
                let mut most = s.zero();
                for i in (0..self.head_dim).step_by(S::LANES) {
                    let v = s.load_first(row.add(i), self.head_dim - i);
                    most = s.max(most, s.max(v, s.sub(s.zero(), v)));
                }
                s.hmax(most).max(LEAST) / largest
            });
            self.scale_at(block, head, offset).write_unaligned(scale);
            let to = self.at(block, head, offset);
            // What is rounded beyond the largest number is no number.
            let (low, high) = (s.splat(-largest), s.splat(largest));
            for i in (0..self.head_dim).step_by(S::LANES) {
                let v = s.load_first(row.add(i), self.head_dim - i);
                let v = s.div(v, s.splat(scale));
                let v = s.min(s.max(v, low), high);
                byte.store(s, to.add(i), v, self.head_dim - i);
            }
        }
    }
}
