"""GPTNeoForCausalLM: learned positions, scores as they are, and every other layer local."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from octavo.checkpoints.weights import Weights
from octavo.kernels.opset import OpSet
from octavo.layers.context import StepContext
from octavo.layers.norm import Addend
from octavo.models.config import ModelConfig
from octavo.models.hf_config import HfConfig
from octavo.models.layer_norm_decoder import Layer, LayerNormDecoder, UngatedMLP, make_attention
from octavo.models.parts import heads_of, load_columns, load_layer_norm, load_rows


class GPTNeoDecoderLayer:
    """Attention and MLP, each after a norm and added to the residual."""

    __slots__ = ("attention", "ln_1", "ln_2", "mlp", "out_proj", "qkv_proj")

    def __init__(
        self, config: ModelConfig, layer: int, cos_sin: Tensor, weights: Weights, ops: OpSet
    ) -> None:
        prefix, d = f"transformer.h.{layer}", config.hidden_size
        self.ln_1 = load_layer_norm(f"{prefix}.ln_1", config, weights, ops)
        self.ln_2 = load_layer_norm(f"{prefix}.ln_2", config, weights, ops)
        attention = f"{prefix}.attn.attention"
        own = heads_of(config, ops.rank).q_rows
        named = {f"{attention}.{name}_proj": d for name in ("q", "k", "v")}
        self.qkv_proj = load_columns(named, d, False, weights, ops, (own,) * 3)
        window = config.sliding_window(layer)
        self.attention = make_attention(config, cos_sin, ops, sliding_window=window)
        self.out_proj = load_rows(f"{attention}.out_proj", d, d, True, weights, ops, own)
        mlp = (f"{prefix}.mlp.c_fc", f"{prefix}.mlp.c_proj")
        self.mlp = UngatedMLP(mlp, config, True, weights, ops)

    def __call__(self, x: Addend, residual: Tensor, ctx: StepContext) -> tuple[Addend, Tensor]:
        x, residual = self.ln_1.add(x, residual)
        attended = self.out_proj(self.attention(self.qkv_proj(x), ctx))
        x, residual = self.ln_2.add(attended, residual)
        return self.mlp(x), residual


class GPTNeoForCausalLM(LayerNormDecoder):
    """See LayerNormDecoder."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {
        "activation_function": "gelu_new",
        "attention_types": [[["global", "local"], 12]],
        "tie_word_embeddings": True,
        "window_size": 256,
    }
    layer_class: ClassVar[Callable[..., Layer]] = GPTNeoDecoderLayer
    embedding_name: ClassVar[str] = "transformer.wte"
    positions_name: ClassVar[str] = "transformer.wpe"
    norm_name: ClassVar[str] = "transformer.ln_f"

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        """The family's config.json.

        Raises:
            ModelLoadError: a value is missing or impossible.
        """
        kinds = [
            kind
            for group, times in hf.values["attention_types"]
            for kind in list(group) * int(times)
        ]
        window = hf.int("window_size")
        return hf.config(
            num_kv_heads=hf.int("num_attention_heads"),
            intermediate_size=hf.int("intermediate_size", 4 * hf.int("hidden_size")),
            hidden_act=hf.values["activation_function"],
            attention_scale=1.0,
            rms_norm_eps=hf.float("layer_norm_epsilon", 1e-5),
            rope_layers=(False,) * hf.num_layers,
            sliding_windows=tuple(
                window if kind == "local" else 0 for kind in kinds[: hf.num_layers]
            ),
        )
