"""KV caches in memory: plain float ones, and ones of a byte an element with a scale a head's row.

A cache is a tensor [num_blocks, num_kv_heads, block_size, head_dim]. One of a byte an element is a
view: in memory each block's head has its rows and, behind them, a float32 a row, by which its
elements are multiplied. The scale is computed from the row when it is stored, so that nothing need
be calibrated, or is a static one of the checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A type of a byte an element -> the largest number of it that is used.
LARGEST = {
    torch.float8_e4m3fn: 448.0,
    torch.float8_e5m2: 57344.0,
    torch.int8: 127.0,
}
_SCALE_BYTES = 4
# The least scale, of rows of zeros too.
_LEAST = 1e-12


def bytes_per_row(head_dim: int, dtype: torch.dtype) -> int:
    """Memory of one head's key, or value, of one token."""
    return head_dim * dtype.itemsize + (_SCALE_BYTES if dtype in LARGEST else 0)


def make_cache(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A cache of zeros, or on a CPU of memory as the system gives it: unused blocks cost nothing.

    Raises:
        ValueError: rows of a byte an element whose scales would not be aligned.
    """
    make = torch.empty if device.type == "cpu" else torch.zeros
    if dtype not in LARGEST:
        return make(shape, dtype=dtype, device=device)
    num_blocks, num_kv_heads, block_size, head_dim = shape
    if head_dim % _SCALE_BYTES:
        raise ValueError(f"a row of a byte an element is a multiple of 4, not {head_dim}")
    stride = head_stride(block_size, head_dim, dtype)
    memory = make((num_blocks, num_kv_heads, stride), dtype=torch.uint8, device=device)
    rows: Tensor = memory[..., : block_size * head_dim].view(shape)
    found: Tensor = rows.view(dtype)
    return found


def head_stride(block_size: int, head_dim: int, dtype: torch.dtype) -> int:
    """Elements from one head of a block to the next."""
    return block_size * bytes_per_row(head_dim, dtype) // dtype.itemsize


def is_whole(cache: Tensor) -> bool:
    """True if a cache lies in memory as ``make_cache`` lays it out."""
    if cache.numel() == 0:
        return True
    _, num_kv_heads, block_size, head_dim = cache.shape
    stride = head_stride(block_size, head_dim, cache.dtype)
    wanted = (num_kv_heads * stride, stride, head_dim, 1)
    return all(
        size == 1 or found == want
        for size, found, want in zip(cache.shape, cache.stride(), wanted, strict=True)
    )


def scales_of(cache: Tensor) -> Tensor:
    """The scales of a cache of a byte an element, where they are: float32 [blocks, heads, rows]."""
    num_blocks, num_kv_heads, block_size, head_dim = cache.shape
    stride = head_stride(block_size, head_dim, cache.dtype) // _SCALE_BYTES
    first = (cache.storage_offset() + block_size * head_dim) // _SCALE_BYTES
    return torch.empty(0, dtype=torch.float32, device=cache.device).set_(
        cache.untyped_storage(),
        first,
        (num_blocks, num_kv_heads, block_size),
        (num_kv_heads * stride, stride, 1),
    )


def store_rows(
    cache: Tensor, block: Tensor, offset: Tensor, rows: Tensor, scales: Tensor | None = None
) -> None:
    """Write rows float32 [T, heads, head_dim] at blocks and offsets in them, int64 [T] each.

    scales: float32 [heads], of all rows of a cache of bytes; None: of each row its own.
    """
    if cache.dtype in LARGEST:
        largest = LARGEST[cache.dtype]
        scale = rows.abs().amax(-1).clamp(min=_LEAST) / largest
        scale = scale if scales is None else scales.expand_as(scale)
        scales_of(cache)[block, :, offset] = scale
        rows = (rows / scale[..., None]).clamp(-largest, largest)
        if cache.dtype == torch.int8:
            rows = rows.round()
    # Bytes: not every device has indexed stores of 8-bit floats.
    written = rows.to(cache.dtype)
    if cache.dtype.itemsize == 1:
        cache, written = cache.view(torch.uint8), written.view(torch.uint8)
    cache[block, :, offset] = written


def read_blocks(cache: Tensor, blocks: Tensor) -> Tensor:
    """Blocks int64 [B] of a cache: float32 [B, heads, block_size, head_dim]."""
    if cache.dtype not in LARGEST:
        return cache[blocks].float()
    found = cache.view(torch.uint8)[blocks].view(cache.dtype)
    return found.float() * scales_of(cache)[blocks][..., None]
