"""pick_token: one id a row of logits, without a sort.

1. ``chunk_kernel``, programs over (row, CHUNK logits): the maximum, its first id and the sum of
   exponentials of each chunk, and the maximum of each group of GROUP logits.
2. ``pick_kernel``, a program a row. Greedy rows reduce the chunks' maxima. Plain random rows draw a
   chunk, then a token of it. For min-p, top-k and top-p the group maxima bound the threshold from
   below; the logits above that bound (usually some hundred) are gathered, and bisection over the
   bits of the float finds the exact threshold among them.

A token is the first, in vocabulary order, at which the running sum of kept probabilities exceeds
u times their total, where u is a hash of the request's seed and output position alone.

Longer than other files: one kernel's steps, a function each, in the order that it takes them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import slots as columns
from .adjust_logits import count_token
from .launch import cdiv, next_power_of_2, pdl_options
from .slots import HostIds, SamplingState, TokenMasks, column_at, load_column

CHUNK = tl.constexpr(4096)  # logits a program of chunk_kernel: 16 KB of float32
GROUP = tl.constexpr(256)  # logits a group: a vocabulary of 128k has 501, which one program holds
GATHER_GROUPS = tl.constexpr(16)  # groups gathered at a time
BLOCK = tl.constexpr(2048)  # gathered logits held in registers
GROUPS_PER_CHUNK = tl.constexpr(CHUNK.value // GROUP.value)

NO_ID = tl.constexpr(0x7FFFFFFF)  # above every id
NOTHING = tl.constexpr(-1)  # in place of an id: every logit is -inf
LEAST_KEY = tl.constexpr(-0x7FFFFFFF)  # below float_key of every float
# The least top_p and the least tail 1 - top_p, so that no logarithm or goal is that of zero.
MIN_TOP_P = tl.constexpr(1e-12)
MIN_TAIL = tl.constexpr(1e-7)

TEMPERATURE = tl.constexpr(columns.TEMPERATURE)
TOP_K = tl.constexpr(columns.TOP_K)
TOP_P = tl.constexpr(columns.TOP_P)
MIN_P = tl.constexpr(columns.MIN_P)
SEED_LOW = tl.constexpr(columns.SEED_LOW)
SEED_HIGH = tl.constexpr(columns.SEED_HIGH)
OUTPUT_POSITION = tl.constexpr(columns.OUTPUT_POSITION)
LAST_TOKEN = tl.constexpr(columns.LAST_TOKEN)


class ChunkStats(NamedTuple):
    """Statistics of a row's chunks and groups, from chunk_kernel; C chunks."""

    largest: torch.Tensor  # [S, C] float32
    first_id: torch.Tensor  # [S, C] int32: of the largest
    total: torch.Tensor  # [S, C] float32: sum of exp((z - largest) / temperature)
    group_max: torch.Tensor  # [S, C * GROUPS_PER_CHUNK] float32


class Candidates(NamedTuple):
    """Scratch of pick_kernel: the logits that may stay, in vocabulary order."""

    groups: torch.Tensor  # [S, C * GROUPS_PER_CHUNK] int32: groups that hold some
    logits: torch.Tensor  # [S, V] float32
    ids: torch.Tensor  # [S, V] int32


# ----------------------------------------------------------------------------------- arithmetic


