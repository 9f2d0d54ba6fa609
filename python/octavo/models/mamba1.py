"""MambaForCausalLM: nothing but mixers of Mamba's first form, each after a norm; FalconMamba too.

A channel of the first form has a step size and a rate of each of its state's columns of its own, as
Jamba's mixers have. Step sizes, and what writes to the state and reads from it, may be normed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from octavo.checkpoints.weights import Weights
from octavo.kernels.opset import OpSet
from octavo.kernels.weights import Rows, rows_of
from octavo.layers.context import LayerState, StepContext
from octavo.layers.norm import Addend, RMSNorm
from octavo.models.config import ModelConfig, StateShape
from octavo.models.hf_config import HfConfig
from octavo.models.hybrid import NO_STATE, HybridForCausalLM, load_taps, recurrent_ops
from octavo.models.mixers import BACKBONE_NAMES, MAX_CONTEXT, MixerLayer, mixers_config
from octavo.models.parts import layer_norms, load_columns, load_rows, width_of

# The three that a mixer may norm.
NORMED = ("dt", "b", "c")


@dataclass(frozen=True, slots=True)
class ChannelShape:
    """Channels, columns of a channel's state, taps, and the rank of the step sizes' projection."""

    channels: int
    state_size: int
    width: int
    rank: int

    @property
    def state(self) -> StateShape:
        """The state that a layer keeps of one request."""
        return StateShape((self.channels, self.width - 1), (self.channels, 1, self.state_size))


class ChannelMixer:
    """See the module doc. ``norms``: of step sizes, B and C, in this order; or none of them."""

    __slots__ = (
        "_conv_bias",
        "_decay",
        "_dt_bias",
        "_gated_activation",
        "_norms",
        "_ops",
        "_shape",
        "_skip",
        "_taps",
        "dt_proj",
        "in_proj",
        "out_proj",
        "state",
        "x_proj",
    )

    def __init__(
        self,
        config: ModelConfig,
        prefix: str,
        shape: ChannelShape,
        weights: Weights,
        ops: OpSet,
        *,
        bias: bool,
        conv_bias: bool,
        norms: tuple[RMSNorm, RMSNorm, RMSNorm] | None,
    ) -> None:
        d, inner, size = config.hidden_size, shape.channels, shape.state_size
        own = width_of(inner, ops.rank)
        part = Rows((own,)) if ops.rank.size > 1 else None
        halves: dict[str, int | list[int]] = {f"{prefix}.in_proj": [inner, inner]}
        self.in_proj = load_columns(halves, d, bias, weights, ops, (own, own))
        # Step sizes, B and C come of all channels, and every rank has them whole.
        self.x_proj = load_rows(
            f"{prefix}.x_proj", shape.rank + 2 * size, inner, False, weights, ops, own
        )
        steps = {f"{prefix}.dt_proj": inner}
        self.dt_proj = load_columns(steps, shape.rank, False, weights, ops, (own,))
        self.out_proj = load_rows(f"{prefix}.out_proj", d, inner, bias, weights, ops, own)
        self._taps = load_taps(f"{prefix}.conv1d.weight", inner, shape.width, weights, part)
        self._conv_bias: Tensor | None = None
        if conv_bias:
            self._conv_bias = weights.vector(f"{prefix}.conv1d.bias", inner, part)
        rates = weights.tensor(f"{prefix}.A_log", (inner, size))
        rates = rates if part is None else rows_of(rates, part)
        self._decay = -torch.exp(rates.float())
        self._dt_bias = weights.vector(f"{prefix}.dt_proj.bias", inner, part).float()
        self._skip = weights.vector(f"{prefix}.D", inner, part).float()
        self._norms, self._shape = norms, replace(shape, channels=own[1] - own[0])
        self._gated_activation = ops.gated_activation
        self._ops = recurrent_ops(ops)
        self.state: LayerState = NO_STATE

    @property
    def state_shape(self) -> StateShape:
        """Of the rank's channels."""
        return self._shape.state

    def normed(
        self, x: Addend, residual: Tensor, norm: RMSNorm, ctx: StepContext
    ) -> tuple[Addend, Tensor]:
        """(addend, residual) after norm(residual + x) has gone through this; see ``Linear``."""
        projected, residual = self.in_proj.normed(x, residual, norm)
        return self.out_proj.add(self._mix(projected, ctx), residual)

    def _mix(self, projected: Tensor, ctx: StepContext) -> Tensor:
        shape, steps = self._shape, ctx.steps
        assert self.state.recurrent is not None
        x, gate = projected.chunk(2, -1)
        x = self._ops.causal_conv(
            x, self._taps, self._conv_bias, self.state.conv, steps, activation="silu"
        )
        sizes = [shape.rank, shape.state_size, shape.state_size]
        dt, b, c = (part.contiguous() for part in self.x_proj(x).split_with_sizes(sizes, -1))
        if self._norms is not None:
            dt, b, c = (norm(part) for norm, part in zip(self._norms, (dt, b, c), strict=True))
        y = self._ops.selective_scan(
            torch.cat((x, b, c), -1),
            self.dt_proj(dt),
            self._decay,
            self._dt_bias,
            self._skip,
            self.state.recurrent,
            steps,
            num_groups=1,
            dt_limits=(0.0, math.inf),
        )
        return self._gated_activation(torch.cat((gate, y), -1), "silu")


