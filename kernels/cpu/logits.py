"""argmax and log probabilities of logits. Semantics: ``reference``."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo import _core

from .tensors import F32, int_address, matrix, refuse


def _logits(logits: Tensor) -> tuple[int, int]:
    code, rows, vocab = matrix(logits, "logits")
    if code != F32 or vocab == 0:
        raise refuse(logits, "logits", "float32 (S, V)")
    return rows, vocab


def argmax(logits: Tensor) -> Tensor:
    """See reference.argmax.

    Raises:
        ValueError: logits that are not a contiguous float32 matrix.
    """
    rows, vocab = _logits(logits)
    out = torch.empty(rows, dtype=torch.int32)
    _core.cpu_argmax(logits.data_ptr(), rows, vocab, out.data_ptr())
    return out


def selected_logprobs(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """See reference.selected_logprobs.

    Raises:
        ValueError: an id outside the vocabulary, or tensors that do not fit.
    """
    rows, vocab = _logits(logits)
    if ids.dim() != 2 or ids.shape[0] != rows or ids.shape[1] == 0:
        raise refuse(ids, "ids", f"({rows}, C) with C > 0")
    columns = ids.shape[1]
    ids_ptr = int_address(ids.view(-1), "ids", rows * columns)
    out = torch.empty((rows, columns), dtype=torch.float32)
    ranks = torch.empty(rows, dtype=torch.int32)
    _core.cpu_selected_logprobs(
        logits.data_ptr(), rows, vocab, ids_ptr, columns, out.data_ptr(), ranks.data_ptr()
    )
    return out, ranks
