"""Steps of attention of a tile of queries: the online softmax over a range of cached keys."""

from __future__ import annotations

import triton
import triton.language as tl

from .online_softmax import attend, lean, to_log2_scores
from .paged_kv import load_all_keys_and_values, load_keys_and_values


@triton.jit
def prefill_steps(
    acc,  # [BLOCK_M, BLOCK_D]
    row_max,  # [BLOCK_M]
    row_sum,
    query,  # [BLOCK_M, BLOCK_D]
    q_position,  # [BLOCK_M]
    kv,  # PagedKV
    table,  # the request's row of the block table
    kv_head,
    begin,
    end,
    seq_len,
    scale,
    softcap,
    slopes,
    head,  # [BLOCK_M]
    in_rows,  # [BLOCK_M]
    KV: tl.constexpr,
    WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,  # False: every query of the tile sees every key of [begin, end)
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The online softmax over keys [begin, end), BLOCK_N at a time."""
    n = tl.arange(0, BLOCK_N)
    for start in range(begin, end, BLOCK_N):
        position = start + n
        if MASKED:
            valid = position < seq_len
            keys, values = load_keys_and_values(
                kv, table, kv_head, position, valid, KV, query.dtype
            )
        else:
            keys, values = load_all_keys_and_values(kv, table, kv_head, position, KV, query.dtype)
        scores = tl.dot(query, keys.to(query.dtype), input_precision=PRECISION)
        scores = to_log2_scores(scores, scale, softcap)
        scores = lean(scores, slopes, head, in_rows, position[None, :] - q_position[:, None])
        if MASKED:
            seen = valid[None, :]
            if CAUSAL:
                seen = seen & (position[None, :] <= q_position[:, None])
            if WINDOW > 0:
                seen = seen & (q_position[:, None] - position[None, :] < WINDOW)
                if not CAUSAL:
                    seen = seen & (position[None, :] - q_position[:, None] < WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        acc, row_max, row_sum = attend(
            acc, row_max, row_sum, query, scores, values, True, PRECISION
        )
    return acc, row_max, row_sum
