"""BertEncoder: BERT, RoBERTa and XLM-RoBERTa encoders, for embeddings, scores of pairs and classes.

Learned positions, attention in both directions, norms after each sum. A batch's texts lie end to
end, without padding; all layers share one cache, of the keys and values of the layer that runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from octavo.checkpoints.weights import RenamedSizedWeights
from octavo.errors import ModelLoadError
from octavo.kernels.encoder import EncoderLayerSpec, EncoderSpec
from octavo.kernels.opset import OpSet
from octavo.kernels.weights import dense
from octavo.layers.context import StepContext
from octavo.layers.linear import Linear
from octavo.layers.rope import RopeConfig, identity_table
from octavo.models.config import ModelConfig
from octavo.models.hf_config import HfConfig, architecture_of
from octavo.models.parts import load_layer_norm, load_linear


class Family(NamedTuple):
    """``prefix``: of the tensors, in checkpoints with a head. ``offsets``: positions start after
    the padding id, as RoBERTa's do. ``classifies``: the checkpoint has a classification head."""

    prefix: str
    offsets: bool
    classifies: bool = False


ENCODERS = {
    "BertModel": Family("bert.", False),
    "RobertaModel": Family("roberta.", True),
    "XLMRobertaModel": Family("roberta.", True),
    # Named after what they were trained on, by sentence-transformers too.
    "BertForMaskedLM": Family("bert.", False),
    "RobertaForMaskedLM": Family("roberta.", True),
    "XLMRobertaForMaskedLM": Family("roberta.", True),
    "BertForSequenceClassification": Family("bert.", False, True),
    "RobertaForSequenceClassification": Family("roberta.", True, True),
    "XLMRobertaForSequenceClassification": Family("roberta.", True, True),
    "BertForTokenClassification": Family("bert.", False, True),
    "RobertaForTokenClassification": Family("roberta.", True, True),
    "XLMRobertaForTokenClassification": Family("roberta.", True, True),
}


def read_encoder_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The shape that a config.json describes.

    Raises:
        ModelLoadError: no encoder of these families, or a value that is missing or impossible.
    """
    architecture = architecture_of(raw)
    if architecture not in ENCODERS:
        raise ModelLoadError(f"architecture {architecture!r} is not an encoder known here")
    if raw.get("position_embedding_type", "absolute") != "absolute" or raw.get("is_decoder"):
        raise ModelLoadError("config.json: only encoders with absolute positions are supported")
    hf = HfConfig(raw, {"hidden_act": "gelu"})
    num_heads, hidden_size = hf.int("num_attention_heads"), hf.int("hidden_size")
    max_len = hf.max_positions - first_position(raw)
    if num_heads < 1 or hidden_size % num_heads or max_len < 1:
        raise ModelLoadError("config.json: sizes that do not fit each other")
    return hf.config(
        rms_norm_eps=hf.float("layer_norm_eps", 1e-12),
        rope=RopeConfig(theta=10000.0, rot_dim=2, rope_type="default", scaling={}),
        rope_layers=(False,) * hf.num_layers,
        max_position_embeddings=max_len,
        max_context_len=max_len,
        eos_token_ids=(),
    )


def first_position(raw: Mapping[str, Any]) -> int:
    """The row of the first token's learned position."""
    offsets = ENCODERS[architecture_of(raw)].offsets
    return HfConfig(raw, {"pad_token_id": 1}).int("pad_token_id") + 1 if offsets else 0


class _Layer:
    """norm(x + attention(x)), then norm(x + mlp(x))."""

    __slots__ = ("down", "mlp_norm", "o", "o_norm", "qkv", "up")

    def __init__(
        self, config: ModelConfig, layer: int, weights: RenamedSizedWeights, ops: OpSet
    ) -> None:
        prefix, d, f = f"encoder.layer.{layer}", config.hidden_size, config.intermediate_size

        def linear(names: Sequence[str], n: int, k: int) -> Linear:
            return load_linear({f"{prefix}.{name}": n for name in names}, k, True, weights, ops)

        self.qkv = linear([f"attention.self.{name}" for name in ("query", "key", "value")], d, d)
        self.o = linear(["attention.output.dense"], d, d)
        o_norm = f"{prefix}.attention.output.LayerNorm"
        self.o_norm = load_layer_norm(o_norm, config, weights, ops)
        self.up = linear(["intermediate.dense"], f, d)
        self.down = linear(["output.dense"], d, f)
        self.mlp_norm = load_layer_norm(f"{prefix}.output.LayerNorm", config, weights, ops)

    def spec(self) -> EncoderLayerSpec:
        """This layer as ``kernels.encoder`` describes one."""
        return EncoderLayerSpec(
            qkv=self.qkv.spec(),
            o=self.o.spec(),
            o_norm=self.o_norm.spec(),
            up=self.up.spec(),
            down=self.down.spec(),
            mlp_norm=self.mlp_norm.spec(),
        )


