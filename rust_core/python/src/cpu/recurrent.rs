//! Ops of layers with a state, in float32.

use octavo_cpu::recurrent::{
    ConvArgs, DeltaArgs, ScanArgs, States, Steps, causal_conv, gated_delta_rule, selective_scan,
};
use pyo3::prelude::*;

use super::args::{Matrix, Vector};
use super::call::{level, run};
use crate::error::value_error;

pub(super) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(cpu_causal_conv, m)?)?;
    m.add_function(wrap_pyfunction!(cpu_gated_delta_rule, m)?)?;
    m.add_function(wrap_pyfunction!(cpu_selective_scan, m)?)
}

/// The requests of a step: slots, seq_lens, query_start_loc.
type StepTuple = (Vector, Vector, Vector);

/// # Safety
/// The vectors exist while the result is used.
unsafe fn steps<'a>((slots, seq_lens, starts): StepTuple) -> PyResult<Steps<'a>> {
    let requests = slots.len();
    // SAFETY: the caller's.
    unsafe {
        Ok(Steps {
            slots: slots.slice()?,
            seq_lens: seq_lens.of_len(requests)?.slice()?,
            query_start_loc: starts.of_len(requests + 1)?.slice()?,
        })
    }
}

/// # Safety
/// The states exist, and no one else uses them while the result is used.
unsafe fn states(matrix: Matrix) -> PyResult<States> {
    // SAFETY: the caller's.
    let all = unsafe { matrix.flat()?.slice_mut::<f32>()? };
    Ok(States {
        ptr: all.as_mut_ptr(),
        num_rows: matrix.rows(),
        row_len: matrix.cols(),
    })
}

/// state: [N, C * (K - 1)].
#[pyfunction]
#[pyo3(signature = (x, taps, bias, *, state, step, out))]
fn cpu_causal_conv(
    py: Python<'_>,
    x: Matrix,
    taps: Matrix,
    bias: Option<Vector>,
    state: Matrix,
    step: StepTuple,
    out: Matrix,
) -> PyResult<()> {
    let (level, channels) = (level()?, x.cols());
    let (taps, state) = (
        taps.of_shape(channels, taps.cols())?,
        state.of_shape(state.rows(), channels * taps.cols().saturating_sub(1))?,
    );
    // SAFETY: `kernels/cpu/recurrent.py` passes tensors that it holds, out a new one.
    unsafe {
        let bias = bias.map(|b| b.of_len(channels)?.slice()).transpose()?;
        let args = ConvArgs {
            x: x.flat()?.slice()?,
            taps: taps.flat()?.slice()?,
            bias,
            states: states(state)?,
            steps: steps(step)?,
            channels,
            out: out.like(x)?.flat()?.slice_mut()?.as_mut_ptr(),
        };
        let call = Call(args);
        run(py, 4 * x.rows() * taps.rows() * taps.cols(), 0, move || {
            causal_conv(level, call.args())
        })
        .map_err(value_error)
    }
}

/// state: [N, Hv * Dk * Dv].
#[pyfunction]
#[allow(clippy::too_many_arguments)] // the op's own
#[pyo3(signature = (qkv, *, a, b, decay, dt_bias, state, step, num_key_heads, key_dim, value_dim, beta_scale, out))]
fn cpu_gated_delta_rule(
    py: Python<'_>,
    qkv: Matrix,
    a: Matrix,
    b: Matrix,
    decay: Vector,
    dt_bias: Vector,
    state: Matrix,
    step: StepTuple,
    num_key_heads: usize,
    key_dim: usize,
    value_dim: usize,
    beta_scale: f32,
    out: Matrix,
) -> PyResult<()> {
    let (level, tokens, heads) = (level()?, qkv.rows(), decay.len());
    let values = heads * value_dim;
    let rates = if a.cols() == heads { 1 } else { key_dim };
    let qkv = qkv.of_shape(tokens, 2 * num_key_heads * key_dim + values)?;
    let state = state.of_shape(state.rows(), values * key_dim)?;
    // SAFETY: `kernels/cpu/recurrent.py` passes tensors that it holds, out a new one.
    unsafe {
        let args = DeltaArgs {
            qkv: qkv.flat()?.slice()?,
            a: a.of_shape(tokens, heads * rates)?.flat()?.slice()?,
            b: b.of_shape(tokens, heads)?.flat()?.slice()?,
            decay: decay.slice()?,
            dt_bias: dt_bias.of_len(heads * rates)?.slice()?,
            states: states(state)?,
            steps: steps(step)?,
            num_key_heads,
            key_dim,
            value_dim,
            beta_scale,
            out: out
                .of_shape(tokens, values)?
                .flat()?
                .slice_mut()?
                .as_mut_ptr(),
        };
        let call = Call(args);
        run(py, 8 * tokens * values * key_dim, 0, move || {
            gated_delta_rule(level, call.args())
        })
        .map_err(value_error)
    }
}

/// state: [N, H * P * S].
#[pyfunction]
#[allow(clippy::too_many_arguments)] // the op's own
#[pyo3(signature = (xbc, *, dt, decay, dt_bias, skip, state, step, num_groups, head_dim, state_size, dt_limits, out))]
fn cpu_selective_scan(
    py: Python<'_>,
    xbc: Matrix,
    dt: Matrix,
    decay: Vector,
    dt_bias: Vector,
    skip: Vector,
    state: Matrix,
    step: StepTuple,
    num_groups: usize,
    head_dim: usize,
    state_size: usize,
    dt_limits: (f32, f32),
    out: Matrix,
) -> PyResult<()> {
    let (level, tokens, heads) = (level()?, xbc.rows(), dt_bias.len());
    let columns = if decay.len() == heads { 1 } else { state_size };
    let inner = heads * head_dim;
    let xbc = xbc.of_shape(tokens, inner + 2 * num_groups * state_size)?;
    let state = state.of_shape(state.rows(), inner * state_size)?;
    // SAFETY: `kernels/cpu/recurrent.py` passes tensors that it holds, out a new one.
    unsafe {
        let args = ScanArgs {
            xbc: xbc.flat()?.slice()?,
            dt: dt.of_shape(tokens, heads)?.flat()?.slice()?,
            decay: decay.of_len(heads * columns)?.slice()?,
            dt_bias: dt_bias.slice()?,
            skip: skip.of_len(heads)?.slice()?,
            states: states(state)?,
            steps: steps(step)?,
            num_groups,
            head_dim,
            state_size,
            dt_limits,
            out: out
                .of_shape(tokens, inner)?
                .flat()?
                .slice_mut()?
                .as_mut_ptr(),
        };
        let call = Call(args);
        run(py, 6 * tokens * inner * state_size, 0, move || {
            selective_scan(level, call.args())
        })
        .map_err(value_error)
    }
}

/// An op's arguments, to be used on this thread or while it has given up the GIL.
#[derive(Clone, Copy)]
struct Call<T>(T);

impl<T: Copy> Call<T> {
    fn args(self) -> T {
        self.0
    }
}

// SAFETY: the addresses in it are of tensors that the caller holds until the call has returned.
unsafe impl<T> Send for Call<T> {}
