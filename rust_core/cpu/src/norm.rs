//! rms_norm and layer_norm over rows, with the residual added first if there is one.
//!
//! Memory-bound: two or three passes over a row that stays in the first-level cache.

use std::ops::Range;

use crate::level::Level;
use crate::pool;
use crate::simd::{Kernel, Simd};
use crate::tensor::{Rows, RowsMut, load_some, store_some};

/// Elements below which one thread does the work sooner than two.
const SERIAL: usize = 1 << 15;

/// Kind of norm: its divisor, and its addends.
#[derive(Clone, Copy)]
pub enum Norm {
    /// Root mean square; this is added to the weight.
    Rms {
        /// 1 for Gemma.
        weight_offset: f32,
    },
    /// Mean and deviation; the bias [1, D] is added.
    Layer {
        /// None: nothing.
        bias: Option<Rows>,
    },
}

/// y [T, D] = norm(x + residual) * weight [1, D]; the sum, rounded to x's type, replaces residual.
///
/// # Safety
/// All describe valid memory of these shapes; residual has x's dtype; nothing that is written
/// overlaps anything else.
pub unsafe fn norm(
    level: Level,
    x: Rows,
    residual: Option<RowsMut>,
    weight: Rows,
    kind: Norm,
    eps: f32,
    y: RowsMut,
) {
    assert!(x.rows == y.rows && x.cols == y.cols && weight.cols == x.cols);
    assert!(residual.is_none_or(|r| r.rows == x.rows && r.cols == x.cols && r.dtype == x.dtype));
    if let Norm::Layer { bias: Some(b) } = kind {
        assert!(b.cols == x.cols);
    }
    let step = (SERIAL / x.cols.max(1)).max(1);
    pool::run(x.rows.div_ceil(step), |task| {
        let rows = task * step..((task + 1) * step).min(x.rows);
        // SAFETY: the caller's; tasks take disjoint rows.
        unsafe {
            level.run(NormTask {
                x,
                residual,
                weight,
                kind,
                eps,
                y,
                rows,
            });
        }
    });
}

struct NormTask {
    x: Rows,
    residual: Option<RowsMut>,
    weight: Rows,
    kind: Norm,
    eps: f32,
    y: RowsMut,
    rows: Range<usize>,
}

impl Kernel for NormTask {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let cols = self.x.cols;
        let size = self.x.dtype.size();
        let dtype = self.x.dtype;
        for row in self.rows {
            // SAFETY: `norm`'s contract.
            unsafe {
                let mut x = self.x.at(row, 0);
                if let Some(residual) = self.residual {
                    let r = residual.at(row, 0);
                    let mut i = 0;
                    while i < cols {
                        let a = load_some(s, x.add(i * size), dtype, cols - i);
                        let b = load_some(s, r.add(i * size), dtype, cols - i);
                        store_some(s, r.add(i * size), dtype, s.add(a, b), cols - i);
                        i += S::LANES;
                    }
                    x = r;
                }
                let mut mean = 0.0;
                if matches!(self.kind, Norm::Layer { .. }) {
                    let mut sum = s.zero();
                    let mut i = 0;
                    while i < cols {
                        sum = s.add(sum, load_some(s, x.add(i * size), dtype, cols - i));
                        i += S::LANES;
                    }
                    mean = s.sum(sum) / cols as f32;
                }
                let center = s.splat(mean);
                let mut squares = [s.zero(); 2];
                let mut i = 0;
                while i + 2 * S::LANES <= cols {
                    for (j, square) in squares.iter_mut().enumerate() {
                        let at = x.add((i + j * S::LANES) * size);
                        let v = s.sub(load_some(s, at, dtype, S::LANES), center);
                        *square = s.fma(v, v, *square);
                    }
                    i += 2 * S::LANES;
                }
                let mut total = s.sum(s.add(squares[0], squares[1]));
                while i < cols {
                    let v = crate::tensor::load_one(x.add(i * size), dtype) - mean;
                    total += v * v;
                    i += 1;
                }
                let scale = s.splat(1.0 / (total / cols as f32 + self.eps).sqrt());
                let mut i = 0;
                while i < cols {
                    let v = s.sub(load_some(s, x.add(i * size), dtype, cols - i), center);
                    let w = load_some(s, self.weight.at(0, i), self.weight.dtype, cols - i);
                    let v = s.mul(v, scale);
                    let v = match self.kind {
                        Norm::Rms { weight_offset } => s.mul(v, s.add(w, s.splat(weight_offset))),
                        Norm::Layer { bias: None } => s.mul(v, w),
                        Norm::Layer { bias: Some(b) } => {
                            s.fma(v, w, load_some(s, b.at(0, i), b.dtype, cols - i))
                        }
                    };
                    store_some(s, self.y.at(row, i), self.y.dtype, v, cols - i);
                    i += S::LANES;
                }
            }
        }
    }
}
