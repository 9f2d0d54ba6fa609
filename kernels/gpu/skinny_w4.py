"""skinny_w4: a few rows times a weight of 4 bits an element, on the matrix units.

As ``skinny``, with elements made floats between memory and the units: 128 + q (1024 + q in
float16) is the mask of a word and the bits of that power of two.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import cdiv, num_sms, pdl_options
from .limits import block_rows, shared_bytes
from .skinny import finish_tile, split_scratch
from .w4 import W4


class SkinnyW4Config(NamedTuple):
    """Tile of skinny_w4_kernel: weight rows, parts of K and of each group, warps, loads ahead.

    scaled_first: weights are rounded to the activations' type, as dequantized ones are.
    """

    block_n: int
    split_k: int
    parts: int
    num_warps: int
    num_stages: int
    scaled_first: bool = False


@triton.jit
def scale_of(packed, j: tl.constexpr, scales):
    """The j-th of four 16-bit floats, as float32; ``scales``: a pointer of their type."""
    if scales.dtype.element_ty == tl.bfloat16 and j % 2 == 1:
        half = (packed >> (16 * j - 16)).to(tl.int32)
        return (half & -65536).to(tl.float32, bitcast=True)
    bits = (packed >> (16 * j)).to(tl.int16)
    return bits.to(scales.dtype.element_ty, bitcast=True).to(tl.float32)


@triton.jit
def _code_bits(index, words):
    """The 16 bits of the code of each index, from ``code_words``; for the interpreter."""
    bits = index & 0
    for i in tl.static_range(16):
        low = (words[i // 4] >> (8 * (i % 4))) & 255
        high = (words[4 + i // 4] >> (8 * (i % 4))) & 255
        bits = tl.where(index == i, low | (high << 8), bits)
    return bits


@triton.jit
def look_up(w, words, ASM: tl.constexpr):
    """Codes of words of elements: pairs of 16-bit floats of the four groups.

    ``words``: of ``code_words``. An element's lower three bits select a byte of each half of the
    table, and its fourth the half.
    """
    if ASM:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 s, m, f, g, u, al, ah, bl, bh, p, q;
            and.b32 s, $4, 0x7777; shr.u32 m, $4, 3; and.b32 m, m, 0x1111; prmt.b32 m, 0xFF00, 0, m;
            prmt.b32 f, $5, $6, s; prmt.b32 g, $7, $8, s; lop3.b32 al, m, g, f, 0xCA;
            prmt.b32 f, $9, $10, s; prmt.b32 g, $11, $12, s; lop3.b32 ah, m, g, f, 0xCA;
            shr.u32 u, $4, 16;
            and.b32 s, u, 0x7777; shr.u32 m, u, 3; and.b32 m, m, 0x1111; prmt.b32 m, 0xFF00, 0, m;
            prmt.b32 f, $5, $6, s; prmt.b32 g, $7, $8, s; lop3.b32 bl, m, g, f, 0xCA;
            prmt.b32 f, $9, $10, s; prmt.b32 g, $11, $12, s; lop3.b32 bh, m, g, f, 0xCA;
            prmt.b32 p, al, ah, 0x5140; prmt.b32 q, bl, bh, 0x5140;
            prmt.b32 $0, p, q, 0x5410; prmt.b32 $1, p, q, 0x7632;
            prmt.b32 p, al, ah, 0x7362; prmt.b32 q, bl, bh, 0x7362;
            prmt.b32 $2, p, q, 0x5410; prmt.b32 $3, p, q, 0x7632;
            }""",
            "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
            [w, words[0], words[1], words[2], words[3], words[4], words[5], words[6], words[7]],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        return (
            _code_bits(w & 15, words) | (_code_bits((w >> 16) & 15, words) << 16),
            _code_bits((w >> 4) & 15, words) | (_code_bits((w >> 20) & 15, words) << 16),
            _code_bits((w >> 8) & 15, words) | (_code_bits((w >> 24) & 15, words) << 16),
            _code_bits((w >> 12) & 15, words) | (_code_bits((w >> 28) & 15, words) << 16),
        )


