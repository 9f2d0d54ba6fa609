"""Ops of layers with a state on a CPU: Rust where all is float32, as a CPU's activations are.

Others (a ``--dtype`` that was asked for) take the definitions. Semantics: ``reference_recurrent``.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from octavo import _core

from .. import reference_recurrent as reference
from ..recurrent import RecurrentOps, Steps
from .elementwise import activation as activate
from .elementwise import rms_norm
from .tensors import Matrix, Vector, float32_matrix, ints, optional_vector, refuse, vector

# Taps and columns that the kernels have room for.
_MAX_WIDTH, _MAX_COLUMNS = 8, 512
_FLOAT32_MAX = torch.finfo(torch.float32).max


def _step(steps: Steps) -> tuple[Vector, Vector, Vector]:
    count = steps.slots.shape[0]
    return (
        ints(steps.slots, "slots", count),
        ints(steps.seq_lens, "seq_lens", count),
        ints(steps.query_start_loc, "query_start_loc", count + 1),
    )


def _rows(state: Tensor, name: str) -> Matrix:
    """States as a matrix, a row of it each."""
    if state.dtype != torch.float32 or not state.is_cpu or not state.is_contiguous():
        raise refuse(state, name, "contiguous float32 on the CPU")
    return state.data_ptr(), "F32", state.shape[0], math.prod(state.shape[1:])


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    steps: Steps,
    *,
    activation: str = "",
) -> Tensor:
    """See reference_recurrent.causal_conv. Rows of no request are undefined.

    Raises:
        ValueError: a slot or token out of range, or tensors that do not fit.
    """
    channels, width = weight.shape
    if x.dtype != torch.float32 or width > _MAX_WIDTH:
        return reference.causal_conv(x, weight, bias, state, steps, activation=activation)
    x = x.contiguous()
    out = torch.empty_like(x)
    _core.cpu_causal_conv(
        float32_matrix(x, "x", channels),
        float32_matrix(weight, "weight", width),
        optional_vector(bias, "bias", channels),
        state=_rows(state, "state"),
        step=_step(steps),
        out=float32_matrix(out, "out", channels),
    )
    return activate(out, activation) if activation else out


def short_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, steps: Steps
) -> Tensor:
    """See reference_recurrent.short_conv. Raises as ``causal_conv``."""
    b, c, v = x.chunk(3, -1)
    return causal_conv(b * v, weight, bias, state, steps).mul_(c)


def gated_delta_rule(
    qkv: Tensor,
    a: Tensor,
    b: Tensor,
    decay: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    steps: Steps,
    *,
    num_key_heads: int,
    beta_scale: float = 1.0,
) -> Tensor:
    """See reference_recurrent.gated_delta_rule. Rows of no request are undefined.

    Raises:
        ValueError: a slot or token out of range, or tensors that do not fit.
    """
    _, heads, dk, dv = state.shape
    if qkv.dtype != torch.float32 or max(dk, dv) > _MAX_COLUMNS:
        return reference.gated_delta_rule(
            qkv,
            a,
            b,
            decay,
            dt_bias,
            state,
            steps,
            num_key_heads=num_key_heads,
            beta_scale=beta_scale,
        )
    qkv, a, b = qkv.contiguous(), a.contiguous(), b.contiguous()
    out = torch.empty((qkv.shape[0], heads * dv), dtype=torch.float32)
    # One rate of a head, or one of each row of its state.
    rates = heads if a.shape[1] == heads else heads * dk
    _core.cpu_gated_delta_rule(
        float32_matrix(qkv, "qkv", 2 * num_key_heads * dk + heads * dv),
        a=float32_matrix(a, "a", rates),
        b=float32_matrix(b, "b", heads),
        decay=vector(decay, "decay", heads),
        dt_bias=vector(dt_bias, "dt_bias", rates),
        state=_rows(state, "state"),
        step=_step(steps),
        num_key_heads=num_key_heads,
        key_dim=dk,
        value_dim=dv,
        beta_scale=beta_scale,
        out=float32_matrix(out, "out", heads * dv),
    )
    return out


def selective_scan(
    xbc: Tensor,
    dt: Tensor,
    decay: Tensor,
    dt_bias: Tensor,
    skip: Tensor,
    state: Tensor,
    steps: Steps,
    *,
    num_groups: int,
    dt_limits: tuple[float, float],
) -> Tensor:
    """See reference_recurrent.selective_scan. Rows of no request are undefined.

    Raises:
        ValueError: a slot or token out of range, or tensors that do not fit.
    """
    _, heads, p, size = state.shape
    if xbc.dtype != torch.float32:
        return reference.selective_scan(
            xbc,
            dt,
            decay,
            dt_bias,
            skip,
            state,
            steps,
            num_groups=num_groups,
            dt_limits=dt_limits,
        )
    xbc, dt = xbc.contiguous(), dt.contiguous()
    out = torch.empty((xbc.shape[0], heads * p), dtype=torch.float32)
    _core.cpu_selective_scan(
        float32_matrix(xbc, "xbc", heads * p + 2 * num_groups * size),
        dt=float32_matrix(dt, "dt", heads),
        decay=vector(decay.flatten(), "decay", heads if decay.dim() == 1 else heads * size),
        dt_bias=vector(dt_bias, "dt_bias", heads),
        skip=vector(skip, "skip", heads),
        state=_rows(state, "state"),
        step=_step(steps),
        num_groups=num_groups,
        head_dim=p,
        state_size=size,
        dt_limits=(dt_limits[0], min(dt_limits[1], _FLOAT32_MAX)),
        out=float32_matrix(out, "out", heads * p),
    )
    return out


def gated_norm(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, *, group_size: int, gate_first: bool
) -> Tensor:
    """See reference_recurrent.gated_norm.

    Raises:
        ValueError: tensors that do not fit.
    """
    if x.dtype != torch.float32 or gate.dtype != torch.float32:
        return reference.gated_norm(
            x, gate, weight, eps, group_size=group_size, gate_first=gate_first
        )
    factor = activate(gate.contiguous(), "silu")
    groups = (factor.mul_(x) if gate_first else x).reshape(-1, group_size)
    # Groups with weights of their own get them after it.
    is_shared = weight.numel() == group_size
    y = rms_norm(groups, weight if is_shared else _ones(group_size), eps)
    assert isinstance(y, Tensor)
    y = y.view(x.shape)
    if not is_shared:
        y.mul_(weight)
    return y if gate_first else y.mul_(factor)


@functools.cache
def _ones(size: int) -> Tensor:
    return torch.ones(size)


RECURRENT_OPS = RecurrentOps(
    causal_conv=causal_conv,
    short_conv=short_conv,
    gated_delta_rule=gated_delta_rule,
    selective_scan=selective_scan,
    gated_norm=gated_norm,
    copy_rows=reference.copy_rows,
)
