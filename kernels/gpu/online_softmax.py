"""The online softmax of attention: a tile of keys at a time, in units of log2(e).

Its state: acc [M, BLOCK_D] sums of weighted values, row_max [M] and row_sum [M], all float32.
Algorithm: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018); with values,
Dao et al., "FlashAttention" (2022).
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def empty_softmax(M: tl.constexpr, BLOCK_D: tl.constexpr):
    """(acc, row_max, row_sum) before the first key."""
    row_max = tl.full([M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([M], dtype=tl.float32)
    acc = tl.zeros([M, BLOCK_D], dtype=tl.float32)
    return acc, row_max, row_sum


@triton.jit
def to_log2_scores(scores, scale, softcap):
    """Dot products -> scores in units of log2(e), capped unless softcap is None."""
    if softcap is not None:
        # tanh(z) = 1 - 2 / (e^2z + 1)
        z = scores * (scale / softcap)
        return (softcap * LOG2E) * (1.0 - 2.0 / (tl.exp2(z * (2.0 * LOG2E)) + 1.0))
    else:
        return scores * (scale * LOG2E)


@triton.jit
def attend(
    acc,
    row_max,
    row_sum,
    query,  # [M, BLOCK_D]
    scores,  # [M, N], of to_log2_scores; -inf: not seen
    values,  # [N, BLOCK_D]
    MAY_SEE_NONE: tl.constexpr,  # a row may have seen no key yet
    PRECISION: tl.constexpr,
):
    """The state after one more tile of keys."""
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    shift = new_max
    if MAY_SEE_NONE:
        # Subtract 0 then, so that exp2(-inf) gives 0 and not NaN.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = tl.exp2(scores - shift[:, None])
    alpha = tl.exp2(row_max - shift)
    row_sum = row_sum * alpha + tl.sum(p, 1)
    acc = tl.dot(
        p.to(query.dtype),
        values.to(query.dtype),
        acc * alpha[:, None],
        input_precision=PRECISION,
    )
    return acc, new_max, row_sum


@triton.jit
def lean(scores, slopes, head, in_group, distance):
    """Scores with ALiBi's bias, each head's slope times a distance of at most 0; as they are where
    slopes is None. distance: [1, N] or [M, N].
    """
    if slopes is not None:
        slope = tl.load(slopes + head, mask=in_group, other=0.0) * LOG2E
        scores += slope[:, None] * distance.to(tl.float32)
    return scores


@triton.jit
def with_sink(row_max, row_sum, sinks, head, in_group):
    """row_sum with each row's sink, a score without a value; as it is where sinks is None."""
    if sinks is not None:
        sink = tl.load(sinks + head, mask=in_group, other=0.0) * LOG2E
        # A row without keys has the largest possible sum: its result is zero.
        row_sum += tl.exp2(sink - row_max)
    return row_sum


@triton.jit
def normalized(acc, row_sum):
    """Attention's output [M, BLOCK_D]; zero for a row that has seen no key."""
    return acc / tl.where(row_sum > 0.0, row_sum, 1.0)[:, None]
