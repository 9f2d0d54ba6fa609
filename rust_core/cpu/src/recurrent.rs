//! Layers with a state, in float32: causal convolution, gated delta rule, Mamba's scans.
//!
//! Token by token, as the definitions are (`kernels/reference_recurrent.py`): a head's state stays in the
//! second-level cache from token to token, so that a prompt reads it from memory once. Tasks are heads,
//! or blocks of channels, of one request each. Inner loops go along a state's rows without a reduction
//! where the arithmetic allows, and the compiler turns them into vectors.
//!
//! Longer than other files: each kind of state is a kernel of a page, and they share how tasks are dealt out.

use crate::level::Level;
use crate::pool;
use crate::simd::{Kernel, Simd};
use crate::tensor::Shared;

/// Taps of the widest convolution.
pub const MAX_WIDTH: usize = 8;
/// Channels of a task: its inputs and taps lie in the first-level cache.
const CHANNELS: usize = 64;
/// Columns of the widest state.
pub const MAX_COLUMNS: usize = 512;
/// Rows of states that a task of a scan takes at least: Mamba's first form has one a head.
const SCAN_ROWS: usize = 64;
/// Sums of a dot product that are kept apart, so that they are vectors'.
const LANES: usize = 16;

/// The requests of a step.
#[derive(Clone, Copy)]
pub struct Steps<'a> {
    /// [R], rows of the states: distinct.
    pub slots: &'a [i32],
    /// [R], tokens so far; 0: padding.
    pub seq_lens: &'a [i32],
    /// [R + 1]
    pub query_start_loc: &'a [i32],
}

/// One request of a step.
#[derive(Clone, Copy)]
struct Span {
    row: usize,
    first: usize,
    last: usize,
    begins: bool,
}

impl Steps<'_> {
    /// Checks that rows and tokens are in range.
    ///
    /// # Errors
    /// Naming what is not.
    pub fn check(&self, num_rows: usize, num_tokens: usize) -> Result<(), String> {
        let requests = self.slots.len();
        assert!(self.seq_lens.len() == requests && self.query_start_loc.len() == requests + 1);
        if let Some(slot) = self.slots.iter().find(|&&slot| slot as usize >= num_rows) {
            return Err(format!("slot {slot} is outside {num_rows} rows of states"));
        }
        let last = self.query_start_loc[requests];
        let ascends = self.query_start_loc.is_sorted() && self.query_start_loc[0] >= 0;
        if !ascends || last as usize > num_tokens {
            return Err(format!("tokens up to {last} of {num_tokens}"));
        }
        Ok(())
    }

    /// A request, if it has tokens.
    fn span(&self, request: usize) -> Option<Span> {
        let (first, last) = (
            self.query_start_loc[request] as usize,
            self.query_start_loc[request + 1] as usize,
        );
        let seq_len = self.seq_lens[request];
        (seq_len > 0 && last > first).then(|| Span {
            row: self.slots[request] as usize,
            first,
            last,
            begins: seq_len as usize == last - first,
        })
    }
}

/// States [N, ...] and their rows' length in elements.
#[derive(Clone, Copy)]
pub struct States {
    /// The first element.
    pub ptr: *mut f32,
    /// Rows.
    pub num_rows: usize,
    /// Elements of one.
    pub row_len: usize,
}

/// Arguments of [`causal_conv`].
#[derive(Clone, Copy)]
pub struct ConvArgs<'a> {
    /// [T, C]
    pub x: &'a [f32],
    /// [C, K]
    pub taps: &'a [f32],
    /// [C]
    pub bias: Option<&'a [f32]>,
    /// [N, C, K - 1]
    pub states: States,
    /// The step.
    pub steps: Steps<'a>,
    /// C
    pub channels: usize,
    /// [T, C]
    pub out: *mut f32,
}

/// Arguments of [`gated_delta_rule`].
#[derive(Clone, Copy)]
pub struct DeltaArgs<'a> {
    /// [T, 2 Hk Dk + Hv Dv]
    pub qkv: &'a [f32],
    /// [T, Hv], or [T, Hv Dk]: of each row of a state.
    pub a: &'a [f32],
    /// [T, Hv]
    pub b: &'a [f32],
    /// [Hv]
    pub decay: &'a [f32],
    /// [Hv], or [Hv Dk]
    pub dt_bias: &'a [f32],
    /// [N, Hv, Dk, Dv]
    pub states: States,
    /// The step.
    pub steps: Steps<'a>,
    /// Hk
    pub num_key_heads: usize,
    /// Dk
    pub key_dim: usize,
    /// Dv
    pub value_dim: usize,
    /// Of the write strength.
    pub beta_scale: f32,
    /// [T, Hv, Dv]
    pub out: *mut f32,
}

