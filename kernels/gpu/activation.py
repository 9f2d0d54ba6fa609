"""gated_activation and activation, elementwise."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import cdiv, check_tensors, pdl_options

BLOCK = 1024  # 4 warps x 8 values a thread: 16-byte loads

GATED_KINDS = ("silu", "gelu", "gelu_tanh", "swiglu_clamped")
KINDS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "gelu_new")


@triton.jit
def activate(x, KIND: tl.constexpr):
    """The activation named KIND of a float32 tile."""
    if KIND == "silu":
        return x * tl.sigmoid(x)
    elif KIND == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "relu":
        return tl.maximum(x, 0.0)
    elif KIND == "relu2":
        positive = tl.maximum(x, 0.0)
        return positive * positive
    else:
        # gelu_tanh, gelu_new: 0.5 * (1 + tanh(u)) = sigmoid(2u)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def gated_activation_kernel(
    x,  # [T, 2F]
    y,  # [T, F]
    F,
    KIND: tl.constexpr,
    BLOCK_F: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = cols < F
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    gate = tl.load(x + row * 2 * F + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * F + F + cols, mask=mask, other=0.0).to(tl.float32)
    if KIND == "swiglu_clamped":
        # The reference's bound and gain.
        gate = tl.minimum(gate, 7.0)
        up = tl.minimum(tl.maximum(up, -7.0), 7.0) + 1.0
        out = gate * tl.sigmoid(1.702 * gate) * up
    else:
        out = activate(gate, KIND) * up
    tl.store(y + row * F + cols, out.to(y.dtype.element_ty), mask=mask)


@triton.jit
def activation_kernel(
    x,  # [count]
    y,  # [count]
    count,
    KIND: tl.constexpr,
    BLOCK_F: tl.constexpr,
    PDL: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = offsets < count
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + offsets, activate(value, KIND).to(y.dtype.element_ty), mask=mask)


def gated_activation(x: torch.Tensor, kind: str) -> torch.Tensor:
    """activation(first half of each row) * second half: [T, 2F] -> [T, F].

    Raises:
        ValueError: on an unknown kind or an odd row length.
    """
    if kind not in GATED_KINDS:
        raise ValueError(f"unknown gated activation {kind!r}, known: {', '.join(GATED_KINDS)}")
    check_tensors(x=x)
    rows, width = x.shape
    if width % 2:
        raise ValueError(f"a gate and an up half need an even row length, not {width}")
    half = width // 2
    y = torch.empty((rows, half), dtype=x.dtype, device=x.device)
    if rows:
        gated_activation_kernel[(rows, cdiv(half, BLOCK))](
            x, y, half, KIND=kind, BLOCK_F=BLOCK, num_warps=4, num_stages=1, **pdl_options()
        )
    return y


def activation(x: torch.Tensor, kind: str) -> torch.Tensor:
    """The activation of every element, in x's shape.

    Raises:
        ValueError: on an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown activation {kind!r}, known: {', '.join(KINDS)}")
    check_tensors(x=x)
    y = torch.empty_like(x)
    count = x.numel()
    if count:
        activation_kernel[(cdiv(count, BLOCK),)](
            x, y, count, KIND=kind, BLOCK_F=BLOCK, num_warps=4, num_stages=1, **pdl_options()
        )
    return y
