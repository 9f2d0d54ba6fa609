"""GraphRunner: steps as CUDA graphs, one ahead of the host.

A step is one copy of its packed plan to the device and one graph from input ids to sampled ids,
which its last kernel writes on the device and on the host. Everything a request carries from step
to step (last token, block table row, sampling parameters) lives on the device by slot, so that step
n + 1 is launched before step n's tokens are known. Steps that no captured shape holds run the same
code kernel by kernel.

The plan is packed once; every shard of the mesh gets a copy of it and launches its own graph, rank
0 last, whose ids are the ones waited for. Of a pipeline the mesh is the last stage: a step passes
through the others (pipeline.py) before it.

Longer than other files: a step's ways, from the steady one to that of any need, are read together.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import get_ident
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo._core import Staging
from octavo.kernels.gpu import ops as gpu
from octavo.kernels.gpu.step import HEADER, HEADER_LEN
from octavo.kernels.shared_prefixes import MAX_GROUPS
from octavo.kernels.slots import RECORD_LEN
from octavo.models.registry import CausalLM
from octavo.pooling import PoolingInfo
from octavo.runner.constrained import ConstrainedSteps, Unchosen
from octavo.runner.cuda_driver import CudaDriverError, DeviceClock
from octavo.runner.cuda_graphs import (
    Padding,
    Shapes,
    StepShape,
    decode_sizes,
    exact_shape,
    launched_layers,
    mixed_rows,
)
from octavo.runner.first_kernels import compile_first_kernels
from octavo.runner.gpu_sampling import PLAIN, GpuSampling, Needs
from octavo.runner.kv_cache import KVCachePlan
from octavo.runner.largest_step import LargestStep, open_stream
from octavo.runner.loading import LoadedModel, ModelPart
from octavo.runner.logprobs import LogprobsMode, TokenLogprobs
from octavo.runner.masks import FillMasks
from octavo.runner.pipeline import Pipeline
from octavo.runner.prompt_scorer import PromptSpan, ScoredRows, collected, moved
from octavo.runner.request_state import RequestState
from octavo.runner.runner import InFlight, Observer, ShardLostError, is_device_error
from octavo.runner.sampler import SampledTokens
from octavo.runner.shard import GpuShard, StepIds
from octavo.runner.sizing import StepSizes, available_bytes, fit_cache, max_num_seqs
from octavo.runner.stage_shard import StageShard
from octavo.runner.staging import StagingBuffer

if TYPE_CHECKING:
    from octavo._core import ScheduledBatch


GIB = 1 << 30
# Groups of a step, the shortest prefix, and the least tokens that a group need not read: 16,384 of
# an 8B model's layer are 64 MB, which an H200 reads in 15 us; a kernel more costs it 2.
PREFIX_SHARING = (MAX_GROUPS, 512, 16384)


@dataclass(slots=True, eq=False)
class GraphInFlight(InFlight):
    """A step on the device, whose ``num_samples`` ids arrive in ``ids``."""

    ids: StepIds
    num_samples: int
    tracked: Sequence[tuple[int, list[int]]]
    logprobs: TokenLogprobs | None = None
    scored: Sequence[ScoredRows] = ()
    # Of one that waits for masks.
    unchosen: Unchosen | None = None

    @property
    def tokens(self) -> NDArray[np.int32]:
        """[num_samples], once they are there."""
        return self.ids.array[: self.num_samples]


class GraphRunner:
    """See Runner. Over the Triton op set; on a CPU without graphs, in Triton's interpreter.

    Raises:
        ModelLoadError: one request of max_model_len does not fit into memory.
    """

    # Launched while the device is at others: one, so that it never waits for the host.
    steps_ahead = 1
    keeps_kv = True
    prefix_sharing: tuple[int, int, int] | None = PREFIX_SHARING
    pooling: PoolingInfo | None = None

    def __init__(self, loaded: LoadedModel[CausalLM]) -> None:
        self._loaded = loaded
        if loaded.config.disable_cascade_attn:
            self.prefix_sharing = None
        self._on_gpu = loaded.device.type == "cuda"
        self.num_stages = len(loaded.earlier) + 1
        self.max_in_flight = self.num_stages + self.steps_ahead
        self._observer: Observer | None = None
        # The last thread on which torch has used the device: the driver's own calls need that.
        self._device_thread: int | None = None
        self._weight_bytes = {
            part.device: torch.cuda.memory_allocated(part.device)
            for part in (loaded.parts if self._on_gpu else ())
        }
        self._graph_bytes = 0

        parts = loaded.mesh.shards
        # That the host launches.
        self._num_layers = launched_layers(loaded.shape.num_layers, len(parts))
        stages = (*loaded.earlier, loaded.mesh)
        streams = {
            stage.exchange: [open_stream(part.device) for part in stage.shards] for stage in stages
        }
        tables = [
            GpuSampling(
                max_num_seqs(loaded),
                loaded.shape.vocab_size,
                loaded.config.seed,
                part.device,
                LogprobsMode.of(loaded.config.logprobs_mode),
            )
            for part in parts
        ]
        if self._on_gpu:
            gpu.set_pdl(torch.cuda.get_device_capability(loaded.device) >= (9, 0))
        self._plan, self._sizes = fit_cache(loaded, self._available_bytes())
        self._shapes = self._make_shapes()

        def make_shard(part: ModelPart[CausalLM], plan: KVCachePlan, sizes: StepSizes) -> GpuShard:
            return GpuShard(
                loaded,
                part,
                streams[loaded.mesh.exchange][part.rank],
                tables[part.rank],
                plan,
                sizes,
                plan_len=HEADER_LEN + sizes.plan_len + sizes.max_num_seqs * RECORD_LEN,
                max_padding=self._shapes.max_padding,
                num_turns=self.max_in_flight + 1,
            )

        if self._on_gpu:
            largest = [
                LargestStep(loaded, tables, streams[stage.exchange], stage) for stage in stages
            ]
            compile_first_kernels(
                loaded, largest, make_shard, self._plan, self._sizes, self._shapes.compiled()
            )
            # The KV cache comes before the graphs, which hold its address; they live in the part
            # of the free memory that gpu_memory_utilization leaves.
            for step in largest:
                step.reserve()
            self._plan, self._sizes = fit_cache(loaded, self._available_bytes())
        self.num_blocks = self._sizes.num_blocks
        self.block_size = self._sizes.block_size
        self.max_num_seqs = self._sizes.max_num_seqs
        self.max_num_batched_tokens = self._sizes.max_num_batched_tokens
        self.max_model_len = self._sizes.max_model_len
        states = self._sizes.states
        self.num_state_checkpoints = None if states is None else states.num_checkpoints

        # max_model_len may be less than it was, and with it the largest step.
        self._shapes = self._make_shapes()
        self.padded_prompts: Sequence[int] = self._shapes.prompt_rows
        self._padding = Padding(self._shapes, self._num_layers, loaded.model.num_weights)
        # Shapes whose graphs are captured while there is nothing to do.
        self._uncaptured: deque[StepShape] = deque()

        # The header stays in front of what the core writes, new requests' records come after it.
        length = self._sizes.plan_len + self.max_num_seqs * RECORD_LEN
        stagings = [
            StagingBuffer(length, pinned=self._on_gpu, header_len=HEADER_LEN)
            for _ in range(self.max_in_flight)
        ]
        self._next_buffer = itertools.cycle(stagings)
        # Of the step that is planned next; where nothing can be planned, of the one after that.
        self._buffer = next(self._next_buffer)
        self.mesh = loaded.mesh.map(lambda part: make_shard(part, self._plan, self._sizes))
        self._pipeline: Pipeline | None = None
        if loaded.earlier:
            self._pipeline = Pipeline(
                loaded,
                self.mesh,
                lambda part, exchange: StageShard(
                    loaded,
                    part,
                    streams[exchange][part.rank],
                    exchange,
                    self._plan,
                    self._sizes,
                    plan_len=HEADER_LEN + length,
                    max_padding=self._shapes.max_padding,
                ),
            )
        self._lead, self._followers = self.mesh.lead, self.mesh.shards[1:]
        # Shards that take part in a step before the lead does.
        self._has_others = len(loaded.parts) > 1
        self.sampling, self.prompt_scorer = self._lead.sampling, self._lead.prompt_scorer
        self._constrained = ConstrainedSteps(self.mesh, self.max_num_seqs, loaded.shape.vocab_size)
        # For the steady path, which has no time to look them up.
        self._driver, self._packed_address = self._lead.driver, self._lead.packed_address
        self._ids = itertools.cycle(self._lead.ids)
        # By the number of plain decodes: their graph's handle on the lead. Graphs of plain steps
        # are never dropped.
        self._steady: dict[int, int] = {}

    def _available_bytes(self) -> int:
        """Memory that a KV cache may take of each device."""
        loaded = self._loaded
        return min(available_bytes(loaded.config, part.device) for part in loaded.parts)

    def _make_shapes(self) -> Shapes:
        config, sizes = self._loaded.config, self._sizes
        decodes: tuple[int, ...] = ()
        if not config.enforce_eager:
            decodes = decode_sizes(sizes.max_num_seqs, config.cuda_graph_sizes)
        if not self._on_gpu:
            return Shapes(decodes)
        num_weights = self._loaded.model.num_weights
        rows = mixed_rows(self._num_layers, num_weights, sizes.max_num_batched_tokens)
        return Shapes(decodes, rows, shares=self.prefix_sharing is not None)

    # ---------------------------------------------------------------------------- between steps

    def warm_up(self) -> None:
        """Capture the widest graphs; of a pipeline, compile the first steps' kernels before."""
        shapes = self._shapes.first()
        if not self._on_gpu or not shapes:
            if self._pipeline is not None:
                self._pipeline.run_nothing()
            self.mesh.each(GpuShard.run_nothing)
            return
        device = self._loaded.device
        before = torch.cuda.memory_reserved(device)
        # Its stages hand states to each other: no stand-ins take their place (first_kernels.py).
        for shard in self._shards if self._pipeline is not None else ():
            with shard.ready(), gpu.compile_only():
                for shape in self._shapes.compiled():
                    shard.forward(shape)
        # What the widest need the pool holds for the others: they all share it.
        widest = self._shapes.widest()
        self._uncaptured.extend(widest)
        self._uncaptured.extend(shape for shape in shapes if shape not in widest)
        self._uncaptured.extend(self._shapes.shared())
        for _ in widest:
            self.idle_work()
        self._synchronize()
        self._graph_bytes = torch.cuda.memory_reserved(device) - before

    def idle_work(self) -> bool:
        """Capture one more graph, some 50 ms while nothing is in flight; False if none is left."""
        if not self._uncaptured:
            return False
        shape = self._uncaptured.popleft()
        if self._pipeline is not None:
            self._pipeline.capture(shape)
        self.mesh.each(GpuShard.capture, shape)
        return True

    @property
    def _shards(self) -> list[StageShard | GpuShard]:
        """Of all stages."""
        earlier = self._pipeline.shards if self._pipeline is not None else []
        return [*earlier, *self.mesh.shards]

    def _synchronize(self) -> None:
        """Wait for every device."""
        for shard in self._shards:
            torch.cuda.synchronize(shard.device)

    def enter_thread(self) -> None:
        """Keep the calling thread, which does nothing but step, on the lead's stream."""
        self._lead.enter_thread()

    def is_fatal(self, error: BaseException) -> bool:
        """True if a device's context is broken, or a shard is lost."""
        return isinstance(error, CudaDriverError | ShardLostError) or is_device_error(error)

    def memory(self) -> list[tuple[str, str]]:
        """Sizes and memory use by purpose: of every GPU, if there are several."""
        rows = [*self._plan.rows(self._loaded.kv_dtype), *self._sizes.rows()]
        if not self._on_gpu:
            return [("device", str(self._loaded.device)), *rows]
        graphs = (
            f"{len(self._lead.graphs)}, {self._graph_bytes / GIB:,.2f} GiB; "
            f"{len(self._uncaptured)} more when idle"
        )
        devices = dict.fromkeys(shard.device for shard in self._shards)
        per_device = [self._device_memory(device) for device in devices]
        if len(devices) > 1:
            named = zip(devices, per_device, strict=True)
            per_device = [[(f"{name}, {d}", value) for name, value in r] for d, r in named]
        return [*itertools.chain(*per_device), ("CUDA graphs", graphs), *rows]

    def _device_memory(self, device: torch.device) -> list[tuple[str, str]]:
        free, total = torch.cuda.mem_get_info(device)
        weights, states = self._weight_bytes[device], self._sizes.states
        cache = sum(shard.kv_bytes for shard in self._shards if shard.device == device)
        cache += states.nbytes if states is not None else 0
        activations = torch.cuda.memory_reserved(device) - weights - cache - self._graph_bytes
        return [
            ("device", torch.cuda.get_device_name(device)),
            ("weights", f"{weights / GIB:,.2f} GiB"),
            ("activations", f"{activations / GIB:,.2f} GiB"),
            ("free", f"{free / GIB:,.2f} of {total / GIB:,.2f} GiB"),
        ]

    def observe(self, observer: Observer | None) -> DeviceClock | None:
        """Report to ``observer`` each wait for the device; returns a clock of the lead's stream."""
        self._observer = observer
        lead = self._lead
        if observer is None or lead.driver is None or lead.stream is None:
            return None
        return DeviceClock(lead.driver, lead.stream)

    # ------------------------------------------------------------------------------------ steps

    def next_staging(self) -> Staging:
        """The staging area of the next step; as many rotate as steps may be in flight."""
        return self._buffer.staging

    def launch(
        self, batch: ScheduledBatch, staging: Staging, requests: Mapping[int, RequestState]
    ) -> InFlight:
        """Start a planned step and return while the device works.

        A step of decodes that ask for nothing comes here after the host has waited milliseconds for
        the last one: none of the code is in the caches then, and each function called costs ten
        times what it does in a loop. So such a step runs through these lines alone.
        """
        assert self._buffer.staging is staging
        buffer, self._buffer = self._buffer, next(self._next_buffer)
        num = batch.num_samples
        graph = self._steady.get(num)
        if (
            graph is None
            or batch.num_tokens != num
            or batch.num_decodes != num
            or batch.new_slots
            or batch.num_constrained
            or batch.num_state_saves
            or batch.num_shared_groups
            or self.sampling.demanding
            or self.prompt_scorer.unscored
            or self._driver is None
            or get_ident() != self._device_thread
        ):
            return self._launch_any(batch, buffer, requests)
        packed_len = batch.packed_len
        ids = next(self._ids)
        HEADER.pack_into(
            buffer.header, 0, num, num, num, num, batch.num_block_updates, 0, packed_len, ids.turn
        )
        length = HEADER_LEN + packed_len
        if self._has_others:
            shape = self._shapes.find(num, 0, 0)
            assert shape is not None
            if self._pipeline is not None:
                self._pipeline.launch(
                    batch, buffer, length, shape, ids, padded=True, has_context=True
                )
            self._replay_followers((shape, False), buffer, 4 * length, ids.turn)
        self._driver.run_step((self._packed_address, buffer.address, 4 * length), graph, ids.handle)
        return GraphInFlight(batch.step_id, ids, num, ())

    def _launch_any(
        self, batch: ScheduledBatch, buffer: StagingBuffer, requests: Mapping[int, RequestState]
    ) -> InFlight:
        """Any step, its needs found out one by one."""
        if not (batch.num_state_restores or batch.num_state_saves):
            return self._launch_step(batch, buffer, requests)
        # Both before the step: once that is over, the host may write the next plan there.
        first, last = HEADER_LEN + batch.state_restores_offset, HEADER_LEN + batch.packed_len
        saves = []
        for shard in self._shards:
            rows = shard.upload_rows(buffer.host[first:last])
            restored, saved = rows.tensor_split([2 * batch.num_state_restores])
            shard.copy_states(restored)
            saves.append(saved)
        in_flight = self._launch_step(batch, buffer, requests)
        for shard, saved in zip(self._shards, saves, strict=True):
            shard.copy_states(saved)
        self._device_thread = get_ident()
        return in_flight

    def _launch_step(
        self,
        batch: ScheduledBatch,
        buffer: StagingBuffer,
        requests: Mapping[int, RequestState],
    ) -> InFlight:
        """The step itself, without the copies of states around it."""
        num_samples, num_reqs = batch.num_samples, batch.num_reqs
        num_tokens, packed_len = batch.num_tokens, batch.packed_len
        with self._lead.ready():
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
            has_context = get_ident() == self._device_thread
            # Graphs keep neither raw logits nor hidden rows.
            shape = None
            if batch.num_constrained and not spans:
                shape = self._shapes.find(*split)
            elif not (needs.keep_raw or spans):
                shape = self._padding.choose(split, needs.adjusted, self._lead.graphs)
            exact = exact_shape(*split)
            if batch.num_shared_groups and num_decodes == num_reqs:
                exact = exact._replace(shares=True)
                shape = None if shape is None else shape._replace(shares=True)
            if self._pipeline is not None:
                self._pipeline.launch(
                    batch,
                    buffer,
                    length,
                    shape or exact,
                    arriving,
                    padded=shape is not None,
                    has_context=has_context,
                )
            if batch.num_constrained:
                unchosen = self._constrained.launch(
                    buffer,
                    length,
                    shape,
                    exact,
                    num_samples,
                    needs,
                    moved(spans, split[0], exact.decode_rows),
                    has_context=has_context,
                )
                self._device_thread = get_ident()
                return GraphInFlight(
                    batch.step_id,
                    arriving,
                    num_samples,
                    needs.tracked,
                    scored=unchosen.scored,
                    unchosen=unchosen,
                )
            graph = None if shape is None else self._lead.graphs.get((shape, needs.adjusted))
            if shape is not None and graph is not None and self._driver is not None and has_context:
                ids, logits = graph.output
                if num_decodes == num_tokens and not needs.adjusted and not shape.shares:
                    self._steady[num_samples] = graph.handle
                if self._has_others:
                    self._replay_followers(
                        (shape, needs.adjusted), buffer, 4 * length, arriving.turn
                    )
                self._driver.run_step(
                    (self._packed_address, buffer.address, 4 * length),
                    graph.handle,
                    arriving.handle,
                )
            else:
                rows = moved(spans, split[0], exact.decode_rows)
                ids, logits, scored = self._compute(buffer.host[:length], shape, exact, needs, rows)
            logprobs = None
            if needs.num_logprobs >= 0:
                logprobs = needs.copy_logprobs(logits[:num_samples], ids[:num_samples])
            self._device_thread = get_ident()
            if self._driver is not None:
                self._driver.record_event(arriving.handle)
        return GraphInFlight(batch.step_id, arriving, num_samples, needs.tracked, logprobs, scored)

    def _compute(
        self,
        staged: Tensor,
        shape: StepShape | None,
        exact: StepShape,
        needs: Needs,
        rows: Sequence[PromptSpan],
    ) -> tuple[Tensor, Tensor, Sequence[ScoredRows]]:
        """The lead's (ids, logits, scores) of a step without a graph, or to be captured."""
        if shape is not None:
            padded = self.mesh.each(lambda shard: shard.run_padded(staged, shape, needs.adjusted))
            return *padded[0], ()
        return self.mesh.each(
            lambda shard: shard.run_exact(staged, exact, needs.adjusted, needs.keep_raw, rows)
        )[0]

    def choose(self, in_flight: InFlight, fill: FillMasks) -> None:
        """Start the sampler of a step that waits for its masks."""
        assert isinstance(in_flight, GraphInFlight)
        assert in_flight.unchosen is not None
        with self._lead.ready():
            has_context = get_ident() == self._device_thread
            in_flight.logprobs = self._constrained.choose(
                in_flight.unchosen, fill, has_context=has_context
            )
            self._device_thread = get_ident()
            if self._driver is not None:
                self._driver.record_event(in_flight.ids.handle)

    def _replay_followers(
        self, key: tuple[StepShape, bool], buffer: StagingBuffer, nbytes: int, turn: int
    ) -> None:
        """Launch a captured step on all shards of the mesh but the lead."""
        for shard in self._followers:
            shard.replay(key, buffer.address, nbytes, turn)
        assert self._driver is not None
        self._driver.enter()

    def _needs(self, batch: ScheduledBatch, buffer: StagingBuffer) -> Needs:
        sampling = self.sampling
        if not sampling.demanding:
            return PLAIN
        slots = buffer.array[batch.sample_slots_offset :][: batch.num_samples]
        return sampling.needs(slots)

    def _write_records(
        self, batch: ScheduledBatch, buffer: StagingBuffer, requests: Mapping[int, RequestState]
    ) -> int:
        """Append the parameters of requests that just got a slot to the plan: their number."""
        new_slots = batch.new_slots
        if not new_slots:
            return 0
        adjusted = self.sampling.adjusted
        records = []
        for slot, request_id, num_outputs in new_slots:
            state = requests[request_id]
            records.append(self.sampling.admit(slot, state, num_outputs))
            for shard in self._followers:
                with shard.ready():
                    shard.sampling.admit(slot, state, num_outputs)
            self.prompt_scorer.admit(slot, state)
        if self.sampling.adjusted is not adjusted:
            for shard in self.mesh.shards:
                shard.drop_adjusted()
        at = batch.packed_len
        buffer.array[at : at + len(records) * RECORD_LEN] = np.concatenate(records)
        return len(records)

    def collect(self, in_flight: InFlight) -> SampledTokens:
        """The tokens of a launched step. Blocks until they are on the host."""
        assert isinstance(in_flight, GraphInFlight)
        if self._observer is None:
            self._wait(in_flight)
        else:
            self._observed_wait(in_flight)
        extras = collected(in_flight.scored) if in_flight.scored else None
        logprobs = in_flight.logprobs
        if logprobs is None:
            return SampledTokens(in_flight.tokens, extras=extras)
        return SampledTokens(
            in_flight.tokens,
            logprobs.ids.numpy(),
            logprobs.values.numpy(),
            logprobs.ranks.numpy(),
            extras,
        )

    def abandon(self) -> None:
        """See Runner."""
        if self._on_gpu:
            self._synchronize()
        self.prompt_scorer.unscored.clear()

    def _wait(self, in_flight: GraphInFlight) -> None:
        """Block until a step's ids are on the host; the tracked requests then have theirs."""
        ids, driver = in_flight.ids, self._driver
        if ids.done is not None and driver is not None and not driver.is_done(ids.handle):
            ids.done.synchronize()
        if self._has_others and self._has_lost_a_rank():
            raise ShardLostError("a shard did not come to an exchange with the others")
        if in_flight.tracked:
            for row, output_token_ids in in_flight.tracked:
                output_token_ids.append(int(ids.array[row]))
            in_flight.tracked = ()

    def _has_lost_a_rank(self) -> bool:
        lost = self.mesh.exchange.has_lost_a_rank()
        return lost or (self._pipeline is not None and self._pipeline.has_lost_a_rank())

    def _observed_wait(self, in_flight: GraphInFlight) -> None:
        """``_wait``, reported to the observer if there is one."""
        began_ns = time.perf_counter_ns()
        self._wait(in_flight)
        if self._observer is not None:
            self._observer("wait", began_ns, time.perf_counter_ns())
