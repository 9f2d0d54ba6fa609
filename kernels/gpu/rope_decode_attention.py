"""rope_decode_attention: rotation, store and attention of single queries, in one kernel."""

from __future__ import annotations

import torch

from .decode_attention import Rotation, decode_attention
from .launch import check_shape, check_tensors
from .paged_kv import check_caches, kv_shape


def max_rope_decodes(head_dim: int) -> int:
    """The most requests for which one kernel is faster than two.

    From whole steps of three models on an H100, see bench/NOTES.md, "Rotation and store inside
    decode attention"; heads of 128 gain nothing at any number of requests.
    """
    return 64 if head_dim <= 64 else 0


def rope_decode_attention(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    num_heads: int,
    scale: float,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    interleaved: bool = False,
    sliding_window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """qk_norm_rope_store_kv and paged_attention of R requests with one query each, in one kernel.

    A request's token is at position seq_lens[r] - 1; those before it were in the cache before the
    step began. The int32 tensors were complete before the kernel that precedes this one began:
    they and those keys and values are read without waiting for it. A request of length 0 is
    padding: its row becomes zeros.

    Args:
        qkv: [R, (num_heads + 2 Hkv) * Dh].
        cos_sin: [max_pos, rot] float32, cos in the first half; rot <= Dh, even.
        slot_mapping: [R] int32, block * block_size + offset; -1: the token is not stored.
        k_cache, v_cache: [num_blocks, Hkv, block_size, Dh].
        block_table: [max slots, max blocks] int32; request r's row is slots[r].
        slots, seq_lens: [R] int32.
        q_norm, k_norm, eps, weight_offset, interleaved: see qk_norm_rope_store_kv.
        scale, sliding_window, softcap, sinks, slopes: see paged_attention.

    Returns:
        [R, num_heads * Dh].

    Raises:
        ValueError: on a wrong shape, layout or device.
    """
    check_tensors(
        qkv=qkv,
        cos_sin=cos_sin,
        slot_mapping=slot_mapping,
        block_table=block_table,
        slots=slots,
        seq_lens=seq_lens,
        q_norm=q_norm,
        k_norm=k_norm,
        sinks=sinks,
        slopes=slopes,
    )
    rows = qkv.shape[0]
    kv = kv_shape(k_cache, num_heads)
    projected = (kv.group + 2) * kv.num_kv_heads * kv.head_dim
    check_shape("qkv", qkv, rows, projected)
    check_caches(k_cache, v_cache)
    for name, tensor in (("slot_mapping", slot_mapping), ("slots", slots), ("seq_lens", seq_lens)):
        check_shape(name, tensor, rows)
    rot = cos_sin.shape[1]
    if rot % 2 or not 0 < rot <= kv.head_dim:
        raise ValueError(f"{rot} rotated values: must be even and at most head_dim {kv.head_dim}")
    out = torch.empty((rows, num_heads * kv.head_dim), dtype=qkv.dtype, device=qkv.device)
    if rows:
        decode_attention(
            qkv,
            k_cache,
            v_cache,
            block_table,
            slots,
            seq_lens,
            out,
            scale=scale,
            sliding_window=sliding_window,
            softcap=softcap,
            sinks=sinks,
            slopes=slopes,
            rotation=Rotation(
                cos_sin, slot_mapping, q_norm, k_norm, eps, weight_offset, interleaved
            ),
        )
    return out
