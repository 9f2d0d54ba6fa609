"""GGUF's block formats: one plane, "blocks", of 32 or 256 consecutive elements of a row each.

A block holds its scales and its integers together (llama.cpp, ggml-common.h). The Rust core decodes
the same formats at speed; tests hold both to the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .block_bytes import Decoder, as_type, f16_at, nibbles
from .format import Format, PlaneMap
from .gguf_grids import GRIDS

# Values of IQ4's codes, spaced as weights are.
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# Twice the 4-bit floats e2m1.
E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


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


def _high_bits(blocks: Tensor, at: int) -> Tensor:
    """32 bits at byte ``at``, bit j for element j: uint8 [B, 32] of 0 or 16."""
    bits = blocks[:, at : at + 4, None] >> torch.arange(8, device=blocks.device, dtype=torch.uint8)
    return (bits & 1).reshape(-1, 32) << 4


def _q4_0(b: Tensor) -> Tensor:
    return f16_at(b, 0) * (nibbles(b[:, 2:]).float() - 8)


def _q4_1(b: Tensor) -> Tensor:
    return f16_at(b, 0) * nibbles(b[:, 4:]).float() + f16_at(b, 2)


def _q5_0(b: Tensor) -> Tensor:
    return f16_at(b, 0) * ((nibbles(b[:, 6:]) | _high_bits(b, 2)).float() - 16)


def _q5_1(b: Tensor) -> Tensor:
    return f16_at(b, 0) * (nibbles(b[:, 8:]) | _high_bits(b, 4)).float() + f16_at(b, 2)


def _q8_0(b: Tensor) -> Tensor:
    return f16_at(b, 0) * as_type(b[:, 2:], torch.int8).float()


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
    return (f16_at(b, 0) * scales)[:, :, None] * q.float() - (f16_at(b, 2) * mins)[:, :, None]


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
    scales = as_type(b[:, 192:208], torch.int8).float()
    return q * (f16_at(b, 208) * scales)[:, :, None]


def _q2_k(b: Tensor) -> Tensor:
    scales = b[:, :16]
    d, dmin = f16_at(b, 80) * (scales & 15).float(), f16_at(b, 82) * (scales >> 4).float()
    q = _pairs_of_bits(b[:, 16:80]).reshape(-1, 16, 16)
    return d[:, :, None] * q.float() - dmin[:, :, None]


def _q3_k(b: Tensor) -> Tensor:
    low = b[:, 96:104]
    shifts = torch.tensor([0, 2, 4, 6], device=b.device, dtype=torch.uint8)[None, :, None]
    high = (b[:, None, 104:108] >> shifts & 3).flatten(1)
    scales = (torch.cat([low & 15, low >> 4], 1) | high << 4).float() - 32
    third = b[:, None, :32] >> torch.arange(8, device=b.device, dtype=torch.uint8)[:, None] & 1
    q = (_pairs_of_bits(b[:, 32:96]) | third << 2).reshape(-1, 16, 16)
    return (f16_at(b, 108) * scales)[:, :, None] * (q.float() - 4)


def _pairs_of_bits(packed: Tensor) -> Tensor:
    """[B, 64] bytes, the pairs of four groups of 32 in each half: uint8 [B, 8, 32]."""
    shifts = torch.tensor([0, 2, 4, 6], device=packed.device, dtype=torch.uint8)[
        None, None, :, None
    ]
    return (packed.reshape(-1, 2, 1, 32) >> shifts & 3).flatten(1, 2)


def _entries(table: tuple[int, ...], q: Tensor) -> Tensor:
    return torch.tensor(table, dtype=torch.float32, device=q.device)[q.int()]


def _iq4_nl(b: Tensor) -> Tensor:
    return f16_at(b, 0) * _entries(_IQ4, nibbles(b[:, 2:]))


def _iq4_xs(b: Tensor) -> Tensor:
    shifts = torch.tensor([0, 2, 4, 6], device=b.device, dtype=torch.uint8)
    low = torch.stack([b[:, 4:8] & 15, b[:, 4:8] >> 4], 2).flatten(1)
    high = (b[:, 2:4, None] >> shifts & 3).flatten(1)
    scales = f16_at(b, 0) * ((low | high << 4).float() - 32)
    q = nibbles(b[:, 8:].reshape(-1, 16)).reshape(-1, 8, 32)
    return scales[:, :, None] * _entries(_IQ4, q)


def _mxfp4(b: Tensor) -> Tensor:
    # 2 to the power of e - 128 as a float32's bits; the first two are subnormal.
    e = b[:, :1].int()
    power = torch.where(e < 2, 0x200000 << e.clamp(max=1), (e - 1) << 23).view(torch.float32)
    return power * _entries(E2M1, nibbles(b[:, 1:]))


BLOCK_FORMATS: dict[str, BlockFormat] = {
    found.name: found
    for found in (
        BlockFormat("F32", 1, 4, lambda b: as_type(b, torch.float32)),
        BlockFormat("F16", 1, 2, lambda b: as_type(b, torch.float16).to(torch.float32)),
        BlockFormat("BF16", 1, 2, lambda b: as_type(b, torch.bfloat16).to(torch.float32)),
        BlockFormat("Q4_0", 32, 18, _q4_0),
        BlockFormat("Q4_1", 32, 20, _q4_1),
        BlockFormat("Q5_0", 32, 22, _q5_0),
        BlockFormat("Q5_1", 32, 24, _q5_1),
        BlockFormat("Q8_0", 32, 34, _q8_0),
        BlockFormat("Q2_K", 256, 84, _q2_k),
        BlockFormat("Q3_K", 256, 110, _q3_k),
        BlockFormat("Q4_K", 256, 144, _q4_k),
        BlockFormat("Q5_K", 256, 176, _q5_k),
        BlockFormat("Q6_K", 256, 210, _q6_k),
        BlockFormat("IQ4_NL", 32, 18, _iq4_nl),
        BlockFormat("IQ4_XS", 256, 136, _iq4_xs),
        BlockFormat("MXFP4", 32, 17, _mxfp4),
        *(BlockFormat(name, 256, nbytes, decode) for name, (nbytes, decode) in GRIDS.items()),
    )
}
