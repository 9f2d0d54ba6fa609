//! Products of bfloat16 pairs, where the processor has them.

use crate::float::DType;
use crate::kv_cache::{Cache, CacheType, MAX_HEAD_DIM};
use crate::simd::Simd;

use super::decode::SUMMED;
use super::gather::{Walk, shifted};
use super::plan::CHUNK;
use super::task::{AttentionTask, Buffers, Sums};

/// Zero partner for an odd last value.
static ZEROS: [u16; MAX_HEAD_DIM] = [0; MAX_HEAD_DIM];

pub(super) fn are_pairs(keys: &Cache, values: &Cache) -> bool {
    // Bytes' numbers are bfloat16's, too.
    let fits = |cache: &Cache| match cache.dtype {
        CacheType::Float(dtype) => dtype == DType::Bf16,
        CacheType::Scaled(_) => true,
    };
    fits(keys) && fits(values) && keys.head_dim.is_multiple_of(32)
}

impl AttentionTask<'_> {
    /// True where both products can be of bfloat16 pairs, as keys and values are kept: queries and
    /// probabilities are rounded to it, sums stay float32.
    #[inline(always)]
    pub(super) fn has_pairs<S: Simd>(&self) -> bool {
        S::DOTS_BF16 && are_pairs(&self.args.k_cache, &self.args.v_cache)
    }

    /// An item of one token or several.
    ///
    /// # Safety
    /// The task's contract; `has_pairs`.
    #[inline(always)]
    pub(super) unsafe fn run_pairs<S: Simd>(&self, s: S) {
        let decode = self.item.tokens == 1;
        // SAFETY: the caller's.
        unsafe {
            let mut b = self.buffers::<S>();
            if decode && self.group <= SUMMED && !self.has_scales() {
                return self.decode_pairs(s, &mut b);
            }
            self.begin::<S, true>(s, &b);
            for (key, len) in self.item.chunks() {
                if decode {
                    self.prefetch_values(s, key, len);
                }
                self.widen(s, &self.args.k_cache, &b, key, len);
                self.scores_of_pairs(s, &b, key, len);
                self.scale_scores(s, &b, key, len);
                if decode {
                    self.prefetch_keys(s, key + len, CHUNK);
                }
                self.softmax::<S, true>(s, &b, key, len);
                self.widen(s, &self.args.v_cache, &b, key, len);
                self.add_values_of_pairs(s, &b, key, len);
            }
            self.finish(s, &b);
        }
    }

    /// One token of a few heads: keys and values are multiplied where they lie. To gather them into
    /// panels costs as much for one row as for many.
    ///
    /// # Safety
    /// The task's contract; `has_pairs`, without scales, for at most `SUMMED` rows.
    #[inline(always)]
    unsafe fn decode_pairs<S: Simd>(&self, s: S, b: &mut Buffers) {
        b.sums = Sums {
            row: b.dim,
            panel: 2 * S::LANES,
            ..b.sums
        };
        // SAFETY: the caller's.
        unsafe {
            self.begin::<S, true>(s, b);
            for (key, len) in self.item.chunks() {
                match self.group {
                    1 => self.decode_chunk::<S, 1>(s, b, key, len),
                    2 => self.decode_chunk::<S, 2>(s, b, key, len),
                    3 => self.decode_chunk::<S, 3>(s, b, key, len),
                    _ => self.decode_chunk::<S, SUMMED>(s, b, key, len),
                }
            }
            self.finish(s, b);
        }
    }

    /// `decode_pairs` of one chunk and R rows.
    ///
    /// # Safety
    /// As there.
    #[inline(always)]
    unsafe fn decode_chunk<S: Simd, const R: usize>(
        &self,
        s: S,
        b: &Buffers,
        key: usize,
        len: usize,
    ) {
        let dim = self.args.k_cache.head_dim;
        let scale = self.score_scale();
        let mut rows = [ZEROS.as_ptr(); CHUNK + SUMMED];
        // SAFETY: the caller's; addresses beyond the chunk are those of zeros.
        unsafe {
            self.addresses(&self.args.k_cache, key, len, &mut rows);
            for first in (0..len).step_by(SUMMED) {
                let count = (len - first).min(SUMMED);
                self.prefetch_values(s, key + first, count);
                // [R][SUMMED]
                let mut sums = [s.zero(); 16];
                for i in (0..dim).step_by(2 * S::LANES) {
                    for j in 0..SUMMED {
                        let k = s.load_words(rows[first + j].add(i).cast());
                        for r in 0..R {
                            let q = s.load_words(b.q.cast::<u16>().add(r * b.dim + i).cast());
                            let sum = &mut sums[r * SUMMED + j];
                            *sum = s.dot_bf16_words(*sum, k, q);
                        }
                    }
                }
                let mut scores = [0.0f32; 16];
                s.sums(sums, scores.as_mut_ptr());
                for r in 0..R {
                    for j in 0..SUMMED {
                        *b.scores.add(r * CHUNK + first + j) = scale * scores[r * SUMMED + j];
                    }
                }
            }
            self.softmax::<S, true>(s, b, key, len);
            self.addresses(&self.args.v_cache, key, len, &mut rows);
            for p in (0..dim).step_by(4 * S::LANES) {
                let vectors = ((dim - p) / S::LANES).min(4);
                if vectors == 4 {
                    self.weigh_pairs::<S, R, 4>(s, b, &rows, key, len, p);
                } else {
                    self.weigh_pairs::<S, R, 2>(s, b, &rows, key, len, p);
                }
            }
        }
    }

    /// Addresses of the rows of a chunk; those behind its end are of zeros.
    ///
    /// # Safety
    /// The task's contract.
    #[inline(always)]
    unsafe fn addresses(
        &self,
        cache: &Cache,
        key: usize,
        len: usize,
        rows: &mut [*const u16; CHUNK + SUMMED],
    ) {
        let mut walk = Walk::START;
        for (j, row) in rows.iter_mut().enumerate() {
            if j < len {
                // SAFETY: the caller's.
                unsafe { walk.to(self, cache, key + j) };
                *row = walk.at.cast();
            } else {
                *row = ZEROS.as_ptr();
            }
        }
    }

    /// sums[row][p..p + V LANES] += b.probs, bfloat16, times values; V is even.
    ///
    /// # Safety
    /// As `decode_pairs`; rows are a chunk's values.
    #[inline(always)]
    unsafe fn weigh_pairs<S: Simd, const R: usize, const V: usize>(
        &self,
        s: S,
        b: &Buffers,
        rows: &[*const u16; CHUNK + SUMMED],
        key: usize,
        len: usize,
        p: usize,
    ) {
        let probs = b.probs.cast::<u32>();
        // SAFETY: the caller's.
        unsafe {
            let sums = b.sums.ptr.add(p);
            let mut acc = [[s.zero(); V]; R];
            for (r, acc) in acc.iter_mut().enumerate() {
                for (v, acc) in acc.iter_mut().enumerate() {
                    *acc = s.load(sums.add(r * b.dim + v * S::LANES));
                }
            }
            for j in (0..len).step_by(2) {
                if p == 0 && j % SUMMED == 0 {
                    self.prefetch_keys(s, key + len + j, SUMMED);
                }
                let mut pairs = [s.zero_words(); V];
                for v in (0..V).step_by(2) {
                    let at = p + v * S::LANES;
                    let even = s.load_words(rows[j].add(at).cast());
                    let odd = s.load_words(rows[j + 1].add(at).cast());
                    [pairs[v], pairs[v + 1]] = s.interleave_words(even, odd);
                }
                for (r, acc) in acc.iter_mut().enumerate() {
                    let prob = *probs.add(r * CHUNK + j / 2);
                    for v in 0..V {
                        acc[v] = s.dot_bf16(acc[v], pairs[v], prob);
                    }
                }
            }
            for (r, acc) in acc.iter().enumerate() {
                for (v, &acc) in acc.iter().enumerate() {
                    s.store(sums.add(r * b.dim + v * S::LANES), acc);
                }
            }
        }
    }

    /// b.scores[row][len, to whole panels] of b.q [rows][dim]. b.keys takes the chunk as panels
    /// [key panel][dim / 2][2 LANES keys].
    ///
    /// # Safety
    /// The task's contract.
    #[inline(always)]
    unsafe fn scores_of_pairs<S: Simd>(&self, s: S, b: &Buffers, key: usize, len: usize) {
        let keys = b.keys.cast::<u32>();
        let width = 2 * S::LANES;
        let dim = self.args.k_cache.head_dim;
        // SAFETY: the task's contract.
        unsafe {
            for first in (0..len).step_by(16) {
                let to = keys.add(first / width * (dim / 2) * width + first % width);
                let rows = self.sixteen_keys(b, key, first, len);
                for i in (0..dim).step_by(32) {
                    s.transpose_pairs(shifted(rows, i), to.add(i / 2 * width), width);
                }
            }
            for p in 0..len.div_ceil(width) {
                let panel = keys.add(p * (dim / 2) * width);
                let to = b.scores.add(p * width);
                let scale = Some(s.splat(self.score_scale()));
                let q = b.q.cast();
                pair_tiles(s, q, dim / 2, self.rows(), panel, dim / 2, to, CHUNK, scale);
            }
        }
    }

    /// b.sums[dim panel][row][2 LANES] += b.probs, bfloat16, times values. b.values takes the chunk as
    /// panels [dim panel][CHUNK / 2][2 LANES dims].
    ///
    /// # Safety
    /// The task's contract.
    #[inline(always)]
    unsafe fn add_values_of_pairs<S: Simd>(&self, s: S, b: &Buffers, key: usize, len: usize) {
        let values = b.values.cast::<u32>();
        let width = 2 * S::LANES;
        let dim = self.args.v_cache.head_dim;
        // SAFETY: the task's contract.
        unsafe {
            let mut walk = Walk::START;
            let mut take = |j: usize| {
                if j >= len {
                    return ZEROS.as_ptr();
                }
                if self.has_scales() {
                    return b.wide.add(j * dim).cast_const();
                }
                walk.to(self, &self.args.v_cache, key + j);
                walk.at.cast::<u16>()
            };
            for j in (0..len).step_by(2) {
                let (even, odd) = (take(j), take(j + 1));
                for i in (0..dim).step_by(width) {
                    let to = values.add((i / width * (CHUNK / 2) + j / 2) * width);
                    s.interleave_bf16(even.add(i), odd.add(i), to);
                }
            }
            for p in 0..dim / width {
                let panel = values.add(p * (CHUNK / 2) * width);
                let to = b.sums.ptr.add(p * b.sums.panel);
                let pairs = len.div_ceil(2);
                let probs = b.probs.cast();
                pair_tiles(s, probs, CHUNK, self.rows(), panel, pairs, to, width, None);
            }
        }
    }
}

