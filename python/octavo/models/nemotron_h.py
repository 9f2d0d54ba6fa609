"""NemotronHForCausalLM: a layer is Mamba-2, attention without rotation, an MLP, or experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from octavo.checkpoints.weights import Weights
from octavo.errors import ModelLoadError
from octavo.kernels.opset import OpSet
from octavo.layers.attention import Attention
from octavo.layers.context import StepContext
from octavo.layers.norm import Addend
from octavo.models.config import ModelConfig
from octavo.models.hf_config import HfConfig
from octavo.models.hybrid import HybridForCausalLM, layer_kinds
from octavo.models.llama import LlamaAttention
from octavo.models.mamba import MambaMixer, MambaShape, dt_limits
from octavo.models.nemotron_experts import NemotronExperts, NemotronMLP
from octavo.models.parts import layer_norms

# As config.json spells a layer's kind, old and new, and the letters of older files.
KINDS = {
    "linear_attention": "state",
    "mamba": "state",
    "full_attention": "attention",
    "attention": "attention",
    "mlp": "neither",
    "moe": "neither",
}
_LETTERS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}


class NemotronHLayer:
    """A norm and one part, added to the residual."""

    __slots__ = ("attention", "mixer", "norm", "recurrence")

    def __init__(
        self, config: ModelConfig, layer: int, cos_sin: Tensor, weights: Weights, ops: OpSet
    ) -> None:
        self.norm = layer_norms(config, layer, weights, ops)("norm")
        self.attention: Attention | None = None
        self.recurrence: MambaMixer | None = None
        self.mixer: LlamaAttention | MambaMixer | NemotronMLP | NemotronExperts
        prefix = f"model.layers.{layer}.mixer"
        match config.layer_kinds[layer]:
            case "state":
                self.mixer = self.recurrence = _load_mamba(config, layer, weights, ops)
            case "attention":
                self.mixer = LlamaAttention(config, layer, cos_sin, weights, ops)
                self.attention = self.mixer.attention
            case _ if config.moe_layers[layer]:
                self.mixer = NemotronExperts(config, prefix, weights, ops)
            case _:
                self.mixer = NemotronMLP(config, prefix, config.intermediate_size, weights, ops)

    def __call__(self, x: Addend, residual: Tensor, ctx: StepContext) -> tuple[Addend, Tensor]:
        return self.mixer.normed(x, residual, self.norm, ctx)


def _load_mamba(config: ModelConfig, layer: int, weights: Weights, ops: OpSet) -> MambaMixer:
    hf = HfConfig(config.raw, NemotronHForCausalLM.hf_defaults)
    bias = hf.bool("use_bias")
    return MambaMixer(
        config,
        f"model.layers.{layer}.mixer",
        _shape(hf),
        weights,
        ops,
        bias=bias,
        out_bias=bias,
        conv_bias=hf.bool("use_conv_bias"),
    )


def _shape(hf: HfConfig) -> MambaShape:
    return MambaShape(
        hf.int("mamba_num_heads"),
        hf.int("mamba_head_dim"),
        hf.int("n_groups"),
        hf.int("ssm_state_size"),
        hf.int("conv_kernel"),
        dt_limits(hf),
    )


class NemotronHForCausalLM(HybridForCausalLM):
    """See LlamaForCausalLM."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {
        "head_dim": 128,
        "mamba_num_heads": 128,
        "mamba_head_dim": 64,
        "n_groups": 8,
        "ssm_state_size": 128,
        "conv_kernel": 4,
        "use_conv_bias": True,
        "layer_norm_epsilon": 1e-5,
        "mlp_hidden_act": "relu2",
        "max_position_embeddings": 4096,
        "intermediate_size": 21504,
    }
    other_parts: ClassVar[tuple[str, ...]] = ("mtp",)
    layer_class: ClassVar[Callable[..., Any]] = NemotronHLayer
    file_names: ClassVar[Mapping[str, str]] = {
        r"model\.embed_tokens": "backbone.embeddings",
        r"model\.norm\.": "backbone.norm_f.",
        r"model\.(.*)self_attn\.": r"backbone.\1mixer.",
        r"model\.": "backbone.",
    }

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        types: Sequence[str] | None = hf.values.get("layers_block_type")
        types = types or hf.values.get("layer_types")
        types = types or [_LETTERS.get(x, x) for x in hf.values.get("hybrid_override_pattern", "")]
        if len(types) != hf.num_layers:
            raise ModelLoadError(
                f"config.json: {len(types)} kinds of layers for {hf.num_layers} layers"
            )
        moe_layers = tuple(kind == "moe" for kind in types)
        return hf.config(
            **(_expert_fields(hf) if any(moe_layers) else {}),
            moe_layers=moe_layers,
            mlp_bias=hf.bool("mlp_bias"),
            hidden_act=hf.values["mlp_hidden_act"],
            rms_norm_eps=hf.float("layer_norm_epsilon"),
            rope_layers=(False,) * hf.num_layers,
            layer_kinds=layer_kinds(types, KINDS),
            state=_shape(hf).state,
        )


def _expert_fields(hf: HfConfig) -> dict[str, Any]:
    return {
        "num_experts": hf.int("n_routed_experts", 8),
        "num_experts_per_token": hf.int("num_experts_per_tok", 2),
        "moe_intermediate_size": hf.int("moe_intermediate_size", 7688),
        "shared_expert_size": hf.int("moe_shared_expert_intermediate_size", 7688),
        "expert_groups": (hf.int("n_group", 1), hf.int("topk_group", 1)),
        "renormalize_experts": bool(hf.values.get("norm_topk_prob", True)),
        "routed_scale": hf.float("routed_scaling_factor", 1.0),
    }
