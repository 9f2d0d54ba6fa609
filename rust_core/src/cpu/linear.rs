//! Linear: a weight [N, K] packed for the kernels, and y = x W^T + b.
//!
//! Layouts, where L is the level's lanes and N is padded with zero rows to a multiple of 2 L:
//! - F32, F16: panels of 2 L rows; in a panel, for each k, its 2 L rows' elements.
//! - BF16: the same for pairs of k, a row's two elements side by side (K padded to even), since
//!   a shift and a mask then make float32 vectors of them.
//! - W4: tiles of L rows; per group of 32 along K: L half scales, L half minima, nibbles
//!   (see `simd`); a weight is scale * nibble + minimum.
//! - W8: per group L half scales and bytes.
//!
//! The nibble and byte layouts move whole 32-bit words of GGUF's Q4_0, Q4_1 and Q8_0 blocks, so
//! packing is lossless; Q4_0's minimum is -8 scales.
//!
//! Cost: 2 M N K operations; the weights are read once per 64 to 128 rows of x.

use super::float::{DType, f16_to_f32, f32_to_f16};
use super::level::Level;
#[cfg(target_arch = "x86_64")]
use super::linear_amx;
use super::linear_float::{FloatTask, ROW_BLOCK, SCRATCH_FLOATS};
use super::linear_int8::{Activations, Int8Task};
use super::pool;
use super::scratch::{AlignedBytes, with_floats};
use super::simd::GROUP;
use super::tensor::{Rows, RowsMut, store_one};

/// How packed weights are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packed {
    /// float32
    F32,
    /// bfloat16
    Bf16,
    /// IEEE half
    F16,
    /// 4 bits with scale and minimum per group
    W4,
    /// 8 bits with a scale per group
    W8,
}

/// How rows are stored that are to be packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A plain tensor.
    Plain(DType),
    /// GGUF blocks.
    Q4_0,
    /// GGUF blocks.
    Q4_1,
    /// GGUF blocks.
    Q8_0,
}

impl Source {
    /// From GGUF's name.
    pub fn parse(name: &str) -> Option<Source> {
        Some(match name {
            "F32" => Source::Plain(DType::F32),
            "BF16" => Source::Plain(DType::Bf16),
            "F16" => Source::Plain(DType::F16),
            "Q4_0" => Source::Q4_0,
            "Q4_1" => Source::Q4_1,
            "Q8_0" => Source::Q8_0,
            _ => return None,
        })
    }

    /// What it is packed to.
    pub fn packed(self) -> Packed {
        match self {
            Source::Plain(DType::F32) => Packed::F32,
            Source::Plain(DType::Bf16) => Packed::Bf16,
            Source::Plain(DType::F16) => Packed::F16,
            Source::Q4_0 | Source::Q4_1 => Packed::W4,
            Source::Q8_0 => Packed::W8,
        }
    }

    /// Bytes of a row of `k` elements.
    pub fn row_bytes(self, k: usize) -> usize {
        match self {
            Source::Plain(dtype) => k * dtype.size(),
            Source::Q4_0 => k / GROUP * 18,
            Source::Q4_1 => k / GROUP * 20,
            Source::Q8_0 => k / GROUP * 34,
        }
    }
}

/// A packed weight. See the module doc.
pub struct Linear {
    level: Level,
    packed: Packed,
    n: usize,
    k: usize,
    bytes: AlignedBytes,
}

impl Linear {
    /// An all-zero weight, to be filled by `pack_rows`.
    ///
    /// # Errors
    /// When K is not a multiple of 32 for a quantized kind, or the size overflows.
    pub fn new(level: Level, packed: Packed, n: usize, k: usize) -> Result<Linear, String> {
        if matches!(packed, Packed::W4 | Packed::W8) && !k.is_multiple_of(GROUP) {
            return Err(format!("K must be a multiple of {GROUP}, not {k}"));
        }
        let rows = n.checked_next_multiple_of(2 * level.lanes());
        let len = rows
            .and_then(|rows| rows.checked_mul(packed.row_bytes(k)))
            .filter(|&len| len < isize::MAX as usize)
            .ok_or_else(|| format!("a weight of {n} x {k} is too large"))?;
        Ok(Linear {
            level,
            packed,
            n,
            k,
            bytes: AlignedBytes::zeroed(len),
        })
    }

    /// Output features.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Input features.
    pub fn k(&self) -> usize {
        self.k
    }

    /// How it is stored.
    pub fn packed(&self) -> Packed {
        self.packed
    }

    /// Bytes it takes.
    pub fn nbytes(&self) -> usize {
        self.bytes.num_bytes()
    }

