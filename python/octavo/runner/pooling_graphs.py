"""PoolingGraphs: steps of an embedding model as CUDA graphs, padded to a few shapes.

An encoder of 22M parameters computes a batch in less time than the host needs to launch its
kernels one by one. A step that is captured is one copy to the device, one graph, and one copy of
the vectors back.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.layers.context import StepContext
from octavo.runner.cuda_driver import CudaDriver, make_event
from octavo.runner.cuda_graphs import CapturedGraph, GraphCache, computing

# Texts of a step: empty ones cost a lane of the attention kernel's search each.
_NUM_TEXTS = (1, 4, 16, 64, 256)

Forward = Callable[[Tensor, StepContext, Tensor | None], Tensor]


class TextBatch(NamedTuple):
    """Whole texts end to end, on the host, int32."""

    input_ids: NDArray[np.int32]  # [T]
    positions: NDArray[np.int32]  # [T]
    is_second: NDArray[np.int32] | None  # [T], 1 for tokens of pairs' second texts
    starts: NDArray[np.int32]  # [R + 1], from 0


class PoolingGraphs:
    """Runs ``forward(input_ids, ctx, is_second)`` -> float32 [R, D] for padded batches.

    Nothing of a text is left when its step is over, so that its keys and values need no blocks of
    the scheduler's: here a step's texts take the cache's first blocks, one text after the other.
    Padding tokens are stored nowhere and belong to no text; padding texts are empty, and their
    rows of the result mean nothing.

    Args:
        num_rows: the tokens of the shapes, ascending.
        block_size: of the cache, which holds every step of these shapes, each text in blocks of
            its own.
        max_len: tokens of the longest text.
        stream: where everything runs; None (a CPU) captures nothing.
    """

    def __init__(
        self,
        forward: Forward,
        num_rows: Sequence[int],
        max_num_texts: int,
        *,
        block_size: int,
        max_len: int,
        device: torch.device,
        stream: torch.cuda.Stream | None,
    ) -> None:
        self._forward, self._block_size = forward, block_size
        self._num_rows = tuple(num_rows)
        # Up to the first that holds as many; they grow by fours.
        self._num_texts = tuple(n for n in _NUM_TEXTS if n < 4 * max_num_texts)
        self._graphs: GraphCache[Tensor] = GraphCache(stream)
        self._stream, self._on_gpu = stream, stream is not None
        length = 4 * self._num_rows[-1] + 3 * self._num_texts[-1] + 1
        self._host = torch.zeros(length, dtype=torch.int32, pin_memory=self._on_gpu)
        self._array = self._host.numpy()
        self._device_ints = torch.zeros(length, dtype=torch.int32, device=device)
        self._rows = np.arange(self._num_rows[-1], dtype=np.int32)
        blocks = torch.arange(-(-max_len // block_size), dtype=torch.int32, device=device)
        self._blocks = blocks[None]
        self._driver = None if stream is None else CudaDriver(stream.cuda_stream)
        self._done = None if stream is None else make_event(stream)
        self._result = torch.empty(0, pin_memory=self._on_gpu)
        # The driver's own calls need a thread on which torch has used the device.
        self._thread: int | None = None

    def run(self, batch: TextBatch) -> NDArray[np.float32] | None:
        """[R, D]; None where no shape holds the batch."""
        num_tokens, num_texts = len(batch.input_ids), len(batch.starts) - 1
        rows = _at_least(self._num_rows, num_tokens)
        texts = _at_least(self._num_texts, num_texts)
        if rows is None or texts is None:
            return None
        key = (rows, texts, batch.is_second is not None)
        length = self._fill(batch, rows, texts)
        graph = self._graphs.get(key)
        if graph is not None and self._thread == threading.get_ident():
            return self._replay(graph, length, num_texts)
        with computing(self._stream):
            self._device_ints[:length].copy_(self._host[:length], non_blocking=True)
            vectors = self._graphs.run(key, lambda: self._compute(*key))
            values: NDArray[np.float32] = vectors[:num_texts].cpu().numpy()
        self._thread = threading.get_ident()
        return values

    def _replay(
        self, graph: CapturedGraph[Tensor], length: int, num_texts: int
    ) -> NDArray[np.float32]:
        """The same in four calls of the driver."""
        assert self._driver is not None
        assert self._done is not None
        vectors = graph.output
        count = num_texts * vectors.shape[1]
        if self._result.numel() < count:
            self._result = torch.empty(count, dtype=torch.float32, pin_memory=True)
        self._driver.run_step(
            (self._device_ints.data_ptr(), self._host.data_ptr(), 4 * length),
            graph.handle,
            self._done.cuda_event,
            (self._result.data_ptr(), vectors.data_ptr(), 4 * count),
        )
        self._done.synchronize()
        # A copy: the next step's vectors arrive in the same place.
        values: NDArray[np.float32] = self._result.numpy()[:count].reshape(num_texts, -1).copy()
        return values

    def _fill(self, batch: TextBatch, rows: int, texts: int) -> int:
        """The batch and its padding, in the order that ``_compute`` reads; how many integers."""
        num_tokens, num_texts = len(batch.input_ids), len(batch.starts) - 1
        lengths = np.diff(batch.starts)
        num_blocks = -(-lengths // self._block_size)
        first_blocks = np.cumsum(num_blocks, dtype=np.int32) - num_blocks
        kinds = 3 if batch.is_second is None else 4
        tokens = self._array[: kinds * rows].reshape(kinds, rows)
        tokens[:, num_tokens:] = np.array([0, 0, -1, 0], np.int32)[:kinds, None]
        tokens[0, :num_tokens] = batch.input_ids
        tokens[1, :num_tokens] = batch.positions
        # Where a text's first token is stored, less its row.
        shifts = first_blocks * self._block_size - batch.starts[:-1]
        np.add(np.repeat(shifts, lengths), self._rows[:num_tokens], out=tokens[2, :num_tokens])
        if batch.is_second is not None:
            tokens[3, :num_tokens] = batch.is_second
        length = kinds * rows + 3 * texts + 1
        firsts, seq_lens, starts = np.split(self._array[kinds * rows : length], [texts, 2 * texts])
        firsts[:num_texts], firsts[num_texts:] = first_blocks, 0
        seq_lens[:num_texts], seq_lens[num_texts:] = lengths, 0
        starts[: num_texts + 1], starts[num_texts + 1 :] = batch.starts, num_tokens
        return length

    def _compute(self, rows: int, texts: int, has_pairs: bool) -> Tensor:
        sizes = [rows] * (4 if has_pairs else 3) + [texts, texts, texts + 1]
        ids, positions, slot_mapping, *second, firsts, seq_lens, starts = self._device_ints[
            : sum(sizes)
        ].split_with_sizes(sizes)
        context = StepContext(
            positions=positions,
            slot_mapping=slot_mapping,
            slots=torch.arange(texts, dtype=torch.int32, device=ids.device),
            seq_lens=seq_lens,
            query_start_loc=starts,
            block_table=firsts[:, None] + self._blocks,
            num_reqs=texts,
            num_decodes=0,
            # Bounds; the kernels' grids do not depend on lengths.
            max_query_len=rows,
            max_seq_len=rows,
        )
        return self._forward(ids, context, second[0] if second else None)


def _at_least(sizes: Sequence[int], n: int) -> int | None:
    at = bisect_left(sizes, n)
    return sizes[at] if at < len(sizes) else None
