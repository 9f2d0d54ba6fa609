"""HunYuanMoEV1ForCausalLM: Hunyuan with experts beside a shared MLP in every layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from octavo.checkpoints.weights import Weights
from octavo.errors import ModelLoadError
from octavo.kernels.opset import OpSet
from octavo.models.config import ModelConfig
from octavo.models.experts import LLAMA_NAMES, load_experts
from octavo.models.hf_config import HfConfig
from octavo.models.hunyuan_dense import HunYuanDecoderLayer, hunyuan_rope
from octavo.models.llama import DecoderLayer, FeedForward, LlamaForCausalLM, LlamaMLP


class HunYuanMoEDecoderLayer(HunYuanDecoderLayer):
    """Attention, then experts and the shared MLP."""

    __slots__ = ()

    @staticmethod
    def make_mlp(config: ModelConfig, layer: int, weights: Weights, ops: OpSet) -> FeedForward:
        prefix = f"model.layers.{layer}.mlp"
        shared = LlamaMLP(config, layer, weights, ops, name="mlp.shared_mlp")
        return load_experts(
            config, prefix, LLAMA_NAMES, weights, ops, router="gate.wg", shared=shared
        )


class HunYuanMoEV1ForCausalLM(LlamaForCausalLM):
    """See LlamaForCausalLM."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {"rms_norm_eps": 1e-5}
    layer_class: ClassVar[Callable[..., DecoderLayer]] = HunYuanMoEDecoderLayer

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        bias = hf.bool("attention_bias")
        return hf.config(
            attention_bias=bias,
            attention_out_bias=bias,
            rope=hunyuan_rope(hf),
            num_experts=_same(hf, "num_experts"),
            num_experts_per_token=_same(hf, "moe_topk"),
            moe_intermediate_size=hf.int("intermediate_size"),
        )


def _same(hf: HfConfig, key: str) -> int:
    """A number that files may give for each layer, where all are equal."""
    value = hf.values.get(key, 1)
    if not isinstance(value, list):
        return hf.int(key, 1)
    if len(set(value)) != 1:
        raise ModelLoadError(f"config.json: layers with another {key} each are not supported")
    return int(value[0])
