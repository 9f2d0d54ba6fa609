//! qk_norm_rope_store_kv: split a QKV row, norm and rotate its heads, store keys and values.
//!
//! Memory-bound. Elements go from row to row by way of registers alone.

use std::mem::MaybeUninit;
use std::ops::Range;

use crate::float::DType;
use crate::kv_cache::{Cache, CacheType, MAX_HEAD_DIM};
use crate::level::Level;
use crate::pool;
use crate::simd::{Kernel, Simd};
use crate::tensor::{Rows, RowsMut, load_one, load_some, store_one, store_some};

/// Elements a task.
const SERIAL: usize = 1 << 14;

/// The op's inputs and outputs.
#[derive(Clone, Copy)]
pub struct RopeArgs<'a> {
    /// [T, (Hq + 2 Hkv) Dh]
    pub qkv: Rows,
    /// [T]
    pub positions: &'a [i32],
    /// float32 [max_pos, rot]
    pub cos_sin: Rows,
    /// [T]; -1 stores nothing.
    pub slot_mapping: &'a [i32],
    /// Keys.
    pub k_cache: Cache,
    /// Values.
    pub v_cache: Cache,
    /// float32 [Hkv] each: the scales of keys and of values in a cache of bytes; empty: of each row
    /// its own.
    pub kv_scales: [&'a [f32]; 2],
    /// Hq
    pub num_heads: usize,
    /// [1, Dh]
    pub q_norm: Option<Rows>,
    /// [1, Dh]
    pub k_norm: Option<Rows>,
    /// Of the norms.
    pub eps: f32,
    /// Added to the norms' weights.
    pub weight_offset: f32,
    /// Pairs are neighbours.
    pub interleaved: bool,
    /// [T, Hq Dh]
    pub q: RowsMut,
}

/// See `kernels/reference.py`.
///
/// # Errors
/// When a position or slot is out of range, or the head is too large.
///
/// # Safety
/// Everything describes valid memory; what is written overlaps nothing else; slots are distinct.
pub unsafe fn qk_norm_rope_store_kv(level: Level, args: RopeArgs) -> Result<(), String> {
    let (tokens, cache) = (args.qkv.rows, &args.k_cache);
    let (dim, rot) = (cache.head_dim, args.cos_sin.cols);
    assert!(args.positions.len() == tokens && args.slot_mapping.len() == tokens);
    assert!(args.q.rows == tokens && args.q.cols == args.num_heads * dim);
    assert!(args.qkv.cols == (args.num_heads + 2 * cache.num_kv_heads) * dim);
    for scales in args.kv_scales {
        assert!(scales.is_empty() || scales.len() == cache.num_kv_heads);
    }
    if dim > MAX_HEAD_DIM || rot > dim || !rot.is_multiple_of(2) {
        return Err(format!(
            "head_dim {dim} with {rot} rotated is not supported"
        ));
    }
    let max_pos = args.cos_sin.rows;
    let in_table = |&p: &i32| p >= 0 && (p as usize) < max_pos;
    if let Some(p) = args.positions.iter().find(|p| !in_table(p)) {
        return Err(format!("position {p} is outside the table of {max_pos}"));
    }
    let num_slots = cache.num_blocks * cache.block_size;
    if let Some(slot) = args
        .slot_mapping
        .iter()
        .find(|&&slot| slot >= 0 && slot as usize >= num_slots)
    {
        return Err(format!("slot {slot} is outside the cache of {num_slots}"));
    }
    let step = (SERIAL / args.qkv.cols.max(1)).max(1);
    pool::run(tokens.div_ceil(step), |task| {
        let rows = task * step..((task + 1) * step).min(tokens);
        // SAFETY: the caller's; tasks take disjoint tokens.
        unsafe { level.run_dots(RopeTask { args, rows }) };
    });
    Ok(())
}

