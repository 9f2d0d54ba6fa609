//! Scratch: aligned memory that grows and is kept, so that a steady step allocates nothing.

use std::cell::Cell;

/// One cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Bytes that begin on a cache line.
#[derive(Default)]
pub(crate) struct AlignedBytes {
    lines: Vec<Line>,
    len: usize,
}

impl AlignedBytes {
    /// `len` zero bytes.
    pub(crate) fn zeroed(len: usize) -> AlignedBytes {
        AlignedBytes {
            lines: vec![Line([0; 64]); len.div_ceil(64)],
            len,
        }
    }

    /// Number of bytes, without padding.
    pub(crate) fn num_bytes(&self) -> usize {
        self.len
    }

    /// The first byte; null-free even when empty.
    pub(crate) fn as_ptr(&self) -> *const u8 {
        self.lines.as_ptr().cast()
    }

    /// The first byte, to write.
    pub(crate) fn as_mut_ptr(&mut self) -> *mut u8 {
        self.lines.as_mut_ptr().cast()
    }
}

thread_local! {
    /// One buffer per purpose, so that a kernel may hold several.
    static BUFFERS: [Cell<AlignedBytes>; 4] = Default::default();
}

/// `f` is not inlined into a level's code: enter `Level::run` inside it, not around it.
///
/// Call `f` with at least `floats` float32 of this thread's buffer number `which` (0..4). Contents
/// are whatever was left there, initialized.
pub(crate) fn with_floats<T>(which: usize, floats: usize, f: impl FnOnce(*mut f32) -> T) -> T {
    BUFFERS.with(|buffers| {
        let mut buffer = buffers[which].take();
        if buffer.len < floats * 4 {
            buffer = AlignedBytes::zeroed((floats * 4).next_power_of_two());
        }
        let out = f(buffer.as_mut_ptr().cast());
        buffers[which].set(buffer);
        out
    })
}

/// As `with_floats`, cut into parts of at least these sizes that begin on cache lines.
pub(crate) fn with_parts<T, const N: usize>(
    which: usize,
    sizes: [usize; N],
    f: impl FnOnce([*mut f32; N]) -> T,
) -> T {
    let sizes = sizes.map(|size| size.next_multiple_of(size_of::<Line>() / size_of::<f32>()));
    with_floats(which, sizes.iter().sum(), |base| {
        let mut at = 0;
        // SAFETY: the buffer holds the sum of the sizes.
        f(sizes.map(|size| unsafe {
            let start = base.add(at);
            at += size;
            start
        }))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_kept() {
        let first = with_floats(0, 100, |p| {
            // SAFETY: 100 floats were asked for.
            unsafe { *p.add(99) = 7.0 };
            p as usize
        });
        assert_eq!(first % 64, 0);
        with_floats(0, 50, |p| {
            assert_eq!(p as usize, first);
            // SAFETY: the buffer kept its 100 floats.
            assert_eq!(unsafe { *p.add(99) }, 7.0);
            with_floats(1, 8, |q| assert_ne!(q as usize, first));
            // Taken: a nested use of the same number gets memory of its own.
            with_floats(0, 8, |q| assert_ne!(q as usize, first));
        });
    }
}
