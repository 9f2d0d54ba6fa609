"""GGUF's block formats: one plane, "blocks", of 32 or 256 consecutive elements of a row each.

A block holds its scales and its integers together (llama.cpp, ggml-common.h). The Rust core decodes
the same formats at speed; tests hold both to the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .format import Format, PlaneMap

# uint8 [B, bytes of a block] -> float32 [B, elements of a block].
Decoder = Callable[[Tensor], Tensor]


class BlockFormat(Format):
    """Blocks of ``block`` elements in ``nbytes`` bytes; plane "blocks": uint8 [N, row bytes].

    The plane may be a view of a mapped file, at any address.
    """

    def __init__(self, name: str, block: int, nbytes: int, decode: Decoder) -> None:
        self.name = name
        self.block = block
        self.nbytes = nbytes
        self._decode = decode

    def row_bytes(self, k: int) -> int:
        """Bytes of a row of ``k`` elements."""
        return k // self.block * self.nbytes

    def check(self, planes: PlaneMap, shape: tuple[int, int]) -> None:
        n, k = shape
        if n < 0 or k < 0 or k % self.block:
            raise ValueError(f"{self.name}: shape {shape}: K must be a multiple of {self.block}")
        if set(planes) != {"blocks"}:
            raise ValueError(f"{self.name} has one plane, blocks, not {', '.join(planes)}")
        blocks = planes["blocks"]
        if blocks.dtype != torch.uint8 or not blocks.is_contiguous():
            raise ValueError("blocks must be a contiguous uint8 tensor")
        if tuple(blocks.shape) != (n, self.row_bytes(k)):
            raise ValueError(
                f"{self.name} {shape} takes {n} rows of {self.row_bytes(k)} bytes, "
                f"blocks is {list(blocks.shape)}"
            )

    def dequantize(self, planes: PlaneMap, shape: tuple[int, int]) -> Tensor:
        return self._decode(planes["blocks"].reshape(-1, self.nbytes)).reshape(shape)

    def columns(self, planes: PlaneMap, begin: int, end: int) -> dict[str, Tensor]:
        part = planes["blocks"][:, self.row_bytes(begin) : self.row_bytes(end)]
        return {"blocks": part.contiguous()}


def quantize(weight: Tensor, name: str) -> dict[str, Tensor]:
    """Round a float weight [N, K] to Q4_0, Q4_1 or Q8_0 (nearest, per group of 32): its planes.

    Raises:
        ValueError: another format, or K not a multiple of 32.
    """
    n, k = weight.shape
    if name not in ("Q4_0", "Q4_1", "Q8_0"):
        raise ValueError(f"cannot quantize to {name!r}; known: Q4_0, Q4_1, Q8_0")
    if k % 32:
        raise ValueError(f"{name}: K must be a multiple of 32, not {k}")
    w = weight.detach().to(torch.float32).reshape(-1, 32)
    if name == "Q8_0":
        d = _as_f16(w.abs().amax(1, keepdim=True) / 127)
        q = (w / _nonzero(d)).round().clamp(-127, 127).to(torch.int8).view(torch.uint8)
        blocks = torch.cat([_f16_bytes(d), q], 1)
    else:
        if name == "Q4_0":
            # The element of largest magnitude, sign kept, becomes exactly -8.
            extreme = w.gather(1, w.abs().argmax(1, keepdim=True))
            d = _as_f16(extreme / -8)
            m = -8 * d
            head = _f16_bytes(d)
        else:
            m = _as_f16(w.amin(1, keepdim=True))
            d = _as_f16((w.amax(1, keepdim=True) - m) / 15)
            head = torch.cat([_f16_bytes(d), _f16_bytes(m)], 1)
        q = ((w - m) / _nonzero(d)).round().clamp(0, 15).to(torch.uint8)
        blocks = torch.cat([head, q[:, :16] | (q[:, 16:] << 4)], 1)
    return {"blocks": blocks.reshape(n, BLOCK_FORMATS[name].row_bytes(k))}


def _as_f16(x: Tensor) -> Tensor:
    return x.to(torch.float16).to(torch.float32)


def _nonzero(d: Tensor) -> Tensor:
    return torch.where(d == 0, torch.ones_like(d), d)


def _f16_bytes(x: Tensor) -> Tensor:
    return x.to(torch.float16).contiguous().view(torch.uint8)


def _as(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes reinterpreted; copied first, since a view needs an aligned storage offset."""
    return blocks.clone(memory_format=torch.contiguous_format).view(dtype)


def _f16(blocks: Tensor, at: int) -> Tensor:
    """The half at byte ``at`` of each block: float32 [B, 1]."""
    return _as(blocks[:, at : at + 2], torch.float16).to(torch.float32)


