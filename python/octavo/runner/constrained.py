"""ConstrainedSteps: steps on GPUs whose tokens wait for masks, in two parts.

The model's part is launched like any step's, ahead of the host. Once the tokens before it are
known the core fills the masks, while the device computes; one copy brings them to the device, and a
second graph, from logits to ids, follows it. So the forward pass never waits for a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from octavo.runner.cuda_graphs import StepShape
from octavo.runner.gpu_sampling import Needs
from octavo.runner.logprobs import TokenLogprobs
from octavo.runner.masks import FillMasks, RowMasks
from octavo.runner.prompt_scorer import PromptSpan, ScoredRows

if TYPE_CHECKING:
    from octavo.runner.mesh import Mesh
    from octavo.runner.shard import GpuShard
    from octavo.runner.staging import StagingBuffer


@dataclass(slots=True, eq=False)
class Unchosen:
    """A step whose logits are being computed.

    ``logits``: each shard's [S, V]; ``captured``: whether graphs have written them.
    """

    shape: StepShape
    needs: Needs
    num_samples: int
    logits: Sequence[Tensor]
    captured: bool
    scored: Sequence[ScoredRows] = ()


class ConstrainedSteps:
    """The two parts of such steps, on every shard of a mesh. Buffers are made with the first."""

    def __init__(self, mesh: Mesh[GpuShard], max_num_seqs: int, vocab_size: int) -> None:
        self._mesh, self._lead = mesh, mesh.lead
        self._sizes = (len(mesh.lead.buffers.sample_slots), max_num_seqs, vocab_size)
        # One is enough: a step's masks are filled when the last step's tokens, which were chosen
        # with theirs, have come back.
        self._host: RowMasks | None = None
        self._of_rank: list[RowMasks] = []

    def launch(
        self,
        buffer: StagingBuffer,
        length: int,
        padded: StepShape | None,
        exact: StepShape,
        num_samples: int,
        needs: Needs,
        spans: Sequence[PromptSpan],
        *,
        has_context: bool,
    ) -> Unchosen:
        """Start the model's part of the step that is staged.

        Args:
            length: int32 elements of the packed plan.
            padded: the shape to run in, which may be captured; None where no graph will do.
            exact: the step's own shape.
            spans: in the rows of ``exact``; with any, nothing is captured.
            has_context: whether the driver may be called on this thread.
        """
        shape = padded or exact
        if padded is not None:
            captured = self._lead.model_graphs.get(padded) is not None
            if captured and has_context and self._lead.driver is not None:
                for shard in reversed(self._mesh.shards):
                    shard.replay_model(padded, buffer.address, 4 * length)
                logits = [graph_logits(shard, padded) for shard in self._mesh.shards]
                return Unchosen(shape, needs, num_samples, logits, captured)
            logits = self._mesh.each(lambda shard: shard.run_model(buffer.host[:length], padded))
            captured = self._lead.model_graphs.get(padded) is not None
            return Unchosen(shape, needs, num_samples, logits, captured)
        parts = self._mesh.each(
            lambda shard: shard.run_model_exact(buffer.host[:length], shape, spans)
        )
        logits = [logits for logits, _ in parts]
        return Unchosen(shape, needs, num_samples, logits, False, parts[0][1])

    def choose(self, step: Unchosen, fill: FillMasks, *, has_context: bool) -> TokenLogprobs | None:
        """Start the sampler, and the copy of the log probabilities that the step needs."""
        host = self._host or self._make_buffers()
        length = host.fill(fill)
        needs = step.needs
        adjusted, num_logprobs = needs.adjusted, needs.num_logprobs
        key = (step.shape, adjusted)
        # Graphs do not keep the logits that log probabilities are of.
        captured = step.captured and num_logprobs < 0
        is_ready = captured and self._lead.choice_graphs.get(key) is not None
        if is_ready and has_context and self._lead.driver is not None:
            for shard in reversed(self._mesh.shards):
                shard.replay_choice(key, self._of_rank[shard.rank], host, length)
            return None
        logits = step.logits[0]
        if needs.keep_raw:
            logits = logits.clone()
        staged = host.packed[:length]
        ids = self._mesh.each(
            lambda shard: shard.choose(
                step.logits[shard.rank],
                step.shape,
                self._of_rank[shard.rank],
                staged,
                adjusted,
                captured=captured,
            )
        )[0]
        if num_logprobs < 0:
            return None
        logits, ids = logits[: step.num_samples], ids[: step.num_samples]
        if needs.records is not None:
            # The sampler reads masks and leaves the logits as they are.
            logits = self._of_rank[self._lead.rank].masked(logits)
        return needs.copy_logprobs(logits, ids)

    def _make_buffers(self) -> RowMasks:
        pinned = self._lead.stream is not None
        self._of_rank = [RowMasks(*self._sizes, shard.device) for shard in self._mesh.shards]
        self._host = RowMasks(*self._sizes, torch.device("cpu"), pinned=pinned)
        return self._host


def graph_logits(shard: GpuShard, shape: StepShape) -> Tensor:
    """The logits [S, V] that the graph of a shape writes."""
    graph = shard.model_graphs.get(shape)
    assert graph is not None
    return graph.output
