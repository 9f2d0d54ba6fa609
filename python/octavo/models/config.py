"""ModelConfig: a decoder's shape, from any kind of file.

Built from a ``config.json`` (hf_config.py) or from GGUF metadata (gguf_config.py), without
importing transformers. Whatever several families compute is a field here; a family's class maps its
own config keys to these fields.
"""

from __future__ import annotations

import builtins
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from octavo.errors import ModelLoadError
from octavo.layers.rope import RopeConfig


@dataclass(frozen=True)
class LatentDims:
    """Sizes of latent attention: what a head's queries, keys and values are made of.

    q_rank: of the queries' own latent; 0: they have none. kv_rank: of the latent in the cache.
    rope_dim: elements that rotate, one key for all heads. nope_dim, value_dim: a head's others.
    """

    q_rank: int
    kv_rank: int
    rope_dim: int
    nope_dim: int
    value_dim: int


@dataclass(frozen=True)
class StateShape:
    """One request's state in each layer that has one.

    ``conv``: (channels, width - 1), the last inputs of a causal convolution; zeros: there is none.
    ``recurrent``: what a recurrence has come to, (heads, rows, columns). ``groups``: of heads with
    the same inputs.
    """

    conv: tuple[int, int]
    recurrent: tuple[int, int, int] | None = None
    groups: int = 1


@dataclass(frozen=True)
class KVShape:
    """A layer's key-value heads, and the elements of each."""

    num_heads: int
    head_dim: int


