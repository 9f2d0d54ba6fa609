"""GGUF's blocks taken apart: integers, and what groups are multiplied by and added to.

For backends whose kernels have one layout for all formats of so many bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .block_bytes import as_type, f16_at, nibbles
from .gguf import _k_scales


class Groups(NamedTuple):
    """w = q * scale + offset, groups of 32 columns.

    q: uint8 [N, K]. scale, offset: float32 [N, K / 32]; no offset: -8 * scale.
    """

    q: Tensor
    scale: Tensor
    offset: Tensor | None


# uint8 [B, bytes of a block] -> q, scale and offset of its groups.
_Parts = tuple[Tensor, Tensor, Tensor | None]


def _q4_0(b: Tensor) -> _Parts:
    return nibbles(b[:, 2:]), f16_at(b, 0), None


def _q4_1(b: Tensor) -> _Parts:
    return nibbles(b[:, 4:]), f16_at(b, 0), f16_at(b, 2)


def _q4_k(b: Tensor) -> _Parts:
    scales, mins = _k_scales(b)
    q = b[:, 16:].reshape(-1, 4, 32)
    q = torch.stack([q & 15, q >> 4], 2)
    return q, f16_at(b, 0) * scales, -f16_at(b, 2) * mins


FOUR_BITS: dict[str, tuple[int, Callable[[Tensor], _Parts]]] = {
    "Q4_0": (18, _q4_0),
    "Q4_1": (20, _q4_1),
    "Q4_K": (144, _q4_k),
}


def four_bit_groups(kind: str, blocks: Tensor) -> Groups:
    """The groups of a plane of blocks uint8 [N, row bytes] of one of FOUR_BITS."""
    n = blocks.shape[0]
    nbytes, take_apart = FOUR_BITS[kind]
    q, scale, offset = take_apart(blocks.reshape(-1, nbytes))
    return Groups(
        q.reshape(n, -1), scale.reshape(n, -1), None if offset is None else offset.reshape(n, -1)
    )


def _q8_0(b: Tensor) -> tuple[Tensor, Tensor]:
    return as_type(b[:, 2:], torch.int8), as_type(b[:, :2], torch.float16)


EIGHT_BITS: dict[str, tuple[int, Callable[[Tensor], tuple[Tensor, Tensor]]]] = {
    "Q8_0": (34, _q8_0),
}


def eight_bit_groups(kind: str, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(q int8 [N, K], scale float16 [N, K / 32]) of blocks of one of EIGHT_BITS: w = q * scale."""
    n = blocks.shape[0]
    nbytes, take_apart = EIGHT_BITS[kind]
    q, scale = take_apart(blocks.reshape(-1, nbytes))
    return q.reshape(n, -1), scale.reshape(n, -1)
