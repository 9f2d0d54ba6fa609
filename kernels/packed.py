"""Weights as they travel: QuantTensor (bytes of a checkpoint file) and PackedLinear (ready to use).

A loader makes QuantTensors, ``ops.prepare_linear`` turns them into what ``ops.linear`` computes
with fastest on its device, and the QuantTensor may then be dropped. Block formats are GGUF's:
groups of 32 (or super-blocks of 256) consecutive elements along K.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# kind -> (elements in one block, bytes of one block)
BLOCK_FORMATS: dict[str, tuple[int, int]] = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}


@dataclass(frozen=True)
class QuantTensor:
    """A 2-D weight [N, K] as the checkpoint stores it.

    data: uint8, contiguous, 1-D, N * K / block_elements * block_bytes bytes; rows one after another
        in the file's order. It may be a view of a mapped file, at any address.
    kind: a key of BLOCK_FORMATS.
    shape: (N, K).
    row_permutation: int64 [N]; row i of the weight is row ``row_permutation[i]`` of the file.
        None: the file's order.

    Raises:
        ValueError: kind unknown, K not a multiple of the block, data of another size or type, a
            permutation that is not one.
    """

    data: Tensor
    kind: str
    shape: tuple[int, int]
    row_permutation: Tensor | None = None

    def __post_init__(self) -> None:
        if self.kind not in BLOCK_FORMATS:
            raise ValueError(f"unknown kind {self.kind!r}; known: {', '.join(BLOCK_FORMATS)}")
        elements, nbytes = BLOCK_FORMATS[self.kind]
        n, k = self.shape
        if n < 0 or k < 0 or k % elements:
            raise ValueError(f"{self.kind}: shape {self.shape}: K must be a multiple of {elements}")
        if self.data.dtype != torch.uint8 or not self.data.is_contiguous():
            raise ValueError("data must be a contiguous uint8 tensor")
        if self.data.numel() != n * (k // elements) * nbytes:
            raise ValueError(
                f"{self.kind} {self.shape} takes {n * (k // elements) * nbytes} bytes, "
                f"data has {self.data.numel()}"
            )
        perm = self.row_permutation
        if perm is not None and (
            perm.dtype != torch.int64
            or perm.shape != (n,)
            or not torch.equal(perm.sort().values, torch.arange(n, device=perm.device))
        ):
            raise ValueError(f"row_permutation must be an int64 permutation of {n} rows")

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        elements, nbytes = BLOCK_FORMATS[self.kind]
        return self.shape[1] // elements * nbytes

    def rows(self) -> Tensor:
        """The bytes [N, row_bytes] in the weight's row order; a copy if there is a permutation."""
        rows = self.data.view(self.shape[0], self.row_bytes)
        return rows if self.row_permutation is None else rows[self.row_permutation]

    def dequantize(self) -> Tensor:
        """The weight as float32 [N, K], exactly as the format defines it."""
        n, k = self.shape
        elements, nbytes = BLOCK_FORMATS[self.kind]
        blocks = self.rows().reshape(n * (k // elements), nbytes)
        return _DEQUANTIZE[self.kind](blocks).reshape(n, k)


class PackedLinear:
    """A weight [N, K] in some device's own layout. Only the op set that made it can read it.

    shape: (N, K); kind: what is stored ("BF16", "Q4_1", ...); nbytes: memory it takes.
    """

    shape: tuple[int, int]
    kind: str
    nbytes: int

    def dequantize(self) -> Tensor:
        """What the kernels compute with, as float32 [N, K]; for tests and fallbacks."""
        raise NotImplementedError


def quantize(weight: Tensor, kind: str) -> QuantTensor:
    """Round a float weight [N, K] to Q4_0, Q4_1 or Q8_0 (nearest, per group of 32).

    Raises:
        ValueError: another kind, or K not a multiple of 32.
    """
    n, k = weight.shape
    if kind not in ("Q4_0", "Q4_1", "Q8_0"):
        raise ValueError(f"cannot quantize to {kind!r}; known: Q4_0, Q4_1, Q8_0")
    if k % 32:
        raise ValueError(f"{kind}: K must be a multiple of 32, not {k}")
    w = weight.detach().to(torch.float32).reshape(-1, 32)
    if kind == "Q8_0":
        d = _as_f16(w.abs().amax(1, keepdim=True) / 127)
        q = (w / _nonzero(d)).round().clamp(-127, 127).to(torch.int8).view(torch.uint8)
        blocks = torch.cat([_f16_bytes(d), q], 1)
    else:
        if kind == "Q4_0":
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
    return QuantTensor(blocks.reshape(-1).contiguous(), kind, (n, k))


def stack_shape(weights: Sequence[Tensor | QuantTensor]) -> tuple[int, int]:
    """(N, K) of weights stacked along their rows (a fused QKV or gate-up projection).

    Raises:
        ValueError: none given, one is not 2-D, or their K differ.
    """
    if not weights:
        raise ValueError("no weights to stack")
    shapes = [tuple(w.shape) for w in weights]
    if any(len(s) != 2 for s in shapes) or len({s[1] for s in shapes}) != 1:
        raise ValueError(f"weights to stack must be [N, K] with one K, not {shapes}")
    return sum(s[0] for s in shapes), shapes[0][1]


# ------------------------------------------------------------- block formats: uint8 [B, bytes] in


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


_DEQUANTIZE: dict[str, Callable[[Tensor], Tensor]] = {
    "F32": lambda b: _as(b, torch.float32),
    "F16": lambda b: _as(b, torch.float16).to(torch.float32),
    "BF16": lambda b: _as(b, torch.bfloat16).to(torch.float32),
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
