//! One token's products with keys and values that are read where they lie.

use crate::float::DType;
use crate::kv_cache::{Bf16, Byte, CacheType, E4m3, E5m2, Elements, F16, F32, Int8};
use crate::simd::Simd;

use super::plan::CHUNK;
use super::task::{AttentionTask, Sums};

/// Keys whose scores are summed together, of up to as many rows.
pub(super) const SUMMED: usize = 4;

impl AttentionTask<'_> {
    /// A decode token's item. Keys that can be transposed as vectors are gathered; values, and other
    /// keys, are read in place. A row's sums lie together.
    ///
    /// # Safety
    /// The task's contract.
    #[inline(always)]
    pub(super) unsafe fn run_decode<S: Simd>(&self, s: S) {
        // SAFETY: the caller's.
        unsafe {
            match self.args.k_cache.dtype {
                CacheType::Float(DType::F32) => self.decode(s, F32),
                CacheType::Float(DType::Bf16) => self.decode(s, Bf16),
                CacheType::Float(DType::F16) => self.decode(s, F16),
                CacheType::Scaled(Byte::Int8) => self.decode(s, Int8),
                CacheType::Scaled(Byte::E4m3) => self.decode(s, E4m3),
                CacheType::Scaled(Byte::E5m2) => self.decode(s, E5m2),
            }
        }
    }

    /// The same for one type of keys and values.
    #[inline(always)]
    unsafe fn decode<S: Simd, E: Elements>(&self, s: S, elements: E) {
        // SAFETY: the caller's.
        unsafe {
            let mut b = self.buffers::<S>();
            b.sums = Sums {
                row: b.dim,
                panel: 2 * S::LANES,
                ..b.sums
            };
            self.begin::<S, false>(s, &b);
            for (key, len) in self.item.chunks() {
                if self.transposes::<S>() {
                    self.prefetch_values(s, key, len);
                    self.gather_keys(s, &b, key, len);
                    self.scores_from_panels(s, &b, len);
                } else {
                    self.scores_in_place(s, elements, b.q, b.dim, key, len, b.scores);
                    self.scale_scores(s, &b, key, len);
                }
                self.softmax::<S, false>(s, &b, key, len);
                self.values_in_place(s, elements, b.probs, b.dim, key, len, b.sums.ptr);
            }
            self.finish(s, &b);
        }
    }

    /// scores[row][key] of the one token's heads.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    unsafe fn scores_in_place<S: Simd, E: Elements>(
        &self,
        s: S,
        elements: E,
        q: *const f32,
        q_stride: usize,
        key: usize,
        len: usize,
        scores: *mut f32,
    ) {
        let mut done = 0;
        while done < len {
            // SAFETY: the task's contract.
            unsafe {
                let (at, run) = self.locate(&self.args.k_cache, key + done);
                let run = run.min(len - done);
                self.prefetch_values(s, key + done, run);
                let mut r = 0;
                while r < self.group {
                    let (q, to) = (q.add(r * q_stride), scores.add(r * CHUNK + done));
                    match self.group - r {
                        4.. => {
                            self.dots::<S, E, 4>(s, elements, q, q_stride, at, run, to);
                            r += 4;
                        }
                        3 => {
                            self.dots::<S, E, 3>(s, elements, q, q_stride, at, run, to);
                            r += 3;
                        }
                        2 => {
                            self.dots::<S, E, 2>(s, elements, q, q_stride, at, run, to);
                            r += 2;
                        }
                        _ => {
                            self.dots::<S, E, 1>(s, elements, q, q_stride, at, run, to);
                            r += 1;
                        }
                    }
                }
                done += run;
            }
        }
    }

    /// R rows of q with `run` keys that lie one after another.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    unsafe fn dots<S: Simd, E: Elements, const R: usize>(
        &self,
        s: S,
        elements: E,
        q: *const f32,
        q_stride: usize,
        keys: *const u8,
        run: usize,
        scores: *mut f32,
    ) {
        let (dim, size) = (self.args.k_cache.head_dim, elements.size());
        let row_bytes = dim * size;
        for first in (0..run).step_by(SUMMED) {
            let count = (run - first).min(SUMMED);
            // [R][SUMMED]: sums across lanes are taken sixteen at a time.
            let mut sums = [s.zero(); 16];
            let mut scores_of = [0.0f32; 16];
            // SAFETY: the task's contract; q's rows are zero from dim to the vector's end.
            unsafe {
                let key = |j: usize| keys.add((first + j) * row_bytes);
                let mut j = 0;
                while j < count {
                    j += if count - j >= 2 {
                        let keys = [key(j), key(j + 1)];
                        dot::<S, E, R, 2>(s, elements, q, q_stride, keys, dim, &mut sums, j)
                    } else {
                        dot::<S, E, R, 1>(s, elements, q, q_stride, [key(j)], dim, &mut sums, j)
                    };
                }
                s.sums(sums, scores_of.as_mut_ptr());
                for r in 0..R {
                    for j in 0..count {
                        let score = self.score_scale() * scores_of[r * SUMMED + j];
                        *scores.add(r * CHUNK + first + j) = score;
                    }
                }
            }
        }
    }

    /// sums[row] += probabilities times values, of the one token's heads.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    unsafe fn values_in_place<S: Simd, E: Elements>(
        &self,
        s: S,
        elements: E,
        probs: *const f32,
        stride: usize,
        key: usize,
        len: usize,
        sums: *mut f32,
    ) {
        let mut done = 0;
        while done < len {
            // SAFETY: the task's contract.
            unsafe {
                let (at, run) = self.locate(&self.args.v_cache, key + done);
                let run = run.min(len - done);
                self.prefetch_keys(s, key + len + done, run);
                let mut r = 0;
                while r < self.group {
                    let (probs, to) = (probs.add(r * CHUNK + done), sums.add(r * stride));
                    match self.group - r {
                        // Three rows' sums fill 16 registers.
                        4.. if S::ROWS >= 12 => {
                            self.weigh::<S, E, 4>(s, elements, probs, at, run, to, stride);
                            r += 4;
                        }
                        4 => {
                            self.weigh::<S, E, 2>(s, elements, probs, at, run, to, stride);
                            r += 2;
                        }
                        3.. => {
                            self.weigh::<S, E, 3>(s, elements, probs, at, run, to, stride);
                            r += 3;
                        }
                        2 => {
                            self.weigh::<S, E, 2>(s, elements, probs, at, run, to, stride);
                            r += 2;
                        }
                        _ => {
                            self.weigh::<S, E, 1>(s, elements, probs, at, run, to, stride);
                            r += 1;
                        }
                    }
                }
                done += run;
            }
        }
    }

    /// The same for R rows and `run` values that lie one after another.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    unsafe fn weigh<S: Simd, E: Elements, const R: usize>(
        &self,
        s: S,
        elements: E,
        probs: *const f32,
        values: *const u8,
        run: usize,
        sums: *mut f32,
        stride: usize,
    ) {
        let (dim, size) = (self.args.v_cache.head_dim, elements.size());
        // SAFETY: the task's contract; sums' rows are whole vectors.
        unsafe {
            let mut i = 0;
            while i + 4 * S::LANES <= dim {
                let mut acc = [[s.zero(); 4]; R];
                for (r, acc) in acc.iter_mut().enumerate() {
                    for (v, acc) in acc.iter_mut().enumerate() {
                        *acc = s.load(sums.add(r * stride + i + v * S::LANES));
                    }
                }
                for j in 0..run {
                    let at = values.add((j * dim + i) * size);
                    let row = [
                        elements.load(s, at, S::LANES),
                        elements.load(s, at.add(S::LANES * size), S::LANES),
                        elements.load(s, at.add(2 * S::LANES * size), S::LANES),
                        elements.load(s, at.add(3 * S::LANES * size), S::LANES),
                    ];
                    for (r, acc) in acc.iter_mut().enumerate() {
                        let p = s.splat(*probs.add(r * CHUNK + j));
                        for (acc, &v) in acc.iter_mut().zip(&row) {
                            *acc = s.fma(p, v, *acc);
                        }
                    }
                }
                for (r, acc) in acc.iter().enumerate() {
                    for (v, &acc) in acc.iter().enumerate() {
                        s.store(sums.add(r * stride + i + v * S::LANES), acc);
                    }
                }
                i += 4 * S::LANES;
            }
            while i < dim {
                for r in 0..R {
                    let to = sums.add(r * stride + i);
                    let mut acc = s.load(to);
                    for j in 0..run {
                        let v = elements.load(s, values.add((j * dim + i) * size), dim - i);
                        acc = s.fma(s.splat(*probs.add(r * CHUNK + j)), v, acc);
                    }
                    s.store(to, acc);
                }
                i += S::LANES;
            }
        }
    }
}

