//! Linear: a weight [N, K] packed for the kernels, and y = x W^T + b.
//!
//! Rows may be of several kinds (a fused projection of a file that mixes them): each stretch of
//! one kind is a section, packed and multiplied by itself. `layout` has the layouts.
//!
//! Cost: 2 M N K operations; the weights are read once per 64 to 128 rows of x.
//!
//! Longer than other files: the choice of a kernel for a product, by kind and rows, is one table.

#[cfg(target_arch = "x86_64")]
mod amx;
pub(crate) mod float;
mod form;
pub mod int16;
pub(crate) mod int8;
mod layout;
mod partition;
mod wide;

use octavo_formats::blocks::Shape;

use self::float::{FloatTask, SCRATCH_FLOATS};
use self::int8::{Activations, Int8Task, Product};
pub use self::layout::Packed;
use self::layout::View;
pub(crate) use self::partition::split;
use crate::float::DType;
use crate::level::Level;
use crate::pool;
use crate::scratch::{AlignedBytes, with_floats};
use crate::tensor::{Rows, RowsMut, Shared, store_one};

/// to[i] = from[columns[i]], elements as large as T, at any address.
///
/// # Safety
/// They exist.
unsafe fn gather<T: Copy>(from: *const u8, columns: &[usize], to: *mut u8) {
    let (from, to) = (from.cast::<T>(), to.cast::<T>());
    for (i, &column) in columns.iter().enumerate() {
        // SAFETY: the caller's.
        unsafe { to.add(i).write_unaligned(from.add(column).read_unaligned()) };
    }
}

/// The activations that quantized weights meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    /// As they are: float32 arithmetic.
    Exact,
    /// Two int8 parts, or one int16: see `int8` and `wide`.
    Fine,
    /// One int8 part, where that is faster.
    Coarse,
}

impl Rounding {
    /// That of so many bits: 32, 16 or 8.
    ///
    /// # Errors
    /// A message for any other number.
    pub fn of_bits(bits: u8) -> Result<Rounding, String> {
        match bits {
            32 => Ok(Rounding::Exact),
            16 => Ok(Rounding::Fine),
            8 => Ok(Rounding::Coarse),
            _ => Err(format!("activations have 8, 16 or 32 bits, not {bits}")),
        }
    }
}

/// Rows of one kind.
struct Section {
    packed: Packed,
    /// The first row's number.
    first: usize,
    n: usize,
    bytes: AlignedBytes,
}

/// A packed weight. See the module doc.
pub struct Linear {
    level: Level,
    n: usize,
    k: usize,
    sections: Vec<Section>,
    /// Packed column i is the weight's column `columns[i]`; None: i.
    columns: Option<Vec<usize>>,
}

impl Linear {
    /// An all-zero weight, to be filled by `pack_rows`. `parts`: kinds and numbers of rows, from
    /// the first row on.
    ///
    /// # Errors
    /// When K is not a multiple of a kind's block, or the size overflows.
    pub fn new(level: Level, k: usize, parts: &[(Packed, usize)]) -> Result<Linear, String> {
        let mut merged: Vec<(Packed, usize)> = Vec::new();
        let mut n = 0usize;
        for &(packed, rows) in parts {
            let elements = packed.elements();
            if !k.is_multiple_of(elements) {
                return Err(format!("K must be a multiple of {elements}, not {k}"));
            }
            n = n
                .checked_add(rows)
                .ok_or_else(|| format!("{n} + {rows} rows are too many"))?;
            match merged.last_mut() {
                Some(last) if last.0 == packed => last.1 += rows,
                _ => merged.push((packed, rows)),
            }
        }
        let mut linear = Linear {
            level,
            n,
            k,
            sections: Vec::new(),
            columns: None,
        };
        let mut first = 0;
        for (packed, n) in merged {
            let len = n
                .checked_next_multiple_of(2 * level.lanes())
                .and_then(|rows| rows.checked_mul(packed.row_bytes(k)))
                .filter(|&len| len < isize::MAX as usize)
                .ok_or_else(|| format!("a weight of {n} x {k} is too large"))?;
            linear.sections.push(Section {
                packed,
                first,
                n,
                bytes: AlignedBytes::zeroed(len),
            });
            first += n;
        }
        Ok(linear)
    }

    /// Take the rows that are packed, or will be, for the weight's columns in another order: column i
    /// of theirs is its column `order[i]`.
    ///
    /// # Errors
    /// When the order is no permutation of K columns.
    pub fn set_columns(&mut self, order: &[i64]) -> Result<(), String> {
        let mut seen = vec![false; self.k];
        let mut columns = Vec::with_capacity(self.k);
        for &column in order {
            let place = usize::try_from(column)
                .ok()
                .filter(|&c| c < self.k && !std::mem::replace(&mut seen[c], true))
                .ok_or_else(|| format!("not a permutation of {} columns", self.k))?;
            columns.push(place);
        }
        if columns.len() != self.k {
            return Err(format!("not a permutation of {} columns", self.k));
        }
        self.columns = Some(columns);
        Ok(())
    }

    /// The instruction set it is packed for.
    pub fn level(&self) -> Level {
        self.level
    }

