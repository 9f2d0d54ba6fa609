"""argmax, log probabilities and masks of logits. Semantics: ``reference``."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo import _core

from .tensors import F32, Matrix, int_matrix, ints, matrix, refuse


def _logits(logits: Tensor) -> Matrix:
    found = _, element, _, vocab = matrix(logits, "logits")
    if element != F32 or vocab == 0:
        raise refuse(logits, "logits", "float32 (S, V)")
    return found


def argmax(logits: Tensor) -> Tensor:
    """See reference.argmax.

    Raises:
        ValueError: logits that are not a contiguous float32 matrix.
    """
    x = _logits(logits)
    rows = x[2]
    out = torch.empty(rows, dtype=torch.int32)
    _core.cpu_argmax(x, (out.data_ptr(), "I32", rows))
    return out


def mask_logits_(logits: Tensor, rows: Tensor, masks: Tensor) -> Tensor:
    """See reference.mask_logits, in place; rows and masks are int32, and no row has two.

    Returns:
        bool [M]: the row keeps a token, or the mask is of no row.

    Raises:
        ValueError: a row that does not exist or has two masks, or tensors that do not fit.
    """
    num_masks = len(rows)
    has_any = torch.empty(num_masks, dtype=torch.uint8)
    _core.cpu_mask_logits(
        _logits(logits),
        ints(rows, "rows", num_masks),
        int_matrix(masks, "masks"),
        (has_any.data_ptr(), "U8", num_masks),
    )
    return has_any.bool()


def selected_logprobs(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """See reference.selected_logprobs.

    Raises:
        ValueError: an id outside the vocabulary, or tensors that do not fit.
    """
    x = _logits(logits)
    rows = x[2]
    if ids.dim() != 2 or ids.shape[0] != rows or ids.shape[1] == 0:
        raise refuse(ids, "ids", f"({rows}, C) with C > 0")
    columns = ids.shape[1]
    out = torch.empty((rows, columns), dtype=torch.float32)
    ranks = torch.empty(rows, dtype=torch.int32)
    _core.cpu_selected_logprobs(
        x,
        int_matrix(ids, "ids"),
        (out.data_ptr(), F32, rows, columns),
        (ranks.data_ptr(), "I32", rows),
    )
    return out, ranks