/// Arguments of [`selective_scan`].
#[derive(Clone, Copy)]
pub struct ScanArgs<'a> {
    /// [T, H P + 2 G S]
    pub xbc: &'a [f32],
    /// [T, H]
    pub dt: &'a [f32],
    /// [H], or [H, S]: each column's.
    pub decay: &'a [f32],
    /// [H]
    pub dt_bias: &'a [f32],
    /// [H]
    pub skip: &'a [f32],
    /// [N, H, P, S]
    pub states: States,
    /// The step.
    pub steps: Steps<'a>,
    /// G
    pub num_groups: usize,
    /// P
    pub head_dim: usize,
    /// S
    pub state_size: usize,
    /// Of a step size.
    pub dt_limits: (f32, f32),
    /// [T, H, P]
    pub out: *mut f32,
}

/// See `kernels/reference_recurrent.py`; without the activation.
///
/// # Errors
/// A slot or token out of range, or too many taps.
///
/// # Safety
/// The addresses name valid memory of these shapes; what is written overlaps nothing else.
pub unsafe fn causal_conv(level: Level, args: ConvArgs) -> Result<(), String> {
    let channels = args.channels;
    let width = args.taps.len() / channels.max(1);
    assert!(args.taps.len() == channels * width && args.bias.is_none_or(|b| b.len() == channels));
    assert!(width >= 2 && args.states.row_len == channels * (width - 1));
    args.steps
        .check(args.states.num_rows, args.x.len() / channels)?;
    if width > MAX_WIDTH {
        return Err(format!("{width} taps, at most {MAX_WIDTH} are supported"));
    }
    let blocks = channels.div_ceil(CHANNELS);
    let (out, states) = (Shared(args.out), Shared(args.states.ptr));
    pool::run(args.steps.slots.len() * blocks, |task| {
        if let Some(span) = args.steps.span(task / blocks) {
            let first = task % blocks * CHANNELS;
            let count = CHANNELS.min(channels - first);
            let (x, taps, bias) = (args.x, args.taps, args.bias);
            // SAFETY: the caller's; tasks take disjoint channels of disjoint rows and tokens.
            unsafe {
                level.run(ConvTask {
                    x,
                    taps,
                    bias,
                    states,
                    out,
                    span,
                    channels,
                    width,
                    first,
                    count,
                });
            }
        }
    });
    Ok(())
}

struct ConvTask<'a> {
    x: &'a [f32],
    taps: &'a [f32],
    bias: Option<&'a [f32]>,
    states: Shared<f32>,
    out: Shared<f32>,
    span: Span,
    channels: usize,
    width: usize,
    first: usize,
    count: usize,
}

impl Kernel for ConvTask<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self, _: S) {
        let (width, past, count) = (self.width, self.width - 1, self.count);
        let channels = self.first..self.first + count;
        let at_state = (self.span.row * self.channels + self.first) * past;
        // SAFETY: `causal_conv`'s contract.
        let state =
            unsafe { std::slice::from_raw_parts_mut(self.states.at(at_state), count * past) };
        // Transposed, so that the loops go along channels.
        let mut taps = [[0.0f32; CHANNELS]; MAX_WIDTH];
        let mut seen = [[0.0f32; CHANNELS]; MAX_WIDTH];
        for (c, channel) in channels.clone().enumerate() {
            for (k, tap) in taps.iter_mut().enumerate().take(width) {
                tap[c] = self.taps[channel * width + k];
            }
            for k in 0..if self.span.begins { 0 } else { past } {
                seen[k][c] = state[c * past + k];
            }
        }
        let mut bias = [0.0f32; CHANNELS];
        if let Some(values) = self.bias {
            bias[..count].copy_from_slice(&values[channels.clone()]);
        }
        for token in self.span.first..self.span.last {
            let at = token * self.channels + self.first;
            seen[past][..count].copy_from_slice(&self.x[at..at + count]);
            let mut sums = bias;
            for (tap, input) in taps.iter().zip(&seen).take(width) {
                for c in 0..CHANNELS {
                    sums[c] += tap[c] * input[c];
                }
            }
            // SAFETY: `causal_conv`'s contract.
            let out = unsafe { std::slice::from_raw_parts_mut(self.out.at(at), count) };
            out.copy_from_slice(&sums[..count]);
            for k in 0..past {
                seen[k] = seen[k + 1];
            }
        }
        for c in 0..count {
            for k in 0..past {
                state[c * past + k] = seen[k][c];
            }
        }
    }
}

