"""Gemma3nForCausalLM, the text model: Gemma 3 whose later layers read the caches of earlier ones.

Four residuals go side by side (AltUp): each layer predicts all of them, computes one, and corrects
the others by how far that was off. Beside attention there is a low-rank block (Laurel), gates of
early layers keep the largest few of their values, and each layer has vectors of its own for tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from octavo.checkpoints.weights import Weights
from octavo.kernels.opset import OpSet
from octavo.layers.context import StepContext
from octavo.layers.linear import Linear
from octavo.layers.norm import RMSNorm
from octavo.models.config import ModelConfig
from octavo.models.gemma import gemma_fields
from octavo.models.hf_config import HfConfig
from octavo.models.llama import LlamaForCausalLM, LlamaMLP
from octavo.models.parts import layer_norms, load_linear, width_of
from octavo.models.per_layer_input import PerLayerEmbedding, PerLayerGate, of_layers
from octavo.models.reading_attention import ReadingAttention, kv_sources
from octavo.models.stage import Stage

_DEFAULTS: Mapping[str, Any] = {
    "altup_num_inputs": 4,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_size_per_layer_input": 256,
    "laurel_rank": 64,
    "max_position_embeddings": 32768,
    "num_kv_shared_layers": 15,
    "rope_local_base_freq": 10000.0,
    "rope_theta": 1000000.0,
    "sliding_window": 512,
    "tie_word_embeddings": True,
    "vocab_size_per_layer_input": 262144,
}
_LEAST_SQUARE = 1e-5


class Gemma3nMLP(LlamaMLP):
    """An MLP whose gate may keep only what is far above its mean."""

    __slots__ = ("_deviations", "_fractions", "_rank")

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        weights: Weights,
        ops: OpSet,
        sparsity: float,
        device: torch.device,
    ) -> None:
        sizes = config.raw.get("intermediate_size", config.intermediate_size)
        size = int(sizes[layer]) if isinstance(sizes, Sequence) else int(sizes)
        super().__init__(config, layer, weights, ops, size=size)
        self._deviations = NormalDist().inv_cdf(sparsity) if sparsity > 0 else None
        self._rank = rank = ops.rank
        own = [width_of(size, rank.at(other, rank.size)) for other in range(rank.size)]
        fractions = [(end - begin) / size for begin, end in own]
        # float32 [ranks]: the part of the width that each has.
        self._fractions = torch.tensor(fractions, device=device)

    def __call__(self, x: Tensor) -> Tensor:
        gate_up = self.gate_up_proj(x)
        if self._deviations is not None:
            gate = gate_up[:, : gate_up.shape[1] // 2]
            deviation, mean = self._spread(gate)
            gate.copy_(torch.relu(gate - (mean + deviation * self._deviations)))
        return self.down_proj(self._gated_activation(gate_up, self.act))

    def _spread(self, gate: Tensor) -> tuple[Tensor, Tensor]:
        """Deviation and mean, [T, 1] each, of all ranks' gates, of which ``gate`` is a rank's."""
        deviation, mean = torch.std_mean(gate, -1, correction=0, keepdim=True)
        size = self._rank.size
        if size == 1:
            return deviation, mean
        both = torch.cat((deviation, mean), 1).float()
        deviations, means = self._rank.gather(both, 2 * size).view(-1, size, 2).unbind(-1)
        whole = (means * self._fractions).sum(-1, keepdim=True)
        squares = deviations.square() + (means - whole).square()
        variance = (squares * self._fractions).sum(-1, keepdim=True)
        return variance.sqrt().to(gate.dtype), whole.to(gate.dtype)


class AltUp:
    """Prediction of all residuals, and their correction by the one that was computed."""

    __slots__ = ("_active", "_correct", "_norm", "_predict", "_route")

    def __init__(
        self, config: ModelConfig, layer: int, active: int, weights: Weights, ops: OpSet
    ) -> None:
        prefix = f"model.layers.{layer}.altup"
        d, count = config.hidden_size, int(HfConfig(config.raw, _DEFAULTS).int("altup_num_inputs"))
        self._active = active

        def matrix(name: str, rows: int, columns: int) -> Tensor:
            return weights.tensor(f"{prefix}.{name}.weight", (rows, columns)).float()

        # So few rows and columns, and so much that hangs on them, that they stay float32.
        self._route = matrix("modality_router", count, d).T / d
        self._predict = matrix("prediction_coefs", count * count, count).T
        self._correct = matrix("correction_coefs", count, count).T
        self._norm = layer_norms(config, layer, weights, ops)("altup.router_norm")

    def _modalities(self, x: Tensor) -> Tensor:
        """x [T, D] -> float32 [T, residuals]."""
        return torch.tanh(self._norm(x).float() @ self._route)

    def predict(self, residuals: Tensor) -> Tensor:
        """residuals [A, T, D] -> [A, T, D]."""
        count = len(residuals)
        factors = self._modalities(residuals[self._active]) @ self._predict
        factors = factors.view(-1, count, count)
        mixed = torch.einsum("tji,itd->jtd", factors, residuals.float())
        return (mixed + residuals).to(residuals.dtype).contiguous()

    def correct(self, predicted: Tensor, computed: Tensor) -> Tensor:
        """predicted [A, T, D], computed [T, D] -> [A, T, D]."""
        change = (computed - predicted[self._active]).float()
        factors = (self._modalities(computed) @ self._correct + 1.0).T
        return (predicted + change * factors[:, :, None]).to(predicted.dtype)


class Gemma3nDecoderLayer:
    """Attention and MLP of one of the residuals, each between two norms."""

    __slots__ = (
        "_active",
        "_scale",
        "altup",
        "gate",
        "input_layernorm",
        "laurel",
        "laurel_norm",
        "mlp",
        "post_attention_layernorm",
        "post_feedforward_layernorm",
        "pre_feedforward_layernorm",
        "self_attn",
    )

    def __init__(
        self, config: ModelConfig, layer: int, cos_sin: Tensor, weights: Weights, ops: OpSet
    ) -> None:
        hf = HfConfig(config.raw, _DEFAULTS)
        prefix, d, rank = f"model.layers.{layer}", config.hidden_size, hf.int("laurel_rank")
        norm = layer_norms(config, layer, weights, ops)
        self._active = hf.int("altup_active_idx", 0)
        self.altup = AltUp(config, layer, self._active, weights, ops)
        self.input_layernorm = norm("input_layernorm")
        left, right = (f"{prefix}.laurel.linear_{side}" for side in ("left", "right"))
        self.laurel = (
            load_linear({left: rank}, d, False, weights, ops),
            load_linear({right: d}, rank, False, weights, ops),
        )
        self.laurel_norm = norm("laurel.post_laurel_norm")
        self.self_attn = ReadingAttention(config, layer, cos_sin, weights, ops)
        self.post_attention_layernorm = norm("post_attention_layernorm")
        self.pre_feedforward_layernorm = norm("pre_feedforward_layernorm")
        sparsity = _sparsity(hf, layer)
        self.mlp = Gemma3nMLP(config, layer, weights, ops, sparsity, cos_sin.device)
        self.post_feedforward_layernorm = norm("post_feedforward_layernorm")
        self._scale = weights.vector(f"{prefix}.altup.correct_output_scale", d)
        if not hf.values.get("altup_correct_scale", True):
            self._scale = torch.ones_like(self._scale)
        self.gate = PerLayerGate(config, layer, weights, ops)

    def __call__(self, residuals: Tensor, vectors: Tensor, ctx: StepContext) -> Tensor:
        """residuals [A, T, D], the layer's vectors [T, size] -> [A, T, D]."""
        predicted = self.altup.predict(residuals)
        active = predicted[self._active]
        x = self.input_layernorm(active)
        left, right = self.laurel
        laurel = x + self.laurel_norm(right(left(x)))
        attended = active + self.post_attention_layernorm(self.self_attn(x, ctx))
        mixed = (attended + laurel) * 2**-0.5
        hidden = self.mlp(self.pre_feedforward_layernorm(mixed))
        computed = mixed + self.post_feedforward_layernorm(hidden)
        corrected = self.altup.correct(predicted, computed)
        corrected[1:] += self.gate(corrected[self._active] * self._scale, vectors)
        return corrected

    def spec(self) -> None:
        """None: no op set runs such layers in one call."""
        return None