/// A head's elements, on their way to be bytes: not zeroed, which would take longer than their use.
type Row = MaybeUninit<[f32; MAX_HEAD_DIM]>;

struct RopeTask<'a> {
    args: RopeArgs<'a>,
    rows: Range<usize>,
}

impl Kernel for RopeTask<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let a = &self.args;
        let (dim, kv_heads) = (a.k_cache.head_dim, a.k_cache.num_kv_heads);
        for row in self.rows.clone() {
            let slot = a.slot_mapping[row];
            // SAFETY: `qk_norm_rope_store_kv` checked positions, slots and sizes.
            unsafe {
                let table = a.cos_sin.at(a.positions[row] as usize, 0).cast::<f32>();
                for head in 0..a.num_heads {
                    let to = a.q.at(row, head * dim);
                    let from = a.qkv.at(row, head * dim);
                    self.turn(s, from, table, a.q_norm, to, a.q.dtype);
                }
                if slot < 0 {
                    continue;
                }
                let (block, offset) = (
                    slot as usize / a.k_cache.block_size,
                    slot as usize % a.k_cache.block_size,
                );
                for head in 0..kv_heads {
                    let place = (block, head, offset);
                    let from = a.qkv.at(row, (a.num_heads + head) * dim);
                    self.store_key(s, from, table, place);
                    let from = a.qkv.at(row, (a.num_heads + kv_heads + head) * dim);
                    self.store_value(s, from, place);
                }
            }
        }
    }
}

impl RopeTask<'_> {
    /// A key's head, normed and rotated, into its (block, head, offset) in the cache.
    ///
    /// # Safety
    /// The task's contract.
    #[inline(always)]
    unsafe fn store_key<S: Simd>(
        &self,
        s: S,
        from: *const u8,
        table: *const f32,
        place: (usize, usize, usize),
    ) {
        let cache = &self.args.k_cache;
        // SAFETY: the caller's; a row has room for the largest head.
        unsafe {
            match cache.dtype {
                CacheType::Float(dtype) => {
                    let to = cache.at(place.0, place.1, place.2);
                    self.turn(s, from, table, self.args.k_norm, to, dtype);
                }
                CacheType::Scaled(byte) => {
                    let mut row = Row::uninit();
                    let to = row.as_mut_ptr().cast();
                    self.turn(s, from, table, self.args.k_norm, to, DType::F32);
                    let scale = self.args.kv_scales[0].get(place.1).copied();
                    cache.store_bytes(s, byte, place, row.as_ptr().cast(), scale);
                }
            }
        }
    }

    /// A value's head into its (block, head, offset) in the cache.
    ///
    /// # Safety
    /// The task's contract.
    #[inline(always)]
    unsafe fn store_value<S: Simd>(&self, s: S, from: *const u8, place: (usize, usize, usize)) {
        let cache = &self.args.v_cache;
        let (dim, read) = (cache.head_dim, self.args.qkv.dtype);
        // SAFETY: the caller's; a row has room for the largest head.
        unsafe {
            let load = |i: usize| load_some(s, from.add(i * read.size()), read, dim - i);
            match cache.dtype {
                CacheType::Float(write) => {
                    let to = cache.at(place.0, place.1, place.2);
                    for i in (0..dim).step_by(S::LANES) {
                        store_some(s, to.add(i * write.size()), write, load(i), dim - i);
                    }
                }
                CacheType::Scaled(byte) => {
                    let mut row = Row::uninit();
                    for i in (0..dim).step_by(S::LANES) {
                        s.store(row.as_mut_ptr().cast::<f32>().add(i), load(i));
                    }
                    let scale = self.args.kv_scales[1].get(place.1).copied();
                    cache.store_bytes(s, byte, place, row.as_ptr().cast(), scale);
                }
            }
        }
    }

    /// Norm and rotate one head.
    #[inline(always)]
    unsafe fn turn<S: Simd>(
        &self,
        s: S,
        from: *const u8,
        table: *const f32,
        norm: Option<Rows>,
        to: *mut u8,
        to_dtype: DType,
    ) {
        let a = &self.args;
        let dim = a.k_cache.head_dim;
        let half = a.cos_sin.cols / 2;
        // SAFETY: `qk_norm_rope_store_kv`'s contract.
        unsafe {
            let head = Head::new(s, a, from, norm);
            let put = |i: usize, v: S::V, left: usize| {
                store_some(s, to.add(i * to_dtype.size()), to_dtype, v, left);
            };
            let put_one = |i: usize, x: f32| store_one(to.add(i * to_dtype.size()), to_dtype, x);
            let mut i = 0;
            while !a.interleaved && i + S::LANES <= half {
                let (cos, sin) = (s.load(table.add(i)), s.load(table.add(half + i)));
                let (x, y) = (head.some(s, i, S::LANES), head.some(s, half + i, S::LANES));
                put(i, s.sub(s.mul(x, cos), s.mul(y, sin)), S::LANES);
                put(half + i, s.fma(y, cos, s.mul(x, sin)), S::LANES);
                i += S::LANES;
            }
            for i in i..half {
                let (cos, sin) = (*table.add(i), *table.add(half + i));
                let [first, second] = if a.interleaved {
                    [2 * i, 2 * i + 1]
                } else {
                    [i, half + i]
                };
                let (x, y) = (head.one(first), head.one(second));
                put_one(first, x * cos - y * sin);
                put_one(second, y * cos + x * sin);
            }
            for i in (2 * half..dim).step_by(S::LANES) {
                put(i, head.some(s, i, dim - i), dim - i);
            }
        }
    }
}