/// See `kernels/reference_recurrent.py`.
///
/// # Errors
/// A slot or token out of range, or heads that are too large.
///
/// # Safety
/// The addresses name valid memory of these shapes; what is written overlaps nothing else.
pub unsafe fn gated_delta_rule(level: Level, args: DeltaArgs) -> Result<(), String> {
    let heads = args.decay.len();
    let tokens = args.b.len() / heads.max(1);
    let (dk, dv) = (args.key_dim, args.value_dim);
    let width = 2 * args.num_key_heads * dk + heads * dv;
    assert!(args.num_key_heads > 0 && heads.is_multiple_of(args.num_key_heads));
    assert!(args.qkv.len() == tokens * width && args.states.row_len == heads * dk * dv);
    assert!(args.a.len() == tokens * args.dt_bias.len());
    assert!(args.dt_bias.len() == heads || args.dt_bias.len() == heads * dk);
    args.steps.check(args.states.num_rows, tokens)?;
    if dk > MAX_COLUMNS || dv > MAX_COLUMNS {
        return Err(format!("heads of {dk} and {dv}: at most {MAX_COLUMNS}"));
    }
    let (out, states) = (Shared(args.out), Shared(args.states.ptr));
    let (steps, shape) = (args.steps, (heads, width));
    let inputs = DeltaInputs {
        qkv: args.qkv,
        a: args.a,
        b: args.b,
        decay: args.decay,
        dt_bias: args.dt_bias,
        num_key_heads: args.num_key_heads,
        key_dim: dk,
        value_dim: dv,
        beta_scale: args.beta_scale,
    };
    pool::run(steps.slots.len() * heads, |task| {
        if let Some(span) = steps.span(task / heads) {
            let head = task % heads;
            // SAFETY: the caller's; tasks take disjoint heads of disjoint rows and tokens.
            unsafe {
                level.run(DeltaTask {
                    inputs,
                    states,
                    out,
                    span,
                    shape,
                    head,
                });
            }
        }
    });
    Ok(())
}

#[derive(Clone, Copy)]
struct DeltaInputs<'a> {
    qkv: &'a [f32],
    a: &'a [f32],
    b: &'a [f32],
    decay: &'a [f32],
    dt_bias: &'a [f32],
    num_key_heads: usize,
    key_dim: usize,
    value_dim: usize,
    beta_scale: f32,
}

struct DeltaTask<'a> {
    inputs: DeltaInputs<'a>,
    states: Shared<f32>,
    out: Shared<f32>,
    span: Span,
    shape: (usize, usize),
    head: usize,
}

impl Kernel for DeltaTask<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self, _: S) {
        let DeltaTask {
            inputs: i,
            shape: (heads, width),
            head,
            ..
        } = self;
        let (dk, dv) = (i.key_dim, i.value_dim);
        let key_head = head / (heads / i.num_key_heads);
        // SAFETY: `gated_delta_rule`'s contract.
        let state = unsafe {
            let at = (self.span.row * heads + head) * dk * dv;
            std::slice::from_raw_parts_mut(self.states.at(at), dk * dv)
        };
        if self.span.begins {
            state.fill(0.0);
        }
        let (mut q, mut k) = ([0.0f32; MAX_COLUMNS], [0.0f32; MAX_COLUMNS]);
        let mut change = [0.0f32; MAX_COLUMNS];
        // Each row's factor; of a head that has one for all, the first is that.
        let mut keeps = [0.0f32; MAX_COLUMNS];
        let rates = i.dt_bias.len() / heads;
        for token in self.span.first..self.span.last {
            let row = &i.qkv[token * width..(token + 1) * width];
            let keys = i.num_key_heads * dk;
            unit(
                &row[key_head * dk..][..dk],
                &mut q[..dk],
                (dk as f32).powf(-0.5),
            );
            unit(&row[keys + key_head * dk..][..dk], &mut k[..dk], 1.0);
            let values = &row[2 * keys + head * dv..][..dv];
            let at = token * heads + head;
            let steps = &i.a[at * rates..][..rates];
            let biases = &i.dt_bias[head * rates..][..rates];
            for ((keep, &a), &bias) in keeps.iter_mut().zip(steps).zip(biases) {
                *keep = (i.decay[head] * softplus(a + bias)).exp();
            }
            if rates == 1 {
                let first = keeps[0];
                keeps[..dk].fill(first);
            }
            let beta = i.beta_scale / (1.0 + (-i.b[at]).exp());
            let change = &mut change[..dv];
            change.fill(0.0);
            for ((row, &k), &keep) in state.chunks_exact_mut(dv).zip(&k[..dk]).zip(&keeps) {
                for (s, sum) in row.iter_mut().zip(change.iter_mut()) {
                    *s *= keep;
                    *sum += k * *s;
                }
            }
            for (sum, &value) in change.iter_mut().zip(values) {
                *sum = beta * (value - *sum);
            }
            // SAFETY: `gated_delta_rule`'s contract.
            let out = unsafe { std::slice::from_raw_parts_mut(self.out.at(at * dv), dv) };
            out.fill(0.0);
            for ((row, &k), &q) in state.chunks_exact_mut(dv).zip(&k[..dk]).zip(&q[..dk]) {
                for ((s, &change), y) in row.iter_mut().zip(change.iter()).zip(out.iter_mut()) {
                    *s += k * change;
                    *y += q * *s;
                }
            }
        }
    }
}

