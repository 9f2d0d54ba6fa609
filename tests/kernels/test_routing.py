"""Routing: which experts are chosen, and their weights."""

from __future__ import annotations

import pytest
import torch

from octavo.kernels.routing import Routing

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0, 1.5, -3.0]])


@pytest.mark.parametrize("is_sigmoid", [False, True])
def test_weights_are_the_scores_of_the_best(is_sigmoid: bool) -> None:
    scores = LOGITS.sigmoid() if is_sigmoid else LOGITS.softmax(-1)
    weights, experts = Routing(2, renormalize=False, is_sigmoid=is_sigmoid).choose(LOGITS)
    assert experts.tolist() == [[0, 4]]
    torch.testing.assert_close(weights, scores[:, [0, 4]])
    weights, _ = Routing(2, is_sigmoid=is_sigmoid, scale=2.5).choose(LOGITS)
    torch.testing.assert_close(weights, 2.5 * scores[:, [0, 4]] / scores[0, [0, 4]].sum())


def test_a_bias_chooses_but_does_not_weigh() -> None:
    bias = torch.tensor([0.0, 0.0, 0.0, 5.0, 0.0, 0.0])
    weights, experts = Routing(2, renormalize=False, is_sigmoid=True, bias=bias).choose(LOGITS)
    assert experts.tolist() == [[3, 0]]
    torch.testing.assert_close(weights, LOGITS.sigmoid()[:, [3, 0]])


def test_scales_of_experts_weigh_after_all_else() -> None:
    scales = torch.tensor([0.5, 1.0, 1.0, 1.0, 2.0, 1.0])
    weights, _ = Routing(2, expert_scales=scales).choose(LOGITS)
    plain, _ = Routing(2).choose(LOGITS)
    torch.testing.assert_close(weights, plain * torch.tensor([[0.5, 2.0]]))


@pytest.mark.parametrize(("group_scores", "want"), [(1, [0, 1]), (2, [0, 1])])
def test_experts_are_of_the_best_groups(group_scores: int, want: list[int]) -> None:
    routing = Routing(2, groups=3, top_groups=1, group_scores=group_scores)
    assert routing.choose(LOGITS)[1].tolist() == [want]


def test_two_scores_of_a_group_may_beat_the_best_one() -> None:
    logits = torch.tensor([[3.0, -9.0, 2.0, 2.0]])
    one, two = (Routing(1, is_sigmoid=True, groups=2, group_scores=n) for n in (1, 2))
    assert one.choose(logits)[1].tolist() == [[0]]
    assert two.choose(logits)[1].tolist() == [[2]]