    /// Output features.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Input features.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Bytes it takes.
    pub fn nbytes(&self) -> usize {
        self.sections.iter().map(|s| s.bytes.num_bytes()).sum()
    }

    /// The section that has row `row`.
    fn section(&self, row: usize) -> Option<&Section> {
        let after = self.sections.partition_point(|s| s.first <= row);
        self.sections[..after]
            .last()
            .filter(|s| row - s.first < s.n)
    }

    /// Set rows `first..first + rows`, row i from row `permutation[i]` (i if None) of `source`.
    ///
    /// # Errors
    /// When these rows are not all of that kind, or the permutation is wrong.
    ///
    /// # Safety
    /// `source` holds `rows` rows of `packed.file_row_bytes(k)` bytes, one after another.
    pub unsafe fn pack_rows(
        &mut self,
        first: usize,
        rows: usize,
        source: *const u8,
        packed: Packed,
        permutation: Option<&[i64]>,
    ) -> Result<(), String> {
        if rows == 0 {
            return Ok(());
        }
        let section = self
            .section(first)
            .filter(|s| s.packed == packed && rows <= s.n - (first - s.first))
            .ok_or_else(|| format!("rows {first} + {rows} of {} are not {packed:?}", self.n))?;
        if let Some(p) = permutation
            && (p.len() != rows || p.iter().any(|&i| i < 0 || i as usize >= rows))
        {
            return Err(format!("not a permutation of {rows} rows"));
        }
        let (lanes, k) = (self.level.lanes(), self.k);
        let row_bytes = packed.file_row_bytes(k);
        let (source, to) = (source as usize, section.bytes.as_ptr() as usize);
        let low = first - section.first;
        // Panels are disjoint memory, so they may be filled side by side.
        let (panel0, panel1) = (low / (2 * lanes), (low + rows).div_ceil(2 * lanes));
        let step = 16;
        pool::run((panel1 - panel0).div_ceil(step), |task| {
            let start = ((panel0 + task * step) * 2 * lanes).max(low);
            let end = ((panel0 + (task + 1) * step) * 2 * lanes).min(low + rows);
            for row in start..end {
                let from = permutation.map_or(row - low, |p| p[row - low] as usize);
                // SAFETY: `from < rows`, and the caller vouches for the source; the row is the
                // section's, whose memory is this Linear's own and held mutably.
                unsafe {
                    let from = (source as *const u8).add(from * row_bytes);
                    packed.pack_row(from, to as *mut u8, row, k, lanes);
                }
            }
        });
        Ok(())
    }