/// A head's elements, normed.
struct Head {
    at: *const u8,
    dtype: DType,
    norm: Option<Rows>,
    offset: f32,
    /// One over the root of the mean square.
    scale: f32,
}

impl Head {
    /// # Safety
    /// `at` is a head, `norm` as long, both outlive this.
    #[inline(always)]
    unsafe fn new<S: Simd>(s: S, args: &RopeArgs, at: *const u8, norm: Option<Rows>) -> Head {
        let dim = args.k_cache.head_dim;
        let mut head = Head {
            at,
            dtype: args.qkv.dtype,
            norm: None,
            offset: args.weight_offset,
            scale: 1.0,
        };
        if norm.is_some() {
            let mut squares = s.zero();
            for i in (0..dim).step_by(S::LANES) {
                // SAFETY: the caller's.
                let v = unsafe { head.some(s, i, dim - i) };
                squares = s.fma(v, v, squares);
            }
            head.scale = 1.0 / (s.sum(squares) / dim as f32 + args.eps).sqrt();
            head.norm = norm;
        }
        head
    }

    /// The first min(n, LANES) from element i on, then zeros.
    ///
    /// # Safety
    /// They exist.
    #[inline(always)]
    unsafe fn some<S: Simd>(&self, s: S, i: usize, n: usize) -> S::V {
        // SAFETY: the caller's.
        unsafe {
            let v = load_some(s, self.at.add(i * self.dtype.size()), self.dtype, n);
            let Some(weight) = self.norm else {
                return v;
            };
            let w = load_some(s, weight.at(0, i), weight.dtype, n);
            s.mul(
                s.mul(v, s.splat(self.scale)),
                s.add(w, s.splat(self.offset)),
            )
        }
    }

    /// Element i.
    ///
    /// # Safety
    /// It exists.
    #[inline(always)]
    unsafe fn one(&self, i: usize) -> f32 {
        // SAFETY: the caller's.
        unsafe {
            let x = load_one(self.at.add(i * self.dtype.size()), self.dtype);
            let Some(weight) = self.norm else {
                return x;
            };
            x * self.scale * (load_one(weight.at(0, i), weight.dtype) + self.offset)
        }
    }
}
