"""MambaMixer: Mamba-2's state space in attention's place, as Bamba, Granite 4 and others have it.

One projection gives a gate, what goes through a causal convolution (inputs, and what writes to the
state and reads from it) and a step size a head; the result is gated, normed and projected.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from octavo.checkpoints.weights import Weights
from octavo.errors import ModelLoadError
from octavo.kernels.opset import OpSet
from octavo.kernels.weights import Range, Rows
from octavo.layers.context import LayerState, StepContext
from octavo.layers.norm import Addend, RMSNorm
from octavo.models.config import ModelConfig, StateShape
from octavo.models.hf_config import HfConfig
from octavo.models.hybrid import NO_STATE, load_taps, recurrent_ops
from octavo.models.parts import grouped_heads, load_columns, load_rows, scaled


@dataclass(frozen=True, slots=True)
class MambaShape:
    """Numbers of heads and of the groups that share B and C, and the sizes of a state's sides.

    ``dt_limits``: bounds of a step size.
    """

    num_heads: int
    head_dim: int
    num_groups: int
    state_size: int
    width: int
    dt_limits: tuple[float, float] = (0.0, math.inf)

    @property
    def inner(self) -> int:
        """Width of all heads."""
        return self.num_heads * self.head_dim

    @property
    def channels(self) -> int:
        """Width of what is convolved."""
        return self.inner + 2 * self.num_groups * self.state_size

    @property
    def state(self) -> StateShape:
        """The state that a layer keeps of one request."""
        recurrent = (self.num_heads, self.head_dim, self.state_size)
        return StateShape((self.channels, self.width - 1), recurrent, self.num_groups)


def mamba_shape(hf: HfConfig, inner: int) -> MambaShape:
    """The ``mamba_...`` keys of a config.json; ``inner``: the heads' width in all.

    Raises:
        ModelLoadError: the heads are not of this width.
    """
    num_heads, head_dim = hf.int("mamba_n_heads", 128), hf.values.get("mamba_d_head", "auto")
    size = inner // num_heads if head_dim == "auto" else hf.int("mamba_d_head")
    if size * num_heads != inner:
        raise ModelLoadError(f"config.json: {num_heads} heads of {size} are not {inner} wide")
    return MambaShape(
        num_heads,
        size,
        hf.int("mamba_n_groups", 1),
        hf.int("mamba_d_state", 256),
        hf.int("mamba_d_conv", 4),
        dt_limits(hf),
    )


def dt_limits(hf: HfConfig) -> tuple[float, float]:
    """``time_step_limit``; transformers spells infinity ``{"__float__": "Infinity"}``."""
    limits: Sequence[Any] = hf.values.get("time_step_limit") or (0.0, math.inf)
    low, high = (float(x["__float__"] if isinstance(x, Mapping) else x) for x in limits)
    return low, high


class MambaMixer:
    """See the module doc.

    ``gate_first``: the norm comes after the gate; None: there is no norm. ``scales``: factors on
    the input, and on the projection's parts: gate, x, B, C, step sizes.
    """

    __slots__ = (
        "_conv_bias",
        "_decay",
        "_dt_bias",
        "_gate_first",
        "_gated_activation",
        "_group_size",
        "_norm",
        "_ops",
        "_own",
        "_rank",
        "_scale",
        "_shape",
        "_skip",
        "_taps",
        "eps",
        "in_proj",
        "out_proj",
        "state",
    )

    def __init__(
        self,
        config: ModelConfig,
        prefix: str,
        shape: MambaShape,
        weights: Weights,
        ops: OpSet,
        *,
        bias: bool,
        out_bias: bool,
        conv_bias: bool,
        gate_first: bool | None = True,
        scales: tuple[float, Sequence[float]] | None = None,
    ) -> None:
        d, inner, rank = config.hidden_size, shape.inner, ops.rank
        heads, groups = grouped_heads(shape.num_heads, shape.num_groups, rank)
        # Of one group's parts and of all; the whole's are in the files.
        size, all_groups = shape.state_size, shape.num_groups * shape.state_size
        own, group = scaled(heads, shape.head_dim), scaled(groups, size)
        part = replace(shape, num_heads=heads[1] - heads[0], num_groups=groups[1] - groups[0])

        def rows(*ranges: Range) -> Rows | None:
            return Rows(ranges) if rank.size > 1 else None

        in_sizes = [inner, inner, all_groups, all_groups, shape.num_heads]
        self.in_proj = load_columns(
            {f"{prefix}.in_proj": in_sizes},
            d,
            bias,
            weights,
            ops,
            (own, own, group, group, heads),
        )
        self._scale: Tensor | None = None
        if scales is not None:
            self._scale = self._scale_vector(part, scales).to(weights.act_dtype)
            if self.in_proj.bias is not None:
                # The input's factor is in the vector, too, and is none of the bias.
                self.in_proj.bias = self.in_proj.bias / scales[0]
        channels = rows(own, scaled(groups, size, inner), scaled(groups, size, inner + all_groups))
        conv = f"{prefix}.conv1d"
        self._taps = load_taps(f"{conv}.weight", shape.channels, shape.width, weights, channels)
        self._conv_bias: Tensor | None = None
        if conv_bias:
            self._conv_bias = weights.vector(f"{conv}.bias", shape.channels, channels)

        def per_head(name: str) -> Tensor:
            return weights.vector(f"{prefix}.{name}", shape.num_heads, rows(heads)).float()

        self._decay = -torch.exp(per_head("A_log"))
        self._dt_bias, self._skip = per_head("dt_bias"), per_head("D")
        if self._scale is not None:
            self._scale = self._scale.to(self._skip.device)
        self._norm: Tensor | None = None
        # A group of several ranks' heads is normed as a whole, by each of them.
        self._own = own if rank.size > shape.num_groups else None
        if gate_first is not None:
            normed = rows(own) if self._own is None else None
            self._norm = weights.vector(f"{prefix}.norm.weight", inner, normed)
        self._rank, self._group_size = rank, inner // shape.num_groups
        self._gate_first = bool(gate_first)
        self._gated_activation = ops.gated_activation
        self.eps = config.rms_norm_eps
        self.out_proj = load_rows(f"{prefix}.out_proj", d, inner, out_bias, weights, ops, own)
        self._shape, self._ops = part, recurrent_ops(ops)
        self.state: LayerState = NO_STATE

    @property
    def state_shape(self) -> StateShape:
        """Of the rank's heads."""
        return self._shape.state

    @staticmethod
    def _scale_vector(shape: MambaShape, scales: tuple[float, Sequence[float]]) -> Tensor:
        factor, parts = scales
        group = shape.num_groups * shape.state_size
        sizes = (shape.inner, shape.inner, group, group, shape.num_heads)
        return torch.cat(
            [torch.full((size,), factor * part) for size, part in zip(sizes, parts, strict=True)]
        )

    def normed(
        self, x: Addend, residual: Tensor, norm: RMSNorm, ctx: StepContext
    ) -> tuple[Addend, Tensor]:
        """(addend, residual) after norm(residual + x) has gone through this; see ``Linear``."""
        projected, residual = self.in_proj.normed(x, residual, norm)
        return self.out_proj.add(self._mix(projected, ctx), residual)

    def __call__(self, x: Tensor, ctx: StepContext) -> Tensor:
        """x [T, D] -> [T, D]."""
        return self.out_proj(self._mix(self.in_proj(x), ctx))

    def _mix(self, projected: Tensor, ctx: StepContext) -> Tensor:
        shape, steps = self._shape, ctx.steps
        if self._scale is not None:
            projected = projected * self._scale
        sizes = [shape.inner, shape.channels, shape.num_heads]
        gate, xbc, dt = projected.split_with_sizes(sizes, -1)
        assert self.state.recurrent is not None
        xbc = self._ops.causal_conv(
            xbc, self._taps, self._conv_bias, self.state.conv, steps, activation="silu"
        )
        y = self._ops.selective_scan(
            xbc,
            dt,
            self._decay,
            self._dt_bias,
            self._skip,
            self.state.recurrent,
            steps,
            num_groups=shape.num_groups,
            dt_limits=shape.dt_limits,
        )
        if self._norm is None:
            return self._gated_activation(torch.cat([gate, y], -1), "silu")
        if self._own is not None:
            y, gate = self._gathered(y, gate)
        y = self._ops.gated_norm(
            y,
            gate,
            self._norm,
            self.eps,
            group_size=self._group_size,
            gate_first=self._gate_first,
        )
        return y if self._own is None else y[:, slice(*self._own)].contiguous()

    def _gathered(self, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        """Both of all ranks' heads."""
        size, width = self._rank.size, y.shape[1]
        parts = self._rank.gather(torch.cat([y, gate], -1), 2 * size * width)
        both = parts.view(len(y), size, 2, width).unbind(2)
        return both[0].reshape(len(y), -1), both[1].reshape(len(y), -1)
