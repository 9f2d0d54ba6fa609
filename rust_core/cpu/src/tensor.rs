//! Rows and RowsMut: a matrix by address, as the binding passes it.

use crate::float::{DType, bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
use crate::level::Level;
use crate::pool;
use crate::simd::{Kernel, Simd};

/// A matrix that is read: `rows` x `cols` elements, rows `stride` elements apart.
#[derive(Clone, Copy)]
pub struct Rows {
    /// First element.
    pub ptr: *const u8,
    /// Element type.
    pub dtype: DType,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Elements from one row to the next.
    pub stride: usize,
}

/// A matrix that is written.
#[derive(Clone, Copy)]
pub struct RowsMut {
    /// First element.
    pub ptr: *mut u8,
    /// Element type.
    pub dtype: DType,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Elements from one row to the next.
    pub stride: usize,
}

// SAFETY: they only name memory; whoever reads or writes it vouches that it may, in `unsafe` code.
unsafe impl Sync for Rows {}
// SAFETY: as above.
unsafe impl Send for Rows {}
// SAFETY: as above; tasks write disjoint parts.
unsafe impl Sync for RowsMut {}
// SAFETY: as above.
unsafe impl Send for RowsMut {}

impl Rows {
    /// One row of floats.
    pub fn vector(values: &[f32]) -> Rows {
        Rows::new(values.as_ptr().cast(), DType::F32, 1, values.len())
    }

    /// Contiguous rows.
    pub fn new(ptr: *const u8, dtype: DType, rows: usize, cols: usize) -> Rows {
        Rows {
            ptr,
            dtype,
            rows,
            cols,
            stride: cols,
        }
    }

    /// Address of an element.
    ///
    /// # Safety
    /// The element, or one past the last, exists.
    #[inline(always)]
    pub unsafe fn at(&self, row: usize, col: usize) -> *const u8 {
        // SAFETY: the caller's.
        unsafe { self.ptr.add((row * self.stride + col) * self.dtype.size()) }
    }

    /// A float32 copy at `out` with rows of `stride` >= cols elements, padded with zeros.
    ///
    /// # Safety
    /// This describes valid memory, and `out` holds rows * stride floats.
    pub unsafe fn to_f32(self, level: Level, out: *mut f32, stride: usize) -> Rows {
        let out = RowsMut {
            ptr: out.cast(),
            dtype: DType::F32,
            rows: self.rows,
            cols: stride,
            stride,
        };
        let step = (32_768 / stride.max(1)).max(1);
        pool::run(self.rows.div_ceil(step), |task| {
            let rows = task * step..((task + 1) * step).min(self.rows);
            // SAFETY: the caller's; tasks write disjoint rows.
            unsafe { level.run(Convert { x: self, out, rows }) };
        });
        Rows {
            ptr: out.ptr,
            dtype: DType::F32,
            stride,
            ..self
        }
    }
}

impl RowsMut {
    /// The same matrix, to read.
    pub fn read(self) -> Rows {
        Rows {
            ptr: self.ptr,
            dtype: self.dtype,
            rows: self.rows,
            cols: self.cols,
            stride: self.stride,
        }
    }

    /// Contiguous rows.
    pub fn new(ptr: *mut u8, dtype: DType, rows: usize, cols: usize) -> RowsMut {
        RowsMut {
            ptr,
            dtype,
            rows,
            cols,
            stride: cols,
        }
    }

    /// Address of an element.
    ///
    /// # Safety
    /// The element, or one past the last, exists.
    #[inline(always)]
    pub unsafe fn at(&self, row: usize, col: usize) -> *mut u8 {
        // SAFETY: the caller's.
        unsafe { self.ptr.add((row * self.stride + col) * self.dtype.size()) }
    }
}

/// Memory of which every task writes a part of its own.
#[derive(Clone, Copy)]
pub(crate) struct Shared<T>(pub *mut T);

impl<T> Shared<T> {
    /// # Safety
    /// The element, or one past the last, exists.
    #[inline(always)]
    pub(crate) unsafe fn at(self, i: usize) -> *mut T {
        // SAFETY: the caller's.
        unsafe { self.0.add(i) }
    }
}

// SAFETY: it only names memory; whoever writes it vouches that no other task does.
unsafe impl<T> Sync for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Send for Shared<T> {}

/// Rows of x as float32 rows of `out`, padded with zeros.
pub struct Convert {
    /// Source.
    pub x: Rows,
    /// float32, at least as many columns.
    pub out: RowsMut,
    /// Range of rows.
    pub rows: std::ops::Range<usize>,
}

impl Kernel for Convert {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        for row in self.rows {
            // SAFETY: `to_f32`'s contract.
            unsafe {
                let (from, to) = (self.x.at(row, 0), self.out.at(row, 0).cast::<f32>());
                let mut i = 0;
                while i < self.out.cols {
                    let valid = self.x.cols.saturating_sub(i).min(S::LANES);
                    let v = load_some(s, from.add(i * self.x.dtype.size()), self.x.dtype, valid);
                    s.store_first(to.add(i), v, self.out.cols - i);
                    i += S::LANES;
                }
            }
        }
    }
}

