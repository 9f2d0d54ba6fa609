"""sample: from logits to ids without a sort, within a graph.

Everything a request may set lives in tensors indexed by its slot (``SamplingState``), so one
captured graph serves every mix of requests. ``adjust_logits`` changes the logits in place, only
where the state has tensors for that; ``pick_token`` chooses.
"""

from __future__ import annotations

import torch

from ..slots import RECORD_LEN
from .adjust_logits import adjust_logits
from .launch import cdiv, check_shape, check_tensors
from .pick_token import pick_token
from .slots import HostIds, SamplingState, TokenMasks


def sample(
    logits: torch.Tensor,
    slots: torch.Tensor,
    state: SamplingState,
    host: HostIds | None = None,
    masks: TokenMasks | None = None,
) -> torch.Tensor:
    """One token a row, by its slot's parameters; updates the state for the next step.

    Order: bias, allowed ids, penalties, masks, temperature, min-p, top-k, top-p. Equals of the k-th
    and of the last top-p token are kept; a greedy row's equal maxima give the lowest id.

    Args:
        logits: [S, V] float32 or 16-bit; changed in place by bias, allowed ids and penalties
            (take raw log probabilities before).
        slots: [S] int32, distinct except for padding rows.
        host: receives the ids too; they are there once the stream has come past this.
        masks: the only tokens that some rows may have, whatever else is asked; the logits stay.

    Returns:
        ids [S] int32. The state's LAST_TOKEN, OUTPUT_POSITION and token_counts are advanced.

    Raises:
        ValueError: on a wrong shape, layout or device, or a part of the three bias tensors.
    """
    check_tensors(logits=logits, slots=slots, **vars(state))
    rows = logits.shape[0]
    check_shape("slots", slots, rows)
    check_shape("slot_table", state.slot_table, state.slot_table.shape[0], RECORD_LEN)
    if host is not None and host.ids.shape[1] < rows:
        raise ValueError(f"{rows} ids do not fit {host.ids.shape[1]} places on the host")
    if not rows:
        return torch.empty(0, dtype=torch.int32, device=logits.device)
    if masks is not None:
        check_tensors(logits=logits, of_row=masks.of_row, words=masks.words)
        if masks.of_row.shape[0] < rows:
            raise ValueError(f"{masks.of_row.shape[0]} masks for {rows} rows")
        check_shape("words", masks.words, masks.words.shape[0], cdiv(logits.shape[1], 32))
    adjust_logits(logits, slots, state)
    return pick_token(logits, slots, state, host, masks)
