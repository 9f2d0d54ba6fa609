"""CUDA graphs of whole steps, and the few shapes that steps are padded to.

A graph fixes its shape: rows of decodes, requests and rows of prefill. Launching one costs the host
some microseconds, where launching its kernels one by one costs milliseconds.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch

T = TypeVar("T")

# Steps that prefill are captured up to the last of these prefilled tokens, and where a model is
# small in wider steps beyond it: see mixed_rows.
MIXED_ROWS = (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024)
MIXED_ROWS_STEP = 1024
MIXED_REQS = (1, 4, 16, 64)
MIXED_DECODES = (0, 8, 32, 64, 128, 192, 256, 384, 512, 768, 1024)
# Compiled before a server is ready and captured while it has nothing to do, beside all sizes of
# decodes: what one prompt alone takes, and one of each kind of mixed step, so that no kernel is
# compiled while requests wait.
FIRST_PREFILLS = (16, 32, 64, 128, 256, 512)
FIRST_MIXED = ((8, 4, 64), (8, 4, 1024), (32, 64, 512), (32, 64, 1024))
# Of decodes that begin with the same blocks: their kernels are those of all sizes between.
FIRST_SHARED = (4, 16, 64)
# And where a model is small, shapes that stand in for all others: a wave of 64 new requests met
# five to eight that were not captured, at 20 to 40 ms each, a quarter of 135M's time. A large model
# computes meanwhile.
STAND_IN_ROWS = (64, 256, 512, 1024, 2048, 4096, 8192)
STAND_IN_DECODES = 64


class StepShape(NamedTuple):
    """The size of a padded step: decodes of one row each, then requests that prefill.

    A tuple: it is a key that each step looks up, and a dataclass takes microseconds to hash.
    """

    decode_rows: int
    prefill_reqs: int
    prefill_rows: int
    # Of decodes alone: some begin with the same blocks, which are read once.
    shares: bool = False

    @property
    def rows(self) -> int:
        """Token rows."""
        return self.decode_rows + self.prefill_rows

    @property
    def reqs(self) -> int:
        """Requests."""
        return self.decode_rows + self.prefill_reqs


def decode_sizes(max_num_seqs: int, asked: Sequence[int] | None = None) -> tuple[int, ...]:
    """Sizes of the decode graphs: ``asked``, else powers of two, and from 16 on what lies between.

    Padding costs a decode little: its weights are read all the same, and it attends to nothing.
    """
    if asked is None:
        powers = [1 << n for n in range(max_num_seqs.bit_length())]
        asked = (*powers, *(3 * n // 2 for n in powers if n >= 16), max_num_seqs)
    return tuple(sorted({min(size, max_num_seqs) for size in asked if size > 0}))


# Launching a layer's ten kernels one by one takes the host so long on a server that is loaded, a
# quarter of it on one that is not.
LAUNCH_LAYER_S = 1e-3
# Of several shards one host launches all kernels, and changes the thread at each exchange: a shard
# takes it so much longer than if alone (bench/NOTES.md, "Two shards launched by one host").
LOCKSTEP_COST = 1.3
# What an H100 makes of the matrix products of a thousand rows and more.
DEVICE_FLOPS = 5e14
# A run kernel by kernel, which compiles what it meets, and a capture.
CAPTURE_S = 0.05


def rows_in(seconds: float, num_weights: int) -> int:
    """Rows that the device computes in that time."""
    return int(seconds * DEVICE_FLOPS / (2 * max(num_weights, 1)))


def launched_layers(num_layers: int, num_shards: int) -> int:
    """Layers of one shard that take a host as long to launch as one layer of each of all shards."""
    return num_layers if num_shards == 1 else round(num_layers * num_shards * LOCKSTEP_COST)


def mixed_rows(num_layers: int, num_weights: int, max_rows: int) -> tuple[int, ...]:
    """Prefilled tokens of the graphs that prefill, ascending.

    A graph pads, so it pays while the host would take longer to launch the step's kernels than the
    device to run them: up to 1,024 rows of an 8B model, 8,192 of one of 135M.
    ``num_layers``: as ``launched_layers``; ``num_weights``: of a shard.
    """
    last = min(rows_in(num_layers * LAUNCH_LAYER_S, num_weights), max_rows)
    wider = range(MIXED_ROWS[-1] + MIXED_ROWS_STEP, last + 1, MIXED_ROWS_STEP)
    return (*MIXED_ROWS, *wider)


class Shapes:
    """The shapes that steps may be padded to.

    ``sizes``: of the decode graphs, ascending; ``rows``: prefilled tokens of those that prefill;
    ``shares``: decodes may begin with the same blocks.
    """

    def __init__(
        self, sizes: Sequence[int], rows: Sequence[int] = MIXED_ROWS, *, shares: bool = False
    ) -> None:
        self._decodes = tuple(sizes)
        self._shared = FIRST_SHARED if shares else ()
        self._rows = tuple(rows)
        # By the number of decodes: looked up at each step.
        self._decode_shapes = [
            StepShape(self._decodes[bisect_left(self._decodes, n)], 0, 0)
            for n in range(self._decodes[-1] + 1 if self._decodes else 0)
        ]
        mixed = {*(StepShape(*shape) for shape in FIRST_MIXED), *self._stand_ins()}
        # The cheapest first.
        self._mixed = sorted(mixed, key=lambda s: (s.rows, s.reqs)) if self._decodes else []

    @property
    def prompt_rows(self) -> tuple[int, ...]:
        """Rows that a step's prompts are padded to, ascending."""
        return self._rows if self._decodes else ()

    @property
    def max_padding(self) -> int:
        """Rows, or requests, that a shape has at most beyond its step's own."""
        return self._rows[-1] + MIXED_DECODES[-1]

    def first(self) -> list[StepShape]:
        """Shapes to capture when there is time."""
        if not self._decodes:
            return []
        decodes = [StepShape(n, 0, 0) for n in self._decodes]
        return decodes + [StepShape(0, 1, rows) for rows in FIRST_PREFILLS] + self._mixed

    def shared(self) -> list[StepShape]:
        """Shapes of decodes that begin with the same blocks, to compile before the first comes."""
        return [StepShape(n, 0, 0, shares=True) for n in self._shared if n in self._decodes]

    def compiled(self) -> list[StepShape]:
        """Of ``first`` and ``shared``, those of which no other has all kernels. Those that prefill
        first: their kernels take the longest to compile."""
        first = reversed(self.first())
        own = [shape for shape in first if shape.prefill_rows or shape.rows.bit_count() == 1]
        return own + self.shared()

    def widest(self) -> list[StepShape]:
        """Of ``first``, those with the most rows of each kind: no other needs more memory."""
        if not self._decodes:
            return []
        return [StepShape(self._decodes[-1], 0, 0), self._mixed[-1]]

    def _stand_ins(self) -> list[StepShape]:
        """Shapes of which one holds any mixed step that ``find`` has a shape for."""
        if not self._decodes or self._rows[-1] <= MIXED_ROWS[-1]:
            return []
        most = self._decodes[-1]
        decodes = {_at_least(MIXED_DECODES, n) for n in (min(STAND_IN_DECODES, most), most)}
        return [
            StepShape(n, MIXED_REQS[-1], rows)
            for rows in sorted({*STAND_IN_ROWS, self._rows[-1]})
            if rows in self._rows
            for n in decodes
            if n is not None
        ]

    def stand_in(self, shape: StepShape) -> StepShape | None:
        """The cheapest of ``first`` that holds a mixed step's shape; None where none does."""
        return next((other for other in self._mixed if _holds(other, shape)), None)

    def find(self, num_decodes: int, num_prefills: int, num_rows: int) -> StepShape | None:
        """The smallest shape that holds the step; None where none does."""
        if not num_prefills:
            known = self._decode_shapes
            return known[num_decodes] if num_decodes < len(known) else None
        decodes = _at_least(MIXED_DECODES, num_decodes)
        reqs, rows = _at_least(MIXED_REQS, num_prefills), _at_least(self._rows, num_rows)
        if decodes is None or reqs is None or rows is None or not self._decodes:
            return None
        return StepShape(decodes, reqs, rows)


