"""Mamba2ForCausalLM: nothing but Mamba-2 mixers, each after a norm; no attention, no MLP."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from octavo.checkpoints.weights import Weights
from octavo.kernels.opset import OpSet
from octavo.models.config import ModelConfig
from octavo.models.hf_config import HfConfig
from octavo.models.hybrid import HybridForCausalLM
from octavo.models.mamba import MambaMixer, MambaShape, dt_limits
from octavo.models.mixers import BACKBONE_NAMES, MAX_CONTEXT, MixerLayer, mixers_config
from octavo.models.parts import layer_norms


class Mamba2Layer(MixerLayer):
    """See MixerLayer."""

    __slots__ = ()

    def __init__(
        self, config: ModelConfig, layer: int, cos_sin: Tensor, weights: Weights, ops: OpSet
    ) -> None:
        hf = HfConfig(config.raw, Mamba2ForCausalLM.hf_defaults)
        self.norm = layer_norms(config, layer, weights, ops)("norm")
        bias = hf.bool("use_bias")
        self.recurrence = MambaMixer(
            config,
            f"model.layers.{layer}.mixer",
            _shape(hf),
            weights,
            ops,
            bias=bias,
            out_bias=bias,
            conv_bias=hf.bool("use_conv_bias"),
        )


class Mamba2ForCausalLM(HybridForCausalLM):
    """See LlamaForCausalLM."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {
        "num_heads": 128,
        "head_dim": 64,
        "n_groups": 8,
        "state_size": 128,
        "conv_kernel": 4,
        "layer_norm_epsilon": 1e-5,
        "use_conv_bias": True,
        "max_position_embeddings": MAX_CONTEXT,
        "num_attention_heads": 1,
    }
    layer_class: ClassVar[Callable[..., Any]] = Mamba2Layer
    file_names: ClassVar[Mapping[str, str]] = BACKBONE_NAMES

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        return mixers_config(hf, _shape(hf).state)


def _shape(hf: HfConfig) -> MambaShape:
    return MambaShape(
        hf.int("num_heads"),
        hf.int("head_dim"),
        hf.int("n_groups"),
        hf.int("state_size"),
        hf.int("conv_kernel"),
        dt_limits(hf),
    )
