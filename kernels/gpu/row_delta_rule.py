"""row_delta_rule: the gated delta rule with a decay of each row of a state, token by token.

A program keeps a tile of one head's state in registers from its request's first token to its last;
a decode is a request of one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..recurrent import Steps
from .launch import cdiv, check_shape, check_tensors, next_power_of_2, pdl_options
from .softplus import softplus

# Of a tile: 128 bytes of each row of the state.
COLUMNS = 32


@triton.jit(do_not_specialize_on_alignment=["slots", "seq_lens", "query_start_loc"])
def row_delta_kernel(
    qkv,  # [T, 2 H Dk + H Dv], rows of ``qkv_stride``
    a,  # [T, H Dk], rows of ``a_stride``
    b,  # [T, H], rows of ``b_stride``
    decay,  # [H]
    dt_bias,  # [H Dk]
    state,  # [N, H, Dk, Dv]
    slots,  # [R]
    seq_lens,  # [R]
    query_start_loc,  # [R + 1]
    out,  # [T, H, Dv]
    qkv_stride,
    a_stride,
    b_stride,
    scale,
    beta_scale,
    H: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PDL: tl.constexpr,
):
    head = tl.program_id(0)
    request = tl.program_id(2)
    i = tl.arange(0, BLOCK_K)
    j = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    seq_len = tl.load(seq_lens + request)
    if seq_len == 0:
        return
    q_start = tl.load(query_start_loc + request)
    q_len = tl.load(query_start_loc + request + 1) - q_start
    slot = tl.load(slots + request).to(tl.int64)
    rows, columns = i < DK, j < DV
    mask = rows[:, None] & columns[None, :]
    at = state + (slot * H + head) * (DK * DV) + i[:, None] * DV + j[None, :]
    s = tl.where(seq_len > q_len, tl.load(at, mask=mask, other=0.0), 0.0)
    rate = tl.load(decay + head)
    bias = tl.load(dt_bias + head * DK + i, mask=rows, other=0.0)
    for t in range(0, q_len):
        row = (q_start + t).to(tl.int64)
        own = qkv + row * qkv_stride
        q = tl.load(own + head * DK + i, mask=rows, other=0.0).to(tl.float32)
        k = tl.load(own + (H + head) * DK + i, mask=rows, other=0.0).to(tl.float32)
        v = tl.load(own + 2 * H * DK + head * DV + j, mask=columns, other=0.0).to(tl.float32)
        q = q * (tl.rsqrt(tl.sum(q * q, 0) + 1e-6) * scale)
        k = k * tl.rsqrt(tl.sum(k * k, 0) + 1e-6)
        step = tl.load(a + row * a_stride + head * DK + i, mask=rows, other=0.0).to(tl.float32)
        beta = beta_scale * tl.sigmoid(tl.load(b + row * b_stride + head).to(tl.float32))
        s = s * tl.exp(rate * softplus(step + bias))[:, None]
        change = beta * (v - tl.sum(s * k[:, None], 0))
        s += k[:, None] * change[None, :]
        y = tl.sum(s * q[:, None], 0)
        tl.store(out + (row * H + head) * DV + j, y.to(out.dtype.element_ty), mask=columns)
    tl.store(at, s, mask=mask)


def row_delta_rule(
    qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    decay: torch.Tensor,
    dt_bias: torch.Tensor,
    state: torch.Tensor,
    steps: Steps,
    *,
    beta_scale: float,
) -> torch.Tensor:
    """``reference_recurrent.gated_delta_rule`` of as many key heads as value heads.

    a: [T, H Dk]; dt_bias: [H Dk]. Rows of no request are left unwritten.

    Raises:
        ValueError: on a wrong shape, layout or device.
    """
    slots, seq_lens, query_start_loc, _, _ = steps
    check_tensors(decay=decay, dt_bias=dt_bias, state=state, slots=slots, seq_lens=seq_lens)
    _, heads, dk, dv = state.shape
    rows = qkv.shape[0]
    check_shape("qkv", qkv, rows, 2 * heads * dk + heads * dv)
    check_shape("a", a, rows, heads * dk)
    check_shape("b", b, rows, heads)
    check_shape("dt_bias", dt_bias, heads * dk)
    for name, tensor in (("qkv", qkv), ("a", a), ("b", b)):
        if tensor.stride(1) != 1:
            raise ValueError(f"{name}'s rows must be contiguous")
    out = torch.empty((rows, heads * dv), dtype=qkv.dtype, device=qkv.device)
    columns = min(max(next_power_of_2(dv), 16), COLUMNS)
    row_delta_kernel[(heads, cdiv(dv, columns), slots.shape[0])](
        qkv,
        a,
        b,
        decay,
        dt_bias,
        state,
        slots,
        seq_lens,
        query_start_loc,
        out,
        qkv.stride(0),
        a.stride(0),
        b.stride(0),
        dk**-0.5,
        beta_scale,
        H=heads,
        DK=dk,
        DV=dv,
        BLOCK_K=max(next_power_of_2(dk), 16),
        BLOCK_V=columns,
        num_warps=4,
        num_stages=1,
        **pdl_options(),
    )
    return out
