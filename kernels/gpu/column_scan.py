"""column_scan: the state of Mamba's first form, token by token, a rate for each of its columns.

A program keeps a tile of one request's channels in registers from its first token to its last; a
decode is a request of one.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..recurrent import Steps
from .launch import cdiv, check_shape, check_tensors, next_power_of_2, pdl_options
from .softplus import softplus

# Elements of a tile: 8 registers a thread.
TILE = 1024


@triton.jit(do_not_specialize_on_alignment=["slots", "seq_lens", "query_start_loc"])
def column_scan_kernel(
    xbc,  # [T, C + 2 S]
    dt,  # [T, C], rows of ``dt_stride``
    decay,  # [C, S]
    dt_bias,  # [C]
    skip,  # [C]
    state,  # [N, C, S]
    slots,  # [R]
    seq_lens,  # [R]
    query_start_loc,  # [R + 1]
    out,  # [T, C]
    xbc_stride,
    dt_stride,
    dt_min,
    dt_max,
    C: tl.constexpr,
    S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PDL: tl.constexpr,
):
    request = tl.program_id(1)
    i = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    j = tl.arange(0, BLOCK_S)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    seq_len = tl.load(seq_lens + request)
    if seq_len == 0:
        return
    q_start = tl.load(query_start_loc + request)
    q_len = tl.load(query_start_loc + request + 1) - q_start
    slot = tl.load(slots + request).to(tl.int64)
    own, columns = i < C, j < S
    mask = own[:, None] & columns[None, :]
    within = i[:, None] * S + j[None, :]
    at = state + slot * (C * S) + within
    s = tl.where(seq_len > q_len, tl.load(at, mask=mask, other=0.0), 0.0)
    rates = tl.load(decay + within, mask=mask, other=0.0)
    bias = tl.load(dt_bias + i, mask=own, other=0.0)
    gain = tl.load(skip + i, mask=own, other=0.0)
    for t in range(0, q_len):
        row = (q_start + t).to(tl.int64)
        inputs = xbc + row * xbc_stride
        x = tl.load(inputs + i, mask=own, other=0.0).to(tl.float32)
        b = tl.load(inputs + C + j, mask=columns, other=0.0).to(tl.float32)
        c = tl.load(inputs + C + S + j, mask=columns, other=0.0).to(tl.float32)
        d = tl.load(dt + row * dt_stride + i, mask=own, other=0.0).to(tl.float32) + bias
        d = tl.minimum(tl.maximum(softplus(d), dt_min), dt_max)
        s = s * tl.exp(d[:, None] * rates) + (d * x)[:, None] * b[None, :]
        y = tl.sum(s * c[None, :], 1) + gain * x
        tl.store(out + row * C + i, y.to(out.dtype.element_ty), mask=own)
    tl.store(at, s, mask=mask)


def column_scan(
    xbc: torch.Tensor,
    dt: torch.Tensor,
    decay: torch.Tensor,
    dt_bias: torch.Tensor,
    skip: torch.Tensor,
    state: torch.Tensor,
    steps: Steps,
    *,
    dt_limits: tuple[float, float],
) -> torch.Tensor:
    """``reference_recurrent.selective_scan`` of heads of one channel, in one group.

    decay: [C, S]; state: [N, C, 1, S]. Rows of no request are left unwritten.

    Raises:
        ValueError: on a wrong shape, layout or device.
    """
    slots, seq_lens, query_start_loc, _, _ = steps
    check_tensors(decay=decay, dt_bias=dt_bias, skip=skip, state=state, slots=slots)
    num_rows, channels, _, size = state.shape
    rows = xbc.shape[0]
    check_shape("state", state, num_rows, channels, 1, size)
    check_shape("xbc", xbc, rows, channels + 2 * size)
    check_shape("dt", dt, rows, channels)
    check_shape("decay", decay, channels, size)
    if xbc.stride(1) != 1 or dt.stride(1) != 1:
        raise ValueError("rows of xbc and dt must be contiguous")
    out = torch.empty((rows, channels), dtype=xbc.dtype, device=xbc.device)
    block_s = next_power_of_2(size)
    block_c = max(min(next_power_of_2(channels), TILE // block_s), 1)
    low, high = dt_limits
    column_scan_kernel[(cdiv(channels, block_c), slots.shape[0])](
        xbc,
        dt,
        decay,
        dt_bias,
        skip,
        state,
        slots,
        seq_lens,
        query_start_loc,
        out,
        xbc.stride(0),
        dt.stride(0),
        low,
        # Any step size is below float32's largest.
        torch.finfo(torch.float32).max if math.isinf(high) else high,
        C=channels,
        S=size,
        BLOCK_C=block_c,
        BLOCK_S=block_s,
        num_warps=4,
        num_stages=1,
        **pdl_options(),
    )
    return out
