"""GraniteMoeHybridForCausalLM: Granite with Mamba-2 in most layers, attention in some.

Granite 4. An MLP that all tokens go to, and beside it experts in the larger ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from octavo.checkpoints.weights import Weights
from octavo.kernels.opset import OpSet
from octavo.layers.attention import Attention
from octavo.layers.context import StepContext
from octavo.layers.norm import Addend
from octavo.models.bamba import load_mamba
from octavo.models.config import ModelConfig
from octavo.models.granite_moe import GraniteMoeDecoderLayer
from octavo.models.hf_config import HfConfig
from octavo.models.hybrid import HybridForCausalLM, layer_kinds
from octavo.models.llama import FeedForward, LlamaAttention
from octavo.models.mamba import MambaMixer, mamba_shape
from octavo.models.parts import layer_norms, load_columns, load_rows, width_of

KINDS = {
    "linear_attention": "state",
    "mamba": "state",
    "full_attention": "attention",
    "attention": "attention",
}


class GraniteHybridMLP:
    """The MLP of every token, plus the experts of those that were chosen for it."""

    __slots__ = ("_act", "_gated_activation", "down_proj", "experts", "gate_up_proj")

    def __init__(self, config: ModelConfig, layer: int, weights: Weights, ops: OpSet) -> None:
        prefix = f"model.layers.{layer}"
        d, f = config.hidden_size, config.shared_expert_size
        # GGUF files have gate and up apart, and an MLP without experts beside it is a plain one.
        shared = f"{prefix}.shared_mlp"
        gate_up: dict[str, int | list[int]] = {f"{shared}.input_linear": [f, f]}
        down = f"{shared}.output_linear"
        if not config.fused_experts:
            shared = shared if config.num_experts else f"{prefix}.mlp"
            gate_up, down = {f"{shared}.{n}_proj": f for n in ("gate", "up")}, f"{shared}.down_proj"
        own = width_of(f, ops.rank)
        self.gate_up_proj = load_columns(gate_up, d, False, weights, ops, (own, own))
        self.down_proj = load_rows(down, d, f, False, weights, ops, own)
        self._gated_activation, self._act = ops.gated_activation, config.hidden_act
        self.experts: FeedForward | None = None
        if config.num_experts:
            self.experts = GraniteMoeDecoderLayer.make_mlp(config, layer, weights, ops)

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, D]."""
        y = self.down_proj(self._gated_activation(self.gate_up_proj(x), self._act))
        return y if self.experts is None else y + self.experts(x)


class GraniteHybridLayer:
    """A mixer or attention, then an MLP; what each adds to the residual is scaled."""

    __slots__ = ("attention", "input_layernorm", "mixer", "mlp", "post_norm", "recurrence", "scale")

    def __init__(
        self, config: ModelConfig, layer: int, cos_sin: Tensor, weights: Weights, ops: OpSet
    ) -> None:
        norm = layer_norms(config, layer, weights, ops)
        self.input_layernorm = norm("input_layernorm")
        self.attention: Attention | None = None
        self.recurrence: MambaMixer | None = None
        self.mixer: LlamaAttention | MambaMixer
        if config.state_layers[layer]:
            self.mixer = self.recurrence = load_mamba(config, layer, weights, ops)
        else:
            self.mixer = LlamaAttention(config, layer, cos_sin, weights, ops)
            self.attention = self.mixer.attention
        self.post_norm = norm("post_attention_layernorm")
        self.mlp = GraniteHybridMLP(config, layer, weights, ops)
        self.scale = config.residual_scale

    def __call__(self, x: Addend, residual: Tensor, ctx: StepContext) -> tuple[Addend, Tensor]:
        x, residual = self.input_layernorm.add(x, residual)
        x = self.mixer(x, ctx) * self.scale
        x, residual = self.post_norm.add(x, residual)
        return self.mlp(x) * self.scale, residual


class GraniteMoeHybridForCausalLM(HybridForCausalLM):
    """See LlamaForCausalLM."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {"intermediate_size": 11008}
    layer_class: ClassVar[Callable[..., Any]] = GraniteHybridLayer

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        bias = hf.bool("attention_bias")
        types = hf.values.get("layer_types") or hf.values.get("layers_block_type")
        kinds = layer_kinds(types or ["mamba"] * hf.num_layers, KINDS)
        inner = int(hf.float("mamba_expand", 2) * hf.int("hidden_size"))
        rotates = hf.values.get("position_embedding_type") == "rope"
        return hf.config(
            attention_bias=bias,
            attention_out_bias=bias,
            embedding_scale=hf.float("embedding_multiplier", 1.0),
            attention_scale=hf.float("attention_multiplier", 1.0),
            residual_scale=hf.float("residual_multiplier", 1.0),
            logit_scale=1.0 / hf.float("logits_scaling", 1.0),
            rope_layers=() if rotates else (False,) * hf.num_layers,
            num_experts=hf.int("num_local_experts", 8),
            num_experts_per_token=hf.int("num_experts_per_tok", 2),
            moe_intermediate_size=hf.int("intermediate_size"),
            shared_expert_size=hf.int("shared_intermediate_size", 1024),
            fused_experts=True,
            layer_kinds=kinds,
            state=mamba_shape(hf, inner).state if "state" in kinds else None,
        )
