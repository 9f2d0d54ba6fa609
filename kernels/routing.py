"""Routing: the experts that a router's logits choose for each token, and their weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """The ``top_k`` experts of the highest scores, by one of the rules that models train with.

    is_sigmoid: scores are sigmoids of the logits; otherwise their softmax.
    bias: float [E], added to the scores where experts are compared, not to their weights; or None.
    groups, top_groups: experts are chosen from the best ``top_groups`` of so many equal groups.
    group_scores: as many of a group's best scores add up to the group's.
    renormalize: the chosen experts' weights sum to one, before ``scale`` multiplies them.
    expert_scales: float [E], factors on the experts' weights after all else, or None.
    weighs_inputs: the weights multiply what experts are given, not what they return (``MoE``).
    least_sum: added to a sum of sigmoids before it divides; the default is DeepSeek's.
    """

    top_k: int
    renormalize: bool = True
    is_sigmoid: bool = False
    bias: Tensor | None = None
    groups: int = 1
    top_groups: int = 1
    group_scores: int = 1
    scale: float = 1.0
    least_sum: float = 1e-20
    expert_scales: Tensor | None = None
    weighs_inputs: bool = False

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """logits [T, E] -> (weights float32 [T, top_k], experts int64 [T, top_k]).

        No value is read on the host.
        """
        logits = logits.float()
        scores = logits.sigmoid() if self.is_sigmoid else logits.softmax(-1)
        compared = scores if self.bias is None else scores + self.bias
        if self.top_groups < self.groups:
            compared = self._in_best_groups(compared)
        if compared is scores:
            weights, experts = scores.topk(self.top_k, -1)
        else:
            experts = compared.topk(self.top_k, -1).indices
            weights = scores.gather(-1, experts)
        if self.renormalize:
            total = weights.sum(-1, keepdim=True)
            weights = weights / (total + self.least_sum if self.is_sigmoid else total)
        if self.expert_scales is not None:
            weights = weights * self.expert_scales[experts]
        return (weights if self.scale == 1.0 else weights * self.scale), experts

    def _in_best_groups(self, scores: Tensor) -> Tensor:
        """Scores [T, E], -inf outside of the best groups."""
        grouped = scores.view(len(scores), self.groups, -1)
        best = grouped.topk(self.group_scores, -1).values.sum(-1).topk(self.top_groups, -1).indices
        left_out = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, False)
        return grouped.masked_fill(left_out[..., None], float("-inf")).flatten(1)
