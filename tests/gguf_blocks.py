"""Random blocks of GGUF's kinds: any bytes, but scales that are ordinary numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels.formats.dense import DENSE_DTYPES
from octavo.kernels.formats.gguf import BLOCK_FORMATS
from octavo.kernels.formats.gguf_grids import GRIDS

# Every kind that is not a plain float, and those that a CPU computes with as they are.
KINDS = [name for name in BLOCK_FORMATS if name not in DENSE_DTYPES]
PACKED_KINDS = [name for name in KINDS if name not in GRIDS]

# Bytes of a block where its halves begin.
_HALVES = {
    "Q4_1": [0, 2],
    "Q5_1": [0, 2],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    "TQ1_0": [52],
    "TQ2_0": [64],
    "MXFP4": [],
    "IQ1_M": [],
}


def halves_of(kind: str) -> list[int]:
    """Where the halves of a kind's block begin; without those that lie in pieces."""
    return _HALVES.get(kind, [0])


def set_halves(kind: str, blocks: Tensor, value: Tensor) -> None:
    """Make all factors of blocks uint8 [B, bytes] the numbers float [B]."""
    half = value.to(torch.float16)[:, None].contiguous().view(torch.uint8)
    for at in halves_of(kind):
        blocks[:, at : at + 2] = half
    if kind == "MXFP4":
        # Its exponents are of what doubles the elements.
        blocks[:, 0] = value.abs().log2().round().clamp(-126, 126).to(torch.int16) + 128
    if kind == "IQ1_M":
        # A nibble of the half in each word of scales.
        for i in range(4):
            nibble = half[:, i // 2] >> 4 * (i % 2) & 15
            blocks[:, 49 + 2 * i] = blocks[:, 49 + 2 * i] & 15 | nibble << 4


def random_blocks(kind: str, rows: int, k: int) -> Tensor:
    """uint8 [rows, bytes of a row] of ``k`` elements each."""
    form = BLOCK_FORMATS[kind]
    blocks = torch.randint(0, 256, (rows * k // form.block, form.nbytes), dtype=torch.uint8)
    set_halves(kind, blocks, torch.rand(len(blocks)) * 0.1 + 0.01)
    return blocks.view(rows, -1)
