"""latent_attention and store_latent: attention over one cached row for all heads, DeepSeek's MLA.

A row is a rotated key and the latent, which is both the rest of the key and the value: its tile is
loaded once for both products. A program takes some query tokens of a request times some heads, so
that a tile of rows is read once for all of them. No grid depends on a length.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import cdiv, check_shape, check_tensors, next_power_of_2, pdl_options
from .online_softmax import attend, empty_softmax, normalized, to_log2_scores
from .paged_kv import block_r, find_request

# Matrix units take float32 as sums of two tf32 numbers, as in attention.py.
FLOAT32_PRECISION = "tf32x3"


class LatentShape(NamedTuple):
    """A cache of latent rows and its query heads, constants of a kernel."""

    num_heads: int
    rope_dim: int
    latent_dim: int
    block_size: int  # tokens
    block_rope: int  # powers of two that hold the dims
    block_latent: int


class LatentTile(NamedTuple):
    """Query tokens and heads of a program, keys a step."""

    block_q: int
    block_h: int
    block_n: int
    num_warps: int
    num_stages: int


@triton.jit
def store_latent_kernel(
    rows,  # [T, D]
    slot_mapping,  # [T]; -1: not stored
    cache,  # [num_blocks, 1, block_size, D]
    D,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    slot = tl.load(slot_mapping + row).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if slot >= 0:
        values = tl.load(rows + row * D + d, mask=d < D)
        tl.store(cache + slot * D + d, values.to(cache.dtype.element_ty), mask=d < D)


@triton.jit(
    do_not_specialize=["num_reqs"],
    do_not_specialize_on_alignment=["slots", "seq_lens", "query_start_loc"],
)
def latent_kernel(
    q,  # [T, H, rope_dim + latent_dim]
    cache,  # [num_blocks, 1, block_size, rope_dim + latent_dim]
    block_table,  # [max slots, max blocks]
    table_stride,
    slots,  # [R]
    seq_lens,  # [R]
    query_start_loc,  # [R + 1]
    out,  # [T, H, latent_dim]
    scale,
    num_reqs,
    SHAPE: tl.constexpr,  # LatentShape
    BLOCK_R: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    BLOCK_M: tl.constexpr = BLOCK_Q * BLOCK_H
    # Names for them: Triton 3.6 takes no attribute inside a shape.
    BLOCK_ROPE: tl.constexpr = SHAPE.block_rope
    BLOCK_LATENT: tl.constexpr = SHAPE.block_latent
    WIDTH: tl.constexpr = SHAPE.rope_dim + SHAPE.latent_dim
    # Later tiles see more keys and start first.
    unit = tl.num_programs(1) - 1 - tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    reqs = tl.arange(0, BLOCK_R)
    known = reqs < num_reqs
    starts = tl.load(query_start_loc + reqs, mask=known, other=0)
    ends = tl.load(query_start_loc + reqs + 1, mask=known, other=0)
    request, first, _ = find_request(tl.cdiv(ends - starts, BLOCK_Q), unit, BLOCK_R)
    if request >= num_reqs:
        return
    slot = tl.load(slots + request).to(tl.int64)
    seq_len = tl.load(seq_lens + request)
    q_start = tl.load(query_start_loc + request)
    q_len = tl.load(query_start_loc + request + 1) - q_start
    q_begin = (unit - first) * BLOCK_Q
    context = seq_len - q_len
    if PDL:
        tl.extra.cuda.gdc_wait()

    i = tl.arange(0, BLOCK_M)
    r = tl.arange(0, BLOCK_ROPE)
    c = tl.arange(0, BLOCK_LATENT)
    n = tl.arange(0, BLOCK_N)
    token = q_begin + i // BLOCK_H
    head = tl.program_id(0) * BLOCK_H + i % BLOCK_H
    in_rows = (token < q_len) & (head < SHAPE.num_heads)
    rows = (q_start + token).to(tl.int64) * SHAPE.num_heads + head
    in_rope, in_latent = r < SHAPE.rope_dim, c < SHAPE.latent_dim
    turned = tl.load(
        q + rows[:, None] * WIDTH + r[None, :],
        mask=in_rows[:, None] & in_rope[None, :],
        other=0.0,
    )
    absorbed = tl.load(
        q + rows[:, None] * WIDTH + SHAPE.rope_dim + c[None, :],
        mask=in_rows[:, None] & in_latent[None, :],
        other=0.0,
    )
    acc, row_max, row_sum = empty_softmax(BLOCK_M, BLOCK_LATENT)
    table = block_table + slot * table_stride
    end = context + tl.minimum(q_begin + BLOCK_Q, q_len)
    for start in range(0, end, BLOCK_N):
        position = start + n
        valid = position < end
        block = tl.load(table + position // SHAPE.block_size, mask=valid, other=0).to(tl.int64)
        at = (block * SHAPE.block_size + position % SHAPE.block_size) * WIDTH
        keys = tl.load(
            cache + at[None, :] + r[:, None], mask=valid[None, :] & in_rope[:, None], other=0.0
        )
        latents = tl.load(
            cache + at[:, None] + SHAPE.rope_dim + c[None, :],
            mask=valid[:, None] & in_latent[None, :],
            other=0.0,
        ).to(q.dtype.element_ty)
        scores = tl.dot(turned, keys.to(q.dtype.element_ty), input_precision=PRECISION)
        scores = tl.dot(absorbed, tl.trans(latents), scores, input_precision=PRECISION)
        scores = to_log2_scores(scores, scale, None)
        seen = valid[None, :] & (position[None, :] <= (context + token)[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        acc, row_max, row_sum = attend(
            acc, row_max, row_sum, absorbed, scores, latents, True, PRECISION
        )
    tl.store(
        out + rows[:, None] * SHAPE.latent_dim + c[None, :],
        normalized(acc, row_sum).to(out.dtype.element_ty),
        mask=in_rows[:, None] & in_latent[None, :],
    )


def store_latent(rows: torch.Tensor, slot_mapping: torch.Tensor, cache: torch.Tensor) -> None:
    """Store rows [T, D] in a cache [num_blocks, 1, block_size, D]; slot -1: not stored.

    Raises:
        ValueError: on a wrong shape, layout or device.
    """
    check_tensors(rows=rows, slot_mapping=slot_mapping, cache=cache)
    tokens, width = rows.shape
    check_shape("slot_mapping", slot_mapping, tokens)
    check_shape("cache", cache, cache.shape[0], 1, cache.shape[2], width)
    if tokens:
        store_latent_kernel[(tokens,)](
            rows,
            slot_mapping,
            cache,
            width,
            BLOCK_D=next_power_of_2(width),
            num_warps=4,
            num_stages=1,
            **pdl_options(),
        )


def plan_latent(rows: int, num_heads: int, dtype: torch.dtype) -> LatentTile:
    """The tile for ``rows`` query tokens of all requests."""
    few = rows <= 64 or dtype == torch.float32
    block_h = min(max(next_power_of_2(num_heads), 16), 16 if few else 32)
    if dtype == torch.float32:
        return LatentTile(1, block_h, 16, 4, 1)
    # Accumulators are a row of the latent for each query row: 64 of 512 no longer fit 8 warps'
    # registers (bench/compiled_kernels.py).
    return LatentTile(1 if few else 32 // block_h, block_h, 32, 8, 2)


def latent_attention(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    *,
    scale: float,
    value_dim: int,
    num_decodes: int,
    max_query_len: int,
    max_seq_len: int,
) -> torch.Tensor:
    """Attention of each request's queries over its cached rows, which all heads share.

    Rows of q that belong to no request are left unwritten. The int32 tensors were complete before
    the kernel that precedes this one began: they are read without waiting for it.

    Args:
        q: [T, H, D], its last value_dim elements in the latent's space.
        cache: [num_blocks, 1, block_size, D], any float type; a row's last value_dim elements are
            its value.
        block_table, slots, seq_lens, query_start_loc, scale, num_decodes, max_query_len,
            max_seq_len: see paged_attention.

    Returns:
        [T, H, value_dim].

    Raises:
        ValueError: on a wrong shape, layout or device.
    """
    check_tensors(
        q=q,
        cache=cache,
        block_table=block_table,
        slots=slots,
        seq_lens=seq_lens,
        query_start_loc=query_start_loc,
    )
    rows, num_heads, width = q.shape
    num_reqs, rope_dim = slots.shape[0], width - value_dim
    check_shape("cache", cache, cache.shape[0], 1, cache.shape[2], width)
    check_shape("seq_lens", seq_lens, num_reqs)
    check_shape("query_start_loc", query_start_loc, num_reqs + 1)
    if not 0 < value_dim < width:
        raise ValueError(f"value_dim {value_dim}: must be less than a row's {width}")
    shape = LatentShape(
        num_heads,
        rope_dim,
        value_dim,
        cache.shape[2],
        max(next_power_of_2(rope_dim), 16),
        max(next_power_of_2(value_dim), 16),
    )
    out = torch.empty((rows, num_heads, value_dim), dtype=q.dtype, device=q.device)
    if not num_reqs:
        return out
    tile = plan_latent(rows, num_heads, q.dtype)
    # Rounding up costs at most one tile a request.
    tiles = rows // tile.block_q + num_reqs
    latent_kernel[(cdiv(num_heads, tile.block_h), tiles)](
        q,
        cache,
        block_table,
        block_table.stride(0),
        slots,
        seq_lens,
        query_start_loc,
        out,
        scale,
        num_reqs,
        SHAPE=shape,
        BLOCK_R=block_r(num_reqs),
        BLOCK_Q=tile.block_q,
        BLOCK_H=tile.block_h,
        BLOCK_N=tile.block_n,
        PRECISION=FLOAT32_PRECISION if q.dtype == torch.float32 else "ieee",
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **pdl_options(),
    )
    return out