/// sums[row][2 LANES], `to_stride` apart, of rows of x [rows][pairs], `stride` pairs apart, times a
/// panel [pairs][2 LANES]; added to the sums, or times `scale` in their place.
///
/// # Safety
/// All of it exists; `to` overlaps nothing.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn pair_tiles<S: Simd>(
    s: S,
    x: *const u32,
    stride: usize,
    rows: usize,
    panel: *const u32,
    pairs: usize,
    to: *mut f32,
    to_stride: usize,
    scale: Option<S::V>,
) {
    let mut r = 0;
    while r < rows {
        // SAFETY: the caller's; each tile takes at most the rows that are left.
        unsafe {
            let (x, to) = (x.add(r * stride), to.add(r * to_stride));
            r += match rows - r {
                12.. => pair_tile::<S, 12>(s, x, stride, panel, pairs, to, to_stride, scale),
                6.. => pair_tile::<S, 6>(s, x, stride, panel, pairs, to, to_stride, scale),
                4.. => pair_tile::<S, 4>(s, x, stride, panel, pairs, to, to_stride, scale),
                3 => pair_tile::<S, 3>(s, x, stride, panel, pairs, to, to_stride, scale),
                2 => pair_tile::<S, 2>(s, x, stride, panel, pairs, to, to_stride, scale),
                _ => pair_tile::<S, 1>(s, x, stride, panel, pairs, to, to_stride, scale),
            };
        }
    }
}

