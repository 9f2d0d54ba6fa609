"""MoE: a router and the experts it sends each token to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from octavo.kernels.opset import OpSet
from octavo.kernels.weights import Stored
from octavo.layers.norm import Addend, Parts, RMSNorm


class MoE:
    """The sum of the chosen experts' gated MLPs, weighted by the router.

    ``router``: [E, D]; ``gate_up``: per expert its gate and up weights [F, D]; ``down``: [D, F] per
    expert, F being the rank's part where there are several. ``top_k`` experts a token;
    ``renormalize``: their weights sum to one.
    """

    __slots__ = ("_rank", "act", "experts", "renormalize", "router", "top_k")

    def __init__(
        self,
        ops: OpSet,
        router: Stored,
        gate_up: Sequence[Sequence[Stored]],
        down: Sequence[Stored],
        *,
        top_k: int,
        renormalize: bool,
        act: str,
    ) -> None:
        # A router's rounding decides which experts run: it is never computed with int8.
        self.router = ops.weight([router], exact=True)
        self.experts = ops.experts(gate_up, down)
        self._rank = ops.rank
        self.top_k = top_k
        self.renormalize = renormalize
        self.act = act

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, D]."""
        return self._rank.reduce(self._mix(x))

    def _mix(self, x: Tensor) -> Tensor:
        """The rank's part."""
        logits = self.router.linear(x, out_dtype=torch.float32)
        return self.experts.mix(x, logits, self.top_k, self.renormalize, kind=self.act)

    def normed(self, x: Addend, residual: Tensor, norm: RMSNorm) -> tuple[Addend, Tensor]:
        """(addend, residual) after norm(residual + x) has gone through this; see ``Linear``."""
        normed, residual = norm.add(x, residual)
        mixed = self._mix(normed)
        return mixed if self._rank.size == 1 else Parts(mixed), residual

    def spec(self) -> None:
        """None: no op set has experts in its call of all layers."""
        return None
