"""gated_delta_rule: token by token for decodes, and in chunks for prefills.

A decode's program takes a tile of one head's state, which it reads once and writes once. A
prefill's program keeps its tile in registers from chunk to chunk; within a chunk of C tokens the
rule's C updates are one triangular system (the WY form of Yang et al., arXiv:2406.06484, with the
decays of arXiv:2412.06464), whose matrix I + A, A strictly lower, is inverted by products. Powers
grow with their size where keys are alike, and with them the error, so those are of the blocks of 8
on the diagonal, D, alone::

    T = (I + D)^-1 = (I - D) (I + D^2) (I + D^4)        since D^8 = 0
    (I + A)^-1 = (I - T (A - D)) T                      since (T (A - D))^2 = 0
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..recurrent import Steps
from .attention import FLOAT32_PRECISION
from .launch import cdiv, check_shape, check_tensors, next_power_of_2, pdl_options
from .row_delta_rule import row_delta_rule
from .softplus import softplus

# Two blocks of 8: the inverse above is of chunks of this size.
CHUNK = 16
DECODE_COLUMNS = 32  # of a decode's tile: 128 bytes of each row of the state
PREFILL_COLUMNS = 64  # of a prefill's: 32 registers of each of 256 threads


@triton.jit
def unit_rows(x):
    """Rows of a float32 tile divided by their lengths."""
    return x * tl.rsqrt(tl.sum(x * x, 1) + 1e-6)[:, None]


@triton.jit
def delta_decode_kernel(
    qkv,  # [T, 2 Hk Dk + Hv Dv], rows of ``qkv_stride``
    a,  # [T, Hv], rows of ``a_stride``
    b,  # [T, Hv], rows of ``b_stride``
    decay,  # [Hv]
    dt_bias,  # [Hv]
    state,  # [N, Hv, Dk, Dv]
    slots,  # [R]
    seq_lens,  # [R]
    out,  # [T, Hv, Dv]
    qkv_stride,
    a_stride,
    b_stride,
    scale,
    beta_scale,
    HK: tl.constexpr,
    HV: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    i = tl.arange(0, BLOCK_K)
    j = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    seq_len = tl.load(seq_lens + row)
    if seq_len == 0:
        return
    slot = tl.load(slots + row).to(tl.int64)
    at = state + (slot * HV + head) * (DK * DV) + i[:, None] * DV + j[None, :]
    mask = (i[:, None] < DK) & (j[None, :] < DV)
    s = tl.where(seq_len > 1, tl.load(at, mask=mask, other=0.0), 0.0)
    own = qkv + row * qkv_stride
    key_head = head // (HV // HK)
    q = tl.load(own + key_head * DK + i, mask=i < DK, other=0.0).to(tl.float32)
    k = tl.load(own + (HK + key_head) * DK + i, mask=i < DK, other=0.0).to(tl.float32)
    v = tl.load(own + 2 * HK * DK + head * DV + j, mask=j < DV, other=0.0).to(tl.float32)
    q = q * (tl.rsqrt(tl.sum(q * q, 0) + 1e-6) * scale)
    k = k * tl.rsqrt(tl.sum(k * k, 0) + 1e-6)
    step = tl.load(a + row * a_stride + head).to(tl.float32) + tl.load(dt_bias + head)
    beta = beta_scale * tl.sigmoid(tl.load(b + row * b_stride + head).to(tl.float32))
    s = s * tl.exp(tl.load(decay + head) * softplus(step))
    change = beta * (v - tl.sum(s * k[:, None], 0))
    s += k[:, None] * change[None, :]
    y = tl.sum(s * q[:, None], 0)
    tl.store(at, s, mask=mask)
    tl.store(out + (row * HV + head) * DV + j, y.to(out.dtype.element_ty), mask=j < DV)


@triton.jit(do_not_specialize_on_alignment=["slots", "seq_lens", "query_start_loc"])
def delta_prefill_kernel(
    qkv,  # [T, 2 Hk Dk + Hv Dv], rows of ``qkv_stride``
    a,  # [T, Hv], rows of ``a_stride``
    b,  # [T, Hv], rows of ``b_stride``
    decay,  # [Hv]
    dt_bias,  # [Hv]
    state,  # [N, Hv, Dk, Dv]
    slots,  # [R]
    seq_lens,  # [R]
    query_start_loc,  # [R + 1]
    out,  # [T, Hv, Dv]
    qkv_stride,
    a_stride,
    b_stride,
    scale,
    beta_scale,
    HK: tl.constexpr,
    HV: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,  # precision of the inverse
    PDL: tl.constexpr,
):
    head = tl.program_id(0)
    request = tl.program_id(2)
    i = tl.arange(0, BLOCK_K)
    j = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
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
    at = state + (slot * HV + head) * (DK * DV) + i[:, None] * DV + j[None, :]
    mask = (i[:, None] < DK) & (j[None, :] < DV)
    s = tl.where(seq_len > q_len, tl.load(at, mask=mask, other=0.0), 0.0)
    key_head = head // (HV // HK)
    rate, bias = tl.load(decay + head), tl.load(dt_bias + head)
    lower = t[:, None] > t[None, :]
    near = t[:, None] // 8 == t[None, :] // 8
    seen = t[:, None] >= t[None, :]
    one = tl.where(t[:, None] == t[None, :], 1.0, 0.0)
    for begin in range(0, q_len, C):
        valid = begin + t < q_len
        rows = (q_start + begin + t).to(tl.int64)
        own = qkv + rows[:, None] * qkv_stride
        here = valid[:, None] & (i[None, :] < DK)
        q = tl.load(own + key_head * DK + i[None, :], mask=here, other=0.0)
        k = tl.load(own + (HK + key_head) * DK + i[None, :], mask=here, other=0.0)
        values = valid[:, None] & (j[None, :] < DV)
        v = tl.load(own + 2 * HK * DK + head * DV + j[None, :], mask=values, other=0.0)
        q, k, v = unit_rows(q.to(tl.float32)) * scale, unit_rows(k.to(tl.float32)), v.to(tl.float32)
        step = tl.load(a + rows * a_stride + head, mask=valid, other=0.0).to(tl.float32) + bias
        beta = tl.load(b + rows * b_stride + head, mask=valid, other=0.0).to(tl.float32)
        # Rows beyond the request change nothing.
        beta = tl.where(valid, beta_scale * tl.sigmoid(beta), 0.0)
        log_keep = tl.where(valid, rate * softplus(step), 0.0)
        total = tl.sum(log_keep, 0)
        sums = tl.cumsum(log_keep, 0)
        between = tl.exp(tl.where(seen, sums[:, None] - sums[None, :], 0.0))

        keys = tl.trans(k)
        system = tl.dot(k, keys, input_precision=EXACT) * between * beta[:, None]
        power = tl.where(lower & near, system, 0.0)
        inverse = one - power
        for _ in tl.static_range(2):
            power = tl.dot(power, power, input_precision=EXACT)
            inverse = tl.dot(inverse, one + power, input_precision=EXACT)
        far = tl.where(near, 0.0, tl.where(lower, system, 0.0))
        far = tl.dot(inverse, far, input_precision=EXACT)
        inverse -= tl.dot(far, inverse, input_precision=EXACT)
        kept = tl.exp(sums)[:, None]
        change = beta[:, None] * (v - kept * tl.dot(k, s, input_precision=PRECISION))
        change = tl.dot(inverse, change, input_precision=EXACT)
        scores = tl.where(seen, tl.dot(q, keys, input_precision=PRECISION) * between, 0.0)
        y = kept * tl.dot(q, s, input_precision=PRECISION)
        y += tl.dot(scores, change, input_precision=PRECISION)
        to_end = k * tl.exp(total - sums)[:, None]
        s = s * tl.exp(total) + tl.dot(tl.trans(to_end), change, input_precision=PRECISION)
        at_out = out + (rows[:, None] * HV + head) * DV + j[None, :]
        tl.store(at_out, y.to(out.dtype.element_ty), mask=values)
    tl.store(at, s, mask=mask)


def gated_delta_rule(
    qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    decay: torch.Tensor,
    dt_bias: torch.Tensor,
    state: torch.Tensor,
    steps: Steps,
    *,
    num_key_heads: int,
    beta_scale: float = 1.0,
) -> torch.Tensor:
    """See ``reference_recurrent.gated_delta_rule``. Rows of no request are left unwritten.

    Raises:
        ValueError: on a wrong shape, layout or device.
    """
    if dt_bias.shape[0] > decay.shape[0]:
        if num_key_heads != decay.shape[0]:
            raise ValueError(f"decays of rows: {num_key_heads} key heads of {decay.shape[0]}")
        return row_delta_rule(qkv, a, b, decay, dt_bias, state, steps, beta_scale=beta_scale)
    slots, seq_lens, query_start_loc, num_decodes, _ = steps
    check_tensors(decay=decay, dt_bias=dt_bias, state=state, slots=slots, seq_lens=seq_lens)
    _, heads, dk, dv = state.shape
    rows, width = qkv.shape
    if width != 2 * num_key_heads * dk + heads * dv or heads % num_key_heads:
        raise ValueError(
            f"qkv has {width} columns; heads: {num_key_heads} of {dk}, {heads} of {dv}"
        )
    for name, tensor in (("qkv", qkv), ("a", a), ("b", b)):
        if tensor.stride(1) != 1:
            raise ValueError(f"{name}'s rows must be contiguous")
    check_shape("a", a, rows, heads)
    check_shape("b", b, rows, heads)
    out = torch.empty((rows, heads * dv), dtype=qkv.dtype, device=qkv.device)
    block_k = max(next_power_of_2(dk), 16)
    rest = slots.shape[0] - num_decodes
    strides = (qkv.stride(0), a.stride(0), b.stride(0))
    if num_decodes:
        columns = min(max(next_power_of_2(dv), 16), DECODE_COLUMNS)
        delta_decode_kernel[(num_decodes, heads, cdiv(dv, columns))](
            qkv,
            a,
            b,
            decay,
            dt_bias,
            state,
            slots,
            seq_lens,
            out,
            *strides,
            dk**-0.5,
            beta_scale,
            HK=num_key_heads,
            HV=heads,
            DK=dk,
            DV=dv,
            BLOCK_K=block_k,
            BLOCK_V=columns,
            num_warps=4,
            num_stages=1,
            **pdl_options(),
        )
    if rest:
        columns = min(max(next_power_of_2(dv), 16), PREFILL_COLUMNS)
        delta_prefill_kernel[(heads, cdiv(dv, columns), rest)](
            qkv,
            a,
            b,
            decay,
            dt_bias,
            state,
            slots[num_decodes:],
            seq_lens[num_decodes:],
            query_start_loc[num_decodes:],
            out,
            *strides,
            dk**-0.5,
            beta_scale,
            HK=num_key_heads,
            HV=heads,
            DK=dk,
            DV=dv,
            BLOCK_K=block_k,
            BLOCK_V=columns,
            C=CHUNK,
            PRECISION=FLOAT32_PRECISION if qkv.dtype == torch.float32 else "tf32",
            EXACT=FLOAT32_PRECISION,
            num_warps=8,
            num_stages=1,
            **pdl_options(),
        )
    return out
