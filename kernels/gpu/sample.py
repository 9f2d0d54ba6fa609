"""sample and token_logprobs: from logits to ids without a sort, within a graph.

Everything a request may set lives in tensors indexed by its slot (``SamplingState``), so one
captured graph serves every mix of requests:

1. ``bias_kernel`` and ``adjust_kernel`` (only when the state has such tensors) change the logits in
   place: bias, allowed ids, penalties.
2. ``chunk_kernel``, programs over (row, CHUNK logits): the maximum, its first id and the sum of
   exponentials of each chunk, and the maximum of each group of GROUP logits.
3. ``pick_kernel``, a program a row. Greedy rows reduce the chunks' maxima. Plain random rows draw a
   chunk, then a token of it. For min-p, top-k and top-p the group maxima bound the threshold from
   below; what lies above (usually some hundred logits) is gathered, and bisection over the bits of
   the float finds the exact threshold there.

A token is the first, in vocabulary order, at which the running sum of kept probabilities exceeds
u times their total, where u is a hash of the request's seed and output position alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .launch import cdiv, check_shape, check_tensors, next_power_of_2, pdl_options

CHUNK = 4096  # logits a program of chunk_kernel: 16 KB of float32
GROUP = 256  # logits a group: a vocabulary of 128k has 501, which one program can hold
GATHER_GROUPS = 16  # groups gathered at a time
BLOCK = 2048  # gathered logits held in registers
BIAS_BLOCK = 32

IN_PROMPT = 0x4000  # token_counts: this bit, set by the caller, marks the prompt's tokens
MAX_COUNT = 0x3FFF


@dataclass(frozen=True)
class SamplingState:
    """Per-slot parameters and counts, all on the logits' device; N slots, vocabulary V.

    A None tensor switches its feature off for the whole graph; a neutral value for one slot.
    """

    temperature: torch.Tensor  # [N] float32; 0: greedy
    top_k: torch.Tensor  # [N] int32; 0 or below: off
    top_p: torch.Tensor  # [N] float32; 1: off
    min_p: torch.Tensor  # [N] float32; 0: off
    seeds: torch.Tensor  # [N] int64
    output_positions: torch.Tensor  # [N] int32: tokens generated so far; sample() adds 1
    last_tokens: torch.Tensor | None = None  # [N] int32: sample() writes the new id
    # Penalties: all four or none.
    repetition_penalty: torch.Tensor | None = None  # [N] float32; 1: off
    presence_penalty: torch.Tensor | None = None  # [N] float32; 0: off
    frequency_penalty: torch.Tensor | None = None  # [N] float32; 0: off
    token_counts: torch.Tensor | None = None  # [N, V] int16: generated so far, | IN_PROMPT
    # Added to logits while output_positions < bias_until (-inf until min_tokens bans a stop token).
    bias_ids: torch.Tensor | None = None  # [N, B] int32, distinct; -1: none
    bias_values: torch.Tensor | None = None  # [N, B] float32
    bias_until: torch.Tensor | None = None  # [N, B] int32
    allowed_mask: torch.Tensor | None = None  # [N, ceil(V / 32)] int32, a bit a token


@dataclass(frozen=True)
class HostIds:
    """Where the host finds a step's ids, written by the kernel that chooses them.

    A copy of its own would be one more call of the driver for the host, and one more wait for the
    device. Several steps' ids may be on their way, so each has a row.
    """

    ids: torch.Tensor  # [T, >= S] int32, pinned
    turn: torch.Tensor  # [1] int32 on the device: which row


@triton.jit
def mix(h):
    """A bijection of uint32 in which every input bit flips every output bit half the time."""
    h = h ^ (h >> 16)
    h = h * 0x7FEB352D
    h = h ^ (h >> 15)
    h = h * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def hash_uniform(seed, position):
    """A float32 in [0, 1), a function of (seed int64, position int32)."""
    h = mix((seed & 0xFFFFFFFF).to(tl.uint32) ^ 0x9E3779B9)
    h = mix(h ^ ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32))
    h = mix(h ^ position.to(tl.uint32))
    return (h >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2^-24


@triton.jit
def float_key(x):
    """int32 in the order of the float32."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def bias_kernel(
    logits,  # [S, V]
    slots,  # [S]
    bias_ids,  # [N, B]
    bias_values,
    bias_until,
    output_positions,  # [N]
    V,
    B,
    BLOCK_B: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    slot = tl.load(slots + row).to(tl.int64)
    position = tl.load(output_positions + slot)
    ids = tl.load(bias_ids + slot * B + b, mask=b < B, other=-1)
    until = tl.load(bias_until + slot * B + b, mask=b < B, other=0)
    value = tl.load(bias_values + slot * B + b, mask=b < B, other=0.0)
    active = (ids >= 0) & (ids < V) & (position < until)
    at = logits + row * V + ids
    old = tl.load(at, mask=active, other=0.0).to(tl.float32)
    tl.store(at, (old + value).to(logits.dtype.element_ty), mask=active)


