"""Small integers in 32-bit words, as most quantized files store them."""

from __future__ import annotations

import torch
from torch import Tensor


def unpack(words: Tensor, bits: int) -> Tensor:
    """int32 [..., W], packed from the lowest bit on and across words -> uint8 [..., 32W / bits].

    Whole values only: bits left at the end of a row are dropped.
    """
    words = words.contiguous()
    if 8 % bits == 0:
        # Little-endian words are bytes in the order of their values.
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=words.device)
        values = words.view(torch.uint8)[..., None] >> shifts & (1 << bits) - 1
        return values.flatten(-2)
    count = words.shape[-1] * 32 // bits
    at = torch.arange(count, device=words.device) * bits
    wide = words.to(torch.int64) & 0xFFFFFFFF
    # A value may begin in one word and end in the next.
    following = torch.nn.functional.pad(wide[..., 1:], (0, 1))
    low, high = wide[..., at // 32], following[..., at // 32]
    return ((low | high << 32) >> at % 32 & (1 << bits) - 1).to(torch.uint8)


def num_words(values: int, bits: int) -> int:
    """Words that so many values take."""
    return -(-values * bits // 32)


# As TensorFiles.read takes them.
WORDS = {"I32": torch.int32}
