"""W4: the layout of 4-bit weights on a GPU, and how the layouts of files become it.

A row of words is cut into chunks of four groups; word c of a chunk's ``group / 2`` holds elements
2 c and 2 c + 1 of each group j of the chunk, in bits 4 j and 16 + 4 j on. One shift and one mask
give two neighbouring elements, in the halves where a pair of 16-bit floats lies, and neighbouring
words meet neighbouring activations. Measured alternatives: bench/NOTES.md, "Quantized products".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Columns that share a scale here: one dot of the matrix units takes at least 16, and beyond 128
# nothing is saved.
MIN_GROUP, MAX_GROUP = 16, 128
GROUPS = 4  # of a chunk
# The values of 4-bit floats by their bits.
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = (*_MAGNITUDES, *(-value for value in _MAGNITUDES))


@dataclass(frozen=True, slots=True)
class W4:
    """A weight [N, K] of 4 bits an element: (q - zero) * scale, q * scale + zero, or a float's, or
    codes[q] * scale.

    words: int32 [N, C group / 2] for C chunks; columns beyond K are there, with scales of 0.
    scales: bfloat16 or float16 [N, 4 C].
    zeros: int16 [N, 4 C], 16 less the zero point; or, to be added, of the scales' dtype. None: the
        zero point is 8.
    e2m1: elements are 4-bit floats, of a sign, two bits of exponent and one of mantissa.
    codes: what each of the 16 elements stands for, in the activations' type; None: nothing else.
    group: columns of a scale, a power of two.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    group: int
    shape: tuple[int, int]
    e2m1: bool = False
    codes: tuple[float, ...] | None = None

    @property
    def zero(self) -> str:
        """The kernels' name for what ``zeros`` holds."""
        if self.codes is not None:
            return "codes"
        if self.zeros is None:
            return "e2m1" if self.e2m1 else ""
        return "add" if self.zeros.is_floating_point() else "zero"

    def code_words(self, dtype: torch.dtype) -> tuple[int, ...]:
        """The codes as 16-bit floats: their lower bytes in four words, then their upper ones."""
        if self.codes is None:
            return (0,) * 8
        floats = torch.tensor(self.codes, dtype=torch.float32).to(dtype)
        planes = floats.view(torch.uint8).view(-1, 2).t().contiguous()
        return tuple(planes.view(torch.int32).flatten().tolist())

    @property
    def chunks(self) -> int:
        """Chunks of a row."""
        return self.scales.shape[1] // GROUPS

    @property
    def nbytes(self) -> int:
        """Bytes of all planes."""
        zeros = 0 if self.zeros is None else self.zeros.nbytes
        return self.words.nbytes + self.scales.nbytes + zeros


def group_of(size: int) -> int | None:
    """The group here for groups of ``size`` columns in a file; None if there is none."""
    group = min(size & -size, MAX_GROUP)
    return group if group >= MIN_GROUP else None


def pack(q: Tensor, scale: Tensor, zero: Tensor | None, group: int) -> W4:
    """Words of q uint8 [N, K], with scale and zero [N, G] for equal groups of K / G columns.

    zero: integers, zero points; floats: to be added. group: of ``group_of(K / G)``.
    """
    n, k = q.shape
    repeat = k // scale.shape[1] // group
    chunks = -(-k // (GROUPS * group))
    pad = chunks * GROUPS * group - k
    if pad:
        q = torch.nn.functional.pad(q, (0, pad))
    halves = q.view(n, chunks, GROUPS, group // 2, 2)
    words = torch.zeros((n, chunks, group // 2), dtype=torch.int32, device=q.device)
    for j in range(GROUPS):
        for half in range(2):
            words |= halves[:, :, j, :, half].to(torch.int32) << (4 * j + 16 * half)

    def spread(plane: Tensor) -> Tensor:
        plane = plane.repeat_interleave(repeat, 1) if repeat > 1 else plane
        return torch.nn.functional.pad(plane, (0, pad // group)).contiguous()

    if zero is not None and not zero.is_floating_point():
        zero = 16 - zero.to(torch.int16)
    return W4(
        words.view(n, -1), spread(scale), None if zero is None else spread(zero), group, (n, k)
    )


def unpack(weight: W4) -> Tensor:
    """The numbers that the kernels compute with: float32 [N, K]."""
    n, k = weight.shape
    words = weight.words.view(n, weight.chunks, 1, -1, 1)
    shifts = torch.tensor([[0, 4, 8, 12], [16, 20, 24, 28]], device=words.device)
    q = (words >> shifts.t()[None, None, :, None, :]) & 15
    values = q.reshape(n, -1, weight.group).float()
    scales = weight.scales.float()[:, :, None]
    if weight.codes is not None:
        codes = torch.tensor(weight.codes, device=words.device).half().float()
        values = codes[values.int()] * scales
    elif weight.e2m1:
        values = torch.tensor(E2M1, device=words.device)[values.int()] * scales
    elif weight.zeros is None:
        values = (values - 8) * scales
    elif weight.zero == "add":
        values = values * scales + weight.zeros.float()[:, :, None]
    else:
        values = (values - (16 - weight.zeros.float())[:, :, None]) * scales
    return values.reshape(n, -1)[:, :k].contiguous()
