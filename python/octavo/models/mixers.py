"""Shared parts of models that are nothing but mixers with a state: no attention, no MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from torch import Tensor

from octavo.layers.context import StepContext
from octavo.layers.norm import Addend, RMSNorm
from octavo.layers.rope import RopeConfig
from octavo.models.config import ModelConfig, StateShape
from octavo.models.hf_config import HfConfig
from octavo.models.mixed_layer import RecurrentMixer

# The states know no positions: a bound on what a server plans for, not the model's.
MAX_CONTEXT: Final = 1 << 17
# ``file_names`` of the state-spaces checkpoints as transformers writes them.
BACKBONE_NAMES: Final[Mapping[str, str]] = {
    r"model\.embed_tokens": "backbone.embeddings",
    r"model\.norm\.": "backbone.norm_f.",
    r"model\.": "backbone.",
}


class MixerLayer:
    """A norm and a mixer, added to the residual."""

    __slots__ = ("norm", "recurrence")

    attention = None
    norm: RMSNorm
    recurrence: RecurrentMixer

    def __call__(self, x: Addend, residual: Tensor, ctx: StepContext) -> tuple[Addend, Tensor]:
        return self.recurrence.normed(x, residual, self.norm, ctx)


def mixers_config(hf: HfConfig, state: StateShape, **fields: Any) -> ModelConfig:
    """The shape of a model whose layers each keep ``state``."""
    return hf.config(
        intermediate_size=hf.int("hidden_size"),
        rms_norm_eps=hf.float("layer_norm_epsilon"),
        # There are no positions; the fields of attention are of a layer that no model has.
        rope=RopeConfig(theta=1e4, rot_dim=2),
        rope_layers=(False,) * hf.num_layers,
        num_heads=1,
        num_kv_heads=1,
        layer_kinds=("state",) * hf.num_layers,
        state=state,
        **fields,
    )
