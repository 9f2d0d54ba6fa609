"""GpuRunner: steps as CUDA graphs, one ahead of the host.

A step is one copy of its packed plan to the device and one graph from input ids to sampled ids,
which its last kernel writes on the device and on the host. Everything a request carries from step
to step (last token, block table row, sampling parameters) lives on the device by slot, so that step
n + 1 is launched before step n's tokens are known. Steps that no captured shape holds run the same
code kernel by kernel.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import get_ident
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo._core import Staging
from octavo.config import EngineConfig
from octavo.kernels import gpu
from octavo.kernels.gpu.step import (
    HEADER,
    HEADER_LEN,
    HEADER_TURN,
    StepBuffers,
    prepare_step,
)
from octavo.kernels.slots import RECORD_LEN
from octavo.layers.context import AttentionContext
from octavo.models.loader import DTYPES
from octavo.models.source import ModelSource
from octavo.runner.cuda_driver import CudaDriver, CudaDriverError, DeviceClock, make_event
from octavo.runner.cuda_graphs import (
    CAPTURE_S,
    LAUNCH_LAYER_S,
    MIXED_ROWS,
    GraphCache,
    Shapes,
    StepShape,
    computing,
    decode_sizes,
    exact_shape,
    mixed_rows,
    rows_in,
)
from octavo.runner.gpu_sampling import GpuSampling
from octavo.runner.input_batch import StagingBuffer
from octavo.runner.model_runner import InFlight, ModelRunner
from octavo.runner.prompt_scorer import PromptSpan, ScoredRows, to_host
from octavo.runner.request_state import RequestState
from octavo.runner.sampler import SampledTokens

if TYPE_CHECKING:
    from octavo._core import ScheduledBatch


@dataclass(slots=True)
class _Logprobs:
    """Host copies under way: ids, log probabilities, ranks."""

    ids: Tensor  # [S, C] int32
    values: Tensor  # [S, C] float32
    ranks: Tensor  # [S] int32


@dataclass(slots=True, eq=False)
class GpuInFlight(InFlight):
    """A step on the device, whose ``num_samples`` ids arrive in ``ids``."""

    ids: _Ids
    num_samples: int
    tracked: list[tuple[int, RequestState]]
    logprobs: _Logprobs | None = None
    scored: Sequence[ScoredRows] = ()

    @property
    def tokens(self) -> NDArray[np.int32]:
        """[num_samples], once they are there."""
        return self.ids.array[: self.num_samples]


@dataclass(slots=True, eq=False)
class _Ids:
    """Where one step's ids arrive; as many rotate as may be in flight, and one being read.

    ``turn``: which row of HostIds; ``done``: behind them on the stream, its ``handle`` the driver's
    name for it.
    """

    turn: int
    array: NDArray[np.int32]
    done: torch.cuda.Event | None
    handle: int


class _Needs(NamedTuple):
    """What a step's samples ask for together, beyond their slots' records.

    ``num_logprobs``: -1 is none; ``keep_raw``: of logits as they were before they were adjusted;
    ``tracked``: (row, request) whose ids the host must know.
    """

    adjusted: bool
    num_logprobs: int
    keep_raw: bool
    tracked: list[tuple[int, RequestState]]


# Nobody adds to it.
_UNTRACKED: list[tuple[int, RequestState]] = []
_PLAIN = _Needs(False, -1, False, _UNTRACKED)


class GpuRunner(ModelRunner):
    """A ModelRunner over the Triton op set."""

    max_in_flight = 2

    def __init__(self, config: EngineConfig, source: ModelSource) -> None:
        self._on_gpu = False
        self._stream: torch.cuda.Stream | None = None
        self._driver: CudaDriver | None = None
        self._last: GpuInFlight | None = None
        # The thread that does nothing but step, and the last on which torch has used the device:
        # the driver's own calls need one.
        self._thread: int | None = None
        self._device_thread: int | None = None
        self._weight_bytes = 0
        self._graph_bytes = 0
        # Shapes whose graphs are captured while there is nothing to do.
        self._uncaptured: deque[StepShape] = deque()
        super().__init__(config, source)

    # ---------------------------------------------------------------------------------- memory

    def _available_bytes(self) -> int:
        """What is left after the largest step has run once: nothing later needs more.

        The KV cache comes before the graphs, which hold its address; they live in the part of the
        free memory that gpu_memory_utilization leaves.
        """
        self._on_gpu = self.device.type == "cuda"
        if not self._on_gpu:
            return super()._available_bytes()
        self._weight_bytes = torch.cuda.memory_allocated(self.device)
        # Legacy streams cannot be captured.
        self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._driver = CudaDriver(self._stream.cuda_stream)
        gpu.set_pdl(torch.cuda.get_device_capability(self.device) >= (9, 0))
        self._make_sampling()
        with computing(self._stream):
            with gpu.compile_only():
                self._run_largest_step()
            self._run_largest_step()
        torch.cuda.synchronize(self.device)
        free, _total = torch.cuda.mem_get_info(self.device)
        return int(free * self.config.gpu_memory_utilization)

    def _run_largest_step(self) -> None:
        """max_num_batched_tokens of one request and max_num_seqs samples, nothing stored."""
        config, model = self.config, self.model.config
        tokens = config.max_num_batched_tokens or 8192
        if not config.enable_chunked_prefill:
            tokens = max(tokens, config.max_model_len or 0, model.max_context_len)
        dtype = DTYPES.get(config.kv_cache_dtype, self._act_dtype)
        shape = (1, model.num_kv_heads, config.block_size, model.head_dim)
        cache = torch.zeros(shape, dtype=dtype, device=self.device)
        self.model.bind_kv_cache([(cache, cache)] * model.num_layers)

        def ints(*shape: int, fill: int = 0) -> Tensor:
            return torch.full(shape, fill, dtype=torch.int32, device=self.device)

        context = AttentionContext(
            positions=ints(tokens),
            slot_mapping=ints(tokens, fill=-1),
            slots=ints(1),
            seq_lens=ints(1, fill=tokens),
            query_start_loc=torch.tensor([0, tokens], dtype=torch.int32, device=self.device),
            block_table=ints(1, -(-tokens // config.block_size)),
            num_reqs=1,
            num_decodes=0,
            max_query_len=tokens,
            max_seq_len=tokens,
        )
        hidden = self.model(ints(tokens), context)
        rows = min(self.max_num_seqs, tokens)
        logits = self.model.compute_logits(hidden[:rows])
        spare = ints(rows, fill=self.max_num_seqs)
        host = torch.zeros((1, rows), dtype=torch.int32, pin_memory=True)
        gpu.sample(logits, spare, self.sampling.adjusted, gpu.HostIds(host, ints(1)))

    def memory_table(self) -> list[tuple[str, str]]:
        """What takes how much memory, for people to read."""
        table = super().memory_table()
        if self._on_gpu:
            gib = 1 << 30
            free, total = torch.cuda.mem_get_info(self.device)
            activations = (
                torch.cuda.memory_reserved(self.device)
                - self._weight_bytes
                - self._plan.nbytes
                - self._graph_bytes
            )
            table[0] = ("device", torch.cuda.get_device_name(self.device))
            table[1:1] = [
                ("weights", f"{self._weight_bytes / gib:,.2f} GiB"),
                ("activations", f"{activations / gib:,.2f} GiB"),
                (
                    "CUDA graphs",
                    f"{len(self._graphs)}, {self._graph_bytes / gib:,.2f} GiB; "
                    f"{len(self._uncaptured)} more when idle",
                ),
                ("free", f"{free / gib:,.2f} of {total / gib:,.2f} GiB"),
            ]
        return table

    def _make_sampling(self) -> None:
        self.sampling = GpuSampling(
            self.max_num_seqs, self.model.config.vocab_size, self.config.seed, self.device
        )

    def _make_buffers(self, max_blocks_per_seq: int) -> None:
        if not self._on_gpu:
            self._make_sampling()
        sizes = (
            ()
            if self.config.enforce_eager
            else decode_sizes(self.max_num_seqs, self.config.cuda_graph_sizes)
        )
        num_layers = self.model.config.num_layers
        num_weights = self._weight_bytes // self._act_dtype.itemsize
        rows = mixed_rows(num_layers, num_weights, self.max_num_batched_tokens)
        # Rows that may be padding: at a time, and until a shape is worth a graph of its own.
        self._most_padding = rows_in(num_layers * LAUNCH_LAYER_S, num_weights)
        self._capture_rows = rows_in(CAPTURE_S, num_weights)
        self._shapes = Shapes(sizes, rows if self._on_gpu else MIXED_ROWS)
        self._graphs: GraphCache[tuple[Tensor, Tensor]] = GraphCache(self._stream)
        # By the number of plain decodes: their graph's handle. Graphs of plain steps are never
        # dropped.
        self._steady: dict[int, int] = {}
        reqs = self.max_num_seqs + self._shapes.max_padding
        num_rows = self.max_num_batched_tokens + self.max_num_seqs + self._shapes.max_padding

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=self.device)

        self.buffers = StepBuffers(
            input_ids=ints(num_rows),
            positions=ints(num_rows),
            slot_mapping=ints(num_rows),
            slots=ints(reqs),
            seq_lens=ints(reqs),
            query_start_loc=ints(reqs + 1),
            sample_rows=ints(reqs),
            sample_slots=ints(reqs),
            block_table=ints(self.max_num_seqs + 1, max_blocks_per_seq),
            slot_table=self.sampling.slot_table,
        )
        self._stagings = [self._new_staging_buffer() for _ in range(self.max_in_flight)]
        self._next_staging = 0
        self._packed = torch.zeros_like(self._stagings[0].host, device=self.device)
        self._packed_address = self._packed.data_ptr()
        turns = self.max_in_flight + 1
        host = torch.zeros((turns, reqs), dtype=torch.int32, pin_memory=self._on_gpu)
        self._host_ids = gpu.HostIds(host, self._packed[HEADER_TURN : HEADER_TURN + 1])
        self._ids = itertools.cycle([self._new_ids(turn) for turn in range(turns)])

    def _new_staging_buffer(self) -> StagingBuffer:
        length = Staging.required_len(
            self.max_num_batched_tokens, self.max_num_seqs, self.max_model_len, self.block_size
        )
        # The header stays in front of what Rust writes, new requests' records come behind it.
        records = self.max_num_seqs * RECORD_LEN
        return StagingBuffer(length + records, (), pinned=self._on_gpu, header_len=HEADER_LEN)

    def _new_ids(self, turn: int) -> _Ids:
        done = None if self._stream is None else make_event(self._stream)
        handle = 0 if done is None else done.cuda_event
        return _Ids(turn, self._host_ids.ids[turn].numpy(), done, handle)

    # ----------------------------------------------------------------------------------- steps

    def warm_up(self) -> None:
        """Compile all kernels that the first steps need, and capture the widest graphs."""
        shapes = self._shapes.first()
        with self._ready():
            # An empty plan: every row is padding, nothing is stored.
            self._packed.zero_()
            if not self._on_gpu or not shapes:
                self._forward(StepShape(1, 0, 0), adjusted=False)
                return
            before = torch.cuda.memory_reserved(self.device)
            with gpu.compile_only():
                # Those that prefill first: their kernels take the longest to compile.
                for shape in reversed(shapes):
                    # The others' kernels are those of their neighbours.
                    if shape.prefill_rows or shape.rows.bit_count() == 1:
                        self._forward(shape, adjusted=False)
        # What the widest need the pool holds for the others: they all share it.
        widest = self._shapes.widest()
        self._uncaptured.extend(widest)
        self._uncaptured.extend(shape for shape in shapes if shape not in widest)
        for _ in widest:
            self.capture_next()
        torch.cuda.synchronize(self.device)
        self._graph_bytes = torch.cuda.memory_reserved(self.device) - before

    def capture_next(self) -> bool:
        """Capture one more graph, some 50 ms while nothing is in flight; False if none is left."""
        if not self._uncaptured:
            return False
        shape = self._uncaptured.popleft()
        with self._ready():
            # The last step's plan must not be carried out again.
            self._packed.zero_()
            # It is captured at its second run.
            for _ in range(2):
                self._run(shape, adjusted=False)
        return True

    def is_fatal(self, error: BaseException) -> bool:
        """Whether no later step can succeed: the device's context is broken."""
        return isinstance(error, CudaDriverError) or super().is_fatal(error)

    def enter_thread(self) -> None:
        """This thread does nothing but step: it stays on the runner's stream."""
        if self._stream is not None:
            torch.cuda.set_device(self._stream.device)
            torch.cuda.set_stream(self._stream)
            torch.inference_mode().__enter__()  # for good: it costs a step 20 us
            self._thread = get_ident()

    def launch(
        self, batch: ScheduledBatch, staging: Staging, requests: Mapping[int, RequestState]
    ) -> InFlight:
        """Start a planned step and return while the device works.

        A step of decodes that ask for nothing comes here after the host has waited milliseconds for
        the last one: none of the code is in the caches then, and each function called costs ten
        times what it does in a loop. So such a step runs through these lines alone.
        """
        num = batch.num_samples
        graph = self._steady.get(num)
        if (
            graph is None
            or batch.num_tokens != num
            or batch.num_decodes != num
            or batch.new_slots
            or self.sampling.demanding
            or self.prompt_scorer.unscored
            or self._driver is None
            or get_ident() != self._device_thread
        ):
            return self._launch_any(batch, staging, requests)
        buffer = self._stagings[0]
        if buffer.staging is not staging:
            buffer = self._stagings[1]
        packed_len = batch.packed_len
        ids = next(self._ids)
        HEADER.pack_into(
            buffer.header, 0, num, num, num, num, batch.num_block_updates, 0, packed_len, ids.turn
        )
        self._driver.run_step(
            (self._packed_address, buffer.address, 4 * (HEADER_LEN + packed_len)),
            graph,
            ids.handle,
        )
        self._last = in_flight = GpuInFlight(batch.step_id, ids, num, _UNTRACKED)
        return in_flight

    def _launch_any(
        self, batch: ScheduledBatch, staging: Staging, requests: Mapping[int, RequestState]
    ) -> InFlight:
        """Any step, what it needs found out one by one."""
        buffer = next(s for s in self._stagings if s.staging is staging)
        num_samples, num_reqs = batch.num_samples, batch.num_reqs
        num_tokens, packed_len = batch.num_tokens, batch.packed_len
        with self._ready():
            num_records = self._write_records(batch, buffer, requests)
            num_decodes = batch.num_decodes
            if num_decodes == num_reqs and num_samples != num_reqs:
                num_decodes = 0  # only rows of a step that prefills are chosen from
            arriving = next(self._ids)
            HEADER.pack_into(
                buffer.header,
                0,
                num_tokens,
                num_reqs,
                num_decodes,
                num_samples,
                batch.num_block_updates,
                num_records,
                packed_len,
                arriving.turn,
            )
            length = HEADER_LEN + packed_len + num_records * RECORD_LEN
            needs = self._needs(batch, buffer)
            spans = self.prompt_scorer.plan(batch, buffer.array)
            scored: Sequence[ScoredRows] = ()
            split = (num_decodes, num_reqs - num_decodes, num_tokens - num_decodes)
            # Graphs keep neither raw logits nor hidden rows.
            shape = None if needs.keep_raw or spans else self._shapes.find(*split)
            if shape is not None:
                shape = self._captured(shape, needs.adjusted)
            graph = None if shape is None else self._graphs.get((shape, needs.adjusted))
            has_context = get_ident() == self._device_thread
            if graph is not None and self._driver is not None and has_context:
                ids, logits = graph.output
                if num_decodes == num_tokens and not needs.adjusted:
                    self._steady[num_samples] = graph.handle
                self._driver.run_step(
                    (self._packed_address, buffer.address, 4 * length),
                    graph.handle,
                    arriving.handle,
                )
            else:
                self._packed[:length].copy_(buffer.host[:length], non_blocking=True)
                if shape is not None:
                    ids, logits = self._run(shape, needs.adjusted)
                else:
                    exact = exact_shape(*split)
                    hidden = self._hidden(exact)
                    ids, logits = self._sample(hidden, exact, needs.adjusted, needs.keep_raw)
                    if spans:
                        moved = _moved(spans, num_decodes, exact.decode_rows)
                        scored = self.prompt_scorer.score(moved, hidden)
            logprobs = None
            if needs.num_logprobs >= 0:
                logprobs = self._logprobs(
                    logits[:num_samples], ids[:num_samples], needs.num_logprobs
                )
            self._device_thread = get_ident()
            if self._driver is not None:
                self._driver.record_event(arriving.handle)
        self._last = GpuInFlight(
            batch.step_id, arriving, num_samples, needs.tracked, logprobs, scored
        )
        return self._last

    def _captured(self, shape: StepShape, adjusted: bool) -> StepShape:
        """The shape, or one that is captured and holds it, while its own graph would not pay."""
        if self._graphs.get((shape, adjusted)) is None and shape.prefill_rows:
            other = self._shapes.stand_in(shape)
            if other is not None:
                waste = other.rows + other.reqs - shape.rows - shape.reqs
                keys = (shape, adjusted), (other, adjusted)
                if waste <= self._most_padding and self._graphs.stand_in(
                    *keys, waste, self._capture_rows
                ):
                    return other
        return shape

    def _needs(self, batch: ScheduledBatch, buffer: StagingBuffer) -> _Needs:
        sampling = self.sampling
        if not sampling.demanding:
            return _PLAIN
        slots = buffer.array[batch.sample_slots_offset :][: batch.num_samples]
        if sampling.has_words(slots):
            # What comes next depends on what was said last.
            if self._last is not None:
                self.wait(self._last)
            sampling.ban_words(slots)
        adjusted, num_logprobs = sampling.adjusts(slots), sampling.num_logprobs(slots)
        tracked = sampling.states_of(slots) if sampling.tracks(slots) else []
        # Log probabilities are of what the model said, before it was adjusted.
        return _Needs(adjusted, num_logprobs, adjusted and num_logprobs >= 0, tracked)

    def wait(self, in_flight: GpuInFlight) -> None:
        """Block until a step's ids are on the host; the tracked requests then have theirs."""
        ids, driver = in_flight.ids, self._driver
        if ids.done is not None and driver is not None and not driver.is_done(ids.handle):
            ids.done.synchronize()
        if in_flight.tracked:
            for row, state in in_flight.tracked:
                state.output_token_ids.append(int(ids.array[row]))
            in_flight.tracked = []

    def collect(self, in_flight: InFlight) -> SampledTokens:
        """The tokens of a launched step. Blocks until they are on the host."""
        assert isinstance(in_flight, GpuInFlight)
        self.wait(in_flight)
        for scored in in_flight.scored:
            scored.record()
        logprobs = in_flight.logprobs
        if logprobs is None:
            return SampledTokens(in_flight.tokens)
        return SampledTokens(
            in_flight.tokens,
            logprobs.ids.numpy(),
            logprobs.values.numpy(),
            logprobs.ranks.numpy(),
        )

    def device_clock(self) -> DeviceClock | None:
        """What tells when the device comes past a step; None without one. It must be idle."""
        if self._driver is None or self._stream is None:
            return None
        return DeviceClock(self._driver, self._stream)

    # --------------------------------------------------------------------------------- details

    def _ready(self) -> contextlib.AbstractContextManager[None]:
        """Without autograd, on the runner's stream; the runner's own thread is so already."""
        if get_ident() == self._thread:
            return contextlib.nullcontext()
        return computing(self._stream)

    def _write_records(
        self, batch: ScheduledBatch, buffer: StagingBuffer, requests: Mapping[int, RequestState]
    ) -> int:
        """The parameters of requests that just got a slot, behind the plan: how many."""
        new_slots = batch.new_slots
        if not new_slots:
            return 0
        adjusted = self.sampling.adjusted
        records = []
        for slot, request_id in new_slots:
            records.append(self.sampling.admit(slot, requests[request_id]))
            self.prompt_scorer.admit(slot, requests[request_id])
        if self.sampling.adjusted is not adjusted:
            self._graphs.drop(lambda key: isinstance(key, tuple) and key[1] is True)
        at = batch.packed_len
        buffer.array[at : at + len(records) * RECORD_LEN] = np.concatenate(records)
        return len(records)

    def _run(self, shape: StepShape, adjusted: bool) -> tuple[Tensor, Tensor]:
        return self._graphs.run((shape, adjusted), lambda: self._forward(shape, adjusted))

    def _forward(self, shape: StepShape, adjusted: bool) -> tuple[Tensor, Tensor]:
        """(ids [S], logits [S, V]) of the packed plan, padded to the shape."""
        return self._sample(self._hidden(shape), shape, adjusted)

    def _hidden(self, shape: StepShape) -> Tensor:
        """Hidden states [rows, D] of the packed plan, padded to the shape."""
        buffers = self.buffers
        prepare_step(
            self._packed,
            buffers,
            decode_rows=shape.decode_rows,
            prefill_reqs=shape.prefill_reqs,
            prefill_rows=shape.prefill_rows,
        )
        rows, reqs = shape.rows, shape.reqs
        context = AttentionContext(
            positions=buffers.positions[:rows],
            slot_mapping=buffers.slot_mapping[:rows],
            slots=buffers.slots[:reqs],
            seq_lens=buffers.seq_lens[:reqs],
            query_start_loc=buffers.query_start_loc[: reqs + 1],
            block_table=buffers.block_table,
            num_reqs=reqs,
            num_decodes=shape.decode_rows,
            # Bounds; the kernels' grids do not depend on lengths.
            max_query_len=max(shape.prefill_rows, 1),
            max_seq_len=self.max_model_len,
        )
        return self.model(buffers.input_ids[:rows], context)

    def _sample(
        self, hidden: Tensor, shape: StepShape, adjusted: bool, keep_raw: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(ids [S], logits [S, V]); the logits are as sampled from, or with ``keep_raw`` as
        the model said them."""
        buffers = self.buffers
        if shape.prefill_reqs:
            hidden = hidden.index_select(0, buffers.sample_rows[: shape.reqs])
        logits = self.model.compute_logits(hidden)
        raw = logits.clone() if keep_raw else logits
        state = self.sampling.adjusted if adjusted else self.sampling.plain
        slots = buffers.sample_slots[: shape.reqs]
        return gpu.sample(logits, slots, state, self._host_ids), raw

    def _logprobs(self, logits: Tensor, ids: Tensor, most: int) -> _Logprobs:
        """Of the raw logits [S, V]: the chosen token, then the ``most`` best."""
        total = logits.logsumexp(-1, keepdim=True)
        chosen = ids.long()[:, None]
        logit = logits.gather(1, chosen)
        best, best_ids = logits.topk(most, dim=-1)
        ranks = (logits > logit).sum(-1, dtype=torch.int32) + 1
        return _Logprobs(
            to_host(torch.cat([chosen, best_ids], 1).int()),
            to_host(torch.cat([logit, best], 1) - total),
            to_host(ranks),
        )


def _moved(spans: list[PromptSpan], num_decodes: int, decode_rows: int) -> list[PromptSpan]:
    """The plan's rows in the padded step, where prefills come after ``decode_rows``."""
    return [
        span
        if span.row < num_decodes
        else dataclasses.replace(span, row=span.row - num_decodes + decode_rows)
        for span in spans
    ]
