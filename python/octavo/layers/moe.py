"""MoE: a router and the experts it sends each token to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from octavo.kernels.packed import QuantTensor
from octavo.layers.ops import Ops


class MoE:
    """The sum of the chosen experts' gated MLPs, weighted by the router.

    ``router``: [E, D]; ``gate_up``: per expert its gate and up weights [F, D]; ``down``: [D, F] per
    expert. ``top_k`` experts a token; ``renormalize``: their weights sum to one.
    """

    __slots__ = ("_linear", "_moe", "act", "renormalize", "router", "top_k", "w2", "w13")

    def __init__(
        self,
        ops: Ops,
        router: Tensor | QuantTensor,
        gate_up: Sequence[Sequence[Tensor | QuantTensor]],
        down: Sequence[Tensor | QuantTensor],
        *,
        top_k: int,
        renormalize: bool,
        act: str,
        exact: bool = False,
    ) -> None:
        self._linear = ops.linear
        self._moe = ops.moe
        # A router's rounding decides which experts run: it is never computed with int8.
        self.router = ops.prepare_linear(router, exact=True)
        self.w13 = ops.prepare_experts(gate_up, exact=exact)
        self.w2 = ops.prepare_experts([[weight] for weight in down], exact=exact)
        self.top_k = top_k
        self.renormalize = renormalize
        self.act = act

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, D]."""
        logits = self._linear(x, self.router, out_dtype=torch.float32)
        return self._moe(x, logits, self.w13, self.w2, self.top_k, self.renormalize, kind=self.act)
