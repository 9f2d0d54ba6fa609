"""GptOssForCausalLM: attention sinks, every other layer local, biased experts of a clamped SwiGLU.

Of a row of the experts' gate and up projection, even elements are the gate's and odd ones up's; a
GGUF file has them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from octavo.checkpoints.weights import Weights
from octavo.errors import ModelLoadError
from octavo.kernels.opset import OpSet
from octavo.kernels.routing import Routing
from octavo.kernels.weights import ExpertBiases, Rows, Stored, reordered
from octavo.layers.moe import MoE
from octavo.models.config import ModelConfig
from octavo.models.experts import ExpertShare
from octavo.models.hf_config import HfConfig
from octavo.models.llama import DecoderLayer, FeedForward, LlamaDecoderLayer, LlamaForCausalLM

# What the activation's kernels compute (swiglu_alpha, swiglu_limit).
_ALPHA, _LIMIT = 1.702, 7.0
_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


class GptOssDecoderLayer(LlamaDecoderLayer):
    """Attention, then experts."""

    __slots__ = ()

    @staticmethod
    def make_mlp(config: ModelConfig, layer: int, weights: Weights, ops: OpSet) -> FeedForward:
        prefix, count = f"model.layers.{layer}.mlp", config.num_experts
        part, experts = ExpertShare.of(config, ops.rank), f"{prefix}.experts"
        shape = (config.hidden_size, config.moe_intermediate_size)
        return MoE(
            ops,
            weights.linear(f"{prefix}.router", (count, config.hidden_size)),
            _gate_up(experts, config, part, weights),
            list(weights.experts(experts, count, "down_proj", shape, part.columns, part.own)),
            routing=Routing(config.num_experts_per_token),
            act=config.hidden_act,
            router_bias=weights.vector(f"{prefix}.router.bias", count),
            biases=_biases(experts, config, part, weights, ops),
            first=part.own[0],
        )


class GptOssForCausalLM(LlamaForCausalLM):
    """See LlamaForCausalLM."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {
        "attention_bias": True,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "rope_scaling": _YARN,
        "sliding_window": 128,
        "swiglu_alpha": _ALPHA,
        "swiglu_limit": _LIMIT,
    }
    layer_class: ClassVar[Callable[..., DecoderLayer]] = GptOssDecoderLayer

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        for key, value in (("swiglu_alpha", _ALPHA), ("swiglu_limit", _LIMIT)):
            if hf.float(key) != value:
                raise ModelLoadError(f"config.json: {key} {hf.float(key)} is not supported")
        bias = hf.bool("attention_bias")
        every_other = ["sliding_attention", "full_attention"] * (-(-hf.num_layers // 2))
        return hf.config(
            attention_bias=bias,
            attention_out_bias=bias,
            attention_sinks=True,
            fused_experts=True,
            sliding_windows=hf.windows(default_types=every_other),
            num_experts=hf.int("num_local_experts", hf.int("num_experts", 128)),
            num_experts_per_token=hf.int("num_experts_per_tok", 4),
            moe_intermediate_size=hf.int("intermediate_size"),
        ).replace(hidden_act="swiglu_clamped")


def _gate_up(
    prefix: str, config: ModelConfig, part: ExpertShare, weights: Weights
) -> list[list[Stored]]:
    """Each of the rank's experts' gate and up weights, [F, D] each, F being the rank's part."""
    size, count = config.moe_intermediate_size, config.num_experts
    if not config.fused_experts:
        shape = (size, config.hidden_size)
        both = (
            weights.experts(prefix, count, name, shape, part.rows, part.own)
            for name in ("gate_proj", "up_proj")
        )
        return [list(pair) for pair in zip(*both, strict=True)]
    begin, end = part.width
    rows = Rows(((2 * begin, 2 * end),)) if part.is_narrow else None
    shape = (2 * size, config.hidden_size)
    order = _halves(end - begin)
    fused = weights.experts(prefix, count, "gate_up_proj", shape, rows, part.own)
    return [[reordered(weight, order)] for weight in fused]


def _biases(
    prefix: str, config: ModelConfig, part: ExpertShare, weights: Weights, ops: OpSet
) -> ExpertBiases:
    size, count = config.moe_intermediate_size, config.num_experts
    (begin, end), own = part.width, slice(*part.own)
    down = weights.tensor(f"{prefix}.down_proj_bias", (count, config.hidden_size))[own]
    if part.is_narrow and ops.rank.rank > 0:
        down = torch.zeros_like(down)  # the ranks' results are added up
    if not config.fused_experts:
        both = (
            weights.tensor(f"{prefix}.{name}_proj_bias", (count, size)) for name in ("gate", "up")
        )
        gate_up = torch.cat([bias[own, begin:end] for bias in both], 1)
        return ExpertBiases(gate_up, down)
    fused = weights.tensor(f"{prefix}.gate_up_proj_bias", (count, 2 * size))
    own_bias = fused[own, 2 * begin : 2 * end]
    return ExpertBiases(own_bias[:, _halves(end - begin).to(fused.device)].contiguous(), down)


def _halves(size: int) -> Tensor:
    """int64 [2 size]: the even numbers, then the odd ones."""
    return torch.arange(2 * size).view(size, 2).T.reshape(-1)
