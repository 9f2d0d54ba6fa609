"""Bytes of blocks as numbers, for the formats that are made of blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

# uint8 [B, bytes of a block] -> float32 [B, elements of a block].
Decoder: TypeAlias = Callable[[Tensor], Tensor]


def as_type(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes reinterpreted; copied first, since a view needs an aligned storage offset."""
    return blocks.clone(memory_format=torch.contiguous_format).view(dtype)


def f16_at(blocks: Tensor, at: int) -> Tensor:
    """The half at byte ``at`` of each block: float32 [B, 1]."""
    return as_type(blocks[:, at : at + 2], torch.float16).to(torch.float32)


def nibbles(packed: Tensor) -> Tensor:
    """[B, n] bytes -> [B, 2n]: all low nibbles, then all high ones."""
    return torch.cat([packed & 15, packed >> 4], 1)