# Kinds of layers by what they keep of the tokens so far.
KV_KINDS = frozenset({"attention", "both"})
STATE_KINDS = frozenset({"state", "both"})


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a decoder-only model.

    ``sliding_windows`` and ``rope_layers`` have one entry a layer, or none: 0 where attention sees
    everything, False where it has no rotary embedding. ``dtype`` is the one the checkpoint was
    trained in. ``max_position_embeddings`` is the length the rotary embedding starts
    from; ``max_context_len`` the longest context that leaves short ones as they are.

    Raises:
        ModelLoadError: an impossible value.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    max_context_len: int
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    # Biases of q, k, v; of the attention's output; of the MLP.
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    # The checkpoint holds q, k, v as one tensor, and gate and up as another.
    fused_projections: bool = False
    # Gate and up alone.
    fused_mlp: bool = False
    # Rope turns neighbouring elements together, not those of a head's two halves.
    interleaved_rope: bool = False
    # A score of each head that every query's softmax has and no value belongs to.
    attention_sinks: bool = False
    # RMSNorm over each head's query and key, before rope.
    qk_norm: bool = False
    # Queries grow with their position: (beta, every) is 1 + beta log(1 + floor(position / every)).
    query_growth: tuple[float, float] | None = None
    # Norms multiply by (weight + this): Gemma trains weights around zero.
    norm_weight_offset: float = 0.0
    # Of the scores; None: head_dim ** -0.5.
    attention_scale: float | None = None
    # Factors on the embedding's rows, on what a block adds to the residual, on the logits.
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    # One row for all heads in the cache, as wide as head_dim, is both key and value.
    latent: LatentDims | None = None
    sliding_windows: tuple[int, ...] = ()
    # Each layer's chunk: a token sees those of its own chunk alone; 0: everything. Empty: 0 in all.
    attention_chunks: tuple[int, ...] = ()
    # The rotary embedding of layers with a window, where it is another.
    local_rope: RopeConfig | None = None
    rope_layers: tuple[bool, ...] = ()
    attn_logit_softcap: float = 0.0
    final_logit_softcap: float = 0.0
    # Residuals side by side.
    num_residuals: int = 1
    # Elements of a layer's own vector of each token, and ids that have one; 0: there are none.
    per_layer_size: int = 0
    per_layer_vocab: int = 0
    # Mixture of experts: 0 experts, none. ``moe_layers`` has one entry a layer.
    num_experts: int = 0
    num_experts_per_token: int = 0
    moe_intermediate_size: int = 0
    renormalize_experts: bool = True
    # Of an expert that every token goes to; 0: there is none.
    shared_expert_size: int = 0
    moe_layers: tuple[bool, ...] = ()
    # MLPs, as wide as an expert, that every token goes through.
    num_shared_experts: int = 0
    # (groups, of which so many are chosen from), and a factor on the experts' weights.
    expert_groups: tuple[int, int] = (1, 1)
    routed_scale: float = 1.0
    # The checkpoint holds each expert's gate and up as one tensor.
    fused_experts: bool = False
    # Each layer's key-value heads and head size, where layers differ; empty: the model's in all.
    kv_shapes: tuple[KVShape, ...] = ()
    # The layer whose keys and values each layer reads, itself or an earlier one; empty: itself.
    kv_sources: tuple[int, ...] = ()
    # Each layer's kind: "attention", "state", "both" or "neither"; empty: attention in all.
    layer_kinds: tuple[str, ...] = ()
    # Of the layers that keep a state.
    state: StateShape | None = None
    # The text model of a checkpoint with other parts.
    is_part: bool = False
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "float32"
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise ModelLoadError(f"config: {name} must be positive, not {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ModelLoadError(
                f"config: {self.num_heads} heads are not a multiple of {self.num_kv_heads} kv heads"
            )
        if 0 < self.num_experts < self.num_experts_per_token or (
            self.num_experts and self.num_experts_per_token < 1
        ):
            raise ModelLoadError(
                f"config: {self.num_experts_per_token} of {self.num_experts} experts per token"
            )
        if self.rope.rot_dim % 2 or not 0 < self.rope.rot_dim <= self.head_dim:
            raise ModelLoadError(
                f"config: rotary dimension {self.rope.rot_dim} must be even and at most head_dim "
                f"{self.head_dim}"
            )

    @property
    def q_size(self) -> int:
        """Rows of the query projection."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.num_kv_heads * self.head_dim

    @property
    def handed_size(self) -> int:
        """Elements of a token that a stage of layers hands on to the next."""
        return self.num_residuals * self.hidden_size + self.num_layers * self.per_layer_size

    @property
    def kv_layers(self) -> tuple[bool, ...]:
        """True for each layer that keeps keys and values."""
        if self.kv_sources:
            return tuple(source == layer for layer, source in enumerate(self.kv_sources))
        if not self.layer_kinds:
            return (True,) * self.num_layers
        return tuple(kind in KV_KINDS for kind in self.layer_kinds)

    @property
    def cache_shapes(self) -> tuple[KVShape, ...]:
        """The shape of each layer's cache, of those layers that keep one."""
        shapes = self.kv_shapes or (KVShape(self.num_kv_heads, self.head_dim),) * self.num_layers
        return tuple(shape for shape, keeps in zip(shapes, self.kv_layers, strict=True) if keeps)

    @property
    def cache_indices(self) -> tuple[int, ...]:
        """Each layer's cache among those of ``cache_shapes``; of layers with attention alone."""
        if not self.kv_sources:
            return tuple(range(self.num_layers))
        kept = [layer for layer, keeps in enumerate(self.kv_layers) if keeps]
        return tuple(kept.index(source) for source in self.kv_sources)

    @property
    def state_layers(self) -> tuple[bool, ...]:
        """True for each layer that keeps a state."""
        if not self.layer_kinds:
            return (False,) * self.num_layers
        return tuple(kind in STATE_KINDS for kind in self.layer_kinds)

    @property
    def context_limit(self) -> int:
        """The longest context that may be configured.

        Beyond ``max_context_len`` the rotary embedding of short texts changes, too.
        """
        match self.rope.rope_type:
            case "dynamic":
                factor = float(self.rope.scaling.get("factor") or 1.0)
                return int(self.max_position_embeddings * factor)
            case "longrope":
                return max(self.max_context_len, self.max_position_embeddings)
        return self.max_context_len

    def sliding_window(self, layer: int) -> int:
        """The window of layer ``layer`` in tokens; 0: everything."""
        return self.sliding_windows[layer] if self.sliding_windows else 0

    def at_layer(self, layer: int) -> ModelConfig:
        """The shape of layer ``layer``, where layers have heads of their own; else the model's."""
        if not self.kv_shapes:
            return self
        shape = self.kv_shapes[layer]
        is_local = self.local_rope is not None and self.sliding_window(layer) > 0
        return self.replace(
            num_kv_heads=shape.num_heads,
            head_dim=shape.head_dim,
            rope=self.local_rope if is_local else self.rope,
            kv_shapes=(),
        )

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with these fields changed."""
        return dataclasses.replace(self, **changes)


def token_ids(value: Any) -> tuple[int, ...]:
    """A tuple of an ``eos_token_id`` and the like, which may be absent, one id or a list."""
    if value is None:
        return ()
    if isinstance(value, (list, tuple)):
        return tuple(int(v) for v in value)
    return (int(value),)


def first(ids: tuple[int, ...]) -> int | None:
    """The first of the ids, or None."""
    return ids[0] if ids else None


class Getter:
    """Reads numbers out of a mapping; a missing or odd one is an error that names the key."""

    def __init__(self, values: Mapping[str, Any], where: str, prefix: str = "") -> None:
        self.values, self.where, self.prefix = values, where, prefix

    def int(self, key: str, default: builtins.int | None = None) -> builtins.int:
        """A whole number; null is absent."""
        value = self._get(key, default)
        if isinstance(value, bool) or not math.isfinite(value) or int(value) != value:
            raise ModelLoadError(f"{self.where}: {self.prefix}{key} must be a whole number")
        return int(value)

    def float(self, key: str, default: builtins.float | None = None) -> builtins.float:
        """A number; null is absent."""
        return float(self._get(key, default))

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(self.prefix + key)
        if value is None:
            value = default
        if value is None:
            raise ModelLoadError(f"{self.where}: {self.prefix}{key} is missing")
        if not isinstance(value, (int, float)):
            raise ModelLoadError(f"{self.where}: {self.prefix}{key} must be a number")
        return value