@triton.jit
def adjust_kernel(
    logits,  # [S, V]
    slots,  # [S]
    repetition_penalty,  # [N]
    presence_penalty,
    frequency_penalty,
    token_counts,  # [N, V] int16
    allowed_mask,  # [N, WORDS] int32
    V,
    WORDS,
    HAS_PENALTIES: tl.constexpr,
    HAS_ALLOWED: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    mask = cols < V
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    slot = tl.load(slots + row).to(tl.int64)
    z = tl.load(logits + row * V + cols, mask=mask, other=0.0).to(tl.float32)
    if HAS_ALLOWED:
        word = tl.load(allowed_mask + slot * WORDS + cols // 32, mask=mask, other=0)
        z = tl.where(((word >> (cols % 32)) & 1) != 0, z, float("-inf"))
    if HAS_PENALTIES:
        repetition = tl.load(repetition_penalty + slot)
        presence = tl.load(presence_penalty + slot)
        frequency = tl.load(frequency_penalty + slot)
        # A slot without penalties reads no counts. Compared as a tile: the interpreter's masks
        # cannot be joined with a scalar.
        strength = tl.abs(repetition - 1.0) + tl.abs(presence) + tl.abs(frequency)
        used = mask & (tl.zeros([CHUNK], dtype=tl.float32) < strength)
        counts = tl.load(token_counts + slot * V + cols, mask=used, other=0).to(tl.int32)
        generated = counts & 0x3FFF
        z = tl.where(counts > 0, tl.where(z > 0.0, z / repetition, z * repetition), z)
        z -= generated.to(tl.float32) * frequency
        z -= tl.where(generated > 0, presence, 0.0)
    tl.store(logits + row * V + cols, z.to(logits.dtype.element_ty), mask=mask)


@triton.jit
def chunk_kernel(
    logits,  # [S, V]
    slots,  # [S]
    temperature,  # [N]
    chunk_max,  # [S, C] float32
    chunk_id,  # [S, C] int32: the first id of the maximum
    chunk_sum,  # [S, C] float32: sum of exp((z - chunk_max) / temperature)
    group_max,  # [S, C * CHUNK / GROUP] float32
    V,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    num_chunks = tl.num_programs(1)
    cols = chunk * CHUNK + tl.arange(0, CHUNK)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    z = tl.load(logits + row * V + cols, mask=cols < V, other=float("-inf")).to(tl.float32)
    t = tl.load(temperature + tl.load(slots + row).to(tl.int64))
    groups = tl.max(tl.reshape(z, (CHUNK // GROUP, GROUP)), 1)
    largest = tl.max(groups, 0)
    first = tl.min(tl.where(z == largest, cols, 0x7FFFFFFF), 0)
    inverse = tl.where(t > 0.0, 1.0 / tl.where(t > 0.0, t, 1.0), 0.0)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(tl.where(z == float("-inf"), 0.0, tl.exp((z - shift) * inverse)), 0)
    at = row * num_chunks + chunk
    tl.store(chunk_max + at, largest)
    tl.store(chunk_id + at, first)
    tl.store(chunk_sum + at, total)
    g = chunk * (CHUNK // GROUP) + tl.arange(0, CHUNK // GROUP)
    tl.store(group_max + row * (num_chunks * (CHUNK // GROUP)) + g, groups)


@triton.jit
def mass_above(held, values, count, key, largest, inverse, BLOCK: tl.constexpr):
    """Sum of exp((z - largest) * inverse) of the gathered logits with a key above ``key``."""
    total = tl.sum(tl.where(float_key(held) > key, tl.exp((held - largest) * inverse), 0.0), 0)
    for start in range(BLOCK, count, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        z = tl.load(values + offsets, mask=offsets < count, other=float("-inf"))
        total += tl.sum(tl.where(float_key(z) > key, tl.exp((z - largest) * inverse), 0.0), 0)
    return total


@triton.jit
def count_from(held, values, count, key, BLOCK: tl.constexpr):
    """How many gathered logits have a key of at least ``key``."""
    total = tl.sum((float_key(held) >= key).to(tl.int32), 0)
    for start in range(BLOCK, count, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        z = tl.load(values + offsets, mask=offsets < count, other=float("-inf"))
        total += tl.sum(((float_key(z) >= key) & (offsets < count)).to(tl.int32), 0)
    return total


@triton.jit(do_not_specialize=["host_stride"], do_not_specialize_on_alignment=["host_ids", "turn"])
def pick_kernel(
    logits,  # [S, V]
    slots,  # [S]
    temperature,  # [N]
    top_k,
    top_p,
    min_p,
    seeds,
    output_positions,
    last_tokens,
    token_counts,  # [N, V]
    chunk_max,  # [S, C]
    chunk_id,
    chunk_sum,
    group_max,  # [S, NUM_GROUPS]
    group_list,  # [S, NUM_GROUPS] int32 scratch
    values,  # [S, V] float32 scratch: gathered logits in vocabulary order
    value_ids,  # [S, V] int32 scratch: their ids
    ids,  # [S] int32
    host_ids,  # [T, host_stride] int32
    turn,  # [1] int32
    host_stride,
    V,
    C,
    NUM_GROUPS,
    HAS_HOST: tl.constexpr,
    HAS_LAST: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_NG: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    GATHER_GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    slot = tl.load(slots + row).to(tl.int64)
    t = tl.load(temperature + slot)
    k = tl.load(top_k + slot)
    p = tl.load(top_p + slot)
    mp = tl.load(min_p + slot)
    position = tl.load(output_positions + slot)
    u = hash_uniform(tl.load(seeds + slot), position)

    c = tl.arange(0, BLOCK_C)
    maxima = tl.load(chunk_max + row * C + c, mask=c < C, other=float("-inf"))
    firsts = tl.load(chunk_id + row * C + c, mask=c < C, other=0x7FFFFFFF)
    largest = tl.max(maxima, 0)
    greedy = tl.min(tl.where(maxima == largest, firsts, 0x7FFFFFFF), 0)
    # NaN logits compare with nothing: give a valid id all the same.
    greedy = tl.where(greedy < V, greedy, 0)
    chosen = greedy
    if (t > 0.0) & (largest > float("-inf")):
        inverse = 1.0 / t
        truncated = ((k > 0) & (k < V)) | (p < 1.0) | (mp > 0.0)
        found = 0x7FFFFFFF
        last = -1
        if truncated:
            # --- A lower bound of the threshold.
            bound = float("-inf")
            if mp > 0.0:
                bound = largest + t * tl.log(mp)
                # Rounded down a little: the exact test follows on the gathered logits.
                bound = bound - tl.abs(bound) * 1e-6 - 1e-6
            g = tl.arange(0, BLOCK_NG)
            tops = tl.load(
                group_max + row * NUM_GROUPS + g, mask=g < NUM_GROUPS, other=float("-inf")
            )
            if (k > 0) & (k < V):
                if k <= NUM_GROUPS:
                    # k groups reach the k-th largest group maximum, so k logits do.
                    top_keys = float_key(tops)
                    lo = float_key(float("-inf") + tl.zeros([1], tl.float32)).to(tl.int64)
                    low = tl.sum(lo, 0)
                    high = tl.max(top_keys, 0).to(tl.int64)
                    while low < high:
                        middle = (low + high + 1) >> 1
                        reached = tl.sum((top_keys.to(tl.int64) >= middle).to(tl.int32), 0)
                        if reached >= k:
                            low = middle
                            if reached == k:
                                high = middle
                        else:
                            high = middle - 1
                    kth = tl.min(tl.where(top_keys.to(tl.int64) >= low, tops, float("inf")), 0)
                    bound = tl.maximum(bound, kth)
            elif p < 1.0:
                # All logits below it together weigh at most 1 - p of the largest one alone.
                tail = largest + t * (tl.log(tl.maximum(1.0 - p, 1e-7)) - tl.log(V * 1.0))
                bound = tl.maximum(bound, tail - tl.abs(tail) * 1e-6 - 1e-6)
            # --- Gather what reaches it.
            has = (tops >= bound) & (g < NUM_GROUPS) & (tops > float("-inf"))
            rank = tl.cumsum(has.to(tl.int32), 0) - 1
            num_listed = tl.sum(has.to(tl.int32), 0)
            tl.store(group_list + row * NUM_GROUPS + rank, g, mask=has)
            tl.debug_barrier()
            count = 0
            for start in range(0, num_listed, GATHER_GROUPS):
                at = start + tl.arange(0, GATHER_GROUPS)
                group = tl.load(
                    group_list + row * NUM_GROUPS + at, mask=at < num_listed, other=NUM_GROUPS
                )
                cols = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
                cols = tl.reshape(cols, (GATHER_GROUPS * GROUP,))
                z = tl.load(logits + row * V + cols, mask=cols < V, other=float("-inf"))
                z = z.to(tl.float32)
                kept = (z >= bound) & (z > float("-inf"))
                to = count + tl.cumsum(kept.to(tl.int32), 0) - 1
                tl.store(values + row * V + to, z, mask=kept)
                tl.store(value_ids + row * V + to, cols, mask=kept)
                count += tl.sum(kept.to(tl.int32), 0)
            tl.debug_barrier()
            list_values = values + row * V
            offsets = tl.arange(0, BLOCK)
            held = tl.load(list_values + offsets, mask=offsets < count, other=float("-inf"))
            # --- Exact thresholds, as keys: min-p, then top-k among its tokens, then top-p.
            top_key = tl.max(float_key(held), 0)
            for start in range(BLOCK, count, BLOCK):
                z = tl.load(
                    list_values + start + offsets, mask=start + offsets < count, other=float("-inf")
                )
                top_key = tl.maximum(top_key, tl.max(float_key(z), 0))
            floor = tl.full([], -2147483647, dtype=tl.int32)
            if mp > 0.0:
                floor = float_key(largest + t * tl.log(mp))
            if (k > 0) & (k < V):
                # Fewer than k gathered: all stay.
                low = tl.minimum(floor.to(tl.int64), top_key.to(tl.int64)) - 1
                low = tl.maximum(low, -2147483647)
                high = top_key.to(tl.int64)
                while low < high:
                    middle = (low + high + 1) >> 1
                    reached = count_from(held, list_values, count, middle.to(tl.int32), BLOCK)
                    if reached >= k:
                        low = middle
                        if reached == k:
                            high = middle
                    else:
                        high = middle - 1
                floor = tl.maximum(floor.to(tl.int64), low).to(tl.int32)
            if p < 1.0:
                whole = mass_above(held, list_values, count, floor - 1, largest, inverse, BLOCK)
                goal = whole * tl.maximum(p, 1e-12)
                low = floor.to(tl.int64)
                high = top_key.to(tl.int64)
                while low < high:
                    middle = (low + high) >> 1
                    above = mass_above(
                        held, list_values, count, middle.to(tl.int32), largest, inverse, BLOCK
                    )
                    if above < goal:
                        high = middle
                    else:
                        low = middle + 1
                floor = low.to(tl.int32)
            # --- Draw.
            whole = mass_above(held, list_values, count, floor - 1, largest, inverse, BLOCK)
            target = u * whole
            before = 0.0
            for start in range(0, count, BLOCK):
                z = tl.load(
                    list_values + start + offsets, mask=start + offsets < count, other=float("-inf")
                )
                token = tl.load(
                    value_ids + row * V + start + offsets, mask=start + offsets < count, other=0
                )
                weight = tl.where(float_key(z) >= floor, tl.exp((z - largest) * inverse), 0.0)
                running = before + tl.cumsum(weight, 0)
                hit = (running > target) & (weight > 0.0)
                found = tl.minimum(found, tl.min(tl.where(hit, token, 0x7FFFFFFF), 0))
                last = tl.maximum(last, tl.max(tl.where(weight > 0.0, token, -1), 0))
                before += tl.sum(weight, 0)
        else:
            sums = tl.load(chunk_sum + row * C + c, mask=c < C, other=0.0)
            shift = tl.where(maxima > float("-inf"), maxima - largest, 0.0)
            sums = tl.where(maxima > float("-inf"), sums * tl.exp(shift * inverse), 0.0)
            running_sums = tl.cumsum(sums, 0)
            target = u * tl.sum(sums, 0)
            hit_chunk = tl.min(tl.where((running_sums > target) & (sums > 0.0), c, 0x7FFFFFFF), 0)
            last_chunk = tl.max(tl.where(sums > 0.0, c, 0), 0)
            chunk = tl.where(hit_chunk < C, hit_chunk, last_chunk)
            target -= tl.sum(tl.where(c < chunk, sums, 0.0), 0)
            cols = chunk * CHUNK + tl.arange(0, CHUNK)
            z = tl.load(logits + row * V + cols, mask=cols < V, other=float("-inf"))
            z = z.to(tl.float32)
            weight = tl.where(z > float("-inf"), tl.exp((z - largest) * inverse), 0.0)
            hit = (tl.cumsum(weight, 0) > target) & (weight > 0.0)
            found = tl.min(tl.where(hit, cols, 0x7FFFFFFF), 0)
            last = tl.max(tl.where(weight > 0.0, cols, -1), 0)
        # Rounding may put the target past the last token.
        drawn = tl.where(found < V, found, last)
        chosen = tl.where((drawn >= 0) & (drawn < V), drawn, greedy)
    tl.store(ids + row, chosen)
    if HAS_HOST:
        tl.store(host_ids + tl.load(turn).to(tl.int64) * host_stride + row, chosen)
    tl.store(output_positions + slot, position + 1)
    if HAS_LAST:
        tl.store(last_tokens + slot, chosen)
    if HAS_COUNTS:
        counter = token_counts + slot * V + chosen
        old = tl.load(counter).to(tl.int32)
        tl.store(counter, tl.where((old & 0x3FFF) < 0x3FFF, old + 1, old).to(tl.int16))


def sample(
    logits: torch.Tensor,
    slots: torch.Tensor,
    state: SamplingState,
    host: HostIds | None = None,
) -> torch.Tensor:
    """One token a row, by its slot's parameters; updates the state for the next step.

    Order: bias, allowed ids, penalties, temperature, min-p, top-k, top-p. Equals of the k-th and of
    the last top-p token are kept; a greedy row's equal maxima give the lowest id.

    Args:
        logits: [S, V] float32 or 16-bit; changed in place by bias, allowed ids and penalties
            (take raw log probabilities before).
        slots: [S] int32, distinct except for padding rows.
        host: where the ids go besides; they are there once the stream has come past this.

    Returns:
        ids [S] int32. output_positions, last_tokens and token_counts are advanced.

    Raises:
        ValueError: on a wrong shape, layout or device, or half a set of optional tensors.
    """
    check_tensors(logits=logits, slots=slots, **vars(state))
    rows, vocab = logits.shape
    check_shape("slots", slots, rows)
    if host is not None and host.ids.shape[1] < rows:
        raise ValueError(f"{rows} ids do not fit {host.ids.shape[1]} places on the host")
    device = logits.device
    ids = torch.empty(rows, dtype=torch.int32, device=device)
    if not rows:
        return ids
    num_chunks = cdiv(vocab, CHUNK)
    pdl = pdl_options()
    bias = (state.bias_ids, state.bias_values, state.bias_until)
    if bias[0] is not None and bias[1] is not None and bias[2] is not None:
        width = bias[0].shape[1]
        bias_kernel[(rows, cdiv(width, BIAS_BLOCK))](
            logits,
            slots,
            *bias,
            state.output_positions,
            vocab,
            width,
            BLOCK_B=BIAS_BLOCK,
            num_warps=1,
            num_stages=1,
            **pdl,
        )
    elif any(tensor is not None for tensor in bias):
        raise ValueError("bias_ids, bias_values and bias_until come together")
    penalties = (
        state.repetition_penalty,
        state.presence_penalty,
        state.frequency_penalty,
        state.token_counts,
    )
    has_penalties = all(tensor is not None for tensor in penalties)
    if not has_penalties and any(tensor is not None for tensor in penalties):
        raise ValueError("the three penalties and token_counts come together")
    allowed = state.allowed_mask
    if has_penalties or allowed is not None:
        adjust_kernel[(rows, num_chunks)](
            logits,
            slots,
            *(penalties if has_penalties else (logits,) * 4),
            allowed if allowed is not None else slots,
            vocab,
            cdiv(vocab, 32),
            HAS_PENALTIES=has_penalties,
            HAS_ALLOWED=allowed is not None,
            CHUNK=CHUNK,
            num_warps=8,
            num_stages=1,
            **pdl,
        )
    num_groups = num_chunks * (CHUNK // GROUP)
    chunk_stats, group_max = _chunk_stats(logits, slots, state.temperature)
    group_list = torch.empty((rows, num_groups), dtype=torch.int32, device=device)
    values = torch.empty((rows, vocab), dtype=torch.float32, device=device)
    value_ids = torch.empty((rows, vocab), dtype=torch.int32, device=device)
    pick_kernel[(rows,)](
        logits,
        slots,
        state.temperature,
        state.top_k,
        state.top_p,
        state.min_p,
        state.seeds,
        state.output_positions,
        state.last_tokens if state.last_tokens is not None else ids,
        state.token_counts if state.token_counts is not None else ids,
        *chunk_stats,
        group_max,
        group_list,
        values,
        value_ids,
        ids,
        ids if host is None else host.ids,
        ids if host is None else host.turn,
        0 if host is None else host.ids.stride(0),
        vocab,
        num_chunks,
        num_groups,
        HAS_HOST=host is not None,
        HAS_LAST=state.last_tokens is not None,
        HAS_COUNTS=state.token_counts is not None,
        BLOCK_C=next_power_of_2(num_chunks),
        BLOCK_NG=next_power_of_2(num_groups),
        CHUNK=CHUNK,
        GROUP=GROUP,
        GATHER_GROUPS=GATHER_GROUPS,
        BLOCK=BLOCK,
        num_warps=8,
        num_stages=1,
        **pdl,
    )
    return ids


def _chunk_stats(
    logits: torch.Tensor, slots: torch.Tensor, temperature: torch.Tensor
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """((chunk_max, chunk_id, chunk_sum) [S, C] each, group_max [S, C * CHUNK / GROUP])."""
    rows, vocab = logits.shape
    num_chunks = cdiv(vocab, CHUNK)
    shape = (rows, num_chunks)
    chunk_max = torch.empty(shape, dtype=torch.float32, device=logits.device)
    chunk_id = torch.empty(shape, dtype=torch.int32, device=logits.device)
    chunk_sum = torch.empty(shape, dtype=torch.float32, device=logits.device)
    group_max = torch.empty(
        (rows, num_chunks * (CHUNK // GROUP)), dtype=torch.float32, device=logits.device
    )
    chunk_kernel[shape](
        logits,
        slots,
        temperature,
        chunk_max,
        chunk_id,
        chunk_sum,
        group_max,
        vocab,
        CHUNK=CHUNK,
        GROUP=GROUP,
        num_warps=8,
        num_stages=1,
        **pdl_options(),
    )
    return (chunk_max, chunk_id, chunk_sum), group_max
