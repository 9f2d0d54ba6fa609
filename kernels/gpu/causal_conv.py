"""causal_conv and short_conv: a program takes a tile of channels, of one token or of several.

No grid depends on a length: the programs of a prefill find their requests as attention's do. Its
state is written by a kernel of its own, since a request's first tile still reads the old one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..recurrent import Steps
from .launch import cdiv, check_shape, check_tensors, pdl_options
from .paged_kv import block_r, find_request

BLOCK_C = 256  # channels of a program: with 4 warps two neighbours a thread
BLOCK_T = 16  # tokens of a prefill's program


@triton.jit
def load_input(x, row, stride, channels, C, mask, SHORT: tl.constexpr):
    """The convolution's input, float32: x's own element, or b * v rounded to its type."""
    base = x + row * stride
    if SHORT:
        b = tl.load(base + channels, mask=mask, other=0.0)
        v = tl.load(base + 2 * C + channels, mask=mask, other=0.0)
        return (b.to(tl.float32) * v.to(tl.float32)).to(b.dtype).to(tl.float32)
    return tl.load(base + channels, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def finish(y, x, row, stride, channels, C, mask, SILU: tl.constexpr, SHORT: tl.constexpr):
    """The result of a convolution: activated, or times c of its rounded value."""
    if SILU:
        y = y * tl.sigmoid(y)
    if SHORT:
        c = tl.load(x + row * stride + C + channels, mask=mask, other=0.0)
        y = c.to(tl.float32) * y.to(c.dtype).to(tl.float32)
    return y


@triton.jit
def conv_decode_kernel(
    x,  # [T, C] or [T, 3C], rows of ``stride``
    weight,  # [C, K]
    bias,  # [C]
    state,  # [N, C, K - 1]
    slots,  # [R]
    seq_lens,  # [R]
    out,  # [T, C]
    stride,
    C,
    K: tl.constexpr,
    SILU: tl.constexpr,
    SHORT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    """One token a request: reads its state once and writes it once."""
    row = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = channels < C
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    seq_len = tl.load(seq_lens + row)
    if seq_len == 0:
        return
    past = state + (tl.load(slots + row).to(tl.int64) * C + channels) * (K - 1)
    new = load_input(x, row, stride, channels, C, mask, SHORT)
    y = new * tl.load(weight + channels * K + K - 1, mask=mask, other=0.0).to(tl.float32)
    for k in tl.static_range(K - 1):
        value = tl.load(past + k, mask=mask, other=0.0).to(tl.float32)
        value = tl.where(seq_len > 1, value, 0.0)
        y += value * tl.load(weight + channels * K + k, mask=mask, other=0.0).to(tl.float32)
        if k > 0:
            tl.store(past + k - 1, value.to(state.dtype.element_ty), mask=mask)
    tl.store(past + K - 2, new.to(state.dtype.element_ty), mask=mask)
    if HAS_BIAS:
        y += tl.load(bias + channels, mask=mask, other=0.0).to(tl.float32)
    y = finish(y, x, row, stride, channels, C, mask, SILU, SHORT)
    tl.store(out + row * C + channels, y.to(out.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["num_reqs"],
    do_not_specialize_on_alignment=["slots", "seq_lens", "query_start_loc"],
)
def conv_prefill_kernel(
    x,  # [T, C] or [T, 3C], rows of ``stride``
    weight,  # [C, K]
    bias,  # [C]
    state,  # [N, C, K - 1]
    slots,  # [R]
    seq_lens,  # [R]
    query_start_loc,  # [R + 1]
    out,  # [T, C]
    stride,
    C,
    num_reqs,
    K: tl.constexpr,
    SILU: tl.constexpr,
    SHORT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    """A tile of a request's tokens; those before the first come from its state."""
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = channels < C
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    reqs = tl.arange(0, BLOCK_R)
    known = reqs < num_reqs
    starts = tl.load(query_start_loc + reqs, mask=known, other=0)
    ends = tl.load(query_start_loc + reqs + 1, mask=known, other=0)
    lens = tl.load(seq_lens + reqs, mask=known, other=0)
    tiles = tl.where(lens > 0, tl.cdiv(ends - starts, BLOCK_T), 0)
    request, first, _ = find_request(tiles, tl.program_id(1), BLOCK_R)
    if request >= num_reqs:
        return
    q_start = tl.load(query_start_loc + request)
    q_len = tl.load(query_start_loc + request + 1) - q_start
    begins = tl.load(seq_lens + request) == q_len
    past = state + (tl.load(slots + request).to(tl.int64) * C + channels) * (K - 1)
    begin = (tl.program_id(1) - first) * BLOCK_T
    for token in range(begin, tl.minimum(begin + BLOCK_T, q_len)):
        y = tl.zeros((BLOCK_C,), tl.float32)
        for k in tl.static_range(K):
            at = token - (K - 1) + k
            row = (q_start + tl.maximum(at, 0)).to(tl.int64)
            value = load_input(x, row, stride, channels, C, mask, SHORT)
            if k < K - 1:
                old = tl.load(past + tl.minimum(token + k, K - 2), mask=mask, other=0.0)
                old = tl.where(begins, 0.0, old.to(tl.float32))
                value = tl.where(at >= 0, value, old)
            y += value * tl.load(weight + channels * K + k, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            y += tl.load(bias + channels, mask=mask, other=0.0).to(tl.float32)
        row = (q_start + token).to(tl.int64)
        y = finish(y, x, row, stride, channels, C, mask, SILU, SHORT)
        tl.store(out + row * C + channels, y.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize_on_alignment=["slots", "seq_lens", "query_start_loc"])
def conv_state_kernel(
    x,  # [T, C] or [T, 3C], rows of ``stride``
    state,  # [N, C, K - 1]
    slots,  # [R]
    seq_lens,  # [R]
    query_start_loc,  # [R + 1]
    stride,
    C,
    K: tl.constexpr,
    SHORT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    """The last K - 1 inputs of a request that prefills."""
    request = tl.program_id(0)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = channels < C
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    seq_len = tl.load(seq_lens + request)
    if seq_len == 0:
        return
    q_start = tl.load(query_start_loc + request)
    q_len = tl.load(query_start_loc + request + 1) - q_start
    past = state + (tl.load(slots + request).to(tl.int64) * C + channels) * (K - 1)
    # Each is read before what is written there: a token or more behind.
    for k in tl.static_range(K - 1):
        at = q_len - (K - 1) + k
        row = (q_start + tl.maximum(at, 0)).to(tl.int64)
        value = load_input(x, row, stride, channels, C, mask, SHORT)
        old = tl.load(past + tl.minimum(q_len + k, K - 2), mask=mask, other=0.0)
        old = tl.where(seq_len > q_len, old.to(tl.float32), 0.0)
        value = tl.where(at >= 0, value, old)
        tl.store(past + k, value.to(state.dtype.element_ty), mask=mask)


def _convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor,
    steps: Steps,
    *,
    silu: bool,
    short: bool,
) -> torch.Tensor:
    slots, seq_lens, query_start_loc, num_decodes, _ = steps
    check_tensors(weight=weight, bias=bias, state=state, slots=slots, seq_lens=seq_lens)
    channels, width = weight.shape
    if x.stride(1) != 1 or x.shape[1] != channels * (3 if short else 1):
        raise ValueError(f"x {list(x.shape)} does not fit {channels} channels")
    check_shape("state", state, state.shape[0], channels, width - 1)
    if width < 2:
        raise ValueError("a convolution of one tap has no state")
    out = torch.empty((x.shape[0], channels), dtype=x.dtype, device=x.device)
    bias_or_any = weight if bias is None else bias
    rest = slots.shape[0] - num_decodes
    tiles = cdiv(channels, BLOCK_C)
    if num_decodes:
        conv_decode_kernel[(num_decodes, tiles)](
            x,
            weight,
            bias_or_any,
            state,
            slots,
            seq_lens,
            out,
            x.stride(0),
            channels,
            K=width,
            SILU=silu,
            SHORT=short,
            HAS_BIAS=bias is not None,
            BLOCK_C=BLOCK_C,
            num_warps=4,
            num_stages=1,
            **pdl_options(),
        )
    if rest:
        own = (slots[num_decodes:], seq_lens[num_decodes:], query_start_loc[num_decodes:])
        conv_prefill_kernel[(tiles, (x.shape[0] - num_decodes) // BLOCK_T + rest)](
            x,
            weight,
            bias_or_any,
            state,
            *own,
            out,
            x.stride(0),
            channels,
            rest,
            K=width,
            SILU=silu,
            SHORT=short,
            HAS_BIAS=bias is not None,
            BLOCK_R=block_r(rest),
            BLOCK_T=BLOCK_T,
            BLOCK_C=BLOCK_C,
            num_warps=4,
            num_stages=1,
            **pdl_options(),
        )
        conv_state_kernel[(rest, tiles)](
            x,
            state,
            *own,
            x.stride(0),
            channels,
            K=width,
            SHORT=short,
            BLOCK_C=BLOCK_C,
            num_warps=4,
            num_stages=1,
            **pdl_options(),
        )
    return out


def causal_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor,
    steps: Steps,
    *,
    activation: str = "",
) -> torch.Tensor:
    """See ``reference_recurrent.causal_conv``. Rows of no request are left unwritten.

    Raises:
        ValueError: on a wrong shape, layout or device, or an unknown activation.
    """
    if activation not in ("", "silu"):
        raise ValueError(f"unknown activation {activation!r} of a convolution")
    return _convolve(x, weight, bias, state, steps, silu=activation == "silu", short=False)


def short_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor,
    steps: Steps,
) -> torch.Tensor:
    """See ``reference_recurrent.short_conv``. Raises as ``causal_conv``."""
    return _convolve(x, weight, bias, state, steps, silu=False, short=True)
