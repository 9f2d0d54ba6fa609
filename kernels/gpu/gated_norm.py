"""gated_norm, one program a group of a row's channels, and copy_rows, of whole states."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import cdiv, check_tensors, next_power_of_2, pdl_options
from .norm import MAX_HIDDEN_SIZE

COPY_BLOCK = 2048  # elements of a copy's program


@triton.jit
def gated_norm_kernel(
    x,  # [T, C]
    gate,  # [T, C], rows of ``gate_stride``
    weight,  # [C] or [D]
    y,  # [T, C]
    gate_stride,
    C,
    D,
    eps,
    GATE_FIRST: tl.constexpr,
    SHARED: tl.constexpr,  # one weight for all groups
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    mask = cols < D
    first = tl.program_id(1) * D
    w = tl.load(weight + (0 if SHARED else first) + cols, mask=mask, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    h = tl.load(x + row * C + first + cols, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + first + cols, mask=mask, other=0.0).to(tl.float32)
    g = g * tl.sigmoid(g)
    if GATE_FIRST:
        h = h * g
    out = h * tl.rsqrt(tl.sum(h * h, 0) / D + eps) * w
    if not GATE_FIRST:
        out = out * g
    tl.store(y + row * C + first + cols, out.to(y.dtype.element_ty), mask=mask)


def gated_norm(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    group_size: int,
    gate_first: bool,
) -> torch.Tensor:
    """See ``reference_recurrent.gated_norm``.

    Raises:
        ValueError: on a wrong shape, layout or device.
    """
    check_tensors(x=x, weight=weight)
    rows, channels = x.shape
    if gate.shape != x.shape or gate.stride(1) != 1:
        raise ValueError(f"gate {list(gate.shape)} does not fit x {list(x.shape)}")
    if channels % group_size or weight.shape[0] not in (channels, group_size):
        raise ValueError(f"groups of {group_size} of {channels}, {weight.shape[0]} weights")
    if group_size > MAX_HIDDEN_SIZE:
        raise ValueError(f"groups of {group_size}: at most {MAX_HIDDEN_SIZE} are supported")
    y = torch.empty_like(x)
    if rows:
        block = next_power_of_2(group_size)
        gated_norm_kernel[(rows, channels // group_size)](
            x,
            gate,
            weight,
            y,
            gate.stride(0),
            channels,
            group_size,
            eps,
            GATE_FIRST=gate_first,
            SHARED=weight.shape[0] != channels,
            BLOCK_D=block,
            num_warps=min(max(block // 256, 1), 16),
            num_stages=1,
            **pdl_options(),
        )
    return y


@triton.jit
def copy_rows_kernel(
    states,  # [L, N, E]
    rows,  # [2, copies]
    copies,
    N,
    E,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    copy = tl.program_id(1)
    source = tl.load(rows + copy).to(tl.int64)
    target = tl.load(rows + copies + copy).to(tl.int64)
    layer = states + tl.program_id(2).to(tl.int64) * N * E
    elements = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = elements < E
    value = tl.load(layer + source * E + elements, mask=mask)
    tl.store(layer + target * E + elements, value, mask=mask)


def copy_rows(states: torch.Tensor, rows: torch.Tensor) -> None:
    """See ``reference_recurrent.copy_rows``.

    Raises:
        ValueError: on a wrong layout or device.
    """
    check_tensors(states=states, rows=rows)
    layers, num_rows = states.shape[:2]
    size, copies = states[0, 0].numel(), rows.numel() // 2
    if copies and layers:
        copy_rows_kernel[(cdiv(size, COPY_BLOCK), copies, layers)](
            states, rows, copies, num_rows, size,
            BLOCK=COPY_BLOCK, num_warps=4, num_stages=1, **pdl_options(),
        )  # fmt: skip
