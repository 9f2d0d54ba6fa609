"""DummyWeights: random numbers in a checkpoint's place, for ``--load-format dummy``."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from octavo.checkpoints.weights import Progress
from octavo.kernels.weights import Part, Range, Rows, Stored, part_of, rows_of


class DummyWeights:
    """Random weights, the same each time, made on the device.

    One pattern of numbers in [-1, 1], repeated through all tensors: filling 8B parameters costs a
    copy each. Matrices are scaled to keep a signal's variance, so activations stay finite.
    """

    # Prime, so that a matrix's rows are all different.
    PATTERN_LEN = 4_194_301

    def __init__(
        self,
        *,
        device: torch.device,
        dtype: torch.dtype,
        act_dtype: torch.dtype,
        progress: Progress = lambda _: None,
    ) -> None:
        self._device, self._dtype, self.act_dtype = device, dtype, act_dtype
        self._progress = progress
        generator = torch.Generator().manual_seed(0)
        pattern = torch.empty(self.PATTERN_LEN).uniform_(-1, 1, generator=generator)
        self._pattern = pattern.to(device)
        self._at = 0

    def linear(self, prefix: str, shape: tuple[int, int], part: Part = None) -> Stored:
        return part_of(self._fill(shape, math.sqrt(3 / shape[1]), self._dtype), part)

    def embedding(self, prefix: str, shape: tuple[int, int], part: Part = None) -> Stored:
        return self.linear(prefix, shape, part)

    def experts(
        self,
        prefix: str,
        count: int,
        name: str,
        shape: tuple[int, int],
        part: Part = None,
        own: Range | None = None,
    ) -> Iterator[Stored]:
        begin, end = own or (0, count)
        for expert in range(count):
            # All are made, so that a shard's are those of the whole model.
            weight = self.linear(f"{prefix}.{expert}.{name}", shape, part)
            if begin <= expert < end:
                yield weight

    def vector(self, name: str, size: int, part: Rows | None = None) -> Tensor:
        if name.endswith("norm.weight"):
            vector = torch.ones(size, dtype=self.act_dtype, device=self._device)
        else:
            vector = self._fill((size,), 0.02, self.act_dtype)
        return vector if part is None else rows_of(vector, part)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._fill(shape, 0.02, self.act_dtype)

    def kv_scales(self, prefix: str, num_kv_heads: int) -> Tensor | None:
        return None

    def unread(self) -> set[str]:
        return set()

    def finish(self, read: Collection[str] = ()) -> None:
        return

    def _fill(self, shape: tuple[int, ...], scale: float, dtype: torch.dtype) -> Tensor:
        out = torch.empty(shape, dtype=dtype, device=self._device)
        flat, filled = out.view(-1), 0
        while filled < flat.numel():
            n = min(self.PATTERN_LEN - self._at, flat.numel() - filled)
            piece = self._pattern[self._at : self._at + n]
            torch.mul(piece, scale, out=flat[filled : filled + n])
            filled += n
            self._at = (self._at + n) % self.PATTERN_LEN
        self._progress(out.nbytes)
        return out
