"""HybridForCausalLM: decoders with layers that keep a state beside, or in place of, attention.

A family's file has its mixers, the name of each tensor in its files where that is not Llama's, and
which layers are of which kind (``ModelConfig.layer_kinds``). A mixer takes what a layer has normed
and gives what is added to the residual; one with a state holds its rows in ``state``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol, cast

import torch
from torch import Tensor

from octavo.checkpoints.weights import RenamedWeights, Weights
from octavo.errors import ModelLoadError
from octavo.kernels.opset import OpSet
from octavo.kernels.recurrent import RecurrentOps
from octavo.kernels.weights import Rows, rows_of
from octavo.layers.attention import Attention
from octavo.layers.context import LayerState, StepContext
from octavo.layers.latent_attention import LatentAttention
from octavo.layers.norm import Addend, RMSNorm
from octavo.models.config import ModelConfig, StateShape
from octavo.models.llama import LlamaForCausalLM
from octavo.models.stage import Stage

NO_STATE = LayerState(torch.empty(0), None)


class Mixer(Protocol):
    """A layer's first half: attention, or a recurrence."""

    def normed(
        self, x: Addend, residual: Tensor, norm: RMSNorm, ctx: StepContext
    ) -> tuple[Addend, Tensor]:
        """(addend, residual) after norm(residual + x) has gone through this; see ``Linear``."""


class Recurrence(Protocol):
    """Whatever of a layer keeps a state; the ranks have parts of it, by heads or by channels.

    ``state``: empty until the runner binds it.
    """

    state: LayerState

    @property
    def state_shape(self) -> StateShape:
        """Of one request's state, the rank's part."""


class HybridDecoderLayer(Protocol):
    """One block, as ``llama.DecoderLayer``.

    ``attention``: None in a layer without keys and values; ``recurrence``: in one without a state.
    """

    @property
    def attention(self) -> Attention | LatentAttention | None: ...

    @property
    def recurrence(self) -> Recurrence | None: ...

    def __call__(self, x: Addend, residual: Tensor, ctx: StepContext) -> tuple[Addend, Tensor]: ...


def recurrent_ops(ops: OpSet) -> RecurrentOps:
    """The ops of layers with a state.

    Raises:
        ModelLoadError: the backend has none.
    """
    if ops.recurrent is None:
        raise ModelLoadError("layers that keep a state are not supported on this device")
    return ops.recurrent


def layer_kinds(hf_types: Sequence[str], kinds: Mapping[str, str]) -> tuple[str, ...]:
    """``ModelConfig.layer_kinds`` of a config.json's names of them.

    Raises:
        ModelLoadError: a name that ``kinds`` does not have.
    """
    for name in hf_types:
        if name not in kinds:
            raise ModelLoadError(f"config.json: layers of type {name!r} are not supported")
    return tuple(kinds[name] for name in hf_types)


def load_taps(
    name: str, channels: int, width: int, weights: Weights, part: Rows | None = None
) -> Tensor:
    """A convolution of each channel by itself: [channels, width], the oldest input's tap first.

    ``part``: a rank's channels, of all ``channels``.

    Raises:
        ModelLoadError: it is missing or has another shape.
    """
    taps = weights.tensor(name, (channels, 1, width)).view(channels, width)
    return taps if part is None else rows_of(taps, part).contiguous()


class HybridForCausalLM(LlamaForCausalLM):
    """See LlamaForCausalLM.

    ``file_names``: patterns of the names that Llama's layers ask for -> the file's. The first that
    matches is replaced.
    """

    file_names: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        ops: OpSet,
        *,
        max_model_len: int,
        device: torch.device,
        stage: Stage | None = None,
    ) -> None:
        self.recurrent_ops = recurrent_ops(ops)
        super().__init__(
            config,
            RenamedWeights(weights, self.file_name),
            ops,
            max_model_len=max_model_len,
            device=device,
            stage=stage,
        )
        recurrences = (layer.recurrence for layer in self._hybrid_layers())
        own = next((found for found in recurrences if found is not None), None)
        self.config = self.config.replace(state=None if own is None else own.state_shape)

    @classmethod
    def file_name(cls, name: str) -> str:
        """A tensor's or module's name in the family's files."""
        for pattern, replacement in cls.file_names.items():
            name, count = re.subn(pattern, replacement, name)
            if count:
                break
        return name

    def bind_kv_cache(self, caches: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Hand each layer with attention its keys and values."""
        own = iter(caches)
        for layer in self._hybrid_layers():
            if layer.attention is not None:
                layer.attention.k_cache, layer.attention.v_cache = next(own)

    def bind_states(self, states: Sequence[LayerState | None]) -> None:
        """Hand each layer with a recurrence its states."""
        for layer, state in zip(self._hybrid_layers(), states, strict=True):
            if layer.recurrence is not None and state is not None:
                layer.recurrence.state = state

    def _hybrid_layers(self) -> Sequence[HybridDecoderLayer]:
        return cast(Sequence[HybridDecoderLayer], self.layers)