class Gemma3nForCausalLM(LlamaForCausalLM):
    """See LlamaForCausalLM."""

    hf_defaults: ClassVar[Mapping[str, Any]] = _DEFAULTS
    layer_class: ClassVar[Callable[..., Any]] = Gemma3nDecoderLayer

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
        super().__init__(
            config, weights, ops, max_model_len=max_model_len, device=device, stage=stage
        )
        d, others = config.hidden_size, range(config.num_residuals - 1)

        def projections(name: str) -> list[Linear]:
            if config.raw.get("stacks_altup"):
                stacked = weights.experts("model", len(others), name, (d, d))
                return [Linear(ops, [weight]) for weight in stacked]
            return [load_linear({f"model.{name}.{i}": d}, d, False, weights, ops) for i in others]

        if self.stage.is_first:
            self.per_layer = PerLayerEmbedding(config, weights, ops)
            self._widen = projections("altup_projections")
        if self.stage.is_last:
            self._narrow = projections("altup_unembed_projections")

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        types = hf.values.get("layer_types") or [
            "sliding_attention" if (layer + 1) % 5 else "full_attention"
            for layer in range(hf.num_layers)
        ]
        local = {"rope_theta": hf.float("rope_local_base_freq")}
        parameters = hf.values.get("rope_parameters") or {}
        sizes = hf.values["intermediate_size"]
        fields = gemma_fields(hf)
        return hf.config(
            **{**fields, "norm_weight_offset": 0.0},
            intermediate_size=max(sizes) if isinstance(sizes, Sequence) else int(sizes),
            qk_norm=True,
            attention_scale=1.0,
            num_residuals=hf.int("altup_num_inputs"),
            per_layer_size=hf.int("hidden_size_per_layer_input"),
            per_layer_vocab=hf.int("vocab_size_per_layer_input"),
            final_logit_softcap=hf.float("final_logit_softcapping"),
            sliding_windows=hf.windows(default_types=types),
            local_rope=hf.rope(
                rope_parameters=parameters.get("sliding_attention") or local, rope_scaling=None
            ),
            kv_sources=kv_sources(types, hf.int("num_kv_shared_layers")),
        )

    def __call__(self, inputs: Tensor, ctx: StepContext) -> Tensor:
        """As LlamaForCausalLM's; a stage's states are all residuals, and all layers' vectors."""
        stage, config = self.stage, self.config
        if stage.is_first:
            embedded = self.embed_tokens(inputs)
            vectors = self.per_layer(inputs, embedded)
            others = [_as_large(project(embedded), embedded) for project in self._widen]
            residuals = torch.stack([embedded, *others])
        else:
            width = config.num_residuals * config.hidden_size
            residuals = inputs[:, :width].view(len(inputs), config.num_residuals, -1)
            residuals = residuals.transpose(0, 1).contiguous()
            vectors = inputs[:, width:].contiguous()
        layers = cast(Sequence[Gemma3nDecoderLayer], self.layers)
        own = of_layers(vectors, stage.layers, config.per_layer_size)
        for layer, vector in zip(layers, own, strict=True):
            residuals = layer(residuals, vector, ctx)
        if not stage.is_last:
            return torch.cat((residuals.transpose(0, 1).flatten(1), vectors), 1)
        first = residuals[0]
        pairs = zip(self._narrow, residuals[1:], strict=True)
        others = [_as_large(project(residual), first) for project, residual in pairs]
        assert isinstance(self.norm, RMSNorm)
        return self.norm(torch.stack([first, *others]).mean(0))


def _sparsity(hf: HfConfig, layer: int) -> float:
    """The part of a gate's values that a layer leaves out."""
    pattern = hf.values.get("activation_sparsity_pattern")
    if pattern is None:
        return 0.95 if hf.num_layers > 10 and layer < 10 else 0.0
    return float(pattern[layer] if isinstance(pattern, Sequence) else pattern)


def _as_large(x: Tensor, model: Tensor) -> Tensor:
    """x [T, D] with the magnitude of ``model``'s rows."""
    wanted = model.float().square().mean(-1, keepdim=True)
    found = x.float().square().mean(-1, keepdim=True).clamp(min=_LEAST_SQUARE)
    return x * (wanted.sqrt() / found.sqrt()).to(x.dtype)