/// `x` over its length, times `scale`.
#[inline(always)]
fn unit(x: &[f32], out: &mut [f32], scale: f32) {
    let square: f32 = dot(x, x);
    let factor = scale / (square + 1e-6).sqrt();
    for (out, &x) in out.iter_mut().zip(x) {
        *out = x * factor;
    }
}

/// A dot product, in as many sums as a vector has lanes.
#[inline(always)]
fn dot(x: &[f32], y: &[f32]) -> f32 {
    let mut sums = [0.0f32; LANES];
    let (xs, ys) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
    let rest: f32 = xs
        .remainder()
        .iter()
        .zip(ys.remainder())
        .map(|(a, b)| a * b)
        .sum();
    for (x, y) in xs.zip(ys) {
        for lane in 0..LANES {
            sums[lane] += x[lane] * y[lane];
        }
    }
    sums.iter().sum::<f32>() + rest
}

/// log(1 + exp(x)).
fn softplus(x: f32) -> f32 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}

/// See `kernels/reference_recurrent.py`.
///
/// # Errors
/// A slot or token out of range.
///
/// # Safety
/// The addresses name valid memory of these shapes; what is written overlaps nothing else.
pub unsafe fn selective_scan(level: Level, args: ScanArgs) -> Result<(), String> {
    let heads = args.dt_bias.len();
    let tokens = args.dt.len() / heads.max(1);
    let (p, size, groups) = (args.head_dim, args.state_size, args.num_groups);
    let width = heads * p + 2 * groups * size;
    assert!(groups > 0 && heads.is_multiple_of(groups) && size > 0);
    assert!(args.xbc.len() == tokens * width);
    assert!(args.decay.len() == heads || args.decay.len() == heads * size);
    assert!(args.skip.len() == heads && args.states.row_len == heads * p * size);
    args.steps.check(args.states.num_rows, tokens)?;
    let (out, states) = (Shared(args.out), Shared(args.states.ptr));
    let (steps, shape) = (args.steps, (heads, width));
    let inputs = ScanInputs {
        xbc: args.xbc,
        dt: args.dt,
        decay: args.decay,
        dt_bias: args.dt_bias,
        skip: args.skip,
        num_groups: groups,
        head_dim: p,
        state_size: size,
        dt_limits: args.dt_limits,
    };
    let count = (SCAN_ROWS / p.max(1)).max(1);
    let blocks = heads.div_ceil(count);
    pool::run(steps.slots.len() * blocks, |task| {
        if let Some(span) = steps.span(task / blocks) {
            let first = task % blocks * count;
            for head in first..heads.min(first + count) {
                // SAFETY: the caller's; tasks take disjoint heads of disjoint rows and tokens.
                unsafe {
                    level.run(ScanTask {
                        inputs,
                        states,
                        out,
                        span,
                        shape,
                        head,
                    });
                }
            }
        }
    });
    Ok(())
}

#[derive(Clone, Copy)]
struct ScanInputs<'a> {
    xbc: &'a [f32],
    dt: &'a [f32],
    decay: &'a [f32],
    dt_bias: &'a [f32],
    skip: &'a [f32],
    num_groups: usize,
    head_dim: usize,
    state_size: usize,
    dt_limits: (f32, f32),
}