/// sums[r][at + j] = lanes of R rows of q times K keys; returns K.
///
/// # Safety
/// q's rows are zero from dim to the vector's end; keys have dim elements.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn dot<S: Simd, E: Elements, const R: usize, const K: usize>(
    s: S,
    elements: E,
    q: *const f32,
    q_stride: usize,
    keys: [*const u8; K],
    dim: usize,
    sums: &mut [S::V; 16],
    at: usize,
) -> usize {
    let mut acc = [[s.zero(); K]; R];
    let whole = dim - dim % S::LANES;
    // SAFETY: the caller's.
    unsafe {
        for i in (0..whole).step_by(S::LANES) {
            let mut k = [s.zero(); K];
            for j in 0..K {
                k[j] = elements.load(s, keys[j].add(i * elements.size()), S::LANES);
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                let q = s.load(q.add(r * q_stride + i));
                for j in 0..K {
                    acc[j] = s.fma(k[j], q, acc[j]);
                }
            }
        }
        if whole < dim {
            for j in 0..K {
                let from = keys[j].add(whole * elements.size());
                let k = elements.load(s, from, dim - whole);
                for (r, acc) in acc.iter_mut().enumerate() {
                    acc[j] = s.fma(k, s.load(q.add(r * q_stride + whole)), acc[j]);
                }
            }
        }
    }
    for (r, acc) in acc.into_iter().enumerate() {
        for (j, acc) in acc.into_iter().enumerate() {
            sums[r * SUMMED + at + j] = acc;
        }
    }
    K
}
