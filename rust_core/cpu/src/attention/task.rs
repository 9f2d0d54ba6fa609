//! AttentionTask: one item's work, its buffers, and its way to the cache.

use crate::kv_cache::Cache;
use crate::simd::Simd;
use crate::tensor::load_some;

use super::plan::{AttentionArgs, CHUNK, Item, TILE_ROWS};

/// Rows per softmax pass.
pub(super) const STATE_ROWS: usize = 16;

/// One item, on one thread.
pub(super) struct AttentionTask<'a> {
    pub(super) args: AttentionArgs<'a>,
    /// Query heads of a KV head.
    pub(super) group: usize,
    pub(super) item: Item,
    /// The item that this thread probably takes next.
    pub(super) next: Option<Item>,
    /// `scratch_floats` of this thread's own.
    pub(super) scratch: *mut f32,
    /// Memory for the result of an item with `partial`.
    pub(super) partial: *mut f32,
}

/// Rows and columns of an item's buffers, rounded up, the same at every level.
fn padded(group: usize, dim: usize) -> (usize, usize) {
    let rows = TILE_ROWS.max(group).next_multiple_of(STATE_ROWS);
    (rows, dim.next_multiple_of(32))
}

/// Floats of scratch that an item needs: q, sums, probabilities, scores, state, a chunk of keys
/// and of values, and of the numbers and scales of bytes.
pub(super) fn scratch_floats(group: usize, dim: usize) -> usize {
    let (rows, dim) = padded(group, dim);
    rows * (2 * dim + 2 * CHUNK + 3) + 2 * CHUNK * dim + CHUNK * dim / 2 + CHUNK
}

/// The parts of an item's scratch.
pub(super) struct Buffers {
    /// Rows of q and of the state, a multiple of `STATE_ROWS`.
    pub(super) padded_rows: usize,
    /// Columns of q, a multiple of every level's two vectors.
    pub(super) dim: usize,
    /// [padded_rows][dim], float32 or bfloat16.
    pub(super) q: *mut f32,
    /// Sums of values, by probability.
    pub(super) sums: Sums,
    /// [padded_rows][CHUNK]
    pub(super) scores: *mut f32,
    /// [padded_rows][CHUNK], float32 or, in the first half of a row, bfloat16.
    pub(super) probs: *mut f32,
    pub(super) state: State,
    /// A chunk of gathered keys.
    pub(super) keys: *mut f32,
    /// A chunk of gathered values.
    pub(super) values: *mut f32,
    /// Numbers of keys, or of values, of a byte: a chunk in bfloat16, [CHUNK][dim], or a row in float32.
    pub(super) wide: *mut u16,
    /// A chunk's scales of keys, or of values, zeros behind its end: [CHUNK].
    pub(super) scales: *mut f32,
}

/// An item's sums of values: float32, in vectors.
#[derive(Clone, Copy)]
pub(super) struct Sums {
    pub(super) ptr: *mut f32,
    /// Elements from row to row within a panel of 2 LANES columns.
    pub(super) row: usize,
    /// Elements from panel to panel.
    pub(super) panel: usize,
}

impl Sums {
    /// Address of column `i` of row `r`, where a vector begins.
    ///
    /// # Safety
    /// The element exists.
    #[inline(always)]
    pub(super) unsafe fn at<S: Simd>(&self, r: usize, i: usize) -> *mut f32 {
        let width = 2 * S::LANES;
        // SAFETY: the caller's.
        unsafe {
            self.ptr
                .add(i / width * self.panel + r * self.row + i % width)
        }
    }
}

/// The running softmax of each row.
#[derive(Clone, Copy)]
pub(super) struct State {
    /// Largest score so far.
    pub(super) high: *mut f32,
    /// Sum of the probabilities relative to it.
    pub(super) total: *mut f32,
    /// Factor of the last chunk to the sums before it.
    pub(super) shrink: *mut f32,
}

impl State {
    /// Rows without keys.
    ///
    /// # Safety
    /// All hold `rows` floats.
    #[inline(always)]
    pub(super) unsafe fn reset(&self, rows: usize) {
        for r in 0..rows {
            // SAFETY: the caller's.
            unsafe {
                *self.high.add(r) = f32::NEG_INFINITY;
                *self.total.add(r) = 0.0;
            }
        }
    }
}

