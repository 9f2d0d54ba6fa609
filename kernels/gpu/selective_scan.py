"""selective_scan: Mamba-2's state, token by token for decodes, and in chunks for prefills.

A program takes a tile of one head's state. A decode reads it once and writes it once; a prefill
keeps it in registers from chunk to chunk, and within a chunk computes like attention whose scores
decay (the dual form of Dao and Gu, arXiv:2405.21060).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..recurrent import Steps
from .attention import FLOAT32_PRECISION
from .column_scan import column_scan
from .launch import cdiv, check_shape, check_tensors, next_power_of_2, pdl_options
from .softplus import softplus

CHUNK = 32
# Elements of a decode's tile, and of a prefill's: 16 registers a thread.
DECODE_TILE, PREFILL_TILE = 2048, 4096
# No bound of a step size: float32's largest would do, and stays finite in products.
_UNBOUNDED = 3.0e38


@triton.jit
def scan_decode_kernel(
    xbc,  # [T, H P + 2 G S]
    dt,  # [T, H], rows of ``dt_stride``
    decay,  # [H]
    dt_bias,  # [H]
    skip,  # [H]
    state,  # [N, H, P, S]
    slots,  # [R]
    seq_lens,  # [R]
    out,  # [T, H, P]
    xbc_stride,
    dt_stride,
    dt_min,
    dt_max,
    H: tl.constexpr,
    G: tl.constexpr,
    P: tl.constexpr,
    S: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    i = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    j = tl.arange(0, BLOCK_S)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    seq_len = tl.load(seq_lens + row)
    if seq_len == 0:
        return
    slot = tl.load(slots + row).to(tl.int64)
    at = state + (slot * H + head) * (P * S) + i[:, None] * S + j[None, :]
    mask = (i[:, None] < P) & (j[None, :] < S)
    s = tl.where(seq_len > 1, tl.load(at, mask=mask, other=0.0), 0.0)
    own = xbc + row * xbc_stride
    group = head // (H // G)
    x = tl.load(own + head * P + i, mask=i < P, other=0.0).to(tl.float32)
    b = tl.load(own + H * P + group * S + j, mask=j < S, other=0.0).to(tl.float32)
    c = tl.load(own + H * P + (G + group) * S + j, mask=j < S, other=0.0).to(tl.float32)
    d = tl.load(dt + row * dt_stride + head).to(tl.float32) + tl.load(dt_bias + head)
    d = tl.minimum(tl.maximum(softplus(d), dt_min), dt_max)
    s = s * tl.exp(d * tl.load(decay + head)) + (d * x)[:, None] * b[None, :]
    y = tl.sum(s * c[None, :], 1) + tl.load(skip + head) * x
    tl.store(at, s, mask=mask)
    tl.store(out + (row * H + head) * P + i, y.to(out.dtype.element_ty), mask=i < P)


@triton.jit(do_not_specialize_on_alignment=["slots", "seq_lens", "query_start_loc"])
def scan_prefill_kernel(
    xbc,  # [T, H P + 2 G S]
    dt,  # [T, H], rows of ``dt_stride``
    decay,  # [H]
    dt_bias,  # [H]
    skip,  # [H]
    state,  # [N, H, P, S]
    slots,  # [R]
    seq_lens,  # [R]
    query_start_loc,  # [R + 1]
    out,  # [T, H, P]
    xbc_stride,
    dt_stride,
    dt_min,
    dt_max,
    H: tl.constexpr,
    G: tl.constexpr,
    P: tl.constexpr,
    S: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    head = tl.program_id(0)
    request = tl.program_id(2)
    i = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    j = tl.arange(0, BLOCK_S)
    t = tl.arange(0, C)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    seq_len = tl.load(seq_lens + request)
    if seq_len == 0:
        return
    q_start = tl.load(query_start_loc + request)
    q_len = tl.load(query_start_loc + request + 1) - q_start
    slot = tl.load(slots + request).to(tl.int64)
    at = state + (slot * H + head) * (P * S) + i[:, None] * S + j[None, :]
    mask = (i[:, None] < P) & (j[None, :] < S)
    s = tl.where(seq_len > q_len, tl.load(at, mask=mask, other=0.0), 0.0)
    group = head // (H // G)
    rate, bias, gain = tl.load(decay + head), tl.load(dt_bias + head), tl.load(skip + head)
    seen = t[:, None] >= t[None, :]
    for begin in range(0, q_len, C):
        valid = begin + t < q_len
        rows = (q_start + begin + t).to(tl.int64)
        own = xbc + rows[:, None] * xbc_stride
        inputs = valid[:, None] & (i[None, :] < P)
        x = tl.load(own + head * P + i[None, :], mask=inputs, other=0.0).to(tl.float32)
        here = valid[:, None] & (j[None, :] < S)
        at_b = own + H * P + group * S + j[None, :]
        b = tl.load(at_b, mask=here, other=0.0).to(tl.float32)
        c = tl.load(at_b + G * S, mask=here, other=0.0).to(tl.float32)
        d = tl.load(dt + rows * dt_stride + head, mask=valid, other=0.0).to(tl.float32) + bias
        d = tl.minimum(tl.maximum(softplus(d), dt_min), dt_max)
        # Rows beyond the request change nothing.
        d = tl.where(valid, d, 0.0)
        log_keep = d * rate
        total = tl.sum(log_keep, 0)
        sums = tl.cumsum(log_keep, 0)
        between = tl.exp(tl.where(seen, sums[:, None] - sums[None, :], 0.0))
        scores = tl.dot(c, tl.trans(b), input_precision=PRECISION)
        scores = tl.where(seen, scores * between, 0.0)
        y = tl.dot(scores, d[:, None] * x, input_precision=PRECISION) + gain * x
        y += tl.exp(sums)[:, None] * tl.dot(c, tl.trans(s), input_precision=PRECISION)
        to_end = x * (d * tl.exp(total - sums))[:, None]
        s = s * tl.exp(total) + tl.dot(tl.trans(to_end), b, input_precision=PRECISION)
        at_out = out + (rows[:, None] * H + head) * P + i[None, :]
        tl.store(at_out, y.to(out.dtype.element_ty), mask=inputs)
    tl.store(at, s, mask=mask)


def selective_scan(
    xbc: torch.Tensor,
    dt: torch.Tensor,
    decay: torch.Tensor,
    dt_bias: torch.Tensor,
    skip: torch.Tensor,
    state: torch.Tensor,
    steps: Steps,
    *,
    num_groups: int,
    dt_limits: tuple[float, float],
) -> torch.Tensor:
    """See ``reference_recurrent.selective_scan``. Rows of no request are left unwritten.

    Raises:
        ValueError: on a wrong shape, layout or device.
    """
    if decay.dim() == 2:
        if num_groups != 1:
            raise ValueError(f"a rate of each column in {num_groups} groups")
        return column_scan(xbc, dt, decay, dt_bias, skip, state, steps, dt_limits=dt_limits)
    slots, seq_lens, query_start_loc, num_decodes, _ = steps
    check_tensors(decay=decay, dt_bias=dt_bias, skip=skip, state=state, slots=slots)
    _, heads, p, size = state.shape
    rows, width = xbc.shape
    if width != heads * p + 2 * num_groups * size or heads % num_groups:
        raise ValueError(f"{width} columns; {heads} heads of {p}, {num_groups} groups of {size}")
    if xbc.stride(1) != 1 or dt.stride(1) != 1:
        raise ValueError("rows of xbc and dt must be contiguous")
    check_shape("dt", dt, rows, heads)
    out = torch.empty((rows, heads * p), dtype=xbc.dtype, device=xbc.device)
    block_s = max(next_power_of_2(size), 16)
    rest = slots.shape[0] - num_decodes
    low, high = dt_limits
    numbers = (xbc.stride(0), dt.stride(0), low, _UNBOUNDED if math.isinf(high) else high)
    whole = max(next_power_of_2(p), 16)
    if num_decodes:
        block_p = min(whole, max(DECODE_TILE // block_s, 16))
        scan_decode_kernel[(num_decodes, heads, cdiv(p, block_p))](
            xbc,
            dt,
            decay,
            dt_bias,
            skip,
            state,
            slots,
            seq_lens,
            out,
            *numbers,
            H=heads,
            G=num_groups,
            P=p,
            S=size,
            BLOCK_P=block_p,
            BLOCK_S=block_s,
            num_warps=4,
            num_stages=1,
            **pdl_options(),
        )
    if rest:
        block_p = min(whole, max(PREFILL_TILE // block_s, 16))
        scan_prefill_kernel[(heads, cdiv(p, block_p), rest)](
            xbc,
            dt,
            decay,
            dt_bias,
            skip,
            state,
            slots[num_decodes:],
            seq_lens[num_decodes:],
            query_start_loc[num_decodes:],
            out,
            *numbers,
            H=heads,
            G=num_groups,
            P=p,
            S=size,
            BLOCK_P=block_p,
            BLOCK_S=block_s,
            C=CHUNK,
            PRECISION=FLOAT32_PRECISION if xbc.dtype == torch.float32 else "tf32",
            num_warps=8,
            num_stages=1,
            **pdl_options(),
        )
    return out