@triton.jit
def spread(pairs, X: tl.constexpr):
    """Pairs of 16-bit floats [N, W] as floats X [N, 2 W]."""
    low = pairs.to(tl.int16).to(X, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(X, bitcast=True)
    return tl.reshape(tl.join(low, high), (pairs.shape[0], 2 * pairs.shape[1]))


@triton.jit
def unpack_group(w, zero4, j: tl.constexpr, X: tl.constexpr, ZERO: tl.constexpr):
    """Group j of words [N, W] as floats X [N, 2 W], less its zero point; with "add" as it is."""
    BITS: tl.constexpr = 0x43004300 if tl.bfloat16 == X else 0x64006400
    ONE: tl.constexpr = 128.0 if tl.bfloat16 == X else 1024.0
    MIDDLE: tl.constexpr = 8.0 if ZERO == "" else (16.0 if ZERO == "zero" else 0.0)
    q = (w >> (4 * j)) & 0x000F000F
    if ZERO == "e2m1":
        # A sign, two bits of exponent and one of mantissa, where those of a float of X begin.
        SHIFT: tl.constexpr = 6 if tl.bfloat16 == X else 9
        q = ((q & 0x00080008) << 12) | ((q & 0x00070007) << SHIFT)
    elif ZERO == "zero":
        # Less the zero point, plus 16, in the integers that both halves still are.
        less = ((zero4 >> (16 * j)).to(tl.int16).to(tl.int32) * 0x00010001) + BITS
        q = q + less[:, None]
    else:
        q = q | BITS
    floats = spread(q, X)
    if ZERO == "e2m1":
        return (floats.to(tl.float32) * (2.0**126 if tl.bfloat16 == X else 2.0**14)).to(X)
    return floats - tl.full([1, 1], ONE + MIDDLE, X)


@triton.jit(do_not_specialize=["M", "codes"])
def skinny_w4_kernel(
    x,  # [M, K]
    words,  # [N, W] int32
    scales,  # [N, 4 chunks]
    zeros,  # as scales
    bias,  # [N]
    residual,  # [M, N]
    y,  # [M, N]
    partial,  # [SPLIT_K, tiles, BLOCK_N, BLOCK_M] float32
    counters,  # [tiles] int32, zero
    M,
    N,
    K,
    NUM_CHUNKS,
    codes,  # code_words
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
    PARTS: tl.constexpr,
    SCALED_FIRST: tl.constexpr,  # scales meet the weights, not the sums of products with a group
    EVEN: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    PAIRS: tl.constexpr = GROUP // 2
    X: tl.constexpr = x.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n = tl.minimum(rows, N - 1).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    in_m = (m < M)[None, :]
    # A step takes one of PARTS parts of each group of a chunk: smaller tiles, more of them at work.
    WIDTH: tl.constexpr = GROUP // PARTS
    kk = tl.arange(0, WIDTH)
    c = tl.arange(0, WIDTH // 2)
    tiles = words + n[:, None] * (NUM_CHUNKS * PAIRS) + c[None, :]
    four_scales = scales.to(tl.pointer_type(tl.int64)) + n * NUM_CHUNKS
    four_zeros = zeros.to(tl.pointer_type(tl.int64)) + n * NUM_CHUNKS
    x_tiles = x + m[None, :] * K + kk[:, None]
    per_part = tl.cdiv(NUM_CHUNKS, SPLIT_K)
    begin = tl.program_id(1) * per_part
    end = tl.minimum(begin + per_part, NUM_CHUNKS)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if not SCALED_FIRST:
        # Loaded a step ahead: nothing else hides their latency.
        scale4 = tl.load(four_scales + tl.minimum(begin, NUM_CHUNKS - 1))
    if PDL:
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    if ZERO == "add":
        ones = tl.full([BLOCK_N, WIDTH], 1.0, X)
    for step in range(begin * PARTS, end * PARTS):
        chunk = step // PARTS
        w = tl.load(tiles + step * (WIDTH // 2), eviction_policy="evict_first")
        if SCALED_FIRST:
            # On its way into the dot, so that it is loaded as far ahead as the words are.
            scale4 = tl.load(four_scales + chunk)
        else:
            later = tl.minimum((step + 1) // PARTS, NUM_CHUNKS - 1)
            next_scale4 = tl.load(four_scales + later)
        zero4 = tl.load(four_zeros + chunk) if ZERO == "zero" or ZERO == "add" else scale4
        if ZERO == "codes":
            pairs = look_up(w, codes, ASM)
        for j in tl.static_range(4):
            k = (chunk * 4 + j) * GROUP + step % PARTS * WIDTH
            if EVEN:
                xk = tl.load(x_tiles + k, mask=in_m, other=0.0)
            else:
                xk = tl.load(x_tiles + k, mask=in_m & (k + kk < K)[:, None], other=0.0)
            a = spread(pairs[j], X) if ZERO == "codes" else unpack_group(w, zero4, j, X, ZERO)
            if SCALED_FIRST:
                acc = tl.dot(a * scale_of(scale4, j, scales).to(X)[:, None], xk, acc)
            else:
                acc += scale_of(scale4, j, scales)[:, None] * tl.dot(a, xk)
            if ZERO == "add":
                # A row of it has the sums of the activations.
                acc += scale_of(zero4, j, zeros)[:, None] * tl.dot(ones, xk)
        if not SCALED_FIRST:
            scale4 = next_scale4
    finish_tile(
        acc,
        bias,
        residual,
        y,
        partial,
        counters,
        M,
        N,
        HAS_BIAS,
        HAS_RESIDUAL,
        BLOCK_M,
        BLOCK_N,
        SPLIT_K,
    )


def plan_skinny_w4(m: int, n: int, chunks: int, group: int, device: torch.device) -> SkinnyW4Config:
    """The tile of m rows times a weight of n rows and so many chunks of four groups a row.

    ``bench/gpu_products.py --kinds w4 --sweep`` prints the alternatives.
    """
    fills = cdiv(n, 64) >= 2 * num_sms(device)
    split = 1
    while not fills and split < 4 and chunks >= 4 * split:
        split *= 2
    if m <= 8:
        # Instructions of one warp, and many small programs, where there are few rows to share out.
        config = SkinnyW4Config(*((64, 1, 1, 4, 3) if fills else (32, split, 1, 2, 4)))
    elif m <= 16:
        config = SkinnyW4Config(*((64, min(chunks, 2), 2, 4, 3) if fills else (64, split, 1, 4, 3)))
    elif m <= 32:
        config = SkinnyW4Config(*((64, 1, 1, 4, 2) if fills else (64, split, 2, 4, 3)))
    elif m <= 128:
        config = SkinnyW4Config(64, min(split, 2), 2, 4, 3)
    else:
        # As many sums as registers hold: none of their own for a group.
        config = SkinnyW4Config(128, 1, 4, 8, 3, True)
    config = config._replace(parts=min(config.parts, group // 16))
    # Words and activations of all steps ahead, within what a program may have.
    row_bytes = 2 * group * config.block_n + 8 * group * block_rows(m)
    while config.num_stages * row_bytes // config.parts > shared_bytes(device):
        if config.num_stages > 2:
            config = config._replace(num_stages=config.num_stages - 1)
        elif config.parts < group // 16:
            config = config._replace(parts=2 * config.parts)
        else:
            break
    return config


def skinny_w4(
    x: torch.Tensor,
    weight: W4,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    config: SkinnyW4Config | None = None,
) -> torch.Tensor:
    """residual + x [M, K] @ weight.T + bias -> y [M, N], filled and returned."""
    m, k = x.shape
    n, chunks, group = weight.shape[0], weight.chunks, weight.group
    config = config or plan_skinny_w4(m, n, chunks, group, x.device)
    tiles = cdiv(n, config.block_n)
    block_m = block_rows(m)
    partial, counts = split_scratch(config.split_k, tiles, config.block_n * block_m, y)
    skinny_w4_kernel[(tiles, config.split_k)](
        x,
        weight.words,
        weight.scales,
        weight.scales if weight.zeros is None else weight.zeros,
        bias if bias is not None else x,
        residual if residual is not None else x,
        y,
        partial,
        counts,
        m,
        n,
        k,
        chunks,
        weight.code_words(x.dtype),
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        ZERO=weight.zero,
        GROUP=group,
        BLOCK_M=block_m,
        BLOCK_N=config.block_n,
        SPLIT_K=config.split_k,
        PARTS=config.parts,
        SCALED_FIRST=config.scaled_first,
        EVEN=k == chunks * 4 * group,
        ASM=not triton.knobs.runtime.interpret,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **pdl_options(),
    )
    return y
