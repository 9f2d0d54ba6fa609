"""dequantize_w4: a weight of 4 bits an element as floats, for products of many rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import cdiv, pdl_options
from .skinny_w4 import look_up, scale_of, spread
from .w4 import W4

BLOCK_N = 16


@triton.jit(do_not_specialize=["codes"])
def dequantize_w4_kernel(
    words,  # [N, W] int32
    scales,  # [N, 4 chunks]
    zeros,  # as scales
    y,  # [N, K]
    N,
    K,
    NUM_CHUNKS,
    codes,  # code_words of float16
    ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    PAIRS: tl.constexpr = GROUP // 2
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n = tl.minimum(rows, N - 1).to(tl.int64)
    chunk = tl.program_id(1)
    w = tl.load(words + (n * NUM_CHUNKS + chunk)[:, None] * PAIRS + tl.arange(0, PAIRS)[None, :])
    scale4 = tl.load(scales.to(tl.pointer_type(tl.int64)) + n * NUM_CHUNKS + chunk)
    if ZERO == "zero" or ZERO == "add":
        zero4 = tl.load(zeros.to(tl.pointer_type(tl.int64)) + n * NUM_CHUNKS + chunk)
    if PDL:
        # The memory written may still be read by what runs before.
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    k = tl.arange(0, GROUP)
    if ZERO == "codes":
        pairs = look_up(w, codes, ASM)
    for j in tl.static_range(4):
        q = (w >> (4 * j)) & 0x000F000F
        low, high = q & 15, q >> 16
        value = tl.reshape(tl.join(low, high), (BLOCK_N, GROUP))
        scale = scale_of(scale4, j, scales)[:, None]
        if ZERO == "codes":
            value = spread(pairs[j], tl.float16).to(tl.float32) * scale
        elif ZERO == "e2m1":
            magnitude = (value & 7) << 22
            bits = ((value & 8) << 28) | magnitude
            value = bits.to(tl.float32, bitcast=True) * 2.0**126 * scale
        elif ZERO == "":
            value = (value - 8).to(tl.float32) * scale
        elif ZERO == "zero":
            more = (zero4 >> (16 * j)).to(tl.int16).to(tl.int32) - 16
            value = (value + more[:, None]).to(tl.float32) * scale
        else:
            value = value.to(tl.float32) * scale + scale_of(zero4, j, zeros)[:, None]
        at = (chunk * 4 + j) * GROUP + k
        mask = (rows < N)[:, None] & (at < K)[None, :]
        tl.store(y + n[:, None] * K + at[None, :], value.to(y.dtype.element_ty), mask=mask)


def dequantize_w4(weight: W4, dtype: torch.dtype) -> torch.Tensor:
    """The weight [N, K] in dtype, in memory of its own."""
    n, k = weight.shape
    y = torch.empty((n, k), dtype=dtype, device=weight.words.device)
    dequantize_w4_kernel[(cdiv(n, BLOCK_N), weight.chunks)](
        weight.words,
        weight.scales,
        weight.scales if weight.zeros is None else weight.zeros,
        y,
        n,
        k,
        weight.chunks,
        weight.code_words(torch.float16),
        ZERO=weight.zero,
        GROUP=weight.group,
        BLOCK_N=BLOCK_N,
        ASM=not triton.knobs.runtime.interpret,
        num_warps=4,
        num_stages=1,
        **pdl_options(),
    )
    return y