def _nibbles(packed: Tensor) -> Tensor:
    """[B, n] bytes -> [B, 2n]: all low nibbles, then all high ones."""
    return torch.cat([packed & 15, packed >> 4], 1)


def _high_bits(blocks: Tensor, at: int) -> Tensor:
    """32 bits at byte ``at``, bit j for element j: uint8 [B, 32] of 0 or 16."""
    bits = blocks[:, at : at + 4, None] >> torch.arange(8, device=blocks.device, dtype=torch.uint8)
    return (bits & 1).reshape(-1, 32) << 4


def _q4_0(b: Tensor) -> Tensor:
    return _f16(b, 0) * (_nibbles(b[:, 2:]).float() - 8)


def _q4_1(b: Tensor) -> Tensor:
    return _f16(b, 0) * _nibbles(b[:, 4:]).float() + _f16(b, 2)


def _q5_0(b: Tensor) -> Tensor:
    return _f16(b, 0) * ((_nibbles(b[:, 6:]) | _high_bits(b, 2)).float() - 16)


def _q5_1(b: Tensor) -> Tensor:
    return _f16(b, 0) * (_nibbles(b[:, 8:]) | _high_bits(b, 4)).float() + _f16(b, 2)


def _q8_0(b: Tensor) -> Tensor:
    return _f16(b, 0) * _as(b[:, 2:], torch.int8).float()


def _k_scales(b: Tensor) -> tuple[Tensor, Tensor]:
    """The 6-bit scales and mins of Q4_K and Q5_K, 8 each, packed in 12 bytes: float32 [B, 8]."""
    s = b[:, 4:16]
    low, mid, high = s[:, 0:4], s[:, 4:8], s[:, 8:12]
    scales = torch.cat([low & 63, (high & 15) | (low >> 6 << 4)], 1)
    mins = torch.cat([mid & 63, (high >> 4) | (mid >> 6 << 4)], 1)
    return scales.float(), mins.float()


def _k_values(b: Tensor, q: Tensor) -> Tensor:
    """d * scale * q - dmin * min for q uint8 [B, 8, 32]."""
    scales, mins = _k_scales(b)
    return (_f16(b, 0) * scales)[:, :, None] * q.float() - (_f16(b, 2) * mins)[:, :, None]


def _q4_k(b: Tensor) -> Tensor:
    q = b[:, 16:].reshape(-1, 4, 32)
    return _k_values(b, torch.stack([q & 15, q >> 4], 2).reshape(-1, 8, 32))


def _q5_k(b: Tensor) -> Tensor:
    q = b[:, 48:].reshape(-1, 4, 32)
    q = torch.stack([q & 15, q >> 4], 2).reshape(-1, 8, 32)
    shifts = torch.arange(8, device=b.device, dtype=torch.uint8)[None, :, None]
    high = (b[:, None, 16:48] >> shifts) & 1
    return _k_values(b, q | (high << 4))


def _q6_k(b: Tensor) -> Tensor:
    low = b[:, :128].reshape(-1, 2, 64)
    high = b[:, 128:192].reshape(-1, 2, 1, 32)
    shifts = torch.tensor([0, 2, 4, 6], device=b.device, dtype=torch.uint8)[None, None, :, None]
    # Per half of 128 elements: low nibbles of 64 bytes, then their high nibbles.
    q = torch.stack([low & 15, low >> 4], 2).reshape(-1, 2, 4, 32)
    q = (q | ((high >> shifts & 3) << 4)).reshape(-1, 16, 16).float() - 32
    scales = _as(b[:, 192:208], torch.int8).float()
    return q * (_f16(b, 208) * scales)[:, :, None]


BLOCK_FORMATS: dict[str, BlockFormat] = {
    found.name: found
    for found in (
        BlockFormat("F32", 1, 4, lambda b: _as(b, torch.float32)),
        BlockFormat("F16", 1, 2, lambda b: _as(b, torch.float16).to(torch.float32)),
        BlockFormat("BF16", 1, 2, lambda b: _as(b, torch.bfloat16).to(torch.float32)),
        BlockFormat("Q4_0", 32, 18, _q4_0),
        BlockFormat("Q4_1", 32, 20, _q4_1),
        BlockFormat("Q5_0", 32, 22, _q5_0),
        BlockFormat("Q5_1", 32, 24, _q5_1),
        BlockFormat("Q8_0", 32, 34, _q8_0),
        BlockFormat("Q4_K", 256, 144, _q4_k),
        BlockFormat("Q5_K", 256, 176, _q5_k),
        BlockFormat("Q6_K", 256, 210, _q6_k),
    )
}
