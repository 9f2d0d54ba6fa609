"""NemotronExperts: MLPs without a gate, chosen by sigmoids in groups, beside a shared one."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.checkpoints.weights import Weights
from octavo.kernels.opset import OpSet
from octavo.kernels.routing import Routing
from octavo.layers.context import StepContext
from octavo.layers.linear import Linear
from octavo.layers.norm import Addend, RMSNorm
from octavo.models.config import ModelConfig
from octavo.models.experts import ExpertShare
from octavo.models.parts import load_columns, load_linear, load_rows, width_of


class NemotronMLP:
    """down(act(up(x))), without a gate. ``size``: of what up projects to."""

    __slots__ = ("_act", "_activation", "down_proj", "up_proj")

    def __init__(
        self, config: ModelConfig, prefix: str, size: int, weights: Weights, ops: OpSet
    ) -> None:
        d, bias = config.hidden_size, config.mlp_bias
        own = width_of(size, ops.rank)
        self.up_proj = load_columns({f"{prefix}.up_proj": size}, d, bias, weights, ops, [own])
        self.down_proj = load_rows(f"{prefix}.down_proj", d, size, bias, weights, ops, own)
        self._activation, self._act = ops.activation, config.hidden_act

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, D]."""
        return self.down_proj(self._activation(self.up_proj(x), self._act))

    def normed(
        self, x: Addend, residual: Tensor, norm: RMSNorm, ctx: StepContext
    ) -> tuple[Addend, Tensor]:
        """(addend, residual) after norm(residual + x) has gone through this; see ``Linear``."""
        hidden, residual = self.up_proj.normed(x, residual, norm)
        return self.down_proj.add(self._activation(hidden, self._act), residual)


class NemotronExperts:
    """The chosen experts, of what a layer has normed or of a narrower latent of it, and the shared.

    The router sees the wide one.
    """

    __slots__ = (
        "_act",
        "_first",
        "_reduce",
        "_router",
        "_routing",
        "experts",
        "from_latent",
        "shared",
        "to_latent",
    )

    def __init__(self, config: ModelConfig, prefix: str, weights: Weights, ops: OpSet) -> None:
        d, f, count = config.hidden_size, config.moe_intermediate_size, config.num_experts
        latent = int(config.raw.get("moe_latent_size") or 0)
        self.to_latent: Linear | None = None
        self.from_latent: Linear | None = None
        if latent:
            bias = config.mlp_bias
            self.to_latent = load_linear(
                {f"{prefix}.fc1_latent_proj": latent}, d, bias, weights, ops
            )
            self.from_latent = load_linear(
                {f"{prefix}.fc2_latent_proj": d}, latent, bias, weights, ops
            )
        inputs = latent or d
        experts, part = f"{prefix}.experts", ExpertShare.of(config, ops.rank)
        ups = weights.experts(experts, count, "up_proj", (f, inputs), part.rows, part.own)
        downs = weights.experts(experts, count, "down_proj", (inputs, f), part.columns, part.own)
        self.experts = ops.experts([[up] for up in ups], list(downs))
        self._reduce, self._first = ops.rank.reduce, part.own[0]
        # A router's rounding decides which experts run: it is never computed with int8.
        self._router = ops.weight([weights.linear(f"{prefix}.gate", (count, d))], exact=True)
        groups, top_groups = config.expert_groups
        self._routing = Routing(
            config.num_experts_per_token,
            config.renormalize_experts,
            is_sigmoid=True,
            bias=weights.vector(f"{prefix}.gate.e_score_correction_bias", count).float(),
            groups=groups,
            top_groups=top_groups,
            # As DeepSeek V3's own code: the best two of a group.
            group_scores=2,
            scale=config.routed_scale,
        )
        self._act = config.hidden_act
        shared = f"{prefix}.shared_experts"
        self.shared = NemotronMLP(config, shared, config.shared_expert_size, weights, ops)

    def normed(
        self, x: Addend, residual: Tensor, norm: RMSNorm, ctx: StepContext
    ) -> tuple[Addend, Tensor]:
        """(addend, residual) after norm(residual + x) has gone through this; see ``Linear``."""
        normed, residual = norm.add(x, residual)
        logits = self._router.linear(normed, out_dtype=torch.float32)
        latent = normed if self.to_latent is None else self.to_latent(normed)
        mixed = self.experts.mix(latent, logits, self._routing, kind=self._act, first=self._first)
        mixed = self._reduce(mixed)
        if self.from_latent is not None:
            mixed = self.from_latent(mixed)
        return mixed + self.shared(normed), residual
