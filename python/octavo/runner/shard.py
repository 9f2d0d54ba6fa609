"""GpuShard: what one GPU owns of a running model, and the code of a step on it.

A stream and the driver's calls on it, its part of the model with its KV cache, the packed plan and
the buffers it is unpacked to, the sampling state of every slot, and the graphs captured over all of
these. Every shard of a mesh runs the same steps; each samples from the whole logits with the same
seeds, so that all know each request's last token and nothing is sent back.

Without a GPU there is no stream and nothing is captured: Triton's interpreter runs the same code.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import get_ident

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.kernels.gpu import ops as gpu
from octavo.kernels.gpu.step import HEADER_TURN, StepBuffers, prepare_step
from octavo.kernels.kv_cache import make_cache
from octavo.layers.context import StepContext
from octavo.models.registry import CausalLM
from octavo.runner.cuda_driver import CudaDriver, SideStream, make_event
from octavo.runner.cuda_graphs import GraphCache, StepShape, computing
from octavo.runner.gpu_sampling import GpuSampling
from octavo.runner.kv_cache import KVCachePlan, allocate_kv_cache
from octavo.runner.loading import LoadedModel, ModelPart
from octavo.runner.logprobs import LogprobsMode
from octavo.runner.masks import RowMasks
from octavo.runner.prompt_scorer import PromptScorer, PromptSpan, ScoredRows
from octavo.runner.sizing import StepSizes, max_num_seqs, max_step_tokens


@dataclass(slots=True, eq=False)
class StepIds:
    """The place where a step's ids arrive; as many rotate as may be in flight, and one being read.

    ``turn``: the row of HostIds; ``done``: an event recorded after them on the stream, ``handle``
    the driver's name for it.
    """

    turn: int
    array: NDArray[np.int32]
    done: torch.cuda.Event | None
    handle: int


class GpuShard:
    """One rank's device state.

    Args:
        stream: where everything runs; None is Triton's interpreter.
        sampling: every slot's sampling state, on this device.
        plan_len: int32 elements of the packed plan, header and records included.
        max_padding: rows, or requests, that a step's shape has at most beyond the step's own.
        num_turns: steps whose ids may be on their way or being read.
    """

    def __init__(
        self,
        loaded: LoadedModel[CausalLM],
        part: ModelPart[CausalLM],
        stream: torch.cuda.Stream | None,
        sampling: GpuSampling,
        plan: KVCachePlan,
        sizes: StepSizes,
        *,
        plan_len: int,
        max_padding: int,
        num_turns: int,
    ) -> None:
        self.device, self.model, self.rank = part.device, part.model, part.rank
        self.stream, self.sampling = stream, sampling
        self.driver: CudaDriver | None = None
        self._side: SideStream | None = None
        if stream is not None:
            with torch.cuda.stream(stream):
                self.driver = CudaDriver(stream.cuda_stream)
                self._side = SideStream(self.device)
        # A shard alone on its thread never leaves its device's context.
        self._is_alone = loaded.mesh.exchange.size == 1
        self._max_model_len = sizes.max_model_len
        # The thread that does nothing but step: it stays on this stream.
        self._thread: int | None = None
        caches = allocate_kv_cache(plan, self.model.config, loaded.kv_dtype, self.device)
        self.model.bind_kv_cache(caches)
        mode = LogprobsMode.of(loaded.config.logprobs_mode)
        self.prompt_scorer = PromptScorer(self.model.compute_logits, loaded.shape.vocab_size, mode)
        prepare = None
        if self.driver is not None and stream is not None and loaded.mesh.exchange.size > 1:
            barrier = functools.partial(loaded.mesh.exchange.barrier, part.rank)
            prepare = functools.partial(_prepare_graph, self.driver, stream, barrier)
        self.graphs: GraphCache[tuple[Tensor, Tensor]] = GraphCache(stream, prepare=prepare)
        # Of steps whose tokens wait for masks, in two parts: the model's logits by shape, and ids
        # chosen from them by (shape, whether they are adjusted).
        self.model_graphs: GraphCache[Tensor] = GraphCache(stream, self.graphs, prepare)
        self.choice_graphs: GraphCache[Tensor] = GraphCache(stream, self.graphs)
        self.packed = torch.zeros(plan_len, dtype=torch.int32, device=self.device)
        self.packed_address = self.packed.data_ptr()
        self.buffers = self._make_buffers(sizes, max_padding)
        host = torch.zeros(
            (num_turns, sizes.max_num_seqs + max_padding),
            dtype=torch.int32,
            pin_memory=stream is not None,
        )
        self._host_ids = gpu.HostIds(host, self.packed[HEADER_TURN : HEADER_TURN + 1])
        self.ids = [self._make_ids(turn) for turn in range(num_turns)]

    def _make_buffers(self, sizes: StepSizes, max_padding: int) -> StepBuffers:
        reqs = sizes.max_num_seqs + max_padding
        num_rows = sizes.max_num_batched_tokens + sizes.max_num_seqs + max_padding

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=self.device)

        return StepBuffers(
            input_ids=ints(num_rows),
            positions=ints(num_rows),
            slot_mapping=ints(num_rows),
            slots=ints(reqs),
            seq_lens=ints(reqs),
            query_start_loc=ints(reqs + 1),
            sample_rows=ints(reqs),
            sample_slots=ints(reqs),
            block_table=ints(sizes.max_num_seqs + 1, sizes.max_blocks_per_seq),
            slot_table=self.sampling.slot_table,
        )

    def _make_ids(self, turn: int) -> StepIds:
        done = None if self.stream is None else make_event(self.stream)
        handle = 0 if done is None else done.cuda_event
        return StepIds(turn, self._host_ids.ids[turn].numpy(), done, handle)

    # ---------------------------------------------------------------------------------- threads

    def enter_thread(self) -> None:
        """Keep the calling thread, which does nothing but step, on this stream without autograd."""
        if self.stream is not None:
            torch.cuda.set_device(self.stream.device)
            torch.cuda.set_stream(self.stream)
            torch.inference_mode().__enter__()  # for good: it costs a step 20 us
            self._thread = get_ident()

    def ready(self) -> contextlib.AbstractContextManager[None]:
        """Without autograd, on this stream; the shard's own thread is so already."""
        if get_ident() == self._thread:
            return contextlib.nullcontext()
        return computing(self.stream)

    # ------------------------------------------------------------------------- whole steps

    def replay(
        self, key: tuple[StepShape, bool], plan_address: int, nbytes: int, turn: int
    ) -> None:
        """Copy the plan at a pinned address to the device and launch a step that is captured.

        The calling thread then has the device's context.
        """
        graph = self.graphs.get(key)
        assert graph is not None
        assert self.driver is not None
        self.driver.enter()
        self.driver.run_step(
            (self.packed_address, plan_address, nbytes), graph.handle, self.ids[turn].handle
        )

    def run_padded(self, staged: Tensor, shape: StepShape, adjusted: bool) -> tuple[Tensor, Tensor]:
        """The step that is staged, padded to a shape which may be captured: (ids, logits)."""
        with self.ready():
            self._upload(staged)
            return self.run(shape, adjusted)

    def run_exact(
        self,
        staged: Tensor,
        shape: StepShape,
        adjusted: bool,
        keep_raw: bool,
        spans: Sequence[PromptSpan],
    ) -> tuple[Tensor, Tensor, Sequence[ScoredRows]]:
        """The step that is staged, kernel by kernel: (ids, logits, scores of ``spans``).

        ``spans`` count rows as the shape does. The logits are as sampled from, or with
        ``keep_raw`` as the model computed them.
        """
        with self.ready():
            self._upload(staged)
            hidden = self._hidden(shape)
            ids, logits = self._sample(hidden, shape, adjusted, keep_raw)
            return ids, logits, self.prompt_scorer.score(spans, hidden)

    def replay_model(self, shape: StepShape, plan_address: int, nbytes: int) -> None:
        """``run_model`` of a shape that is captured, as ``replay``."""
        graph = self.model_graphs.get(shape)
        assert graph is not None
        assert self.driver is not None
        if not self._is_alone:
            self.driver.enter()
        self.driver.start((self.packed_address, plan_address, nbytes), graph.handle)

    def run_model(self, staged: Tensor, shape: StepShape) -> Tensor:
        """Logits [S, V] of the step that is staged, padded to a shape which may be captured.

        They hold until the next run of any graph.
        """
        with self.ready():
            self._upload(staged)
            return self.model_graphs.run(shape, lambda: self._logits(self._hidden(shape), shape))

    def run_model_exact(
        self, staged: Tensor, shape: StepShape, spans: Sequence[PromptSpan]
    ) -> tuple[Tensor, Sequence[ScoredRows]]:
        """(logits [S, V], scores of ``spans``) of the step that is staged, kernel by kernel."""
        with self.ready():
            self._upload(staged)
            hidden = self._hidden(shape)
            return self._logits(hidden, shape), self.prompt_scorer.score(spans, hidden)

    def replay_choice(
        self, key: tuple[StepShape, bool], masks: RowMasks, host: RowMasks, length: int
    ) -> None:
        """``choose`` of a key that is captured, with the first ``length`` elements of ``host``.

        They are copied beside what the stream is at: the sampler that read the last ones has ended,
        since its tokens have led to these.
        """
        graph = self.choice_graphs.get(key)
        assert graph is not None
        assert self.driver is not None
        assert self._side is not None
        if not self._is_alone:
            self.driver.enter()
        self._side.copy((masks.address, host.address, 4 * length))
        self.driver.start_after(self._side, graph.handle)

    def choose(
        self,
        logits: Tensor,
        shape: StepShape,
        masks: RowMasks,
        staged: Tensor,
        adjusted: bool,
        *,
        captured: bool,
    ) -> Tensor:
        """Ids [S] chosen from logits [S, V], which are changed if ``adjusted``.

        Args:
            masks: this device's; ``staged`` is what they become.
            captured: whether the logits are those of a model's graph, which always have one place.
        """
        with self.ready():
            masks.packed[: len(staged)].copy_(staged, non_blocking=True)
            of_rows = gpu.TokenMasks(masks.index, masks.words)

            def masked() -> Tensor:
                return self._choose(logits, shape, adjusted, of_rows)

            if captured:
                return self.choice_graphs.run((shape, adjusted), masked)
            return masked()

    def drop_adjusted(self) -> None:
        """Forget the graphs that read the tensors of adjusted logits: these have been replaced."""
        for graphs in (self.graphs, self.choice_graphs):
            graphs.drop(lambda key: isinstance(key, tuple) and key[1] is True)

    def run(self, shape: StepShape, adjusted: bool) -> tuple[Tensor, Tensor]:
        """(ids [S], logits [S, V]) of the plan on the device; captured at its second run."""
        return self.graphs.run((shape, adjusted), lambda: self.forward(shape, adjusted))

    def run_nothing(self) -> None:
        """Run one padded row, which stores nothing, kernel by kernel."""
        with self.ready():
            self.clear_plan()
            self.forward(StepShape(1, 0, 0), adjusted=False)

    def clear_plan(self) -> None:
        """Make the plan on the device empty: every row is padding, nothing is stored."""
        self.packed.zero_()

    # ------------------------------------------------------------------------- what is captured

    def forward(self, shape: StepShape, adjusted: bool) -> tuple[Tensor, Tensor]:
        """(ids [S], logits [S, V]) of the packed plan, padded to the shape."""
        return self._sample(self._hidden(shape), shape, adjusted)

    def _upload(self, staged: Tensor) -> None:
        self.packed[: len(staged)].copy_(staged, non_blocking=True)

    def _hidden(self, shape: StepShape) -> Tensor:
        """Hidden states [rows, D] of the packed plan, padded to the shape."""
        buffers = self.buffers
        prepare_step(
            self.packed,
            buffers,
            decode_rows=shape.decode_rows,
            prefill_reqs=shape.prefill_reqs,
            prefill_rows=shape.prefill_rows,
        )
        rows, reqs = shape.rows, shape.reqs
        context = StepContext(
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
            max_seq_len=self._max_model_len,
        )
        return self.model(buffers.input_ids[:rows], context)

    def _sample(
        self, hidden: Tensor, shape: StepShape, adjusted: bool, keep_raw: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(ids [S], logits [S, V]); the logits are as sampled from, or with ``keep_raw`` as
        the model computed them."""
        logits = self._logits(hidden, shape)
        raw = logits.clone() if keep_raw else logits
        return self._choose(logits, shape, adjusted), raw

    def _logits(self, hidden: Tensor, shape: StepShape) -> Tensor:
        if shape.prefill_reqs:
            hidden = hidden.index_select(0, self.buffers.sample_rows[: shape.reqs])
        return self.model.compute_logits(hidden)

    def _choose(
        self,
        logits: Tensor,
        shape: StepShape,
        adjusted: bool,
        masks: gpu.TokenMasks | None = None,
    ) -> Tensor:
        state = self.sampling.adjusted if adjusted else self.sampling.plain
        slots = self.buffers.sample_slots[: shape.reqs]
        return gpu.sample(logits, slots, state, self._host_ids, masks)


def _prepare_graph(
    driver: CudaDriver, stream: torch.cuda.Stream, barrier: Callable[[], None], handle: int
) -> None:
    """Do what a graph's first launch would do, and wait for the other shards to have come here.

    A graph that waits for a peer must not run while the peer still captures, or allocates.
    """
    driver.upload(handle)
    stream.synchronize()
    barrier()


def open_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream that can be captured, as the default one cannot; None on a CPU."""
    if device.type == "cpu":
        return None
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def reserve_activations(
    loaded: LoadedModel[CausalLM],
    part: ModelPart[CausalLM],
    stream: torch.cuda.Stream | None,
    sampling: GpuSampling,
) -> None:
    """Run the largest step once, storing nothing, on every rank.

    The allocator keeps what that took, and no later step needs more: once the device has come to
    its end, the memory that is free is free for good.
    """
    with computing(stream):
        _run_largest_step(loaded, part, sampling)


def compile_largest_step(
    loaded: LoadedModel[CausalLM],
    part: ModelPart[CausalLM],
    stream: torch.cuda.Stream | None,
    sampling: GpuSampling,
) -> None:
    """Compile the kernels of ``reserve_activations`` on one rank."""
    with computing(stream), gpu.compile_only():
        _run_largest_step(loaded, part, sampling)


def _run_largest_step(
    loaded: LoadedModel[CausalLM], part: ModelPart[CausalLM], sampling: GpuSampling
) -> None:
    """One request of as many tokens as a step may have, and max_num_seqs samples."""
    config, model, device = loaded.config, part.model, part.device
    tokens, num_seqs = max_step_tokens(loaded), max_num_seqs(loaded)
    shape = (1, model.config.num_kv_heads, config.block_size, model.config.head_dim)
    cache = make_cache(shape, loaded.kv_dtype, device)
    model.bind_kv_cache([(cache, cache)] * model.config.num_layers)

    def ints(*shape: int, fill: int = 0) -> Tensor:
        return torch.full(shape, fill, dtype=torch.int32, device=device)

    context = StepContext(
        positions=ints(tokens),
        slot_mapping=ints(tokens, fill=-1),
        slots=ints(1),
        seq_lens=ints(1, fill=tokens),
        query_start_loc=torch.tensor([0, tokens], dtype=torch.int32, device=device),
        block_table=ints(1, -(-tokens // config.block_size)),
        num_reqs=1,
        num_decodes=0,
        max_query_len=tokens,
        max_seq_len=tokens,
    )
    hidden = model(ints(tokens), context)
    rows = min(num_seqs, tokens)
    logits = model.compute_logits(hidden[:rows])
    spare = ints(rows, fill=num_seqs)
    host = torch.zeros((1, rows), dtype=torch.int32, pin_memory=True)
    gpu.sample(logits, spare, sampling.adjusted, gpu.HostIds(host, ints(1)))
