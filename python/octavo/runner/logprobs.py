"""TokenLogprobs: log probabilities of tokens, on their way from the device to the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.kernels.slots import MIN_P, TEMPERATURE, TOP_K, TOP_P, Column
from octavo.runner.slots import column_of


class LogprobsMode(NamedTuple):
    """The numbers that ``--logprobs-mode`` chooses.

    ``is_processed``: of what a token is drawn from, not of what the model computed; ``normalizes``:
    log probabilities, not logits.
    """

    is_processed: bool
    normalizes: bool

    @classmethod
    def of(cls, name: str) -> LogprobsMode:
        """By vLLM's name: raw_logprobs, raw_logits, processed_logprobs or processed_logits."""
        return cls(name.startswith("processed"), name.endswith("logprobs"))


RAW_LOGPROBS: Final = LogprobsMode(is_processed=False, normalizes=True)


class NamedTokens(NamedTuple):
    """A row's tokens of which log probabilities are reported, in place of the best."""

    row: int
    token_ids: tuple[int, ...]


@dataclass(slots=True)
class TokenLogprobs:
    """Host copies under way: of S tokens, each followed by the best of the vocabulary, or by those
    that its request names.

    They are there once the device has come past them.
    """

    ids: Tensor  # [S, C] int32
    values: Tensor  # [S, C] float32
    ranks: Tensor  # [S] int32: of the chosen token, 1 is the best


def copy_logprobs(
    logits: Tensor,
    ids: Tensor,
    most: int,
    *,
    normalizes: bool = True,
    named: Sequence[NamedTokens] = (),
) -> TokenLogprobs:
    """Of logits [S, V] and the tokens chosen, ids [S]: the chosen, then the ``most`` best.

    Rows of ``named`` hold the named tokens there first.
    """
    # A row without a token to choose has some valid id's; nobody reads them.
    chosen = ids.long().clamp_min(0)[:, None]
    logit = logits.gather(1, chosen)
    best, best_ids = logits.topk(most, dim=-1)
    for row, token_ids in named:
        tokens = torch.tensor(token_ids, device=logits.device)
        best_ids[row, : len(token_ids)] = tokens
        best[row, : len(token_ids)] = logits[row, tokens]
    ranks = (logits > logit).sum(-1, dtype=torch.int32) + 1
    values = torch.cat([logit, best], 1)
    if normalizes:
        values = values - logits.logsumexp(-1, keepdim=True)
    return TokenLogprobs(
        _to_host(torch.cat([chosen, best_ids], 1).int()), _to_host(values), _to_host(ranks)
    )


def processed_logits(logits: Tensor, records: NDArray[np.int32], ids: Tensor) -> Tensor:
    """Logits [S, V] float32 as ``kernels.reference.sample`` draws from them: [S, V].

    Over the temperature, and -inf where min_p, top_k or top_p leaves a token out; a greedy row is
    as it was. The token that was drawn, of ids [S], stays in: a kernel that sums in another order
    may have found it on the other side of a bound.

    records: [S, RECORD_LEN], on the host.
    """
    device = logits.device

    def column(which: Column) -> Tensor:
        return torch.tensor(column_of(records, which), device=device)[:, None]

    temperature, top_k = column(TEMPERATURE), column(TOP_K).long()
    is_greedy = temperature <= 0
    scaled = logits / torch.where(is_greedy, 1.0, temperature)
    vocab_size = logits.shape[1]
    ordered, order = scaled.sort(dim=-1, descending=True)
    probs = ordered.softmax(-1)
    # Each filter renormalizes what the one before leaves.
    probs = probs.where(probs >= column(MIN_P) * probs[:, :1], 0.0)
    kth = probs.gather(1, (top_k - 1).clamp(0, vocab_size - 1))
    probs = probs.where((top_k <= 0) | (top_k >= vocab_size) | (probs >= kth), 0.0)
    before = probs.cumsum(-1) - probs
    # Equals are in or out together: each has the sum in front of the first of them.
    is_first = torch.ones_like(probs, dtype=torch.bool)
    is_first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    before = before.where(is_first, 0.0).cummax(-1).values
    top_p = column(TOP_P)
    bound = top_p.clamp_min(1e-12) * probs.sum(-1, keepdim=True)
    kept = (probs > 0) & ((top_p >= 1) | (before < bound)) | is_greedy
    kept = torch.zeros_like(kept).scatter(1, order, kept)
    kept.scatter_(1, ids.long().clamp_min(0)[:, None], True)
    return scaled.where(kept, -torch.inf)


def _to_host(tensor: Tensor) -> Tensor:
    """The tensor itself on a CPU; from a GPU a copy that is under way, in pinned memory."""
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
