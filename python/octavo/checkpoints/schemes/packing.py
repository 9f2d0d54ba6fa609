"""Small integers in 32-bit words, as most quantized files store them."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.checkpoints.schemes.cut import Cover


def unpack(words: Tensor, along: Cover, bits: int) -> Tensor:
    """int32 [..., W], packed from the lowest bit on and across words -> uint8 [..., V].

    ``along``: the values, of ``words_of``, whose stored words these are.
    """
    values = [_unpack(piece, bits)[..., own] for piece, own in along.pieces(words, -1)]
    return values[0].contiguous() if len(values) == 1 else torch.cat(values, -1)


def _unpack(words: Tensor, bits: int) -> Tensor:
    """All whole values of words: bits left at the end of a row are dropped."""
    words = words.contiguous()
    if 8 % bits == 0:
        # Little-endian words are bytes in the order of their values.
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=words.device)
        octets = words.flatten().view(torch.uint8).view(*words.shape, 4)
        values = octets[..., None] >> shifts & (1 << bits) - 1
        return values.flatten(-3)
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
