"""The states of layers that keep one: a row for each running request, and rows for checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.layers.context import LayerState
from octavo.models.config import ModelConfig, StateShape
from octavo.models.hybrid import HybridForCausalLM
from octavo.models.registry import CausalLM

# Most checkpoints, unless told otherwise: of more, the oldest would hardly be met again.
MAX_CHECKPOINTS = 1024
# Of the memory that would be the KV cache's, the part that checkpoints may take. A hit needs both,
# keys and values and a state, and one prefix in use has more of the former.
CHECKPOINTS_FRACTION = 0.2
# A CPU's checkpoints unless told otherwise. Pages are touched only when they are first used.
DEFAULT_CPU_CHECKPOINT_BYTES = 256 << 20


@dataclass(frozen=True)
class StatePlan:
    """The numbers of rows: of requests, the padding's included, and of checkpoints behind them."""

    num_slots: int
    num_checkpoints: int
    bytes_per_row: int

    @property
    def num_rows(self) -> int:
        """All rows."""
        return self.num_slots + self.num_checkpoints

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self.num_rows * self.bytes_per_row

    def rows(self) -> list[tuple[str, str]]:
        """Memory of the states, as Runner.memory lists it."""
        size = f"{self.nbytes / (1 << 20):,.1f} MiB"
        return [("states", f"{size}, {self.num_checkpoints:,} of them checkpoints")]


def bytes_per_state(config: ModelConfig, act_dtype: torch.dtype) -> int:
    """One request's state in all layers."""
    shape = config.state
    if shape is None:
        return 0
    conv = shape.conv[0] * shape.conv[1] * act_dtype.itemsize
    heads, rows, columns = shape.recurrent or (0, 0, 0)
    recurrent = heads * rows * columns * torch.float32.itemsize
    return sum(config.state_layers) * (conv + recurrent)


def plan_states(
    per_row: int,
    *,
    max_num_seqs: int,
    num_checkpoints: int | None,
    checkpoint_bytes: int,
) -> StatePlan | None:
    """The rows of a model's states; None where no layer has one.

    per_row: bytes of one request's state, on the device that holds the most of it.
    num_checkpoints: the user's choice; None: as many as ``checkpoint_bytes`` hold, within reason.
    """
    if per_row == 0:
        return None
    if num_checkpoints is None:
        num_checkpoints = min(MAX_CHECKPOINTS, checkpoint_bytes // per_row)
    return StatePlan(max_num_seqs + 1, num_checkpoints, per_row)


class StateCache:
    """The states of a model, bound to its layers.

    Each kind is one tensor [layers, rows, ...], so that a copy is one operation.
    """

    def __init__(
        self,
        num_rows: int,
        model: HybridForCausalLM,
        act_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        config = model.config
        self._copy_rows = model.recurrent_ops.copy_rows
        shape = config.state
        assert isinstance(shape, StateShape)
        self._is_state_layer = config.state_layers
        sizes = (sum(self._is_state_layer), num_rows)
        # As keys and values: on a CPU unused rows cost nothing.
        make = torch.empty if device.type == "cpu" else torch.zeros
        self.conv = make((*sizes, *shape.conv), dtype=act_dtype, device=device)
        self.recurrent: Tensor | None = None
        if shape.recurrent is not None:
            self.recurrent = make((*sizes, *shape.recurrent), dtype=torch.float32, device=device)
        model.bind_states(self._of_layers())

    def _of_layers(self) -> list[LayerState | None]:
        """Each layer's states, views; None where it has none."""
        own = iter(self._states())
        return [next(own) if has_state else None for has_state in self._is_state_layer]

    def _states(self) -> Iterator[LayerState]:
        for layer, conv in enumerate(self.conv):
            yield LayerState(conv, None if self.recurrent is None else self.recurrent[layer])

    def copy(self, rows: Tensor) -> None:
        """Copy whole rows; ``rows`` int32 [2 * copies]: those that are read, then those written."""
        for states in (self.conv, self.recurrent):
            if states is not None:
                self._copy_rows(states, rows)


def make_states(
    plan: StatePlan | None, model: CausalLM, act_dtype: torch.dtype, device: torch.device
) -> StateCache | None:
    """The states of a part of a model, bound to its layers; None where none of them keeps one."""
    if plan is None or not any(model.config.state_layers):
        return None
    assert isinstance(model, HybridForCausalLM)
    return StateCache(plan.num_rows, model, act_dtype, device)
