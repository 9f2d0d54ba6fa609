"""EmbeddingGraphs: steps of an embedding model as CUDA graphs, padded to a few shapes.

An encoder of 22M parameters computes a batch in less time than the host needs to launch its
kernels one by one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.layers.context import AttentionContext
from octavo.runner.cuda_graphs import GraphCache

# Texts of a step: empty ones cost a lane of the attention kernel's search each.
_NUM_TEXTS = (1, 4, 16, 64, 256)

Forward = Callable[[Tensor, AttentionContext, Tensor | None], Tensor]


class TextBatch(NamedTuple):
    """Whole texts end to end, on the host, int32."""

    input_ids: NDArray[np.int32]  # [T]
    positions: NDArray[np.int32]  # [T]
    slot_mapping: NDArray[np.int32]  # [T]
    is_second: NDArray[np.int32] | None  # [T], 1 for tokens of pairs' second texts
    slots: NDArray[np.int32]  # [R]
    starts: NDArray[np.int32]  # [R + 1], from 0


class EmbeddingGraphs:
    """Runs ``forward(input_ids, ctx, is_second)`` -> [R, D] for padded batches.

    Padding tokens are stored nowhere and belong to no text; padding texts are empty, and their
    rows of the result mean nothing.

    ``num_rows``: the tokens of the shapes, ascending. ``stream``: where everything runs; None
    (a CPU) captures nothing.
    """

    def __init__(
        self,
        forward: Forward,
        num_rows: Sequence[int],
        max_num_texts: int,
        block_table: Tensor,
        stream: torch.cuda.Stream | None,
    ) -> None:
        self._forward, self._block_table = forward, block_table
        self._num_rows = tuple(num_rows)
        # Up to the first that holds as many; they grow by fours.
        self._num_texts = tuple(n for n in _NUM_TEXTS if n < 4 * max_num_texts)
        self._graphs: GraphCache[Tensor] = GraphCache(stream)
        length = 4 * self._num_rows[-1] + 3 * self._num_texts[-1] + 1
        self._host = torch.zeros(length, dtype=torch.int32, pin_memory=stream is not None)
        self._array = self._host.numpy()
        self._device_ints = torch.zeros(length, dtype=torch.int32, device=block_table.device)

    def run(self, batch: TextBatch) -> Tensor | None:
        """[R, D], memory that holds until the next run; None where no shape holds the batch.

        The host buffer is free again once the result has been read.
        """
        num_tokens, num_texts = len(batch.input_ids), len(batch.slots)
        rows = _at_least(self._num_rows, num_tokens)
        texts = _at_least(self._num_texts, num_texts)
        if rows is None or texts is None:
            return None
        self._fill(batch, rows, texts)
        length = 4 * rows + 3 * texts + 1
        self._device_ints[:length].copy_(self._host[:length], non_blocking=True)
        has_pairs = batch.is_second is not None
        key = (rows, texts, has_pairs)
        return self._graphs.run(key, lambda: self._compute(*key))[:num_texts]

    def _fill(self, batch: TextBatch, rows: int, texts: int) -> None:
        """The batch and its padding, in the order that ``_compute`` reads."""
        tokens = self._array[: 4 * rows].reshape(4, rows)
        num_tokens, num_texts = len(batch.input_ids), len(batch.slots)
        tokens[:, num_tokens:] = [[0], [0], [-1], [0]]
        tokens[0, :num_tokens] = batch.input_ids
        tokens[1, :num_tokens] = batch.positions
        tokens[2, :num_tokens] = batch.slot_mapping
        tokens[3, :num_tokens] = 0 if batch.is_second is None else batch.is_second
        slots, seq_lens, starts = np.split(self._array[4 * rows :], [texts, 2 * texts])
        slots[:num_texts], slots[num_texts:] = batch.slots, 0
        seq_lens[:num_texts], seq_lens[num_texts:] = np.diff(batch.starts), 0
        starts[: num_texts + 1] = batch.starts
        starts[num_texts + 1 : texts + 1] = num_tokens

    def _compute(self, rows: int, texts: int, has_pairs: bool) -> Tensor:
        sizes = [rows] * 4 + [texts, texts, texts + 1]
        ids, positions, slot_mapping, is_second, slots, seq_lens, starts = self._device_ints[
            : sum(sizes)
        ].split_with_sizes(sizes)
        context = AttentionContext(
            positions=positions,
            slot_mapping=slot_mapping,
            slots=slots,
            seq_lens=seq_lens,
            query_start_loc=starts,
            block_table=self._block_table,
            num_reqs=texts,
            num_decodes=0,
            # Bounds; the kernels' grids do not depend on lengths.
            max_query_len=rows,
            max_seq_len=rows,
        )
        return self._forward(ids, context, is_second if has_pairs else None)


def _at_least(sizes: Sequence[int], n: int) -> int | None:
    at = bisect_left(sizes, n)
    return sizes[at] if at < len(sizes) else None