/// One element as float32.
///
/// # Safety
/// It exists.
#[inline(always)]
pub unsafe fn load_one(p: *const u8, dtype: DType) -> f32 {
    // SAFETY: the caller's; any alignment.
    unsafe {
        match dtype {
            DType::F32 => p.cast::<f32>().read_unaligned(),
            DType::Bf16 => bf16_to_f32(p.cast::<u16>().read_unaligned()),
            DType::F16 => f16_to_f32(p.cast::<u16>().read_unaligned()),
        }
    }
}

/// Write one float32 as an element.
///
/// # Safety
/// It exists.
#[inline(always)]
pub unsafe fn store_one(p: *mut u8, dtype: DType, x: f32) {
    // SAFETY: the caller's; any alignment.
    unsafe {
        match dtype {
            DType::F32 => p.cast::<f32>().write_unaligned(x),
            DType::Bf16 => p.cast::<u16>().write_unaligned(f32_to_bf16(x)),
            DType::F16 => p.cast::<u16>().write_unaligned(f32_to_f16(x)),
        }
    }
}

/// The first `n` elements at p (at most LANES are read), zero in the other lanes.
///
/// # Safety
/// min(n, LANES) elements exist.
#[inline(always)]
pub unsafe fn load_some<S: Simd>(s: S, p: *const u8, dtype: DType, n: usize) -> S::V {
    // SAFETY: the caller's; `lanes` holds LANES <= 16.
    unsafe {
        if n >= S::LANES {
            return match dtype {
                DType::F32 => s.load(p.cast()),
                DType::Bf16 => s.load_bf16(p.cast()),
                DType::F16 => s.load_f16(p.cast()),
            };
        }
        let mut lanes = [0.0f32; 16];
        for (i, lane) in lanes.iter_mut().enumerate().take(n) {
            *lane = load_one(p.add(i * dtype.size()), dtype);
        }
        s.load(lanes.as_ptr())
    }
}

/// Store the first min(n, LANES) lanes as elements at p.
///
/// # Safety
/// They exist.
#[inline(always)]
pub unsafe fn store_some<S: Simd>(s: S, p: *mut u8, dtype: DType, v: S::V, n: usize) {
    // SAFETY: the caller's; `lanes` holds LANES <= 16.
    unsafe {
        if n >= S::LANES {
            return match dtype {
                DType::F32 => s.store(p.cast(), v),
                DType::Bf16 => s.store_bf16(p.cast(), v),
                DType::F16 => s.store_f16(p.cast(), v),
            };
        }
        let mut lanes = [0.0f32; 16];
        s.store(lanes.as_mut_ptr(), v);
        for (i, &lane) in lanes.iter().enumerate().take(n) {
            store_one(p.add(i * dtype.size()), dtype, lane);
        }
    }
}
