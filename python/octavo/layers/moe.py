"""MoE: a router and the experts it sends each token to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from octavo.kernels.opset import OpSet
from octavo.kernels.routing import Routing
from octavo.kernels.weights import ExpertBiases, Stored
from octavo.layers.norm import Addend, Parts, RMSNorm


class MoE:
    """The sum of the chosen experts' gated MLPs, weighted by the router.

    ``router``: [E, D], with ``router_bias`` [E] or None; ``gate_up``: per expert its gate and up
    weights [F, D]; ``down``: [D, F] per expert, F being the rank's part where there are several;
    ``biases``: of both, or None. ``shared``: an MLP that every token goes through as well.
    ``first``: of the rank's experts, where each is whole.
    """

    __slots__ = ("_first", "_rank", "act", "experts", "router", "router_bias", "routing", "shared")

    def __init__(
        self,
        ops: OpSet,
        router: Stored,
        gate_up: Sequence[Sequence[Stored]],
        down: Sequence[Stored],
        *,
        routing: Routing,
        act: str,
        router_bias: Tensor | None = None,
        biases: ExpertBiases | None = None,
        shared: Callable[[Tensor], Tensor] | None = None,
        first: int = 0,
    ) -> None:
        # A router's rounding decides which experts run: it is never computed with int8.
        self.router = ops.weight([router], exact=True)
        self.router_bias = router_bias
        self.experts = ops.experts(gate_up, down, biases)
        self._rank, self._first = ops.rank, first
        self.routing = routing
        self.act = act
        self.shared = shared

    def __call__(self, x: Tensor, routed_by: Tensor | None = None) -> Tensor:
        """x [T, D] -> [T, D]. ``routed_by`` [T, D]: what the router sees in its place."""
        mixed = self._rank.reduce(self._mix(x, routed_by))
        return mixed if self.shared is None else mixed + self.shared(x)

    def _mix(self, x: Tensor, routed_by: Tensor | None = None) -> Tensor:
        """The rank's part."""
        seen = x if routed_by is None else routed_by
        logits = self.router.linear(seen, self.router_bias, out_dtype=torch.float32)
        if self.routing.weighs_inputs:
            return self._mix_weighed(x, logits)
        return self.experts.mix(x, logits, self.routing, kind=self.act, first=self._first)

    def _mix_weighed(self, x: Tensor, logits: Tensor) -> Tensor:
        """The rank's part, where a token's experts are given different inputs: one at a time."""
        weights, chosen = self.routing.choose(logits)
        alone = Routing(1)

        def one(rank: int) -> Tensor:
            expert, weight = chosen[:, rank, None], weights[:, rank, None].to(x.dtype)
            only = torch.full_like(logits, float("-inf")).scatter_(1, expert, 0.0)
            return self.experts.mix(x * weight, only, alone, kind=self.act, first=self._first)

        mixed = one(0)
        for rank in range(1, self.routing.top_k):
            mixed = mixed + one(rank)
        return mixed

    def normed(self, x: Addend, residual: Tensor, norm: RMSNorm) -> tuple[Addend, Tensor]:
        """(addend, residual) after norm(residual + x) has gone through this; see ``Linear``."""
        normed, residual = norm.add(x, residual)
        if self.shared is not None:
            return self(normed), residual
        mixed = self._mix(normed)
        return mixed if self._rank.size == 1 else Parts(mixed), residual

    def spec(self) -> None:
        """None: no op set has experts in its call of all layers."""
        return None
