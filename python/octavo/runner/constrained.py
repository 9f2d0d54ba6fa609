"""ConstrainedSteps: steps on GPUs whose tokens wait for masks, in two parts.

The model's part is launched like any step's, ahead of the host. Once the tokens before it are known
the core fills the masks, while the device computes; they follow in one copy, and the sampler's
kernels with them. So the forward pass never waits for a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from octavo.runner.cuda_graphs import Shapes, StepShape, exact_shape
from octavo.runner.gpu_sampling import Needs
from octavo.runner.logprobs import TokenLogprobs
from octavo.runner.masks import FillMasks
from octavo.runner.prompt_scorer import PromptSpan, ScoredRows, moved

if TYPE_CHECKING:
    from octavo.runner.mesh import Mesh
    from octavo.runner.shard import GpuShard


@dataclass(slots=True, eq=False)
class Unchosen:
    """A step whose logits are being computed. ``logits``: each shard's [S, V]."""

    shape: StepShape
    needs: Needs
    num_samples: int
    logits: Sequence[Tensor]
    scored: Sequence[ScoredRows]


class ConstrainedSteps:
    """The two parts of such steps, on every shard of a mesh. Buffers are made with the first.

    Args:
        pinned: whether masks are copied to a GPU.
    """

    def __init__(
        self, mesh: Mesh[GpuShard], max_num_seqs: int, vocab_size: int, *, pinned: bool
    ) -> None:
        self._mesh = mesh
        self._shape = (max_num_seqs, -(-vocab_size // 32))
        self._pinned = pinned
        # One of each is enough: a step's masks are filled when the last step's tokens, which were
        # chosen with theirs, have come back.
        self._masks: Tensor | None = None
        self._rows: Tensor | None = None

    def launch(
        self,
        staged: Tensor,
        shapes: Shapes,
        split: tuple[int, int, int],
        num_samples: int,
        needs: Needs,
        spans: Sequence[PromptSpan],
    ) -> Unchosen:
        """Start the model's part of the step that is staged.

        ``split``: its decodes, prefills and prefilled rows. ``spans``: in the plan's rows; with
        any, nothing is captured.
        """
        padded = None if spans else shapes.find(*split)
        shape = padded or exact_shape(*split)
        rows = moved(spans, split[0], shape.decode_rows)

        def run(shard: GpuShard) -> tuple[Tensor, Sequence[ScoredRows]]:
            if padded is not None:
                return shard.run_model(staged, padded), ()
            return shard.run_model_exact(staged, shape, rows)

        parts = self._mesh.each(run)
        return Unchosen(shape, needs, num_samples, [logits for logits, _ in parts], parts[0][1])

    def choose(self, step: Unchosen, fill: FillMasks) -> TokenLogprobs | None:
        """Start the sampler, and the copy of the log probabilities that the step needs."""
        if self._masks is None or self._rows is None:
            self._masks = torch.zeros(self._shape, dtype=torch.int32, pin_memory=self._pinned)
            self._rows = torch.zeros(self._shape[0], dtype=torch.int32, pin_memory=self._pinned)
        found = fill(self._masks.numpy().view(np.uint32))
        self._rows.numpy()[: len(found)] = found
        rows, masks = self._rows[: len(found)], self._masks[: len(found)]
        needs = step.needs
        # A mask changes the logits, whether or not anything else does.
        keep_raw = needs.num_logprobs >= 0 and needs.records is None

        def choose(shard: GpuShard) -> tuple[Tensor, Tensor]:
            logits = step.logits[shard.rank]
            return shard.choose(logits, step.shape, rows, masks, needs.adjusted, keep_raw)

        ids, logits = self._mesh.each(choose)[0]
        if needs.num_logprobs < 0:
            return None
        num = step.num_samples
        return needs.copy_logprobs(logits[:num], ids[:num])
