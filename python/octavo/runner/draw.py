"""One draw per row from a filtered softmax, on the host.

numpy's compares, partition and argmax run at memory speed; torch's of the same name are ten times
slower on a CPU, and so is its exponential where the result is 0. Work is per row throughout, so a
row's token never depends on its neighbours.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from octavo.kernels.slots import MIN_P, TEMPERATURE, TOP_K, TOP_P
from octavo.runner.slots import column_of

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]

# Candidates that usually hold a whole nucleus; a row whose does not fit takes 16 times as many.
_NUM_CANDIDATES = 256
# A row without filters is summed in blocks of this many, and only one block token by token.
_BLOCK = 256

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniforms(seeds: NDArray[np.uint64], counters: Ints) -> Doubles:
    """Numbers in [0, 1), each a hash of (seed, counter); splitmix64's mixer, twice."""
    x = _mix(seeds + _GOLDEN) + counters.astype(np.uint64) * _GOLDEN
    return (_mix(x) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def draw(logits: Floats, records: NDArray[np.int32], uniform: Doubles) -> Ints:
    """One token per row, as ``kernels.reference.sample`` defines: int64 [R].

    logits: [R, V], overwritten. records: [R, RECORD_LEN], with temperatures above 0. The filters
    apply in the order min_p, top_k (0: off), top_p (1: off); tokens with equal logits are in or out
    together. uniform [R] in [0, 1): the token is the first, in vocabulary order, at which the
    running sum of the kept weights exceeds that part of it.
    """
    temperature, min_p = column_of(records, TEMPERATURE), column_of(records, MIN_P)
    top_k, top_p = column_of(records, TOP_K), column_of(records, TOP_P)
    x = torch.from_numpy(logits)
    x.sub_(x.amax(-1, keepdim=True)).div_(torch.from_numpy(temperature)[:, None])
    weights = np.exp(logits, out=logits)  # [R, V]: relative to the largest, which is 1
    if min_p.any():
        weights[weights < min_p[:, None]] = 0.0
    filtered = np.flatnonzero((top_k > 0) & (top_k < logits.shape[1]) | (top_p < 1))
    cutoff = np.zeros(len(logits), np.float32)
    if len(filtered):
        some = weights if len(filtered) == len(logits) else weights[filtered]
        cutoff[filtered] = _cutoffs(some, top_k[filtered], top_p[filtered], _NUM_CANDIDATES)
    tokens = np.empty(len(logits), np.int64)
    for row, lowest in enumerate(cutoff.tolist()):
        if lowest > 0:
            kept = np.flatnonzero(weights[row] >= lowest)
            tokens[row] = kept[_first_past(weights[row][kept], uniform[row])]
        else:
            tokens[row] = _draw_in_blocks(weights[row], uniform[row])
    return tokens


def _cutoffs(weights: Floats, top_k: NDArray[np.int32], top_p: Floats, num: int) -> Floats:
    """The smallest weight each row keeps, [R]; ``num``: candidates, the largest of the row."""
    vocab_size = weights.shape[1]
    num = min(num, vocab_size)
    if num < vocab_size:
        best = np.partition(weights, vocab_size - num, axis=-1)[:, vocab_size - num :]
        best.sort(axis=-1)
    else:
        best = np.sort(weights, axis=-1)
    best = best[:, ::-1]
    rows = np.arange(len(weights))
    limited = (top_k > 0) & (top_k < vocab_size)
    # top-k: what is below the k-th weight goes.
    kth = np.where(limited, best[rows, np.clip(top_k, 1, num) - 1], 0.0)
    left = np.where(best >= kth[:, None], best, 0.0).astype(np.float64)
    # top-p: a token stays while what is more likely sums to less than p of all that is left.
    running = left.cumsum(axis=-1)
    total = running[:, -1]
    if num < vocab_size:
        total = np.where(limited, total, weights.sum(axis=-1, dtype=np.float64))
    inside = running - left < (np.maximum(top_p, 1e-12) * total)[:, None]
    inside &= left > 0
    cutoff: Floats = best[rows, inside.sum(axis=-1) - 1]
    if num < vocab_size:
        # Not settled: the lowest weight kept, or the k-th, may have equals beyond the candidates.
        floor = best[:, -1]
        open_rows = (cutoff <= floor) | (limited & ((kth <= floor) | (top_k > num)))
        again = np.flatnonzero(open_rows & (floor > 0))
        if len(again):
            cutoff[again] = _cutoffs(weights[again], top_k[again], top_p[again], 16 * num)
    return cutoff


def _draw_in_blocks(weights: Floats, uniform: float) -> int:
    """Draw from all of a row's weights [V]."""
    starts = np.arange(0, len(weights), _BLOCK)
    running = np.add.reduceat(weights, starts).cumsum(dtype=np.float64)
    block = int(np.searchsorted(running, _below(uniform * running[-1], running[-1]), "right"))
    before = running[block - 1] if block else 0.0
    # How far into this block's share; the two sums' rounding differs, so kept inside it.
    part = (uniform * running[-1] - before) / (running[block] - before)
    start = block * _BLOCK
    return start + _first_past(weights[start : start + _BLOCK], float(part))


def _first_past(weights: Floats, uniform: float) -> int:
    """The first index at which the running sum of weights passes uniform * their sum."""
    running = weights.cumsum(dtype=np.float64)
    target = _below(uniform * running[-1], running[-1])
    return int(np.searchsorted(running, target, "right"))


def _below(value: float, total: float) -> float:
    """A value in [0, total): rounding may have carried it out, and then nothing would pass it."""
    return max(0.0, min(value, float(np.nextafter(total, 0.0))))