    /// Set rows `first..first + rows`, row i from row `permutation[i]` (i if None) of `source`.
    ///
    /// # Errors
    /// When the rows do not fit, are of another packed kind, or the permutation is wrong.
    ///
    /// # Safety
    /// `source` holds `rows` rows of `kind.row_bytes(k)` bytes, one after another.
    pub unsafe fn pack_rows(
        &mut self,
        first: usize,
        rows: usize,
        source: *const u8,
        kind: Source,
        permutation: Option<&[i64]>,
    ) -> Result<(), String> {
        if kind.packed() != self.packed {
            return Err(format!(
                "{kind:?} rows do not fit {:?} weights",
                self.packed
            ));
        }
        if first.checked_add(rows).is_none_or(|end| end > self.n) {
            return Err(format!("rows {first} + {rows} of {}", self.n));
        }
        if let Some(p) = permutation
            && (p.len() != rows || p.iter().any(|&i| i < 0 || i as usize >= rows))
        {
            return Err(format!("not a permutation of {rows} rows"));
        }
        let lanes = 2 * self.level.lanes();
        let row_bytes = kind.row_bytes(self.k);
        let source = source as usize;
        let this = &*self;
        // Panels are disjoint memory, so they may be filled side by side.
        let (panel0, panel1) = (first / lanes, (first + rows).div_ceil(lanes));
        let step = 16;
        pool::run((panel1 - panel0).div_ceil(step), |task| {
            let low = ((panel0 + task * step) * lanes).max(first);
            let high = ((panel0 + (task + 1) * step) * lanes).min(first + rows);
            for row in low..high {
                let from = permutation.map_or(row - first, |p| p[row - first] as usize);
                // SAFETY: `from < rows`, and the caller vouches for the source; `row < n`.
                unsafe { this.pack_row(row, (source as *const u8).add(from * row_bytes), kind) }
            }
        });
        Ok(())
    }

    /// Set one row.
    ///
    /// # Safety
    /// `row < n`; `source` holds one row; nobody else touches this row's panel.
    unsafe fn pack_row(&self, row: usize, source: *const u8, kind: Source) {
        let lanes = self.level.lanes();
        let base = self.bytes.as_ptr().cast_mut();
        // SAFETY: offsets are those of the layout, whose size `new` allocated; the memory behind
        // `base` is this Linear's own and `pack_rows` holds it mutably.
        unsafe {
            match kind {
                Source::Plain(dtype) => {
                    let (panel, column) = (row / (2 * lanes), row % (2 * lanes));
                    let size = dtype.size();
                    for k in 0..self.k {
                        let at = self.plain_offset(panel, column, k);
                        std::ptr::copy_nonoverlapping(source.add(k * size), base.add(at), size);
                    }
                }
                Source::Q4_0 | Source::Q4_1 | Source::Q8_0 => {
                    let (tile, lane) = (row / lanes, row % lanes);
                    let groups = self.k / GROUP;
                    let block = kind.row_bytes(GROUP);
                    let packed_block = self.packed.row_bytes(GROUP) * lanes;
                    for g in 0..groups {
                        let from = source.add(g * block);
                        let to = base.add((tile * groups + g) * packed_block);
                        let half = |at: usize| from.add(at).cast::<u16>().read_unaligned();
                        let put = |at: usize, h: u16| {
                            to.add((at * lanes + lane) * 2)
                                .cast::<u16>()
                                .write_unaligned(h);
                        };
                        put(0, half(0));
                        let (values, words, head) = match kind {
                            Source::Q4_0 => {
                                put(1, f32_to_f16(-8.0 * f16_to_f32(half(0))));
                                (from.add(2), 4, 4)
                            }
                            Source::Q4_1 => {
                                put(1, half(2));
                                (from.add(4), 4, 4)
                            }
                            _ => (from.add(2), 8, 2),
                        };
                        let to = to.add(head * lanes + lane * 4);
                        for word in 0..words {
                            std::ptr::copy_nonoverlapping(
                                values.add(word * 4),
                                to.add(word * lanes * 4),
                                4,
                            );
                        }
                    }
                }
            }
        }
    }

    /// Byte offset of an element of a plain kind.
    fn plain_offset(&self, panel: usize, column: usize, k: usize) -> usize {
        let width = 2 * self.level.lanes();
        match self.packed {
            Packed::F32 => ((panel * self.k + k) * width + column) * 4,
            Packed::Bf16 => {
                let pairs = self.k.div_ceil(2);
                (((panel * pairs + k / 2) * width + column) * 2 + k % 2) * 2
            }
            _ => ((panel * self.k + k) * width + column) * 2,
        }
    }

