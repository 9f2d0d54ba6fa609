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
    # As many words as a value has bits hold 32 values.
    count = words.shape[-1] * 32 // bits
    padded = torch.nn.functional.pad(words, (0, -words.shape[-1] % bits))
    runs = padded.view(*words.shape[:-1], -1, bits)
    values = torch.empty((*runs.shape[:-1], 32), dtype=torch.uint8, device=words.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        value = runs[..., word] >> shift
        if shift + bits > 32:  # it ends in the next word
            value = value & (1 << 32 - shift) - 1 | runs[..., word + 1] << 32 - shift
        values[..., i] = value & (1 << bits) - 1
    return values.flatten(-2)[..., :count]


def num_words(values: int, bits: int) -> int:
    """Words that so many values take."""
    return -(-values * bits // 32)


# As TensorFiles.read takes them.
WORDS = {"I32": torch.int32}
