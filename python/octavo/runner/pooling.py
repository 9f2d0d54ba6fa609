"""PoolingRunner: a pooling model, and the scheduler's batches of texts through it.

The scheduler's blocks are real, but of one layer: a text is computed whole in one step, so that
all layers take turns with the same keys and values, and nothing is left when the step is over.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo._core import Staging
from octavo.layers.context import StepContext
from octavo.models.pooling_model import PoolingModel
from octavo.pooling import PoolingInfo
from octavo.runner.cuda_graphs import computing, mixed_rows
from octavo.runner.input_batch import InputBatch
from octavo.runner.library_pages import drop_library_pages
from octavo.runner.loading import LoadedModel
from octavo.runner.masks import FillMasks
from octavo.runner.pooling_graphs import PoolingGraphs, TextBatch
from octavo.runner.request_state import RequestState
from octavo.runner.runner import ComputedStep, InFlight, Observer, is_device_error
from octavo.runner.sampler import SampledTokens
from octavo.runner.sizing import StepSizes
from octavo.runner.staging import StagingBuffer

if TYPE_CHECKING:
    from octavo._core import ScheduledBatch

# Activations of more tokens leave a processor's caches; a GPU is busy with no fewer.
_CPU_TOKENS, _GPU_TOKENS = 2048, 16384
# Texts hold no memory between steps, so that there may be many in one.
_MAX_NUM_SEQS = 256
# The scheduler keeps a hundredth of its blocks back for requests that grow.
_SPARE_BLOCKS = 1.02
_NO_TOKENS = np.empty(0, np.int32)


class PoolingRunner:
    """See Runner. A step's results are extras: one vector a request, float32 [D], or [T, D]."""

    max_in_flight = 1
    num_stages = 1
    padded_prompts: Sequence[int] = ()
    keeps_kv = False
    num_state_checkpoints: int | None = None
    prefix_sharing: tuple[int, int, int] | None = None

    def __init__(self, loaded: LoadedModel[PoolingModel]) -> None:
        config, self.device = loaded.config, loaded.device
        on_cpu = self.device.type == "cpu"
        self._model = model = loaded.model
        self.pooling: PoolingInfo | None = model.info
        self._most_tokens = config.max_num_batched_tokens or (
            _CPU_TOKENS if on_cpu else _GPU_TOKENS
        )
        self.max_model_len = model.max_len
        self.block_size = config.block_size
        self.max_num_batched_tokens = max(self._most_tokens, self.max_model_len)
        most_seqs = config.max_num_seqs or _MAX_NUM_SEQS
        self.max_num_seqs = min(most_seqs, self.max_num_batched_tokens)
        blocks = self.max_num_batched_tokens // self.block_size + self.max_num_seqs
        self.num_blocks = math.ceil(blocks * _SPARE_BLOCKS) + 1
        self._sizes = StepSizes(
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_model_len=self.max_model_len,
        )
        shape = loaded.shape
        cache = (self.num_blocks, shape.num_kv_heads, self.block_size, shape.head_dim)
        k_cache, v_cache = (
            torch.zeros(cache, dtype=model.act_dtype, device=self.device) for _ in range(2)
        )
        self._cache_bytes = 2 * k_cache.nbytes
        model.bind_kv_cache(k_cache, v_cache)
        self._buffer = StagingBuffer(self._sizes.plan_len, pinned=not on_cpu)
        # True while the block table and the views are those of the step that runs.
        self._is_loaded = False
        self._batch = InputBatch(self.max_num_seqs, self._sizes.max_blocks_per_seq, self.device)
        self._stream: torch.cuda.Stream | None = None
        self._graphs: PoolingGraphs | None = None
        can_capture = model.is_capturable and not on_cpu
        is_native = config.attention_backend != "reference"
        if can_capture and is_native and not config.enforce_eager:
            # Imported here: Triton may be missing on a CPU.
            from octavo.kernels.gpu import ops as gpu

            gpu.set_pdl(torch.cuda.get_device_capability(self.device) >= (9, 0))
            # Legacy streams cannot be captured.
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            num_weights = shape.num_layers * (
                4 * shape.hidden_size**2 + 2 * shape.hidden_size * shape.intermediate_size
            )
            self._graphs = self._make_graphs(
                mixed_rows(shape.num_layers, num_weights, self._most_tokens)
            )
            # Weights and buffers were filled on the default stream.
            self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def next_staging(self) -> Staging:
        """The one staging area: steps do not overlap."""
        return self._buffer.staging

    def enter_thread(self) -> None:
        """Nothing belongs to a thread."""

    def launch(
        self, batch: ScheduledBatch, staging: Staging, requests: Mapping[int, RequestState]
    ) -> InFlight:
        """Compute a planned step, whose requests are whole texts."""
        array = self._buffer.array
        request_ids = batch.request_ids
        starts = array[batch.query_start_loc_offset :][: batch.num_reqs + 1].copy()
        is_second = np.zeros(int(starts[-1]), np.int32)
        for index, request_id in enumerate(request_ids):
            if (num_first := requests[request_id].num_first) is not None:
                is_second[starts[index] + num_first : starts[index + 1]] = 1
        self._is_loaded = False
        extras: list[tuple[int, object]] = []
        for first, last in self._parts(starts):
            rows: Sequence[NDArray[np.float32]] | None
            rows = self._run_graph(batch, first, last, starts, is_second)
            if rows is None:
                rows = self._compute(batch, first, last, starts, is_second)
            extras += zip(request_ids[first:last], rows, strict=True)
        return ComputedStep(batch.step_id, SampledTokens(_NO_TOKENS, extras=extras))

    def choose(self, in_flight: InFlight, fill: FillMasks) -> None:
        """Nothing is chosen here.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("a model for vectors has no constrained steps")

    def collect(self, in_flight: InFlight) -> SampledTokens:
        """No tokens: a vector for each request, as extras."""
        assert isinstance(in_flight, ComputedStep)
        return in_flight.sampled

    def abandon(self) -> None:
        """Wait for the device: a launch that was interrupted may have left it at work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def warm_up(self) -> None:
        """One text of one token: starts threads and pages in weights."""
        if self.device.type == "cpu":
            drop_library_pages()

        def ints(*values: int) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=self.device)

        context = StepContext(
            positions=ints(0),
            slot_mapping=ints(0),
            slots=ints(0),
            seq_lens=ints(1),
            query_start_loc=ints(0, 1),
            block_table=self._batch.block_table,
            num_reqs=1,
            num_decodes=0,
            max_query_len=1,
            max_seq_len=1,
        )
        with computing(self._stream):
            self._model(ints(0), context)

    def idle_work(self) -> bool:
        """There is none: graphs are captured for the shapes that come."""
        return False

    def memory(self) -> list[tuple[str, str]]:
        """Sizes and memory use by purpose."""
        info = self._model.info
        unit = "token" if info.is_per_token else "text"
        return [
            ("device", str(self.device)),
            ("task", f"{info.task}, {info.size} values a {unit}"),
            ("keys and values", f"{self._cache_bytes / (1 << 20):,.1f} MiB, of one layer"),
            ("longest text", f"{self.max_model_len:,} tokens"),
            ("texts in a step", f"{self.max_num_seqs:,}"),
            ("tokens in a step", f"{self.max_num_batched_tokens:,}"),
        ]

    def is_fatal(self, error: BaseException) -> bool:
        """True if the device's context is broken."""
        return is_device_error(error)

    def observe(self, observer: Observer | None) -> None:
        """Nothing to report: a step is computed within ``launch``."""

    def _make_graphs(self, num_rows: Sequence[int]) -> PoolingGraphs:
        return PoolingGraphs(
            self._model,
            num_rows,
            self.max_num_seqs,
            block_size=self.block_size,
            max_len=self.max_model_len,
            device=self.device,
            stream=self._stream,
        )

    def _run_graph(
        self,
        batch: ScheduledBatch,
        first: int,
        last: int,
        starts: NDArray[np.int32],
        is_second: NDArray[np.int32],
    ) -> Sequence[NDArray[np.float32]] | None:
        """As ``_compute``; None where graphs are off, or none holds the step."""
        if self._graphs is None:
            return None
        tokens = slice(int(starts[first]), int(starts[last]))
        ids, positions = self._buffer.array[: 2 * batch.num_tokens].reshape(2, -1)[:, tokens]
        seconds = is_second[tokens]
        values = self._graphs.run(
            TextBatch(
                input_ids=ids,
                positions=positions,
                is_second=seconds if seconds.any() else None,
                starts=starts[first : last + 1] - tokens.start,
            )
        )
        return None if values is None else list(values)

    def _parts(self, starts: NDArray[np.int32]) -> Iterator[tuple[int, int]]:
        """Neighbours of at most ``_most_tokens``: a step may be longer, for the longest text."""
        first = 0
        for index in range(1, len(starts) - 1):
            if starts[index + 1] - starts[first] > self._most_tokens:
                yield first, index
                first = index
        yield first, len(starts) - 1

    def _compute(
        self,
        batch: ScheduledBatch,
        first: int,
        last: int,
        starts: NDArray[np.int32],
        is_second: NDArray[np.int32],
    ) -> Sequence[NDArray[np.float32]]:
        """Texts ``first`` to ``last`` of a planned batch -> the values of each, [D] or [T, D]."""
        with computing(self._stream):
            if not self._is_loaded:
                packed = self._buffer.host[: batch.packed_len].to(self.device)
                self._batch.load(batch, packed)
                self._is_loaded = True
            ctx = self._batch.context
            tokens = slice(int(starts[first]), int(starts[last]))
            longest = int(np.diff(starts[first : last + 1]).max())
            part = StepContext(
                positions=ctx.positions[tokens],
                slot_mapping=ctx.slot_mapping[tokens],
                slots=ctx.slots[first:last],
                seq_lens=ctx.seq_lens[first:last],
                query_start_loc=ctx.query_start_loc[first : last + 1] - tokens.start,
                block_table=ctx.block_table,
                num_reqs=last - first,
                num_decodes=0,
                max_query_len=longest,
                max_seq_len=longest,
            )
            seconds = is_second[tokens]
            second = torch.from_numpy(seconds).to(self.device) if seconds.any() else None
            rows = self._model(self._batch.input_ids[tokens], part, second)
            values: NDArray[np.float32] = rows.cpu().numpy()
        if self._model.info.is_per_token:
            # Each text's own: a part of the step's would hold all of it in memory.
            bounds = starts[first + 1 : last] - tokens.start
            return [each.copy() for each in np.split(values, bounds)]
        return list(values)