    /// Row `row` as float32, times `scale`, into `out` (K elements).
    pub fn read_row(&self, row: usize, scale: f32, out: &mut [f32]) {
        assert!(row < self.n && out.len() == self.k, "row out of range");
        let lanes = self.level.lanes();
        let base = self.bytes.as_ptr();
        // SAFETY: as in `pack_row`, reading.
        let half = |at: usize| f16_to_f32(unsafe { base.add(at).cast::<u16>().read_unaligned() });
        match self.packed {
            Packed::F32 | Packed::Bf16 | Packed::F16 => {
                let (panel, column) = (row / (2 * lanes), row % (2 * lanes));
                for (k, y) in out.iter_mut().enumerate() {
                    let at = self.plain_offset(panel, column, k);
                    // SAFETY: as above.
                    let x = unsafe {
                        match self.packed {
                            Packed::F32 => base.add(at).cast::<f32>().read_unaligned(),
                            Packed::Bf16 => super::float::bf16_to_f32(
                                base.add(at).cast::<u16>().read_unaligned(),
                            ),
                            _ => half(at),
                        }
                    };
                    *y = x * scale;
                }
            }
            Packed::W4 | Packed::W8 => {
                let (tile, lane) = (row / lanes, row % lanes);
                let groups = self.k / GROUP;
                let block = self.packed.row_bytes(GROUP) * lanes;
                for (g, ys) in out.chunks_exact_mut(GROUP).enumerate() {
                    let at = (tile * groups + g) * block;
                    let d = half(at + lane * 2);
                    // SAFETY: as above.
                    let byte = |at: usize| unsafe { *base.add(at) };
                    if self.packed == Packed::W4 {
                        let m = half(at + (lanes + lane) * 2);
                        let at = at + 4 * lanes + lane * 4;
                        for i in 0..GROUP / 2 {
                            let both = byte(at + i / 4 * lanes * 4 + i % 4);
                            ys[i] = (d * f32::from(both & 15) + m) * scale;
                            ys[i + 16] = (d * f32::from(both >> 4) + m) * scale;
                        }
                    } else {
                        let at = at + 2 * lanes + lane * 4;
                        for (i, y) in ys.iter_mut().enumerate() {
                            let q = byte(at + i / 4 * lanes * 4 + i % 4) as i8;
                            *y = d * f32::from(q) * scale;
                        }
                    }
                }
            }
        }
    }

    /// Rows `ids` times `scale`, as y [T, K].
    ///
    /// # Errors
    /// When an id is not a row.
    ///
    /// # Safety
    /// y describes valid memory.
    pub unsafe fn embedding(&self, ids: &[i32], scale: f32, y: RowsMut) -> Result<(), String> {
        assert!(y.rows == ids.len() && y.cols == self.k);
        if let Some(id) = ids.iter().find(|&&id| id < 0 || id as usize >= self.n) {
            return Err(format!(
                "token id {id} is outside the vocabulary of {}",
                self.n
            ));
        }
        pool::run(ids.len(), |row| {
            with_floats(1, self.k, |buffer| {
                // SAFETY: the buffer holds K initialized floats; tasks write rows of their own.
                unsafe {
                    let floats = std::slice::from_raw_parts_mut(buffer, self.k);
                    self.read_row(ids[row] as usize, scale, floats);
                    for (col, &x) in floats.iter().enumerate() {
                        store_one(y.at(row, col), y.dtype, x);
                    }
                }
            });
        });
        Ok(())
    }