class BertEncoder:
    """Weights are pulled from ``weights`` while it is built.

    ``rounded``: factors of matrix products may be rounded to 16 bits where that is faster.

    Raises:
        ModelLoadError: a weight is missing or has another shape.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: RenamedSizedWeights,
        ops: OpSet,
        device: torch.device,
        *,
        rounded: bool = False,
    ) -> None:
        self.config = config
        self._ops = ops

        def table(name: str, rows: int) -> Tensor:
            found = weights.embedding(f"embeddings.{name}", (rows, config.hidden_size))
            return dense(found).to(weights.act_dtype)

        self._words = table("word_embeddings", config.vocab_size)
        types = table(
            "token_type_embeddings", weights.num_rows("embeddings.token_type_embeddings.weight")
        )
        first = first_position(config.raw)
        positions = table("position_embeddings", first + config.max_position_embeddings)[first:]
        # The first text's type is part of every position; a second text adds the difference.
        self._positions = positions + types[0]
        self._second = types[1] - types[0] if types.shape[0] > 1 else None
        self._norm = load_layer_norm("embeddings.LayerNorm", config, weights, ops)
        self._layers = [_Layer(config, i, weights, ops) for i in range(config.num_layers)]
        # All layers in one call, where the op set has that; rounded weights are its own then.
        spec = EncoderSpec(
            layers=[layer.spec() for layer in self._layers],
            num_heads=config.num_heads,
            eps=config.rms_norm_eps,
            scale=config.head_dim**-0.5,
            act=config.hidden_act,
            rounded=rounded,
        )
        self._encoder = None if ops.make_encoder is None else ops.make_encoder(spec)
        if self._encoder is not None:
            self._layers = []
        self._no_rope = identity_table(config.max_position_embeddings, device)
        self._k_cache, self._v_cache = torch.empty(0), torch.empty(0)

    def bind_kv_cache(self, k_cache: Tensor, v_cache: Tensor) -> None:
        """Take the cache [num_blocks, num_heads, block_size, head_dim], shared by all layers."""
        self._k_cache, self._v_cache = k_cache, v_cache

    def __call__(
        self, input_ids: Tensor, ctx: StepContext, is_second: Tensor | None = None
    ) -> Tensor:
        """input_ids int32 [T], whole texts -> hidden states [T, D].

        ``is_second``: bool or 0 and 1 [T], the tokens of pairs' second texts; None is no pairs.
        """
        x = self._words[input_ids] + self._positions[ctx.positions]
        if is_second is not None and self._second is not None:
            x += is_second[:, None] * self._second
        x = self._norm(x)
        if self._encoder is not None:
            return self._encoder(x, ctx.query_start_loc)
        for layer in self._layers:
            attended = self._attend(layer.qkv(x), ctx)
            x, _ = layer.o_norm.add(layer.o(attended), x)
            act = self._ops.activation(layer.up(x), self.config.hidden_act)
            x, _ = layer.mlp_norm.add(layer.down(act), x)
        return x

    def _attend(self, qkv: Tensor, ctx: StepContext) -> Tensor:
        config = self.config
        q = self._ops.qk_norm_rope_store_kv(
            qkv,
            ctx.positions,
            self._no_rope,
            ctx.slot_mapping,
            self._k_cache,
            self._v_cache,
            num_heads=config.num_heads,
            num_kv_heads=config.num_heads,
            head_dim=config.head_dim,
        )
        return self._ops.paged_attention(
            q,
            self._k_cache,
            self._v_cache,
            ctx.block_table,
            ctx.slots,
            ctx.seq_lens,
            ctx.query_start_loc,
            scale=config.head_dim**-0.5,
            num_decodes=0,
            max_query_len=ctx.max_query_len,
            max_seq_len=ctx.max_seq_len,
            causal=False,
        )


def make_class_head(
    architecture: str, hidden_size: int, weights: RenamedSizedWeights
) -> tuple[Callable[[Tensor], Tensor], int]:
    """A classifier's head, hidden [R, D] -> float32 logits [R, labels], and the number of labels.

    Raises:
        ModelLoadError: a weight is missing.
    """
    # RoBERTa keeps both layers in its head, BERT the first one in the encoder; a head for single
    # tokens has one.
    names: tuple[str, ...] = ("pooler.dense", "classifier")
    if architecture.endswith("ForTokenClassification"):
        names = ("classifier",)
    elif ENCODERS[architecture].offsets:
        names = ("classifier.dense", "classifier.out_proj")
    num_labels = weights.num_rows(f"{names[-1]}.weight")
    layers = []
    for name in names:
        rows = num_labels if name == names[-1] else hidden_size
        weight = dense(weights.linear(name, (rows, hidden_size)))
        layers.append((weight.float(), weights.vector(f"{name}.bias", rows).float()))

    def classify(hidden: Tensor) -> Tensor:
        x = hidden.float()
        for layer in layers[:-1]:
            x = torch.nn.functional.linear(x, *layer).tanh()
        return torch.nn.functional.linear(x, *layers[-1])

    return classify, num_labels
