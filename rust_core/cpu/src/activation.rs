//! Activation: elementwise functions, alone or gating the other half of a row.

use std::ops::Range;

use crate::level::Level;
use crate::pool;
use crate::simd::{Kernel, Simd};
use crate::tensor::{Rows, RowsMut, load_some, store_some};

/// Elements a task: below this one thread does the work sooner than two.
const SERIAL: usize = 1 << 13;

/// An activation function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// x sigmoid(x)
    Silu,
    /// With the error function.
    Gelu,
    /// With the hyperbolic tangent.
    GeluTanh,
    /// max(x, 0)
    Relu,
    /// max(x, 0) squared
    Relu2,
    /// min(x, 7) sigmoid(1.702 min(x, 7)), and as a gate times 1 + the other half within 7: gpt-oss.
    ClampedSwiglu,
}

/// Bound of what a clamped SwiGLU takes, and the gain of its sigmoid.
const CLAMP: f32 = 7.0;
const CLAMPED_GAIN: f32 = 1.702;

impl Activation {
    /// From the op set's name.
    pub fn parse(name: &str) -> Option<Activation> {
        Some(match name {
            "silu" => Activation::Silu,
            "gelu" => Activation::Gelu,
            "gelu_tanh" | "gelu_new" => Activation::GeluTanh,
            "relu" => Activation::Relu,
            "relu2" => Activation::Relu2,
            "swiglu_clamped" => Activation::ClampedSwiglu,
            _ => return None,
        })
    }

    #[inline(always)]
    pub(super) fn apply<S: Simd>(self, s: S, x: S::V) -> S::V {
        let half = s.splat(0.5);
        match self {
            Activation::Silu => s.mul(x, s.sigmoid(x)),
            Activation::Gelu => {
                let e = s.erf(s.mul(x, s.splat(std::f32::consts::FRAC_1_SQRT_2)));
                s.mul(s.mul(x, half), s.add(e, s.splat(1.0)))
            }
            Activation::GeluTanh => {
                let cube = s.mul(s.mul(x, x), x);
                let inner = s.fma(cube, s.splat(0.044_715), x);
                let t = s.tanh(s.mul(inner, s.splat(0.797_884_6)));
                s.mul(s.mul(x, half), s.add(t, s.splat(1.0)))
            }
            Activation::Relu => s.max(x, s.zero()),
            Activation::Relu2 => {
                let x = s.max(x, s.zero());
                s.mul(x, x)
            }
            Activation::ClampedSwiglu => {
                let x = s.min(x, s.splat(CLAMP));
                s.mul(x, s.sigmoid(s.mul(x, s.splat(CLAMPED_GAIN))))
            }
        }
    }

    /// The gate's activation times the other half of the row.
    #[inline(always)]
    fn gate<S: Simd>(self, s: S, gate: S::V, up: S::V) -> S::V {
        let up = if self == Activation::ClampedSwiglu {
            let up = s.max(s.min(up, s.splat(CLAMP)), s.splat(-CLAMP));
            s.add(up, s.splat(1.0))
        } else {
            up
        };
        s.mul(self.apply(s, gate), up)
    }
}

/// y [T, F] = f(x [T, F]), or f(x[:, ..F]) * x[:, F..] for x [T, 2F] if `gated`.
///
/// # Safety
/// x and y describe valid memory that does not overlap, or, unless `gated`, is the same.
pub unsafe fn activation(level: Level, kind: Activation, gated: bool, x: Rows, y: RowsMut) {
    assert!(x.rows == y.rows && x.cols == y.cols * (1 + usize::from(gated)));
    // Short rows go several to a task, long ones are cut.
    let rows_step = (SERIAL / y.cols.max(1)).max(1);
    let cols_step = if rows_step == 1 { SERIAL } else { y.cols };
    let cols_tasks = y.cols.div_ceil(cols_step.max(1));
    pool::run(x.rows.div_ceil(rows_step) * cols_tasks, |task| {
        let (row, col) = (task / cols_tasks * rows_step, task % cols_tasks * cols_step);
        let rows = row..(row + rows_step).min(x.rows);
        let cols = col..(col + cols_step).min(y.cols);
        // SAFETY: the caller's; tasks write disjoint parts.
        unsafe {
            level.run(ActivationTask {
                kind,
                gated,
                x,
                y,
                rows,
                cols,
            });
        }
    });
}

struct ActivationTask {
    kind: Activation,
    gated: bool,
    x: Rows,
    y: RowsMut,
    rows: Range<usize>,
    cols: Range<usize>,
}

impl Kernel for ActivationTask {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let (x, y) = (self.x, self.y);
        for row in self.rows {
            let mut i = self.cols.start;
            while i < self.cols.end {
                let left = self.cols.end - i;
                // SAFETY: `activation`'s contract.
                unsafe {
                    let v = load_some(s, x.at(row, i), x.dtype, left);
                    let v = if self.gated {
                        let up = load_some(s, x.at(row, y.cols + i), x.dtype, left);
                        self.kind.gate(s, v, up)
                    } else {
                        self.kind.apply(s, v)
                    };
                    store_some(s, y.at(row, i), y.dtype, v, left);
                }
                i += S::LANES;
            }
        }
    }
}
