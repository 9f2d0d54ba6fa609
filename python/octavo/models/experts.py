"""Experts that families load alike: a router, gated MLPs, and those that all tokens share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.checkpoints.weights import Weights
from octavo.kernels.opset import OpSet
from octavo.kernels.rank import Rank
from octavo.kernels.routing import Routing
from octavo.kernels.weights import Columns, Part, Range, Rows, Stored, share
from octavo.layers.moe import MoE
from octavo.models.config import ModelConfig
from octavo.models.parts import width_of

# What HF's files call an expert's gate, up and down, where they have Llama's names.
LLAMA_NAMES = ("gate_proj", "up_proj", "down_proj")
# Gate and up of all experts as one tensor, in Qwen3.5's files and transformers' own modules.
FUSED_NAME = "gate_up_proj"


@dataclass(frozen=True, slots=True)
class ExpertShare:
    """A rank's part of a mixture: some experts, each whole, or a part of the width of each.

    ``own``: its experts, [begin, end); ``width``: of each one's ``size`` hidden units.
    """

    own: Range
    width: Range
    size: int

    @staticmethod
    def of(config: ModelConfig, rank: Rank) -> ExpertShare:
        """The part of one rank."""
        count, size = config.num_experts, config.moe_intermediate_size
        if rank.whole_experts:
            return ExpertShare(share(count, rank.rank, rank.size), (0, size), size)
        return ExpertShare((0, count), width_of(size, rank), size)

    @property
    def is_narrow(self) -> bool:
        """True where the width is split."""
        return self.width != (0, self.size)

    @property
    def rows(self) -> Part:
        """Of an expert's gate, or of its up."""
        return Rows((self.width,)) if self.is_narrow else None

    @property
    def both_rows(self) -> Part:
        """Of a gate and, below it, an up in one tensor."""
        begin, end = self.width
        halves = ((begin, end), (self.size + begin, self.size + end))
        return Rows(halves) if self.is_narrow else None

    @property
    def columns(self) -> Part:
        """Of an expert's down."""
        return Columns(*self.width) if self.is_narrow else None


def load_experts(
    config: ModelConfig,
    prefix: str,
    names: tuple[str, str, str],
    weights: Weights,
    ops: OpSet,
    *,
    router: str = "gate",
    routing: Routing | None = None,
    shared: Callable[[Tensor], Tensor] | None = None,
) -> MoE:
    """The router and experts below ``prefix``; ``names``: of an expert's gate, up and down.

    routing: None: softmax, of as many experts as the config says.

    Raises:
        ModelLoadError: a weight is missing or has another shape.
    """
    d, f, count = config.hidden_size, config.moe_intermediate_size, config.num_experts
    gate, up, down = names
    experts, part = f"{prefix}.experts", ExpertShare.of(config, ops.rank)
    gate_up: list[tuple[Stored, ...]]
    if names == LLAMA_NAMES and _are_fused(experts, weights):
        shape = (2 * f, d)
        both = weights.experts(experts, count, FUSED_NAME, shape, part.both_rows, part.own)
        gate_up = [(one,) for one in both]
    else:
        gates = weights.experts(experts, count, gate, (f, d), part.rows, part.own)
        ups = weights.experts(experts, count, up, (f, d), part.rows, part.own)
        gate_up = list(zip(gates, ups, strict=True))
    return MoE(
        ops,
        weights.linear(f"{prefix}.{router}", (count, d)),
        gate_up,
        list(weights.experts(experts, count, down, (d, f), part.columns, part.own)),
        routing=routing or Routing(config.num_experts_per_token, config.renormalize_experts),
        act=config.hidden_act,
        shared=shared,
        first=part.own[0],
    )


def _are_fused(experts: str, weights: Weights) -> bool:
    """True where the files have the gates and ups below the prefix ``experts`` as one tensor."""
    # A file of several parts has other words before the layers.
    name = f"{experts.removeprefix('model.')}.{FUSED_NAME}"
    return any(found.endswith(name) for found in weights.unread())


class GatedShared:
    """An MLP that all tokens share, weighted by a sigmoid of its own. ``gate``: [1, D]."""

    __slots__ = ("_gate", "_mlp")

    def __init__(
        self, prefix: str, mlp: Callable[[Tensor], Tensor], d: int, weights: Weights, ops: OpSet
    ) -> None:
        self._gate = ops.weight([weights.linear(prefix, (1, d))], exact=True)
        self._mlp = mlp

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, D]."""
        return torch.sigmoid(self._gate.linear(x)) * self._mlp(x)