    /// Row `row` as float32, times `scale`, into `out` (K elements).
    pub fn read_row(&self, row: usize, scale: f32, out: &mut [f32]) {
        assert!(out.len() == self.k, "a row has {} elements", self.k);
        let section = self.section(row).expect("the row exists");
        let (from, row) = (section.bytes.as_ptr(), row - section.first);
        let read = |out: &mut [f32]| {
            // SAFETY: the section has the row.
            unsafe {
                section
                    .packed
                    .read_row(from, row, self.level.lanes(), scale, out);
            }
        };
        let Some(columns) = &self.columns else {
            return read(out);
        };
        let mut packed = vec![0.0; self.k];
        read(&mut packed);
        for (&column, x) in columns.iter().zip(packed) {
            out[column] = x;
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
    /// Quantized weights meet activations rounded in groups, or float32 ones where the weights are no
    /// integers.
    ///
    /// # Safety
    /// x, y and bias describe valid memory of M x K, M x N and 1 x N elements; y overlaps neither.
    pub unsafe fn forward(&self, x: Rows, bias: Option<Rows>, y: RowsMut, rounding: Rounding) {
        assert!(x.cols == self.k && y.cols == self.n && x.rows == y.rows);
        assert!(bias.is_none_or(|b| b.cols == self.n && b.rows == 1));
        if y.rows == 0 || self.n == 0 {
            return;
        }
        let Some(columns) = &self.columns else {
            // SAFETY: the caller's contract.
            return unsafe { self.forward_sections(x, bias, y, rounding) };
        };
        let row_bytes = self.k * x.dtype.size();
        let row_floats = row_bytes.div_ceil(size_of::<f32>());
        with_floats(2, x.rows * row_floats, |p| {
            let to = Rows {
                stride: row_floats * size_of::<f32>() / x.dtype.size(),
                ..Rows::new(p.cast(), x.dtype, x.rows, self.k)
            };
            let to_rows = Shared(p.cast::<u8>());
            pool::run(x.rows, |row| {
                // SAFETY: the caller's contract; columns exist, and tasks write rows of their own,
                // which the buffer holds.
                unsafe {
                    let to = to_rows.at(row * row_floats * size_of::<f32>());
                    match x.dtype {
                        DType::F32 => gather::<u32>(x.at(row, 0), columns, to),
                        DType::Bf16 | DType::F16 => gather::<u16>(x.at(row, 0), columns, to),
                    }
                }
            });
            // SAFETY: the caller's contract, for the copy of x.
            unsafe { self.forward_sections(to, bias, y, rounding) };
        });
    }

    /// # Safety
    /// As `forward`, of x in the order of the packed columns; there are rows.
    unsafe fn forward_sections(&self, x: Rows, bias: Option<Rows>, y: RowsMut, rounding: Rounding) {
        for section in &self.sections {
            // SAFETY: the caller's contract; the section's columns of y and bias exist.
            unsafe {
                let cut = |b: Rows| Rows {
                    ptr: b.at(0, section.first),
                    cols: section.n,
                    ..b
                };
                let y = RowsMut {
                    ptr: y.at(0, section.first),
                    cols: section.n,
                    ..y
                };
                self.forward_section(section.view(self.k), x, bias.map(cut), y, rounding);
            }
        }
    }

    /// # Safety
    /// As `forward`, of a section's columns; y has rows.
    unsafe fn forward_section(
        &self,
        weight: View,
        x: Rows,
        bias: Option<Rows>,
        y: RowsMut,
        rounding: Rounding,
    ) {
        let level = self.level;
        // SAFETY: the caller's contract; the tasks below write disjoint parts of y.
        unsafe {
            #[cfg(target_arch = "x86_64")]
            if level.has_amx() && x.rows >= amx::MIN_ROWS && self.k > 0 {
                let exact = rounding == Rounding::Exact;
                return self.forward_amx(weight, x, bias, y, exact);
            }
            if let Packed::Blocks(format) = weight.packed
                && rounding != Rounding::Exact
                && let Some(product) = Product::of(format.shape())
            {
                let coarse = rounding == Rounding::Coarse;
                let widens = level.widens() && !(coarse && product.is_narrow());
                if widens && x.rows >= wide::MIN_ROWS {
                    return self.forward_wide(weight, x, bias, y, format.shape());
                }
                return if coarse {
                    self.forward_int8::<1>(weight, x, bias, y)
                } else {
                    self.forward_int8::<2>(weight, x, bias, y)
                };
            }
            // The tiles read aligned float32 rows of even length.
            let even = self.k.next_multiple_of(2);
            let aligned = x.ptr.cast::<f32>().is_aligned();
            let copy = x.dtype != DType::F32 || even != self.k || !aligned;
            with_floats(0, if copy { even * x.rows } else { 0 }, |p| {
                let x = if copy { x.to_f32(level, p, even) } else { x };
                let panels = weight.n.div_ceil(2 * level.lanes());
                split(panels, x.rows, &|panels, rows| {
                    with_floats(1, SCRATCH_FLOATS, |scratch| {
                        level.run(FloatTask {
                            weight,
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

    /// With activations in `PARTS` int8 parts.
    ///
    /// # Safety
    /// As `forward_section`, of a kind that has integers.
    unsafe fn forward_int8<const PARTS: usize>(
        &self,
        weight: View,
        x: Rows,
        bias: Option<Rows>,
        y: RowsMut,
    ) {
        let level = self.level;
        let floats = Activations::<PARTS>::floats(x.rows, self.k);
        // SAFETY: the caller's; the tasks write disjoint parts of y.
        with_floats(0, floats, |p| unsafe {
            let x_rounded = Activations::<PARTS>::quantize(level, x, weight.packed.blocks(), p);
            let tiles = weight.n.div_ceil(level.lanes());
            split(tiles, x.rows, &|tiles, rows| {
                level.run(Int8Task {
                    weight,
                    x: x_rounded,
                    bias,
                    y,
                    tiles,
                    rows,
                });
            });
        });
    }

    /// # Safety
    /// As `forward_section`, of a kind that has integers, at a level that widens them.
    unsafe fn forward_wide(
        &self,
        weight: View,
        x: Rows,
        bias: Option<Rows>,
        y: RowsMut,
        shape: Shape,
    ) {
        let level = self.level;
        // SAFETY: the caller's; the tasks write disjoint parts of y.
        with_floats(0, wide::Activations::floats(x.rows, self.k), |p| unsafe {
            let x_rounded = wide::Activations::round(level, x, shape, p);
            let panels = weight.n.div_ceil(2 * level.lanes());
            split(panels, x.rows, &|panels, rows| {
                with_floats(1, SCRATCH_FLOATS, |scratch| {
                    level.run_pairs(wide::WideTask {
                        weight,
                        x: x_rounded,
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

    /// # Safety
    /// As `forward_section`; the level has AMX.
    #[cfg(target_arch = "x86_64")]
    unsafe fn forward_amx(
        &self,
        weight: View,
        x: Rows,
        bias: Option<Rows>,
        y: RowsMut,
        exact: bool,
    ) {
        let floats = amx::Activations::floats(x, weight, exact);
        // SAFETY: the caller's; the tasks write disjoint parts of y.
        with_floats(0, floats, |p| unsafe {
            let split_x = amx::Activations::split(self.level, x, weight, exact, p);
            split(
                weight.n.div_ceil(2 * self.level.lanes()),
                x.rows,
                &|panels, rows| {
                    let task = amx::AmxTask {
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
}

impl Section {
    fn view(&self, k: usize) -> View {
        View {
            bytes: self.bytes.as_ptr(),
            packed: self.packed,
            n: self.n,
            k,
        }
    }
}
