//! Level: which instructions a kernel may use, found at run time.

#[cfg(target_arch = "x86_64")]
use std::arch::asm;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::sync::OnceLock;

use crate::simd::Kernel;
use crate::simd::scalar::Scalar;

/// An instruction set the kernels are written for.
///
/// A `Level` other than `Scalar` exists only where [`Level::available`] found it, so that holding
/// one is the proof that its instructions run here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level(Kind);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Scalar,
    #[cfg(target_arch = "aarch64")]
    Neon,
    /// NEON with the dot products of four bytes.
    #[cfg(target_arch = "aarch64")]
    Dotprod,
    /// The same of unsigned with signed bytes, too.
    #[cfg(target_arch = "aarch64")]
    I8mm,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX2 with the dot products of VNNI on 256 bits.
    #[cfg(target_arch = "x86_64")]
    AvxVnni,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Amx,
}

impl Level {
    /// Plain Rust: correct everywhere, and what Miri can run.
    pub const SCALAR: Level = Level(Kind::Scalar);

    /// All levels of this machine, the fastest last.
    pub fn available() -> Vec<Level> {
        #[allow(unused_mut)]
        let mut levels = vec![Level(Kind::Scalar)];
        #[cfg(target_arch = "aarch64")]
        if std::arch::is_aarch64_feature_detected!("neon") {
            levels.push(Level(Kind::Neon));
            if std::arch::is_aarch64_feature_detected!("dotprod") {
                levels.push(Level(Kind::Dotprod));
                if std::arch::is_aarch64_feature_detected!("i8mm") {
                    levels.push(Level(Kind::I8mm));
                }
            }
        }
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = std::arch::is_x86_feature_detected!("avx2")
                && std::arch::is_x86_feature_detected!("fma")
                && std::arch::is_x86_feature_detected!("f16c");
            if avx2 {
                levels.push(Level(Kind::Avx2));
            }
            if avx2 && (has_avx_vnni() || has_avx512_vnni()) {
                levels.push(Level(Kind::AvxVnni));
            }
            if avx2
                && std::arch::is_x86_feature_detected!("avx512bw")
                && std::arch::is_x86_feature_detected!("avx512dq")
                && has_avx512_vnni()
            {
                levels.push(Level(Kind::Avx512));
                if tiles_are_available() {
                    levels.push(Level(Kind::Amx));
                }
            }
        }
        levels
    }

    /// The level named `scalar`, `neon`, `dotprod`, `i8mm`, `avx2`, `avxvnni`, `avx512` or `amx`.
    ///
    /// # Errors
    /// A message when the name is unknown or this machine lacks the level.
    pub fn parse(name: &str) -> Result<Level, String> {
        let levels = Level::available();
        levels
            .iter()
            .copied()
            .find(|l| l.name() == name)
            .ok_or_else(|| {
                let names: Vec<_> = levels.iter().map(|l| l.name()).collect();
                format!(
                    "CPU level {name:?} is not one of this machine's: {}",
                    names.join(", ")
                )
            })
    }

    /// The level of new weights and calls: `OCTAVO_CPU_LEVEL` if it is set, else the fastest.
    ///
    /// # Errors
    /// As [`Level::parse`]. Read once per process.
    pub fn preferred() -> Result<Level, String> {
        static PREFERRED: OnceLock<Result<Level, String>> = OnceLock::new();
        PREFERRED
            .get_or_init(|| match std::env::var("OCTAVO_CPU_LEVEL") {
                Ok(name) if !name.is_empty() => Level::parse(&name),
                _ => Ok(Level::available().pop().unwrap_or(Level::SCALAR)),
            })
            .clone()
    }

    /// The name that `parse` reads.
    pub fn name(self) -> &'static str {
        match self.0 {
            Kind::Scalar => "scalar",
            #[cfg(target_arch = "aarch64")]
            Kind::Neon => "neon",
            #[cfg(target_arch = "aarch64")]
            Kind::Dotprod => "dotprod",
            #[cfg(target_arch = "aarch64")]
            Kind::I8mm => "i8mm",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Kind::AvxVnni => "avxvnni",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Kind::Amx => "amx",
        }
    }

    /// float32 lanes of one vector: rows of one quantized weight tile.
    pub fn lanes(self) -> usize {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 | Kind::Amx => 16,
            _ => 8,
        }
    }

    /// True if matrix products may use the tile unit.
    pub fn has_amx(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self.0 == Kind::Amx;
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// True if products of int16 are faster than those of float32, as with AVX-512 and AVX2. The tile unit does float32's, in parts, faster than vectors do int16's;
    /// the other levels have no instruction for it.
    pub fn rounds_fast(self) -> bool {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 | Kind::AvxVnni | Kind::Avx512 => true,
            _ => false,
        }
    }

    /// True if several rows' quantized weights are multiplied as int16: see `linear::wide`.
    pub(crate) fn widens(self) -> bool {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 | Kind::AvxVnni => true,
            _ => false,
        }
    }

    /// True if `run_dots` has the dot products of bfloat16.
    pub fn has_dots(self) -> bool {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 | Kind::Amx => std::arch::is_x86_feature_detected!("avx512bf16"),
            #[cfg(target_arch = "aarch64")]
            Kind::Dotprod | Kind::I8mm => std::arch::is_aarch64_feature_detected!("bf16"),
            _ => false,
        }
    }

    /// As `run`, with the dot products of bfloat16 where this machine has them: for the few kernels
    /// that use them.
    ///
    /// # Safety
    /// As `run`.
    #[inline]
    pub unsafe fn run_dots<K: Kernel>(self, kernel: K) -> K::Out {
        // SAFETY: the caller's; the feature is detected here.
        unsafe {
            match self.0 {
                #[cfg(target_arch = "x86_64")]
                Kind::Avx512 | Kind::Amx if self.has_dots() => {
                    crate::simd::avx512::run_dots(kernel)
                }
                #[cfg(target_arch = "aarch64")]
                Kind::Dotprod | Kind::I8mm if self.has_dots() => {
                    crate::simd::neon::run_bf16(kernel)
                }
                _ => self.run(kernel),
            }
        }
    }

    /// As `run`, with the dot products of int16 pairs in one instruction where this level has them:
    /// for the few kernels that use them.
    ///
    /// # Safety
    /// As `run`.
    #[inline]
    pub unsafe fn run_pairs<K: Kernel>(self, kernel: K) -> K::Out {
        // SAFETY: the caller's; one of the two was detected when this Level was made.
        unsafe {
            match self.0 {
                #[cfg(target_arch = "x86_64")]
                Kind::AvxVnni if has_avx_vnni() => crate::simd::avx2::run_avx_vnni(kernel),
                #[cfg(target_arch = "x86_64")]
                Kind::AvxVnni => crate::simd::avx2::run_avx512_vnni(kernel),
                _ => self.run(kernel),
            }
        }
    }

    /// Run `kernel` compiled for this level.
    ///
    /// # Safety
    /// The kernel's own contract on its pointers and sizes.
    #[inline]
    pub unsafe fn run<K: Kernel>(self, kernel: K) -> K::Out {
        // SAFETY: the caller keeps the kernel's contract; the features of each arm were detected
        // when this Level was made.
        unsafe {
            match self.0 {
                Kind::Scalar => kernel.run(Scalar),
                #[cfg(target_arch = "aarch64")]
                Kind::Neon => crate::simd::neon::run(kernel),
                #[cfg(target_arch = "aarch64")]
                Kind::Dotprod => crate::simd::neon::run_dotprod(kernel),
                #[cfg(target_arch = "aarch64")]
                Kind::I8mm => crate::simd::neon::run_i8mm(kernel),
                #[cfg(target_arch = "x86_64")]
                Kind::Avx2 | Kind::AvxVnni => crate::simd::avx2::run(kernel),
                #[cfg(target_arch = "x86_64")]
                Kind::Avx512 | Kind::Amx => crate::simd::avx512::run(kernel),
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn has_avx_vnni() -> bool {
    std::arch::is_x86_feature_detected!("avxvnni")
}

/// True if the machine has VNNI of AVX-512 on 256 bits.
#[cfg(target_arch = "x86_64")]
fn has_avx512_vnni() -> bool {
    std::arch::is_x86_feature_detected!("avx512f")
        && std::arch::is_x86_feature_detected!("avx512vl")
        && std::arch::is_x86_feature_detected!("avx512vnni")
}

/// True if this process may use the tile unit with bfloat16; one system call a process.
#[cfg(target_arch = "x86_64")]
fn tiles_are_available() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| {
        const AMX_BF16: u32 = 1 << 22;
        const AMX_TILE: u32 = 1 << 24;
        let both = AMX_BF16 | AMX_TILE;
        let known = __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & both == both;
        known && cfg!(all(target_os = "linux", not(miri))) && request_tiles()
    })
}

/// Request the tiles: Linux keeps their 8 KiB of every thread only on request.
#[cfg(target_arch = "x86_64")]
fn request_tiles() -> bool {
    const ARCH_PRCTL: usize = 158;
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const XFEATURE_XTILEDATA: usize = 18;
    let mut result: isize = ARCH_PRCTL.cast_signed();
    // SAFETY: the call takes two integers and touches no memory of ours; the kernel overwrites
    // rcx and r11.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result == 0
}