/// R rows of `pair_tiles`, their sums in registers; returns R.
///
/// # Safety
/// As there.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn pair_tile<S: Simd, const R: usize>(
    s: S,
    x: *const u32,
    stride: usize,
    panel: *const u32,
    pairs: usize,
    to: *mut f32,
    to_stride: usize,
    scale: Option<S::V>,
) -> usize {
    // SAFETY: the caller's.
    unsafe {
        let mut acc = [[s.zero(); 2]; R];
        if scale.is_none() {
            for (r, acc) in acc.iter_mut().enumerate() {
                acc[0] = s.load(to.add(r * to_stride));
                acc[1] = s.load(to.add(r * to_stride + S::LANES));
            }
        }
        for pair in 0..pairs {
            let at = panel.add(pair * 2 * S::LANES);
            let a = s.load_words(at.cast());
            let b = s.load_words(at.add(S::LANES).cast());
            for (r, acc) in acc.iter_mut().enumerate() {
                let x = *x.add(r * stride + pair);
                acc[0] = s.dot_bf16(acc[0], a, x);
                acc[1] = s.dot_bf16(acc[1], b, x);
            }
        }
        if let Some(scale) = scale {
            for acc in acc.as_flattened_mut() {
                *acc = s.mul(*acc, scale);
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            s.store(to.add(r * to_stride), acc[0]);
            s.store(to.add(r * to_stride + S::LANES), acc[1]);
        }
    }
    R
}