struct ScanTask<'a> {
    inputs: ScanInputs<'a>,
    states: Shared<f32>,
    out: Shared<f32>,
    span: Span,
    shape: (usize, usize),
    head: usize,
}

impl Kernel for ScanTask<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self, simd: S) {
        let ScanTask {
            inputs: i,
            shape: (heads, width),
            head,
            ..
        } = self;
        let (p, size) = (i.head_dim, i.state_size);
        let group = head / (heads / i.num_groups);
        // SAFETY: `selective_scan`'s contract.
        let state = unsafe {
            let at = (self.span.row * heads + head) * p * size;
            std::slice::from_raw_parts_mut(self.states.at(at), p * size)
        };
        if self.span.begins {
            state.fill(0.0);
        }
        for token in self.span.first..self.span.last {
            let row = &i.xbc[token * width..(token + 1) * width];
            let x = &row[head * p..][..p];
            let b = &row[heads * p + group * size..][..size];
            let c = &row[heads * p + (i.num_groups + group) * size..][..size];
            let at = token * heads + head;
            let (low, high) = i.dt_limits;
            let d = softplus(i.dt[at] + i.dt_bias[head]).clamp(low, high);
            // SAFETY: `selective_scan`'s contract.
            let out = unsafe { std::slice::from_raw_parts_mut(self.out.at(at * p), p) };
            if i.decay.len() > heads {
                let rates = &i.decay[head * size..][..size];
                for ((row, &x), y) in state.chunks_exact_mut(size).zip(x).zip(out) {
                    // SAFETY: all four are `size` long.
                    *y = unsafe { scan_columns(simd, row, rates, d, d * x, b, c) };
                    *y += i.skip[head] * x;
                }
                continue;
            }
            let keep = (d * i.decay[head]).exp();
            for ((row, &x), y) in state.chunks_exact_mut(size).zip(x).zip(out) {
                let write = d * x;
                for (s, &b) in row.iter_mut().zip(b) {
                    *s = keep * *s + write * b;
                }
                *y = dot(row, c) + i.skip[head] * x;
            }
        }
    }
}

/// One row of a state whose columns decay at rates of their own, past a token: its product with `c`.
///
/// # Safety
/// `row`, `rates`, `b` and `c` are of one length.
#[inline(always)]
unsafe fn scan_columns<S: Simd>(
    s: S,
    row: &mut [f32],
    rates: &[f32],
    d: f32,
    write: f32,
    b: &[f32],
    c: &[f32],
) -> f32 {
    let (d, write, mut sum) = (s.splat(d), s.splat(write), s.zero());
    for j in (0..row.len()).step_by(S::LANES) {
        let left = row.len() - j;
        // SAFETY: the caller's; `left` elements are behind each address.
        unsafe {
            let at = row.as_mut_ptr().add(j);
            let keep = s.exp(s.mul(d, s.load_first(rates.as_ptr().add(j), left)));
            let new = s.mul(write, s.load_first(b.as_ptr().add(j), left));
            let new = s.fma(keep, s.load_first(at, left), new);
            s.store_first(at, new, left);
            sum = s.fma(new, s.load_first(c.as_ptr().add(j), left), sum);
        }
    }
    s.sum(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_out_of_range_are_refused() {
        let steps = |slots: &'static [i32], starts: &'static [i32]| Steps {
            slots,
            seq_lens: &[5, 1],
            query_start_loc: starts,
        };
        assert!(steps(&[0, 1], &[0, 3, 4]).check(2, 4).is_ok());
        assert!(steps(&[0, 2], &[0, 3, 4]).check(2, 4).is_err());
        assert!(steps(&[-1, 1], &[0, 3, 4]).check(2, 4).is_err());
        assert!(steps(&[0, 1], &[0, 3, 5]).check(2, 4).is_err());
        assert!(steps(&[0, 1], &[0, 3, 2]).check(2, 4).is_err());
    }

    #[test]
    fn dot_products_have_their_ends() {
        for len in [0, 1, LANES - 1, LANES, 3 * LANES + 5] {
            let x: Vec<f32> = (0..len).map(|i| i as f32).collect();
            let expected: f32 = x.iter().map(|v| v * v).sum();
            assert_eq!(dot(&x, &x), expected);
        }
    }
}
