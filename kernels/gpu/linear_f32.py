"""linear_f32: many rows of float32 on the matrix units.

They take no float32, but a float32 is the sum of two tf32 numbers to 22 bits, so that three of
their products make one (tf32x3). Its error is below that of cuBLAS's float32 sums and it takes half
the time: bench/NOTES.md, "float32 products". Infinities become NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import cdiv, pdl_options

# Of the tiles tried (64 to 128 rows and outputs, 16 or 32 of K) the best or nearly so for all of
# all-MiniLM-L6-v2's shapes.
BLOCK_M, BLOCK_N, BLOCK_K = 64, 64, 32
# Fewer rows leave most of the GPU idle in tiles this large.
MIN_ROWS = 256


@triton.jit(do_not_specialize=["M"])
def linear_f32_kernel(
    x,  # [M, K]
    weight,  # [N, K]
    bias,  # [N]
    y,  # [M, N]
    M,
    N,
    K,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    # Rows beyond the end read the last one; what comes of them is not stored.
    rows = tl.minimum(m, M - 1).to(tl.int64)
    outputs = tl.minimum(n, N - 1).to(tl.int64)
    x_at = x + rows[:, None] * K + k[None, :]
    weight_at = weight + outputs[None, :] * K + k[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = start + k < K
        xk = tl.load(x_at + start, mask=inside[None, :], other=0.0)
        wk = tl.load(weight_at + start, mask=inside[:, None], other=0.0)
        acc = tl.dot(xk, wk, acc, input_precision="tf32x3")
    if HAS_BIAS:
        acc += tl.load(bias + outputs)[None, :]
    tl.store(y + rows[:, None] * N + n[None, :], acc, mask=(m < M)[:, None] & (n < N)[None, :])


def linear_f32(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor
) -> torch.Tensor:
    """y = x @ weight.T + bias, all float32: x [M, K], weight [N, K], bias [N], y [M, N]."""
    rows, k = x.shape
    n = weight.shape[0]
    linear_f32_kernel[(cdiv(n, BLOCK_N), cdiv(rows, BLOCK_M))](
        x,
        weight,
        bias if bias is not None else x,
        y,
        rows,
        n,
        k,
        HAS_BIAS=bias is not None,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        num_warps=4,
        num_stages=3,
        **pdl_options(),
    )
    return y
