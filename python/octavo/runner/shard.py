"""GpuShard: what one GPU owns of a running model, and the code of a step on it.

A DeviceShard with the sampling state of every slot, and the graphs captured over all of these.
Every shard of a mesh runs the same steps; each samples from the whole logits with the same seeds,
so that all know each request's last token and nothing is sent back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.kernels.gpu import ops as gpu
from octavo.kernels.gpu.step import HEADER_TURN
from octavo.models.registry import CausalLM
from octavo.runner.cuda_driver import SideStream, make_event
from octavo.runner.cuda_graphs import GraphCache, StepShape
from octavo.runner.device_shard import DeviceShard
from octavo.runner.gpu_sampling import GpuSampling
from octavo.runner.kv_cache import KVCachePlan
from octavo.runner.loading import LoadedModel, ModelPart
from octavo.runner.logprobs import LogprobsMode
from octavo.runner.masks import RowMasks
from octavo.runner.prompt_scorer import PromptScorer, PromptSpan, ScoredRows
from octavo.runner.sizing import StepSizes


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


class GpuShard(DeviceShard):
    """One rank of the last stage, in most cases the only one: other arguments as DeviceShard's.

    Args:
        sampling: every slot's sampling state, on this device.
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
        exchange = loaded.mesh.exchange
        super().__init__(
            loaded,
            part,
            stream,
            exchange,
            plan,
            sizes,
            sampling.slot_table,
            plan_len=plan_len,
            max_padding=max_padding,
        )
        self.sampling = sampling
        self._side: SideStream | None = None
        if stream is not None:
            with torch.cuda.stream(stream):
                self._side = SideStream(self.device)
        # A shard alone on its thread never leaves its device's context.
        self._is_alone = len(loaded.parts) == 1
        mode = LogprobsMode.of(loaded.config.logprobs_mode)
        self.prompt_scorer = PromptScorer(self.model.compute_logits, loaded.shape.vocab_size, mode)
        prepare = self._prepare_graph()
        self.graphs: GraphCache[tuple[Tensor, Tensor]] = GraphCache(stream, prepare=prepare)
        # Of steps whose tokens wait for masks, in two parts: the model's logits by shape, and ids
        # chosen from them by (shape, whether they are adjusted).
        self.model_graphs: GraphCache[Tensor] = GraphCache(stream, self.graphs, prepare)
        self.choice_graphs: GraphCache[Tensor] = GraphCache(stream, self.graphs)
        host = torch.zeros(
            (num_turns, sizes.max_num_seqs + max_padding),
            dtype=torch.int32,
            pin_memory=stream is not None,
        )
        self._host_ids = gpu.HostIds(host, self.packed[HEADER_TURN : HEADER_TURN + 1])
        self.ids = [self._make_ids(turn) for turn in range(num_turns)]

    def _make_ids(self, turn: int) -> StepIds:
        done = None if self.stream is None else make_event(self.stream)
        handle = 0 if done is None else done.cuda_event
        return StepIds(turn, self._host_ids.ids[turn].numpy(), done, handle)

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
            hidden = self._states(shape)
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
            return self.model_graphs.run(shape, lambda: self._logits(self._states(shape), shape))

    def run_model_exact(
        self, staged: Tensor, shape: StepShape, spans: Sequence[PromptSpan]
    ) -> tuple[Tensor, Sequence[ScoredRows]]:
        """(logits [S, V], scores of ``spans``) of the step that is staged, kernel by kernel."""
        with self.ready():
            self._upload(staged)
            hidden = self._states(shape)
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

    def capture(self, shape: StepShape) -> None:
        """Capture a shape's graph, at its second run; the plan on the device is lost."""
        with self.ready():
            # The last step's plan must not be carried out again.
            self.clear_plan()
            for _ in range(2):
                self.run(shape, adjusted=False)

    # ------------------------------------------------------------------------- what is captured

    def forward(self, shape: StepShape, adjusted: bool = False) -> tuple[Tensor, Tensor]:
        """(ids [S], logits [S, V]) of the packed plan, padded to the shape."""
        return self._sample(self._states(shape), shape, adjusted)

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
