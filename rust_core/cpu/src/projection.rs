//! Projection: a weight with its bias, as the whole-model calls hold it.

use std::sync::Arc;

use crate::activation::{Activation, activation};
use crate::float::DType;
use crate::linear::int16::{Rounded, Words};
use crate::linear::{Linear, Rounding};
use crate::scratch::with_floats;
use crate::tensor::{Rows, RowsMut};

/// A weight [N, K].
pub enum Weight {
    /// As it is packed.
    Packed {
        /// The weight, which others may hold as well.
        linear: Arc<Linear>,
        /// The activations that quantized weights meet.
        rounding: Rounding,
    },
    /// Rounded to int16: see [`Words`].
    Rounded(Words),
}

/// A projection and its bias.
pub struct Projection {
    /// [N, K]
    pub weight: Weight,
    /// [N]
    pub bias: Option<Vec<f32>>,
}

impl Projection {
    /// Output features.
    pub fn n(&self) -> usize {
        match &self.weight {
            Weight::Packed { linear, .. } => linear.n(),
            Weight::Rounded(words) => words.n(),
        }
    }

    /// Input features.
    pub fn k(&self) -> usize {
        match &self.weight {
            Weight::Packed { linear, .. } => linear.k(),
            Weight::Rounded(words) => words.k(),
        }
    }

    /// Operations of one row.
    pub fn ops_per_row(&self) -> usize {
        2 * self.n() * self.k()
    }

    /// Bytes of the weight.
    pub fn nbytes(&self) -> usize {
        match &self.weight {
            Weight::Packed { linear, .. } => linear.nbytes(),
            Weight::Rounded(words) => words.nbytes(),
        }
    }

    /// # Errors
    /// When the weight is not n x k, or the bias has another length than n.
    pub(crate) fn check(&self, name: &str, n: usize, k: usize) -> Result<(), String> {
        let (found_n, found_k) = (self.n(), self.k());
        if (found_n, found_k) != (n, k) {
            return Err(format!("{name} is {found_n} x {found_k}, not {n} x {k}"));
        }
        match &self.bias {
            Some(bias) if bias.len() != n => Err(format!(
                "{name}'s bias has {} elements, not {n}",
                bias.len()
            )),
            _ => Ok(()),
        }
    }

    /// y [M, N] = f(x [M, K] W^T + bias), both contiguous float32.
    ///
    /// # Safety
    /// As [`Linear::forward`]; `check` found no fault.
    pub(crate) unsafe fn forward(&self, x: Rows, f: Option<Activation>, y: RowsMut) {
        debug_assert!(x.dtype == DType::F32 && y.dtype == DType::F32);
        // SAFETY: the caller's; the buffer holds the rounded rows.
        unsafe {
            match &self.weight {
                Weight::Packed { linear, rounding } => {
                    linear.forward(x, self.bias.as_deref().map(Rows::vector), y, *rounding);
                    if let Some(f) = f {
                        activation(linear.level(), f, false, y.read(), y);
                    }
                }
                Weight::Rounded(words) => {
                    let (rows, k) = (x.rows, x.cols);
                    with_floats(0, Rounded::floats(rows, k), |buffer| {
                        let x =
                            Rounded::round(words.level(), x.ptr.cast(), x.stride, rows, k, buffer);
                        words.forward(x, self.bias.as_deref(), f, y.ptr.cast(), y.stride);
                    });
                }
            }
        }
    }
}