class MambaLayer(MixerLayer):
    """See MixerLayer."""

    __slots__ = ()

    def __init__(
        self, config: ModelConfig, layer: int, cos_sin: Tensor, weights: Weights, ops: OpSet
    ) -> None:
        hf = HfConfig(config.raw, MambaForCausalLM.hf_defaults)
        shape = _shape(hf)
        self.norm = layer_norms(config, layer, weights, ops)("norm")
        self.recurrence = ChannelMixer(
            config,
            f"model.layers.{layer}.mixer",
            shape,
            weights,
            ops,
            bias=hf.bool("use_bias"),
            conv_bias=hf.bool("use_conv_bias"),
            norms=self.mixer_norms(hf, shape, ops, torch.ones_like(self.norm.spec.weight[:1])),
        )

    @staticmethod
    def mixer_norms(
        hf: HfConfig, shape: ChannelShape, ops: OpSet, one: Tensor
    ) -> tuple[RMSNorm, RMSNorm, RMSNorm] | None:
        """The norms of a mixer's step sizes, B and C; ``one``: a weight [1] of such a norm."""
        return None


class FalconMambaLayer(MambaLayer):
    """The same with norms without weights in the mixer."""

    __slots__ = ()

    @staticmethod
    def mixer_norms(
        hf: HfConfig, shape: ChannelShape, ops: OpSet, one: Tensor
    ) -> tuple[RMSNorm, RMSNorm, RMSNorm] | None:
        eps = hf.float("mixer_rms_eps", 1e-6)

        def norm(size: int) -> RMSNorm:
            return RMSNorm(ops, one.repeat(size), eps)

        return norm(shape.rank), norm(shape.state_size), norm(shape.state_size)


class MambaForCausalLM(HybridForCausalLM):
    """See LlamaForCausalLM."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {
        "conv_kernel": 4,
        "expand": 2,
        "layer_norm_epsilon": 1e-5,
        "max_position_embeddings": MAX_CONTEXT,
        "num_attention_heads": 1,
        "state_size": 16,
        "tie_word_embeddings": True,
        "use_conv_bias": True,
    }
    layer_class: ClassVar[Callable[..., Any]] = MambaLayer
    file_names: ClassVar[Mapping[str, str]] = BACKBONE_NAMES

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        return mixers_config(hf, _shape(hf).state, head_dim=hf.int("hidden_size"))


class FalconMambaForCausalLM(MambaForCausalLM):
    """See LlamaForCausalLM."""

    layer_class: ClassVar[Callable[..., Any]] = FalconMambaLayer


def _shape(hf: HfConfig) -> ChannelShape:
    d = hf.int("hidden_size")
    return ChannelShape(
        hf.int("intermediate_size", int(hf.float("expand") * d)),
        hf.int("state_size"),
        hf.int("conv_kernel"),
        dt_rank(hf, "time_step_rank", d),
    )


def dt_rank(hf: HfConfig, key: str, hidden_size: int) -> int:
    """The rank of the step sizes' projection; "auto" is a sixteenth of the width."""
    given = hf.values.get(key, "auto")
    return -(-hidden_size // 16) if given == "auto" else hf.int(key)
