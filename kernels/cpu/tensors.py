"""Checks of tensors before their addresses go to Rust.

A wrong call is a ValueError here and never a read out of bounds there; Rust checks sizes and index
values once more. A step makes some two hundred of these checks, so each is a few attribute reads.
"""

from __future__ import annotations

import torch
from torch import Tensor

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
F32 = DTYPE_CODES[torch.float32]


def refuse(t: object, name: str, want: str) -> ValueError:
    """The error for a tensor that does not meet a call's requirement."""
    if not isinstance(t, Tensor):
        return ValueError(f"{name} must be a tensor, not {type(t).__name__}")
    layout = "contiguous" if t.is_contiguous() else "not contiguous"
    return ValueError(
        f"{name} must be {want}; it is {t.dtype} {tuple(t.shape)} on {t.device}, {layout}"
    )


def float_code(t: Tensor, name: str) -> int:
    """The dtype code of a contiguous float tensor on the CPU."""
    code = DTYPE_CODES.get(t.dtype)
    if code is None or not t.is_cpu or not t.is_contiguous():
        raise refuse(t, name, "a contiguous float32, bfloat16 or float16 CPU tensor")
    return code


def matrix(t: Tensor, name: str) -> tuple[int, int, int]:
    """(dtype code, rows, columns)"""
    code = float_code(t, name)
    if t.dim() != 2:
        raise refuse(t, name, "2-D")
    rows, cols = t.shape
    return code, rows, cols


def vector(t: Tensor | None, name: str, size: int) -> tuple[int, int]:
    """(address, dtype code) of a float vector, (0, 0) of None."""
    if t is None:
        return 0, 0
    code = float_code(t, name)
    if t.numel() != size or t.dim() != 1:
        raise refuse(t, name, f"of shape ({size},)")
    return t.data_ptr(), code


def int_address(t: Tensor, name: str, size: int) -> int:
    """The address of an int32 vector."""
    if (
        t.dtype != torch.int32
        or not t.is_cpu
        or not t.is_contiguous()
        or t.numel() != size
        or t.dim() != 1
    ):
        raise refuse(t, name, f"a contiguous int32 CPU tensor of shape ({size},)")
    return t.data_ptr()


def caches(k: Tensor, v: Tensor) -> tuple[int, tuple[int, int, int, int, int]]:
    """(dtype code, blocks, heads, block_size, head_dim, elements from block to block)"""
    code = DTYPE_CODES.get(k.dtype)
    shape = k.shape
    if code is None or not k.is_cpu or len(shape) != 4:
        raise refuse(k, "k_cache", "a 4-D float CPU tensor")
    blocks, heads, size, dim = shape
    stride = k.stride()
    if v.shape != shape or v.dtype != k.dtype or v.stride() != stride or not v.is_cpu:
        raise refuse(v, "v_cache", "like k_cache")
    if stride[1:] != (size * dim, dim, 1) and k.numel():
        raise refuse(k, "k_cache", "contiguous within a block")
    return code, (blocks, heads, size, dim, stride[0])
