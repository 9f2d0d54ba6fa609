"""BertEncoder: BERT, RoBERTa and XLM-RoBERTa encoders, for embeddings.

Learned positions, attention in both directions, norms after each sum. A batch's texts lie end to
end, without padding; one scratch cache holds the keys and values of the layer that runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from octavo.layers.linear import Linear
from octavo.layers.norm import LayerNorm
from octavo.layers.ops import Ops
from octavo.layers.rope import identity_table
from octavo.models.errors import ModelLoadError
from octavo.models.hf_config import ACTIVATIONS, HfConfig, architecture_of
from octavo.models.weights import SafetensorsWeights, Weights

# Architecture -> whether positions start behind the padding id, as RoBERTa's do.
ENCODERS = {"BertModel": False, "RobertaModel": True, "XLMRobertaModel": True}
# A text's last block is half empty on average; smaller blocks cost more look-ups.
_BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """An encoder's shape. ``first_position``: the row of the first token's learned position."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_positions: int
    first_position: int
    eps: float
    act: str

    @property
    def max_len(self) -> int:
        """The most tokens of a text."""
        return self.num_positions - self.first_position


def read_encoder_config(raw: Mapping[str, Any]) -> EncoderConfig:
    """The shape that a config.json describes.

    Raises:
        ModelLoadError: no encoder of these families, or a value that is missing or impossible.
    """
    architecture = architecture_of(raw)
    if architecture not in ENCODERS:
        raise ModelLoadError(f"architecture {architecture!r} is not an encoder known here")
    if raw.get("position_embedding_type", "absolute") != "absolute" or raw.get("is_decoder"):
        raise ModelLoadError("config.json: only encoders with absolute positions are supported")
    hf = HfConfig(raw, {"hidden_act": "gelu", "pad_token_id": 1 if ENCODERS[architecture] else 0})
    act = str(raw.get("hidden_act") or "gelu")
    if act not in ACTIVATIONS:
        raise ModelLoadError(f"config.json: hidden_act {act!r} is not supported")
    config = EncoderConfig(
        vocab_size=hf.int("vocab_size"),
        hidden_size=hf.int("hidden_size"),
        intermediate_size=hf.int("intermediate_size"),
        num_layers=hf.num_layers,
        num_heads=hf.int("num_attention_heads"),
        num_positions=hf.max_positions,
        first_position=hf.int("pad_token_id") + 1 if ENCODERS[architecture] else 0,
        eps=hf.float("layer_norm_eps", 1e-12),
        act=ACTIVATIONS[act],
    )
    if config.num_heads < 1 or config.hidden_size % config.num_heads or config.max_len < 1:
        raise ModelLoadError("config.json: sizes that do not fit each other")
    return config


class _Layer:
    """norm(x + attention(x)), then norm(x + mlp(x))."""

    __slots__ = ("down", "mlp_norm", "o", "o_norm", "qkv", "up")

    def __init__(self, config: EncoderConfig, layer: int, weights: Weights, ops: Ops) -> None:
        prefix, d, f = f"encoder.layer.{layer}", config.hidden_size, config.intermediate_size

        def linear(names: Sequence[str], n: int, k: int) -> Linear:
            return Linear(
                ops,
                [weights.matrix(f"{prefix}.{name}.weight", (n, k)) for name in names],
                torch.cat([weights.vector(f"{prefix}.{name}.bias", n) for name in names]),
                exact=weights.exact,
            )

        self.qkv = linear([f"attention.self.{name}" for name in ("query", "key", "value")], d, d)
        self.o = linear(["attention.output.dense"], d, d)
        self.o_norm = _norm(f"{prefix}.attention.output.LayerNorm", config, weights, ops)
        self.up = linear(["intermediate.dense"], f, d)
        self.down = linear(["output.dense"], d, f)
        self.mlp_norm = _norm(f"{prefix}.output.LayerNorm", config, weights, ops)


def _norm(name: str, config: EncoderConfig, weights: Weights, ops: Ops) -> LayerNorm:
    weight = weights.vector(f"{name}.weight", config.hidden_size)
    return LayerNorm(ops, weight, weights.vector(f"{name}.bias", config.hidden_size), config.eps)


class BertEncoder:
    """Weights are pulled from ``weights`` while it is built.

    Raises:
        ModelLoadError: a weight is missing or has another shape.
    """

    def __init__(
        self, config: EncoderConfig, weights: SafetensorsWeights, ops: Ops, device: torch.device
    ) -> None:
        self.config = config
        self._ops, self._device = ops, device

        def table(name: str, rows: int) -> Tensor:
            found = weights.matrix(f"embeddings.{name}.weight", (rows, config.hidden_size))
            assert isinstance(found, Tensor), "encoders are read from safetensors"
            return found.to(weights.act_dtype)

        self._words = table("word_embeddings", config.vocab_size)
        types = table(
            "token_type_embeddings", weights.num_rows("embeddings.token_type_embeddings.weight")
        )
        # Every text is of the first type: its row is part of every position's.
        self._positions = table("position_embeddings", config.num_positions) + types[0]
        self._norm = _norm("embeddings.LayerNorm", config, weights, ops)
        self._layers = [_Layer(config, i, weights, ops) for i in range(config.num_layers)]
        self._no_rope = identity_table(config.max_len, device)

    def __call__(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Token ids, no text empty or over ``max_len`` -> hidden states [T, D], end to end."""
        config, ops = self.config, self._ops
        lengths = [len(text) for text in texts]

        def ints(values: Any) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=self._device)

        positions = ints([p for n in lengths for p in range(n)])
        starts, blocks, slots = [0], [0], list[int]()
        for n in lengths:
            starts.append(starts[-1] + n)
            slots += range(blocks[-1] * _BLOCK_SIZE, blocks[-1] * _BLOCK_SIZE + n)
            blocks.append(blocks[-1] - (-n // _BLOCK_SIZE))
        width = max(after - before for before, after in itertools.pairwise(blocks))
        rows = [[min(first + i, blocks[-1] - 1) for i in range(width)] for first in blocks[:-1]]
        tables, slot_mapping, order = ints(rows), ints(slots), ints(range(len(texts)))
        seq_lens, query_start_loc = ints(lengths), ints(starts)
        head_dim = config.hidden_size // config.num_heads
        shape = (blocks[-1], config.num_heads, _BLOCK_SIZE, head_dim)
        k_cache, v_cache = (self._words.new_zeros(shape) for _ in range(2))
        ids = ints([token for text in texts for token in text])
        x = self._norm(self._words[ids] + self._positions[positions + config.first_position])
        for layer in self._layers:
            q = ops.qk_norm_rope_store_kv(
                layer.qkv(x),
                positions,
                self._no_rope,
                slot_mapping,
                k_cache,
                v_cache,
                num_heads=config.num_heads,
                num_kv_heads=config.num_heads,
                head_dim=head_dim,
            )
            attended = ops.paged_attention(
                q,
                k_cache,
                v_cache,
                tables,
                order,
                seq_lens,
                query_start_loc,
                scale=head_dim**-0.5,
                num_decodes=0,
                max_query_len=max(lengths),
                max_seq_len=max(lengths),
                causal=False,
            )
            x, _ = layer.o_norm.add(layer.o(attended), x)
            x, _ = layer.mlp_norm.add(layer.down(ops.activation(layer.up(x), config.act)), x)
        return x
