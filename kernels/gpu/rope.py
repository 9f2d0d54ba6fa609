"""qk_norm_rope_store_kv: every step between the QKV projection and attention, in one kernel.

A program takes one token and a few heads. Which of them are query, key and value heads only
changes masks and addresses, so the grid is (tokens, ceil(heads / BLOCK_H)) for every model.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..kv_cache import LARGEST, head_stride
from .launch import cdiv, check_shape, check_tensors, next_power_of_2, pdl_options
from .paged_kv import check_caches, row_scales, to_bytes

BLOCK_VALUES = 1024  # of a program's heads: 8 a thread in 4 warps
# A token of so few values is one program's: of two, the second would have little to do
# (bench/NOTES.md, "Encoders").
MAX_TOKEN_VALUES = 2048


@triton.jit
def rotation_lanes(d, ROT: tl.constexpr, INTERLEAVED: tl.constexpr):
    """For each element d of a head (partner, angle, sign): out = x * cos + sign * partner * sin."""
    HALF: tl.constexpr = ROT // 2
    rotated = d < ROT
    if INTERLEAVED:
        partner = tl.where(rotated, d ^ 1, d)
        angle = d // 2
        sign = tl.where(d % 2 == 0, -1.0, 1.0)
    else:
        partner = tl.where(d < HALF, d + HALF, tl.where(rotated, d - HALF, d))
        angle = tl.where(d < HALF, d, d - HALF)
        sign = tl.where(d < HALF, -1.0, 1.0)
    return partner, angle, sign


@triton.jit
def load_rotation(cos_sin, position, d, ROT: tl.constexpr, INTERLEAVED: tl.constexpr):
    """(partner, cos, signed sin) of each element d of a head: out = x * cos + partner * sin."""
    rotated = d < ROT
    partner, angle, sign = rotation_lanes(d, ROT, INTERLEAVED)
    turn = cos_sin + position.to(tl.int64) * ROT + angle
    cos = tl.load(turn, mask=rotated, other=1.0)
    sin = tl.load(turn + ROT // 2, mask=rotated, other=0.0) * sign
    return partner, cos, sin


@triton.jit
def load_rotated(
    heads,  # begin of the first head
    offsets,  # [N, BLOCK_D] of the heads' elements
    partners,  # [N, BLOCK_D] of those that each is rotated with
    mask,
    cos,  # [BLOCK_D]
    sin,  # [BLOCK_D], signed
    norm,  # [Dh]; None: heads are not normed
    partner,  # [BLOCK_D]
    eps,
    weight_offset,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Heads of the projection, normed and rotated, in float32."""
    x = tl.load(heads + offsets, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(heads + partners, mask=mask, other=0.0).to(tl.float32)
    if norm is not None:
        d = tl.arange(0, BLOCK_D)
        in_head = d < HEAD_DIM
        w = tl.load(norm + d, mask=in_head, other=0.0).to(tl.float32) + weight_offset
        wp = tl.load(norm + partner, mask=in_head, other=0.0).to(tl.float32) + weight_offset
        rstd = tl.rsqrt(tl.sum(x * x, 1) / HEAD_DIM + eps)[:, None]
        x = x * rstd * w[None, :]
        other = other * rstd * wp[None, :]
    return x * cos[None, :] + other * sin[None, :]


@triton.jit
def qk_norm_rope_store_kv_kernel(
    qkv,  # [T, (Hq + 2 Hkv) * Dh]
    positions,  # [T]
    cos_sin,  # [max_pos, ROT] float32: cos in the first half, sin in the second
    slot_mapping,  # [T]; -1: not stored
    k_cache,  # [num_blocks, Hkv, block_size, Dh]
    v_cache,
    q_out,  # [T, Hq, Dh]
    q_norm,  # [Dh]
    k_norm,  # [Dh]
    kv_scales,  # [2, Hkv] float32
    eps,
    weight_offset,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,  # elements from a block's head to the next
    LARGEST: tl.constexpr,  # number of a byte that is used; 0: no scales
    HAS_Q_NORM: tl.constexpr,
    HAS_K_NORM: tl.constexpr,
    HAS_SCALES: tl.constexpr,  # static ones; else each row's are computed
    INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    NUM_ALL: tl.constexpr = NUM_HEADS + 2 * NUM_KV_HEADS
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    is_query = heads < NUM_HEADS
    is_key = (heads >= NUM_HEADS) & (heads < NUM_HEADS + NUM_KV_HEADS)
    is_value = (heads >= NUM_HEADS + NUM_KV_HEADS) & (heads < NUM_ALL)

    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    position = tl.load(positions + token)
    slot = tl.load(slot_mapping + token).to(tl.int64)
    partner, cos, sin = load_rotation(cos_sin, position, d, ROT, INTERLEAVED)
    if PDL:
        tl.extra.cuda.gdc_wait()

    mask = (heads[:, None] < NUM_ALL) & (d[None, :] < HEAD_DIM)
    base = qkv + token * (NUM_ALL * HEAD_DIM) + heads[:, None] * HEAD_DIM
    raw = tl.load(base + d[None, :], mask=mask, other=0.0)
    x = raw.to(tl.float32)
    other = tl.load(base + partner[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_Q_NORM or HAS_K_NORM:
        rstd = tl.rsqrt(tl.sum(x * x, 1) / HEAD_DIM + eps)[:, None]
        in_head = d < HEAD_DIM
        if HAS_Q_NORM:
            w = tl.load(q_norm + d, mask=in_head, other=0.0).to(tl.float32) + weight_offset
            wp = tl.load(q_norm + partner, mask=in_head, other=0.0).to(tl.float32) + weight_offset
            x = tl.where(is_query[:, None], x * rstd * w[None, :], x)
            other = tl.where(is_query[:, None], other * rstd * wp[None, :], other)
        if HAS_K_NORM:
            w = tl.load(k_norm + d, mask=in_head, other=0.0).to(tl.float32) + weight_offset
            wp = tl.load(k_norm + partner, mask=in_head, other=0.0).to(tl.float32) + weight_offset
            x = tl.where(is_key[:, None], x * rstd * w[None, :], x)
            other = tl.where(is_key[:, None], other * rstd * wp[None, :], other)
    out = x * cos[None, :] + other * sin[None, :]

    tl.store(
        q_out + token * (NUM_HEADS * HEAD_DIM) + heads[:, None] * HEAD_DIM + d[None, :],
        out.to(q_out.dtype.element_ty),
        mask=mask & is_query[:, None],
    )
    block = slot // BLOCK_SIZE
    offset = slot % BLOCK_SIZE
    kv_head = tl.where(is_value, heads - NUM_HEADS - NUM_KV_HEADS, heads - NUM_HEADS)
    head = (block * NUM_KV_HEADS + kv_head) * HEAD_STRIDE
    to_cache = (head + offset * HEAD_DIM)[:, None] + d[None, :]
    # Compared as a tile: the interpreter's masks cannot be joined with a scalar.
    stored = mask & (tl.zeros([BLOCK_H, 1], dtype=tl.int64) <= slot)
    if LARGEST > 0:
        # Beyond the head both are zero.
        rows = tl.where(is_value[:, None], raw.to(tl.float32), out)
        if HAS_SCALES:
            of_head = kv_head + tl.where(is_value, NUM_KV_HEADS, 0)
            scale = tl.load(kv_scales + of_head, mask=is_key | is_value, other=1.0)
        else:
            scale = row_scales(rows, LARGEST)
        keys = to_bytes(rows, scale, LARGEST, k_cache.dtype.element_ty)
        values = keys
        at = (head + BLOCK_SIZE * HEAD_DIM) // 4 + offset
        is_stored = tl.zeros([BLOCK_H], dtype=tl.int64) <= slot
        floats = tl.pointer_type(tl.float32)
        tl.store(k_cache.to(floats) + at, scale, mask=is_stored & is_key)
        tl.store(v_cache.to(floats) + at, scale, mask=is_stored & is_value)
    else:
        keys, values = out.to(k_cache.dtype.element_ty), raw.to(v_cache.dtype.element_ty)
    tl.store(k_cache + to_cache, keys, mask=stored & is_key[:, None])
    tl.store(v_cache + to_cache, values, mask=stored & is_value[:, None])


def qk_norm_rope_store_kv(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    interleaved: bool = False,
    kv_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Norms and rotates query and key heads and writes keys and values into the cache.

    Args:
        qkv: [T, (num_heads + 2 num_kv_heads) * head_dim].
        positions: [T] int32, rows of cos_sin. They and slot_mapping were complete before the kernel
            that precedes this one began: they are read without waiting for it.
        cos_sin: [max_pos, rot] float32, cos in the first half; rot <= head_dim, even.
        slot_mapping: [T] int32, block * block_size + offset; -1: the token is not stored.
        k_cache, v_cache: [num_blocks, num_kv_heads, block_size, head_dim].
        q_norm, k_norm: [head_dim], RMS norm of each head before the rotation.
        interleaved: pairs are (0, 1), (2, 3) ... instead of (0, rot/2), (1, rot/2 + 1) ...
        kv_scales: [2, num_kv_heads] float32, of keys and values in a cache of bytes; None: of each
            row its own.

    Returns:
        q [T, num_heads, head_dim].

    Raises:
        ValueError: on a wrong shape, layout or device.
    """
    check_tensors(
        qkv=qkv,
        positions=positions,
        cos_sin=cos_sin,
        slot_mapping=slot_mapping,
        q_norm=q_norm,
        k_norm=k_norm,
        kv_scales=kv_scales,
    )
    if kv_scales is not None:
        check_shape("kv_scales", kv_scales, 2, num_kv_heads)
    rows = qkv.shape[0]
    num_all = num_heads + 2 * num_kv_heads
    check_shape("qkv", qkv, rows, num_all * head_dim)
    check_shape("positions", positions, rows)
    check_shape("slot_mapping", slot_mapping, rows)
    num_blocks, _, block_size, _ = k_cache.shape
    check_shape("k_cache", k_cache, num_blocks, num_kv_heads, block_size, head_dim)
    check_caches(k_cache, v_cache)
    rot = cos_sin.shape[1]
    if rot % 2 or rot > head_dim:
        raise ValueError(f"{rot} rotated values: must be even and at most head_dim {head_dim}")
    q = torch.empty((rows, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if rows:
        block_d = next_power_of_2(head_dim)
        block_h = max(BLOCK_VALUES // block_d, 1)
        if next_power_of_2(num_all) * block_d <= MAX_TOKEN_VALUES:
            block_h = next_power_of_2(num_all)
        qk_norm_rope_store_kv_kernel[(rows, cdiv(num_all, block_h))](
            qkv,
            positions,
            cos_sin,
            slot_mapping,
            k_cache,
            v_cache,
            q,
            q_norm if q_norm is not None else qkv,
            k_norm if k_norm is not None else qkv,
            kv_scales if kv_scales is not None else qkv,
            eps,
            weight_offset,
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            BLOCK_D=block_d,
            ROT=rot,
            BLOCK_SIZE=block_size,
            HEAD_STRIDE=head_stride(block_size, head_dim, k_cache.dtype),
            LARGEST=LARGEST.get(k_cache.dtype, 0.0),
            HAS_Q_NORM=q_norm is not None,
            HAS_K_NORM=k_norm is not None,
            HAS_SCALES=kv_scales is not None,
            INTERLEAVED=interleaved,
            BLOCK_H=block_h,
            num_warps=4,
            num_stages=1,
            **pdl_options(),
        )
    return q