def exact_shape(num_decodes: int, num_prefills: int, num_rows: int) -> StepShape:
    """A step that is not captured. Prefilling requests begin at a multiple of four: their
    sections' addresses are then aligned alike in every step, and few kernels are compiled."""
    if not num_prefills:
        return StepShape(num_decodes, 0, 0)
    return StepShape(-(-num_decodes // 4) * 4, num_prefills, num_rows)


def _holds(shape: StepShape, other: StepShape) -> bool:
    return all(size >= wanted for size, wanted in zip(shape, other, strict=True))


@contextlib.contextmanager
def computing(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Without autograd, all on ``stream``, which can be captured; None is a CPU."""
    on_stream = contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)
    with torch.inference_mode(), on_stream:
        yield


def _at_least(sizes: Sequence[int], n: int) -> int | None:
    at = bisect_left(sizes, n)
    return sizes[at] if at < len(sizes) else None


@dataclass(frozen=True, slots=True)
class CapturedGraph(Generic[T]):
    """A graph, the driver's handle of it, and the tensors that a launch writes."""

    graph: torch.cuda.CUDAGraph
    handle: int
    output: T


class GraphCache(Generic[T]):
    """Graphs by key, captured at a key's second use, all in one memory pool.

    Args:
        stream: where everything runs; None on a CPU, where nothing is captured.
        other: a cache whose pool is shared.
        prepare: called with a new graph's handle before its first run.
    """

    def __init__(
        self,
        stream: torch.cuda.Stream | None,
        other: GraphCache[Any] | None = None,
        prepare: Callable[[int], None] | None = None,
    ) -> None:
        self._stream, self._prepare = stream, prepare
        self._pool: Any = None
        if stream is not None:
            self._pool = torch.cuda.graph_pool_handle() if other is None else other._pool
        self._graphs: dict[Hashable, CapturedGraph[T]] = {}
        self._seen: set[Hashable] = set()
        self._wasted: dict[Hashable, int] = {}

    def __len__(self) -> int:
        return len(self._graphs)

    def get(self, key: Hashable) -> CapturedGraph[T] | None:
        """A graph that exists. Its output holds until the next run of any graph."""
        return self._graphs.get(key)

    def stand_in(self, key: Hashable, other: Hashable, waste: int, limit: int) -> bool:
        """True if ``other``'s graph exists and may run in place of a missing one for ``key``.

        That costs ``waste`` each time; once it adds up to ``limit``, a graph of its own pays.
        """
        wasted = self._wasted.get(key, 0) + waste
        if other not in self._graphs or wasted > limit:
            return False
        self._wasted[key] = wasted
        return True

    def run(self, key: Hashable, forward: Callable[[], T]) -> T:
        """The result of ``forward``, valid until the next run of any graph."""
        held = self._graphs.get(key)
        if held is None:
            if self._stream is None or key not in self._seen:
                # Kernels are compiled here, and the libraries' first-use allocations made.
                self._seen.add(key)
                return forward()
            held = self._graphs[key] = self._capture(forward)
            if self._prepare is not None:
                self._prepare(held.handle)
        held.graph.replay()
        return held.output

    def drop(self, stale: Callable[[Hashable], bool]) -> None:
        """Forget graphs whose buffers have moved."""
        for key in [key for key in self._seen if stale(key)]:
            self._seen.discard(key)
            self._graphs.pop(key, None)

    def _capture(self, forward: Callable[[], T]) -> CapturedGraph[T]:
        graph = torch.cuda.CUDAGraph()
        # Not torch.cuda.graph: it synchronizes and collects garbage, while a step is in flight.
        # thread_local: what other threads do with the device is no part of this capture.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            output = forward()
        finally:
            graph.capture_end()
        return CapturedGraph(graph, graph.raw_cuda_graph_exec(), output)


class Padding:
    """The shape that each step is padded to, given the graphs that exist.

    A mixed step may run as a wider graph while capturing one of its own would not pay.
    """

    def __init__(self, shapes: Shapes, num_layers: int, num_weights: int) -> None:
        self._shapes = shapes
        # Rows that may be padding: at a time, and until a shape is worth a graph of its own.
        self._most_padding = rows_in(num_layers * LAUNCH_LAYER_S, num_weights)
        self._capture_rows = rows_in(CAPTURE_S, num_weights)

    def choose(
        self, split: tuple[int, int, int], adjusted: bool, graphs: GraphCache[T]
    ) -> StepShape | None:
        """The shape of a step of ``split`` decodes, prefills and prefilled rows.

        ``graphs``: by (shape, adjusted). None: no shape holds the step.
        """
        shape = self._shapes.find(*split)
        if shape is None or not shape.prefill_rows or graphs.get((shape, adjusted)) is not None:
            return shape
        other = self._shapes.stand_in(shape)
        if other is None:
            return shape
        waste = other.rows + other.reqs - shape.rows - shape.reqs
        keys = (shape, adjusted), (other, adjusted)
        if waste <= self._most_padding and graphs.stand_in(*keys, waste, self._capture_rows):
            return other
        return shape