    /// y [M, N] = x [M, K] W^T + bias [N].
    ///
    /// Quantized weights meet activations rounded to int8 per group of 32, or float32 ones if
    /// `exact`.
    ///
    /// # Safety
    /// x, y and bias describe valid memory of M x K, M x N and 1 x N elements; y overlaps neither.
    pub unsafe fn forward(&self, x: Rows, bias: Option<Rows>, y: RowsMut, exact: bool) {
        assert!(x.cols == self.k && y.cols == self.n && x.rows == y.rows);
        assert!(bias.is_none_or(|b| b.cols == self.n && b.rows == 1));
        if y.rows == 0 || self.n == 0 {
            return;
        }
        let quantized = matches!(self.packed, Packed::W4 | Packed::W8);
        // SAFETY: the caller's contract; the tasks below write disjoint parts of y.
        unsafe {
            #[cfg(target_arch = "x86_64")]
            if self.level.has_amx() && x.rows >= linear_amx::MIN_ROWS && self.k > 0 {
                return self.forward_amx(x, bias, y, exact);
            }
            if quantized && !exact {
                let (floats, rows) = (Activations::floats(x.rows, self.k), x.rows);
                with_floats(0, floats, |p| {
                    let activations = Activations::quantize(self.level, x, self.packed, p);
                    let tiles = self.n.div_ceil(self.level.lanes());
                    split(tiles, rows, &|tiles, rows| {
                        self.level.run(Int8Task {
                            weight: self.view(),
                            x: activations,
                            bias,
                            y,
                            tiles,
                            rows,
                        });
                    });
                });
                return;
            }
            // The tiles read aligned float32 rows of even length.
            let even = self.k.next_multiple_of(2);
            let aligned = x.ptr.cast::<f32>().is_aligned();
            let copy = x.dtype != DType::F32 || even != self.k || !aligned;
            with_floats(0, if copy { even * x.rows } else { 0 }, |p| {
                let x = if copy {
                    x.to_f32(self.level, p, even)
                } else {
                    x
                };
                let panels = self.n.div_ceil(2 * self.level.lanes());
                split(panels, x.rows, &|panels, rows| {
                    with_floats(1, SCRATCH_FLOATS, |scratch| {
                        self.level.run(FloatTask {
                            weight: self.view(),
                            x,
                            bias,
                            y,
                            panels,
                            rows,
                            scratch,
                        });
                    });
                });
            });
        }
    }

    /// # Safety
    /// As `forward`; the level has AMX.
    #[cfg(target_arch = "x86_64")]
    unsafe fn forward_amx(&self, x: Rows, bias: Option<Rows>, y: RowsMut, exact: bool) {
        let weight = self.view();
        let floats = linear_amx::Activations::floats(x, weight, exact);
        // SAFETY: the caller's; the tasks write disjoint parts of y.
        with_floats(0, floats, |p| unsafe {
            let split_x = linear_amx::Activations::split(self.level, x, weight, exact, p);
            split(
                self.n.div_ceil(2 * self.level.lanes()),
                x.rows,
                &|panels, rows| {
                    let task = linear_amx::AmxTask {
                        level: self.level,
                        weight,
                        x: split_x,
                        bias,
                        y,
                        panels,
                        rows,
                    };
                    task.run();
                },
            );
        });
    }

    fn view(&self) -> View {
        View {
            bytes: self.bytes.as_ptr(),
            packed: self.packed,
            n: self.n,
            k: self.k,
        }
    }
}

impl Packed {
    /// Bytes of a row of `k` elements.
    pub fn row_bytes(self, k: usize) -> usize {
        match self {
            Packed::F32 => k * 4,
            Packed::Bf16 => k.next_multiple_of(2) * 2,
            Packed::F16 => k * 2,
            Packed::W4 => k / GROUP * 20,
            Packed::W8 => k / GROUP * 34,
        }
    }
}

/// A Linear as the kernels see it.
#[derive(Clone, Copy)]
pub struct View {
    /// The packed bytes.
    pub bytes: *const u8,
    /// Their layout.
    pub packed: Packed,
    /// Rows, without padding.
    pub n: usize,
    /// Columns, without padding.
    pub k: usize,
}

impl View {
    /// Where a panel's element `k0`, even, begins in bfloat16 weights, for panels `width` wide.
    ///
    /// # Safety
    /// The element exists.
    pub unsafe fn bf16_panel(&self, panel: usize, k0: usize, width: usize) -> *const u16 {
        let pairs = panel * self.k.div_ceil(2) + k0 / 2;
        // SAFETY: the caller's.
        unsafe { self.bytes.cast::<u16>().add(pairs * 2 * width) }
    }
}

type Range = std::ops::Range<usize>;

/// Cut `units` columns of work times `rows` into tasks, several a thread so that a thread that
/// loses its core does not hold up the rest.
fn split(units: usize, rows: usize, run: &(dyn Fn(Range, Range) + Sync)) {
    let threads = pool::num_threads();
    if threads == 1 {
        return run(0..units, 0..rows);
    }
    let unit_step = units.div_ceil(threads * 6).max(1);
    let unit_tasks = units.div_ceil(unit_step);
    let row_step = if unit_tasks >= 3 * threads {
        rows
    } else {
        ROW_BLOCK.min(rows)
    };
    let row_tasks = rows.div_ceil(row_step);
    pool::run(unit_tasks * row_tasks, |task| {
        let (u, r) = (task / row_tasks * unit_step, task % row_tasks * row_step);
        run(u..(u + unit_step).min(units), r..(r + row_step).min(rows));
    });
}

// SAFETY: a View's bytes are read only, and outlive the region that uses it.
unsafe impl Sync for View {}
