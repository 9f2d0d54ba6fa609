"""TokenLogprobs: log probabilities of tokens, on their way from the device to the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class TokenLogprobs:
    """Host copies under way: of S tokens, each followed by the best of the vocabulary.

    They are there once the device has come past them.
    """

    ids: Tensor  # [S, C] int32
    values: Tensor  # [S, C] float32
    ranks: Tensor  # [S] int32: of the chosen token, 1 is the best


def copy_logprobs(logits: Tensor, ids: Tensor, most: int) -> TokenLogprobs:
    """Of raw logits [S, V] and the tokens chosen, ids [S]: the chosen, then the ``most`` best."""
    total = logits.logsumexp(-1, keepdim=True)
    # A row without a token to choose has some valid id's; nobody reads them.
    chosen = ids.long().clamp_min(0)[:, None]
    logit = logits.gather(1, chosen)
    best, best_ids = logits.topk(most, dim=-1)
    ranks = (logits > logit).sum(-1, dtype=torch.int32) + 1
    return TokenLogprobs(
        _to_host(torch.cat([chosen, best_ids], 1).int()),
        _to_host(torch.cat([logit, best], 1) - total),
        _to_host(ranks),
    )


def _to_host(tensor: Tensor) -> Tensor:
    """The tensor itself on a CPU; from a GPU a copy that is under way, in pinned memory."""
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
