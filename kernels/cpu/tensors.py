"""Checks of tensors before their places go to Rust.

A wrong call is a ValueError here and never a read out of bounds there; Rust checks sizes and index
values once more. A tensor travels as its address, element type and shape in one tuple, so that one
in another's place is an error as well. A step makes some two hundred of these checks, so each is a
few attribute reads.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from ..kv_cache import head_stride

# Names of element types in the Rust core.
FLOATS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
F32 = FLOATS[torch.float32]
# Those of caches of a byte an element.
_BYTES = {torch.int8: "I8", torch.float8_e4m3fn: "E4M3", torch.float8_e5m2: "E5M2"}

# address, element type, elements
Vector: TypeAlias = tuple[int, str, int]
# address, element type, rows, columns
Matrix: TypeAlias = tuple[int, str, int, int]
# keys' and values' addresses, element type, (blocks, heads, block_size, head_dim, block stride)
KvCache: TypeAlias = tuple[int, int, str, tuple[int, int, int, int, int]]


def refuse(t: object, name: str, want: str) -> ValueError:
    """The error for a tensor that does not meet a call's requirement."""
    if not isinstance(t, Tensor):
        return ValueError(f"{name} must be a tensor, not {type(t).__name__}")
    layout = "contiguous" if t.is_contiguous() else "not contiguous"
    return ValueError(
        f"{name} must be {want}; it is {t.dtype} {tuple(t.shape)} on {t.device}, {layout}"
    )


def float_type(t: Tensor, name: str) -> str:
    """The element type of a contiguous float tensor on the CPU."""
    element = FLOATS.get(t.dtype)
    if element is None or not t.is_cpu or not t.is_contiguous():
        raise refuse(t, name, "a contiguous float32, bfloat16 or float16 CPU tensor")
    return element


def matrix(t: Tensor, name: str) -> Matrix:
    """A float matrix."""
    element = float_type(t, name)
    if t.dim() != 2:
        raise refuse(t, name, "2-D")
    rows, cols = t.shape
    return t.data_ptr(), element, rows, cols


def float32_matrix(t: Tensor, name: str, cols: int) -> Matrix:
    """A float32 matrix of ``cols`` columns."""
    if float_type(t, name) != F32 or t.dim() != 2 or t.shape[1] != cols:
        raise refuse(t, name, f"float32 (T, {cols})")
    return t.data_ptr(), F32, t.shape[0], cols


def vector(t: Tensor, name: str, size: int) -> Vector:
    """A float vector."""
    element = float_type(t, name)
    if t.numel() != size or t.dim() != 1:
        raise refuse(t, name, f"of shape ({size},)")
    return t.data_ptr(), element, size


def optional_vector(t: Tensor | None, name: str, size: int) -> Vector | None:
    """A float vector, or None."""
    return None if t is None else vector(t, name, size)


def optional_scales(t: Tensor | None, heads: int) -> Matrix | None:
    """Static scales of keys and values, float32 [2, heads], or None."""
    if t is None:
        return None
    if t.shape[0] != 2:
        raise refuse(t, "kv_scales", f"float32 (2, {heads})")
    return float32_matrix(t, "kv_scales", heads)


def ints(t: Tensor, name: str, size: int) -> Vector:
    """An int32 vector."""
    if (
        t.dtype != torch.int32
        or not t.is_cpu
        or not t.is_contiguous()
        or t.numel() != size
        or t.dim() != 1
    ):
        raise refuse(t, name, f"a contiguous int32 CPU tensor of shape ({size},)")
    return t.data_ptr(), "I32", size


def int_matrix(t: Tensor, name: str) -> Matrix:
    """An int32 matrix."""
    if t.dtype != torch.int32 or not t.is_cpu or not t.is_contiguous() or t.dim() != 2:
        raise refuse(t, name, "a contiguous 2-D int32 CPU tensor")
    rows, cols = t.shape
    return t.data_ptr(), "I32", rows, cols


def kv_cache(k: Tensor, v: Tensor) -> KvCache:
    """One layer's keys and values."""
    element = FLOATS.get(k.dtype) or _BYTES.get(k.dtype)
    shape = k.shape
    if element is None or not k.is_cpu or len(shape) != 4:
        raise refuse(k, "k_cache", "a 4-D CPU tensor of floats or of a byte an element")
    blocks, heads, size, dim = shape
    stride = k.stride()
    if v.shape != shape or v.dtype != k.dtype or v.stride() != stride or not v.is_cpu:
        raise refuse(v, "v_cache", "like k_cache")
    wanted = (head_stride(size, dim, k.dtype), dim, 1)
    # A dimension of one element has any stride.
    if stride[1:] != wanted and any(
        found != want and num > 1
        for num, found, want in zip(shape[1:], stride[1:], wanted, strict=True)
    ):
        raise refuse(k, "k_cache", "as make_cache lays it out within a block")
    if element not in FLOATS.values():
        end = max(blocks - 1, 0) * stride[0] + heads * wanted[0]
        for t, name in ((k, "k_cache"), (v, "v_cache")):
            if t.storage_offset() + end > t.untyped_storage().nbytes():
                raise refuse(t, name, "of rows with scales behind them")
    return k.data_ptr(), v.data_ptr(), element, (blocks, heads, size, dim, stride[0])