impl AttentionTask<'_> {
    /// Rows of the item: query heads of all its tokens.
    #[inline(always)]
    pub(super) fn rows(&self) -> usize {
        self.item.tokens * self.group
    }

    /// The scratch's parts, with sums in panels as the tiles of products leave them.
    ///
    /// # Safety
    /// The scratch holds `scratch_floats`.
    #[inline(always)]
    pub(super) unsafe fn buffers<S: Simd>(&self) -> Buffers {
        let (rows, dim) = padded(self.group, self.args.k_cache.head_dim);
        let width = 2 * S::LANES;
        // SAFETY: `scratch_floats` is the sum of the parts.
        unsafe {
            let q = self.scratch;
            let sums = q.add(rows * dim);
            let scores = sums.add(rows * dim);
            let probs = scores.add(rows * CHUNK);
            let state = State {
                high: probs.add(rows * CHUNK),
                total: probs.add(rows * (CHUNK + 1)),
                shrink: probs.add(rows * (CHUNK + 2)),
            };
            let keys = state.shrink.add(rows);
            let values = keys.add(CHUNK * dim);
            let scales = values.add(CHUNK * dim);
            Buffers {
                padded_rows: rows,
                dim,
                q,
                sums: Sums {
                    ptr: sums,
                    row: width,
                    panel: width * self.rows(),
                },
                scores,
                probs,
                state,
                keys,
                values,
                wide: scales.add(CHUNK).cast(),
                scales,
            }
        }
    }

    /// The item's queries into `b.q`, as bfloat16 or float32 with zeros after head_dim, and an empty
    /// state.
    ///
    /// # Safety
    /// The task's contract.
    #[inline(always)]
    pub(super) unsafe fn begin<S: Simd, const BF16: bool>(&self, s: S, b: &Buffers) {
        let q = &self.args.q;
        let dim = self.args.k_cache.head_dim;
        // SAFETY: the task's contract.
        unsafe {
            for r in 0..self.rows() {
                let (token, head) = (r / self.group, r % self.group);
                let head = self.item.kv_head * self.group + head;
                let from = q.at(self.item.row + token, head * dim);
                let mut i = 0;
                while i < b.dim {
                    let left = dim.saturating_sub(i);
                    let at = from.wrapping_add(i * q.dtype.size());
                    let v = load_some(s, at, q.dtype, left);
                    if BF16 {
                        s.store_bf16(b.q.cast::<u16>().add(r * b.dim + i), v);
                    } else {
                        s.store(b.q.add(r * b.dim + i), v);
                    }
                    i += S::LANES;
                }
            }
            b.state.reset(b.padded_rows);
            for i in 0..self.rows() * b.dim / S::LANES {
                s.store(b.sums.ptr.add(i * S::LANES), s.zero());
            }
        }
    }

    /// Address of a key's row, and the number of keys from it to the end of its block.
    #[inline(always)]
    pub(super) unsafe fn locate(&self, cache: &Cache, key: usize) -> (*const u8, usize) {
        // SAFETY: the caller's.
        unsafe { self.locate_of(&self.item, cache, key) }
    }

    /// Address of a key's scale, and the number of keys from it to the end of its block.
    ///
    /// # Safety
    /// The task's contract; the cache has scales.
    #[inline(always)]
    pub(super) unsafe fn locate_scales(&self, cache: &Cache, key: usize) -> (*const f32, usize) {
        let (block, offset) = self.place_of(&self.item, cache, key);
        // SAFETY: `plan` checked the table's entries.
        let at = unsafe { cache.scale_at(block, self.item.kv_head, offset) };
        (at.cast_const(), cache.block_size - offset)
    }

    /// The block of an item's key, and its offset there.
    #[inline(always)]
    fn place_of(&self, item: &Item, cache: &Cache, key: usize) -> (usize, usize) {
        let (index, offset) = (key / cache.block_size, key % cache.block_size);
        let slot = self.args.slots[item.request] as usize;
        let block = self.args.block_table[slot * self.args.max_blocks + index] as usize;
        (block, offset)
    }

    /// The same of any item.
    #[inline(always)]
    unsafe fn locate_of(&self, item: &Item, cache: &Cache, key: usize) -> (*const u8, usize) {
        let (block, offset) = self.place_of(item, cache, key);
        // SAFETY: `plan` checked the table's entries.
        let at = unsafe { cache.at(block, item.kv_head, offset) };
        (at.cast_const(), cache.block_size - offset)
    }

    /// Prefetch a chunk of the item's values.
    ///
    /// # Safety
    /// The task's contract.
    #[inline(always)]
    pub(super) unsafe fn prefetch_values<S: Simd>(&self, s: S, key: usize, len: usize) {
        // SAFETY: the caller's.
        unsafe { self.prefetch(s, &self.args.v_cache, &self.item, key, len) }
    }

    /// Prefetch `len` keys from `key` on: of the item, or beyond its end of the next one's beginning.
    ///
    /// # Safety
    /// The task's contract.
    #[inline(always)]
    pub(super) unsafe fn prefetch_keys<S: Simd>(&self, s: S, key: usize, len: usize) {
        let cache = &self.args.k_cache;
        // SAFETY: the caller's; `plan` checked the next item as well.
        unsafe {
            if key < self.item.high {
                self.prefetch(s, cache, &self.item, key, len.min(self.item.high - key));
            } else if let Some(next) = self.next.filter(|next| next.tokens == 1) {
                let at = next.low + (key - self.item.high);
                self.prefetch(s, cache, &next, at, len.min(next.high.saturating_sub(at)));
            }
        }
    }

    /// Prefetch rows of the cache. Blocks lie anywhere in memory, and the hardware's own prefetch
    /// ends with each of them.
    #[inline(always)]
    unsafe fn prefetch<S: Simd>(&self, s: S, cache: &Cache, item: &Item, key: usize, len: usize) {
        let row = cache.head_dim * cache.dtype.size();
        let mut done = 0;
        while done < len {
            // SAFETY: the task's contract.
            let (at, run) = unsafe { self.locate_of(item, cache, key + done) };
            let run = run.min(len - done);
            for line in (0..run * row).step_by(64) {
                s.prefetch_far(at.wrapping_add(line));
            }
            done += run;
        }
    }
}
