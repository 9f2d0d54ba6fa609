//! Helpers of sampling over logits [S, V]: argmax, log-probabilities of chosen ids, and masks.
//!
//! Memory-bound: one pass for argmax and a search, two for log-probabilities, one for masks.

use crate::level::Level;
use crate::pool;
use crate::simd::{Kernel, Simd};

/// The first index of each row's maximum; 0 where a row has none (all NaN).
pub fn argmax(level: Level, logits: &[f32], vocab: usize, out: &mut [i32]) {
    assert!(vocab > 0 && logits.len() == vocab * out.len());
    let to = Out(out.as_mut_ptr());
    pool::run(out.len(), |row| {
        let row_logits = &logits[row * vocab..(row + 1) * vocab];
        // SAFETY: the kernel reads only its slice; `row` is in range and this task's own.
        unsafe {
            let high = level.run(Max(row_logits));
            *to.get().add(row) = row_logits.iter().position(|&x| x == high).unwrap_or(0) as i32;
        }
    });
}

/// log_softmax(logits)[row, ids[row, c]] into `out` [S, C], and the rank of column 0 into `ranks`.
///
/// # Errors
/// When an id is outside the vocabulary.
pub fn selected_logprobs(
    level: Level,
    logits: &[f32],
    vocab: usize,
    ids: &[i32],
    out: &mut [f32],
    ranks: &mut [i32],
) -> Result<(), String> {
    let rows = ranks.len();
    assert!(vocab > 0 && logits.len() == vocab * rows && ids.len() == out.len());
    if rows == 0 {
        return Ok(());
    }
    let columns = ids.len() / rows;
    assert!(columns > 0 && columns * rows == ids.len());
    if let Some(id) = ids.iter().find(|&&id| id < 0 || id as usize >= vocab) {
        return Err(format!(
            "token id {id} is outside the vocabulary of {vocab}"
        ));
    }
    let (to, to_ranks) = (Out(out.as_mut_ptr()), Out(ranks.as_mut_ptr()));
    pool::run(rows, |row| {
        let row_logits = &logits[row * vocab..(row + 1) * vocab];
        let row_ids = &ids[row * columns..(row + 1) * columns];
        // SAFETY: the kernels read only their slice; `row` is in range and this task's own.
        unsafe {
            let high = level.run(Max(row_logits));
            let log_sum = level.run(SumExp(row_logits, high)).ln() + high;
            for (c, &id) in row_ids.iter().enumerate() {
                *to.get().add(row * columns + c) = row_logits[id as usize] - log_sum;
            }
            let chosen = row_logits[row_ids[0] as usize];
            let above = row_logits.iter().filter(|&&x| x > chosen).count();
            *to_ranks.get().add(row) = above as i32 + 1;
        }
    });
    Ok(())
}

/// Make logits [S, V] minus infinity where a mask lacks the token, in place.
///
/// `rows` [M] has the row that each mask is of, each at most once; below 0: of none. `masks` [M, W],
/// W = ceil(V / 32): token i is bit i % 32 of word i / 32. `has_any` [M] becomes 1 where the row keeps a
/// token, or the mask is of none, else 0.
///
/// # Errors
/// When a row does not exist, or has two masks.
pub fn mask(
    logits: &mut [f32],
    vocab: usize,
    rows: &[i32],
    masks: &[i32],
    has_any: &mut [u8],
) -> Result<(), String> {
    let num_words = vocab.div_ceil(32);
    assert!(vocab > 0 && masks.len() == rows.len() * num_words && has_any.len() == rows.len());
    let mut is_masked = vec![false; logits.len() / vocab];
    for &row in rows {
        let Ok(row) = usize::try_from(row) else {
            continue;
        };
        match is_masked.get_mut(row) {
            None => return Err(format!("a mask of row {row} of {}", is_masked.len())),
            Some(true) => return Err(format!("two masks of row {row}")),
            Some(masked) => *masked = true,
        }
    }
    let (to, to_any) = (Out(logits.as_mut_ptr()), Out(has_any.as_mut_ptr()));
    pool::run(rows.len(), |m| {
        let words = &masks[m * num_words..(m + 1) * num_words];
        let any = usize::try_from(rows[m]).is_ok_and(|row| {
            // SAFETY: the row exists, and no other task has it.
            let row = unsafe { std::slice::from_raw_parts_mut(to.get().add(row * vocab), vocab) };
            mask_row(row, words)
        });
        // SAFETY: this task's own element.
        unsafe { *to_any.get().add(m) = u8::from(any || rows[m] < 0) };
    });
    Ok(())
}

/// One row of `mask`. Returns whether it keeps a token.
fn mask_row(logits: &mut [f32], words: &[i32]) -> bool {
    let mut any = false;
    for (logits, &word) in logits.chunks_mut(32).zip(words) {
        match word {
            // Most words of a grammar's mask are one of these.
            0 => logits.fill(f32::NEG_INFINITY),
            -1 => any = any || logits.iter().any(|&x| x > f32::NEG_INFINITY),
            _ => {
                for (i, x) in logits.iter_mut().enumerate() {
                    if word >> i & 1 == 0 {
                        *x = f32::NEG_INFINITY;
                    }
                    any |= *x > f32::NEG_INFINITY;
                }
            }
        }
    }
    any
}

/// An output that tasks write disjoint elements of.
struct Out<T>(*mut T);

impl<T> Out<T> {
    fn get(&self) -> *mut T {
        self.0
    }
}

// SAFETY: every task writes elements of its own.
unsafe impl<T> Sync for Out<T> {}

struct Max<'a>(&'a [f32]);

impl Kernel for Max<'_> {
    type Out = f32;
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) -> f32 {
        let step = 4 * S::LANES;
        let mut high = [s.splat(f32::NEG_INFINITY); 4];
        let whole = self.0.len() / step * step;
        let p = self.0.as_ptr();
        let mut i = 0;
        while i < whole {
            for (j, high) in high.iter_mut().enumerate() {
                // SAFETY: i + step <= len.
                *high = s.max(unsafe { s.load(p.add(i + j * S::LANES)) }, *high);
            }
            i += step;
        }
        let all = s.max(s.max(high[0], high[1]), s.max(high[2], high[3]));
        self.0[whole..].iter().fold(s.hmax(all), |a, &b| a.max(b))
    }
}

struct SumExp<'a>(&'a [f32], f32);

impl Kernel for SumExp<'_> {
    type Out = f32;
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) -> f32 {
        let high = s.splat(self.1);
        // Four sums: fewer roundings in each, and no waiting for the last addition.
        let mut sums = [s.zero(); 4];
        let step = 4 * S::LANES;
        let whole = self.0.len() / step * step;
        let p = self.0.as_ptr();
        let mut i = 0;
        while i < whole {
            for (j, sum) in sums.iter_mut().enumerate() {
                // SAFETY: i + step <= len.
                let x = unsafe { s.load(p.add(i + j * S::LANES)) };
                *sum = s.add(*sum, s.exp(s.sub(x, high)));
            }
            i += step;
        }
        let all = s.sum(s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3])));
        self.0[whole..]
            .iter()
            .fold(all, |a, &x| a + (x - self.1).exp())
    }
}
