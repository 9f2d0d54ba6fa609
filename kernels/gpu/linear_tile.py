"""finish_tile: the epilogue of gemv_kernel and skinny_kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import activate


@triton.jit
def finish_tile(
    acc,  # [BLOCK_N, BLOCK_M] float32: weight rows x activations' rows
    sum_squares,  # [BLOCK_M] float32: of x's rows, for the norm
    bias,
    residual,
    y,  # [M, OUT], OUT = N or, gated, N / 2
    tile,
    M,
    N,
    K,
    eps,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_NORM: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Norm scale, bias, gate, residual, store."""
    m = tl.arange(0, BLOCK_M)
    i = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    if HAS_NORM:
        acc = acc * tl.rsqrt(sum_squares / K + eps)[None, :]
    rows = i if GATE == "" else i // 2 + (i % 2) * (N // 2)
    if HAS_BIAS:
        acc += tl.load(bias + rows, mask=i < N, other=0.0).to(tl.float32)[:, None]
    if GATE == "":
        n = i
        width = N
    else:
        pairs = tl.permute(tl.reshape(acc, (BLOCK_N // 2, 2, BLOCK_M)), (0, 2, 1))
        gate, up = tl.split(pairs)
        acc = activate(gate, GATE) * up
        n = tile * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        width = N // 2
    mask = (n[:, None] < width) & (m[None, :] < M)
    offsets = m[None, :] * width + n[:, None]
    if HAS_RESIDUAL:
        acc += tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + offsets, acc.to(y.dtype.element_ty), mask=mask)