@triton.jit
def mix(h):
    """A bijection of uint32 in which every input bit flips every output bit half the time."""
    h = h ^ (h >> 16)
    h = h * 0x7FEB352D
    h = h ^ (h >> 15)
    h = h * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def hash_uniform(seed_low, seed_high, position):
    """A float32 in [0, 1), a function of three int32."""
    h = mix(seed_low.to(tl.uint32) ^ 0x9E3779B9)
    h = mix(h ^ seed_high.to(tl.uint32))
    h = mix(h ^ position.to(tl.uint32))
    return (h >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2^-24


@triton.jit
def float_key(x):
    """int32 in the order of the float32."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def load_masked(logits, cols, masks, mask, V: tl.constexpr):
    """Logits of the row at ``logits``, float32; -inf past its end and where its mask has no bit.

    ``masks``: TokenMasks, or None; ``mask``: the row's, below 0 for none.
    """
    z = tl.load(logits + cols, mask=cols < V, other=float("-inf")).to(tl.float32)
    if masks is not None:
        W: tl.constexpr = (V + 31) // 32
        has_bits = (cols < V) & (mask + tl.zeros_like(cols) >= 0)
        word = tl.load(masks.words + mask * W + cols // 32, mask=has_bits, other=-1)
        z = tl.where(((word >> (cols % 32)) & 1) == 0, float("-inf"), z)
    return z


@triton.jit
def mask_of(masks, row):
    """The mask of a row; -1: none."""
    if masks is not None:
        return tl.load(masks.of_row + row).to(tl.int64)
    else:
        return tl.full([], -1, tl.int64)


@triton.jit
def below(bound):
    """A bound rounded down a little: the exact test follows, on the gathered logits."""
    return bound - tl.abs(bound) * 1e-6 - 1e-6


# --------------------------------------------------------------------------------- chunk_kernel


@triton.jit
def chunk_kernel(
    logits,  # [S, V]
    slots,  # [S]
    slot_table,  # [N, RECORD_LEN]
    stats,  # ChunkStats
    masks,  # TokenMasks; None: of no row
    V: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    num_chunks = tl.num_programs(1)
    cols = chunk * CHUNK + tl.arange(0, CHUNK)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    z = load_masked(logits + row * V, cols, masks, mask_of(masks, row), V)
    t = load_column(slot_table, tl.load(slots + row).to(tl.int64), TEMPERATURE)
    groups = tl.max(tl.reshape(z, (GROUPS_PER_CHUNK, GROUP)), 1)
    largest = tl.max(groups, 0)
    first = tl.min(tl.where(z == largest, cols, NO_ID), 0)
    inverse = tl.where(t > 0.0, 1.0 / tl.where(t > 0.0, t, 1.0), 0.0)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(tl.where(z == float("-inf"), 0.0, tl.exp((z - shift) * inverse)), 0)
    at = row * num_chunks + chunk
    tl.store(stats.largest + at, largest)
    tl.store(stats.first_id + at, first)
    tl.store(stats.total + at, total)
    g = chunk * GROUPS_PER_CHUNK + tl.arange(0, GROUPS_PER_CHUNK)
    tl.store(stats.group_max + row * (num_chunks * GROUPS_PER_CHUNK) + g, groups)


# ------------------------------------------------------------ pick_kernel: a draw among all ids


@triton.jit
def draw_from_all(
    logits,  # [V]: the row
    u,
    maxima,  # [BLOCK_C] of the chunks
    sums,  # [BLOCK_C]
    largest,
    inverse,
    masks,
    mask,
    V: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """(first id past the target or NO_ID, last id of any weight or -1): a chunk, then its ids."""
    C: tl.constexpr = (V + CHUNK - 1) // CHUNK
    c = tl.arange(0, BLOCK_C)
    shift = tl.where(maxima > float("-inf"), maxima - largest, 0.0)
    sums = tl.where(maxima > float("-inf"), sums * tl.exp(shift * inverse), 0.0)
    running_sums = tl.cumsum(sums, 0)
    target = u * tl.sum(sums, 0)
    hit_chunk = tl.min(tl.where((running_sums > target) & (sums > 0.0), c, NO_ID), 0)
    last_chunk = tl.max(tl.where(sums > 0.0, c, 0), 0)
    chunk = tl.where(hit_chunk < C, hit_chunk, last_chunk)
    target -= tl.sum(tl.where(c < chunk, sums, 0.0), 0)
    cols = chunk * CHUNK + tl.arange(0, CHUNK)
    z = load_masked(logits, cols, masks, mask, V)
    weight = tl.where(z > float("-inf"), tl.exp((z - largest) * inverse), 0.0)
    hit = (tl.cumsum(weight, 0) > target) & (weight > 0.0)
    found = tl.min(tl.where(hit, cols, NO_ID), 0)
    last = tl.max(tl.where(weight > 0.0, cols, -1), 0)
    return found, last


# --------------------------------------------------- pick_kernel: a draw among those that stay


@triton.jit
def kth_group_max(tops, k):
    """The k-th largest of the group maxima, by bisection over their keys."""
    keys = float_key(tops)
    lo = float_key(float("-inf") + tl.zeros([1], tl.float32)).to(tl.int64)
    low = tl.sum(lo, 0)
    high = tl.max(keys, 0).to(tl.int64)
    while low < high:
        middle = (low + high + 1) >> 1
        reached = tl.sum((keys.to(tl.int64) >= middle).to(tl.int32), 0)
        if reached >= k:
            low = middle
            if reached == k:
                high = middle
        else:
            high = middle - 1
    return tl.min(tl.where(keys.to(tl.int64) >= low, tops, float("inf")), 0)


@triton.jit
def lower_bound(tops, largest, t, k, p, min_p, V: tl.constexpr, NUM_GROUPS: tl.constexpr):
    """A logit that the threshold of min-p, top-k and top-p is not below."""
    bound = float("-inf")
    if min_p > 0.0:
        bound = below(largest + t * tl.log(min_p))
    if (k > 0) & (k < V):
        if k <= NUM_GROUPS:
            # k groups reach the k-th largest group maximum, so k logits do.
            bound = tl.maximum(bound, kth_group_max(tops, k))
    elif p < 1.0:
        # All logits below it together weigh at most 1 - p of the largest one alone.
        tail = largest + t * (
            tl.log(tl.maximum(1.0 - p, MIN_TAIL)) - tl.log(tl.full([], V, tl.float32))
        )
        bound = tl.maximum(bound, below(tail))
    return bound


@triton.jit
def gather_candidates(
    logits,  # [V]: the row
    tops,  # [BLOCK_NG]: the group maxima
    bound,
    groups,  # [NUM_GROUPS] scratch
    values,  # [V] scratch
    ids,  # [V] scratch
    masks,
    mask,
    V: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    BLOCK_NG: tl.constexpr,
):
    """Number of logits from ``bound`` on, which are written to values and ids."""
    g = tl.arange(0, BLOCK_NG)
    has = (tops >= bound) & (g < NUM_GROUPS) & (tops > float("-inf"))
    rank = tl.cumsum(has.to(tl.int32), 0) - 1
    num_listed = tl.sum(has.to(tl.int32), 0)
    tl.store(groups + rank, g, mask=has)
    tl.debug_barrier()
    count = 0
    for start in range(0, num_listed, GATHER_GROUPS):
        at = start + tl.arange(0, GATHER_GROUPS)
        group = tl.load(groups + at, mask=at < num_listed, other=NUM_GROUPS)
        cols = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        cols = tl.reshape(cols, (GATHER_GROUPS * GROUP,))
        z = load_masked(logits, cols, masks, mask, V)
        kept = (z >= bound) & (z > float("-inf"))
        to = count + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(values + to, z, mask=kept)
        tl.store(ids + to, cols, mask=kept)
        count += tl.sum(kept.to(tl.int32), 0)
    tl.debug_barrier()
    return count


@triton.jit
def load_candidates(values, start, count):
    """Gathered logits [BLOCK] from ``start`` on; -inf past the last."""
    at = start + tl.arange(0, BLOCK)
    return tl.load(values + at, mask=at < count, other=float("-inf"))


@triton.jit
def weight_above(z, key, largest, inverse):
    """Sum of exp((z - largest) * inverse) of the logits z with a key above ``key``."""
    return tl.sum(tl.where(float_key(z) > key, tl.exp((z - largest) * inverse), 0.0), 0)


@triton.jit
def mass_above(held, values, count, key, largest, inverse):
    """weight_above of all gathered logits, the first BLOCK of which are ``held``."""
    total = weight_above(held, key, largest, inverse)
    for start in range(BLOCK, count, BLOCK):
        total += weight_above(load_candidates(values, start, count), key, largest, inverse)
    return total


@triton.jit
def count_from(held, values, count, key):
    """Number of gathered logits with a key of at least ``key``."""
    total = tl.sum((float_key(held) >= key).to(tl.int32), 0)
    for start in range(BLOCK, count, BLOCK):
        z = load_candidates(values, start, count)
        there = start + tl.arange(0, BLOCK) < count
        total += tl.sum(((float_key(z) >= key) & there).to(tl.int32), 0)
    return total


@triton.jit
def kth_key(held, values, count, floor, top_key, k):
    """The key of the k-th largest gathered logit; below ``floor`` where fewer are gathered."""
    low = tl.minimum(floor.to(tl.int64), top_key.to(tl.int64)) - 1
    low = tl.maximum(low, LEAST_KEY)
    high = top_key.to(tl.int64)
    while low < high:
        middle = (low + high + 1) >> 1
        reached = count_from(held, values, count, middle.to(tl.int32))
        if reached >= k:
            low = middle
            if reached == k:
                high = middle
        else:
            high = middle - 1
    return low


@triton.jit
def nucleus_key(held, values, count, floor, top_key, p, largest, inverse):
    """The least key such that the logits above it, of those from ``floor`` on, weigh below p."""
    whole = mass_above(held, values, count, floor - 1, largest, inverse)
    goal = whole * tl.maximum(p, MIN_TOP_P)
    low = floor.to(tl.int64)
    high = top_key.to(tl.int64)
    while low < high:
        middle = (low + high) >> 1
        above = mass_above(held, values, count, middle.to(tl.int32), largest, inverse)
        if above < goal:
            high = middle
        else:
            low = middle + 1
    return low.to(tl.int32)


@triton.jit
def threshold_key(held, values, count, t, k, p, min_p, largest, inverse, V: tl.constexpr):
    """The exact threshold as a key: min-p, then top-k among its tokens, then top-p among those."""
    top_key = tl.max(float_key(held), 0)
    for start in range(BLOCK, count, BLOCK):
        z = load_candidates(values, start, count)
        top_key = tl.maximum(top_key, tl.max(float_key(z), 0))
    floor = tl.full([], LEAST_KEY, dtype=tl.int32)
    if min_p > 0.0:
        floor = float_key(largest + t * tl.log(min_p))
    if (k > 0) & (k < V):
        kth = kth_key(held, values, count, floor, top_key, k)
        floor = tl.maximum(floor.to(tl.int64), kth).to(tl.int32)
    if p < 1.0:
        floor = nucleus_key(held, values, count, floor, top_key, p, largest, inverse)
    return floor


@triton.jit
def draw_from_candidates(held, values, ids, count, floor, u, largest, inverse):
    """(first id past the target or NO_ID, last id of any weight or -1), of keys from ``floor``."""
    whole = mass_above(held, values, count, floor - 1, largest, inverse)
    target = u * whole
    before = 0.0
    found = NO_ID
    last = -1
    for start in range(0, count, BLOCK):
        z = load_candidates(values, start, count)
        at = start + tl.arange(0, BLOCK)
        token = tl.load(ids + at, mask=at < count, other=0)
        weight = tl.where(float_key(z) >= floor, tl.exp((z - largest) * inverse), 0.0)
        running = before + tl.cumsum(weight, 0)
        hit = (running > target) & (weight > 0.0)
        found = tl.minimum(found, tl.min(tl.where(hit, token, NO_ID), 0))
        last = tl.maximum(last, tl.max(tl.where(weight > 0.0, token, -1), 0))
        before += tl.sum(weight, 0)
    return found, last


# ---------------------------------------------------------------------------------- pick_kernel


@triton.jit(do_not_specialize=["host_stride"], do_not_specialize_on_alignment=["host_ids", "turn"])
def pick_kernel(
    logits,  # [S, V]
    slots,  # [S]
    slot_table,  # [N, RECORD_LEN]
    token_counts,  # [N, V]; None: not counted
    stats,  # ChunkStats
    candidates,  # Candidates
    ids,  # [S] int32
    host_ids,  # [T, host_stride] int32; None: no host reads them
    turn,  # [1] int32
    host_stride,
    masks,  # TokenMasks; None: of no row
    V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_NG: tl.constexpr,
    PDL: tl.constexpr,
):
    C: tl.constexpr = (V + CHUNK - 1) // CHUNK
    NUM_GROUPS: tl.constexpr = C * GROUPS_PER_CHUNK
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    slot = tl.load(slots + row).to(tl.int64)
    t = load_column(slot_table, slot, TEMPERATURE)
    k = load_column(slot_table, slot, TOP_K)
    p = load_column(slot_table, slot, TOP_P)
    min_p = load_column(slot_table, slot, MIN_P)
    position = load_column(slot_table, slot, OUTPUT_POSITION)
    seed_low = load_column(slot_table, slot, SEED_LOW)
    seed_high = load_column(slot_table, slot, SEED_HIGH)
    u = hash_uniform(seed_low, seed_high, position)

    c = tl.arange(0, BLOCK_C)
    maxima = tl.load(stats.largest + row * C + c, mask=c < C, other=float("-inf"))
    firsts = tl.load(stats.first_id + row * C + c, mask=c < C, other=NO_ID)
    largest = tl.max(maxima, 0)
    greedy = tl.min(tl.where(maxima == largest, firsts, NO_ID), 0)
    # NaN logits compare with nothing: give a valid id all the same.
    greedy = tl.where(greedy < V, greedy, 0)
    chosen = greedy
    if (t > 0.0) & (largest > float("-inf")):
        inverse = 1.0 / t
        logits_row = logits + row * V
        mask = mask_of(masks, row)
        if ((k > 0) & (k < V)) | (p < 1.0) | (min_p > 0.0):
            g = tl.arange(0, BLOCK_NG)
            tops = tl.load(
                stats.group_max + row * NUM_GROUPS + g, mask=g < NUM_GROUPS, other=float("-inf")
            )
            bound = lower_bound(tops, largest, t, k, p, min_p, V, NUM_GROUPS)
            groups = candidates.groups + row * NUM_GROUPS
            values = candidates.logits + row * V
            value_ids = candidates.ids + row * V
            count = gather_candidates(
                logits_row,
                tops,
                bound,
                groups,
                values,
                value_ids,
                masks,
                mask,
                V,
                NUM_GROUPS,
                BLOCK_NG,
            )
            held = load_candidates(values, 0, count)
            floor = threshold_key(held, values, count, t, k, p, min_p, largest, inverse, V)
            found, last = draw_from_candidates(
                held, values, value_ids, count, floor, u, largest, inverse
            )
        else:
            sums = tl.load(stats.total + row * C + c, mask=c < C, other=0.0)
            found, last = draw_from_all(
                logits_row, u, maxima, sums, largest, inverse, masks, mask, V, BLOCK_C
            )
        # Rounding may put the target past the last token.
        drawn = tl.where(found < V, found, last)
        chosen = tl.where((drawn >= 0) & (drawn < V), drawn, greedy)
    # There may be nothing to choose from; what the device goes on with is a valid id all the same.
    reported = tl.where(largest > float("-inf"), chosen, NOTHING)
    tl.store(ids + row, reported)
    if host_ids is not None:
        tl.store(host_ids + tl.load(turn).to(tl.int64) * host_stride + row, reported)
    tl.store(column_at(slot_table, slot, OUTPUT_POSITION), position + 1)
    tl.store(column_at(slot_table, slot, LAST_TOKEN), chosen)
    if token_counts is not None:
        count_token(token_counts, slot, chosen, V)


# -------------------------------------------------------------------------------------- launches


def pick_token(
    logits: torch.Tensor,
    slots: torch.Tensor,
    state: SamplingState,
    host: HostIds | None,
    masks: TokenMasks | None,
) -> torch.Tensor:
    """ids [S] int32 of logits [S, V], S > 0; the state is advanced. Arguments as sample checks."""
    rows, vocab = logits.shape
    num_chunks = cdiv(vocab, CHUNK.value)
    num_groups = num_chunks * GROUPS_PER_CHUNK.value

    def empty(columns: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty((rows, columns), dtype=dtype, device=logits.device)

    stats = ChunkStats(
        largest=empty(num_chunks, torch.float32),
        first_id=empty(num_chunks, torch.int32),
        total=empty(num_chunks, torch.float32),
        group_max=empty(num_groups, torch.float32),
    )
    chunk_kernel[(rows, num_chunks)](
        logits,
        slots,
        state.slot_table,
        stats,
        masks,
        V=vocab,
        num_warps=8,
        num_stages=1,
        **pdl_options(),
    )
    candidates = Candidates(
        groups=empty(num_groups, torch.int32),
        logits=empty(vocab, torch.float32),
        ids=empty(vocab, torch.int32),
    )
    ids = torch.empty(rows, dtype=torch.int32, device=logits.device)
    pick_kernel[(rows,)](
        logits,
        slots,
        state.slot_table,
        state.token_counts,
        stats,
        candidates,
        ids,
        None if host is None else host.ids,
        None if host is None else host.turn,
        0 if host is None else host.ids.stride(0),
        masks,
        V=vocab,
        BLOCK_C=next_power_of_2(num_chunks),
        BLOCK_NG=next_power_of_2(num_groups),
        num_warps=8,
        num_stages=1,
        **pdl_options(),
    )
    return ids
