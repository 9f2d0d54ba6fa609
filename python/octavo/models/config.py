"""ModelConfig: one decoder's shape, whatever file it was described in.

Built from a ``config.json`` or from GGUF metadata, without importing transformers. A family differs
from the next in the values of these fields wherever that is enough; only what fields cannot say
gets a file of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from octavo.layers.rope import RopeConfig
from octavo.models.errors import ModelLoadError

# HF's name of an activation -> the op set's.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
# GGUF's architecture -> the one config.json would name.
GGUF_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a decoder-only model.

    ``sliding_windows`` has one entry a layer, 0 where attention sees everything. ``dtype`` is what
    the checkpoint says its weights were trained in. ``max_position_embeddings`` is the length the
    rotary embedding starts from; ``max_context_len`` the longest context it reaches.

    Raises:
        ModelLoadError: from the constructors below, for a missing or impossible value.
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
    # RMSNorm over each head's query and key, before rope.
    qk_norm: bool = False
    sliding_windows: tuple[int, ...] = ()
    attn_logit_softcap: float = 0.0
    final_logit_softcap: float = 0.0
    bos_token_id: int | None = None
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

    def sliding_window(self, layer: int) -> int:
        """How far back layer ``layer`` sees; 0: everything."""
        return self.sliding_windows[layer] if self.sliding_windows else 0

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with these fields changed."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """From the contents of a ``config.json``."""
        get = _Getter(raw, "config.json")
        architecture = _architecture(raw)
        num_heads = get.int("num_attention_heads")
        hidden_size = get.int("hidden_size")
        head_dim = get.int("head_dim", hidden_size // num_heads)
        num_layers = get.int("num_hidden_layers")
        max_positions = get.int("max_position_embeddings", 2048)
        rope = _hf_rope(raw, head_dim, max_positions)
        act = str(raw.get("hidden_act") or "silu")
        if act not in ACTIVATIONS:
            raise ModelLoadError(f"config.json: hidden_act {act!r} is not supported")
        # Qwen2 has biases on q, k and v without saying so in its config.
        qwen2 = architecture == "Qwen2ForCausalLM"
        attention_bias = bool(raw.get("attention_bias", False))
        return cls(
            architecture=architecture,
            vocab_size=get.int("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=get.int("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=get.int("num_key_value_heads", num_heads),
            head_dim=head_dim,
            rms_norm_eps=get.float("rms_norm_eps", 1e-6),
            rope=rope,
            max_position_embeddings=max_positions,
            max_context_len=_max_context_len(rope, max_positions),
            hidden_act=ACTIVATIONS[act],
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            attention_bias=attention_bias or qwen2,
            attention_out_bias=attention_bias and not qwen2,
            mlp_bias=bool(raw.get("mlp_bias", False)),
            qk_norm=architecture == "Qwen3ForCausalLM",
            sliding_windows=_hf_sliding_windows(raw, architecture, num_layers),
            bos_token_id=_first(token_ids(raw.get("bos_token_id"))),
            eos_token_ids=token_ids(raw.get("eos_token_id")),
            dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
            raw=dict(raw),
        )

    @classmethod
    def from_gguf(
        cls,
        metadata: Mapping[str, Any],
        *,
        vocab_size: int,
        tied: bool,
        biases: bool = False,
        freq_factors: tuple[float, ...] = (),
    ) -> ModelConfig:
        """From GGUF metadata, and what only the tensors tell.

        ``vocab_size``: rows of ``token_embd``; ``tied``: there is no ``output.weight``; ``biases``:
        there is an ``attn_q.bias``; ``freq_factors``: the tensor ``rope_freqs.weight``.
        """
        arch = str(metadata.get("general.architecture", ""))
        if arch not in GGUF_ARCHITECTURES:
            raise ModelLoadError(
                f"GGUF architecture {arch!r} is not supported; "
                f"known: {', '.join(sorted(GGUF_ARCHITECTURES))}"
            )
        get = _Getter(metadata, "GGUF", f"{arch}.")
        num_heads = get.int("attention.head_count")
        hidden_size = get.int("embedding_length")
        head_dim = get.int("attention.key_length", hidden_size // num_heads)
        max_positions = get.int("context_length", 2048)
        rope = RopeConfig(
            theta=get.float("rope.freq_base", 10000.0),
            rot_dim=get.int("rope.dimension_count", head_dim),
            freq_factors=freq_factors,
            **_gguf_rope_scaling(get, max_positions),
        )
        return cls(
            architecture=GGUF_ARCHITECTURES[arch],
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=get.int("feed_forward_length"),
            num_layers=get.int("block_count"),
            num_heads=num_heads,
            num_kv_heads=get.int("attention.head_count_kv", num_heads),
            head_dim=head_dim,
            # Files hold the float32 nearest to what config.json says in decimal.
            rms_norm_eps=float(f"{get.float('attention.layer_norm_rms_epsilon', 1e-6):.6g}"),
            rope=rope,
            max_position_embeddings=max_positions,
            # llama.cpp's context_length is already the scaled one.
            max_context_len=max_positions,
            tie_word_embeddings=tied,
            attention_bias=biases,
            qk_norm=arch == "qwen3",
            bos_token_id=_first(token_ids(metadata.get("tokenizer.ggml.bos_token_id"))),
            eos_token_ids=(
                *token_ids(metadata.get("tokenizer.ggml.eos_token_id")),
                *(
                    i
                    for i in token_ids(metadata.get("tokenizer.ggml.eot_token_id"))
                    if i not in token_ids(metadata.get("tokenizer.ggml.eos_token_id"))
                ),
            ),
            dtype="bfloat16",
            raw=dict(metadata),
        )


def token_ids(value: Any) -> tuple[int, ...]:
    """``eos_token_id`` and its kind may be absent, one id or a list; here always a tuple."""
    if value is None:
        return ()
    if isinstance(value, (list, tuple)):
        return tuple(int(v) for v in value)
    return (int(value),)


def _first(ids: tuple[int, ...]) -> int | None:
    return ids[0] if ids else None


class _Getter:
    """Reads numbers out of a mapping; a missing or odd one is an error that names the key."""

    def __init__(self, values: Mapping[str, Any], where: str, prefix: str = "") -> None:
        self.values, self.where, self.prefix = values, where, prefix

    def int(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or int(value) != value:
            raise ModelLoadError(f"{self.where}: {self.prefix}{key} must be a whole number")
        return int(value)

    def float(self, key: str, default: float | None = None) -> float:
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


def _architecture(raw: Mapping[str, Any]) -> str:
    names = raw.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise ModelLoadError("config.json: architectures is missing")
    return names[0]


def _hf_rope(raw: Mapping[str, Any], head_dim: int, max_positions: int) -> RopeConfig:
    # transformers 5 writes `rope_parameters` (theta inside), 4 wrote `rope_theta` and
    # `rope_scaling`.
    scaling = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = float(scaling.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0)
    factor = scaling.pop("partial_rotary_factor", None) or raw.get("partial_rotary_factor") or 1.0
    rope_type = str(scaling.pop("rope_type", None) or scaling.get("type") or "default")
    scaling.pop("type", None)
    if rope_type in ("llama3", "yarn"):
        original = raw.get("original_max_position_embeddings")
        if original is not None:
            scaling["original_max_position_embeddings"] = original
        scaling.setdefault("original_max_position_embeddings", max_positions)
    return RopeConfig(
        theta=theta,
        rot_dim=int(head_dim * float(factor)),
        rope_type=rope_type,
        scaling=scaling,
    )


def _max_context_len(rope: RopeConfig, max_positions: int) -> int:
    factor = float(rope.scaling.get("factor") or 1.0)
    if rope.rope_type == "linear":
        return int(max_positions * factor)
    if rope.rope_type == "yarn":
        original = int(rope.scaling["original_max_position_embeddings"])
        return max(max_positions, int(original * factor))
    # llama3: the config's length is the scaled one. dynamic: longer contexts turn *all* positions
    # more slowly, so they are an explicit choice (max_model_len), never a default.
    return max_positions


def _hf_sliding_windows(
    raw: Mapping[str, Any], architecture: str, num_layers: int
) -> tuple[int, ...]:
    window = raw.get("sliding_window")
    if not window or architecture == "LlamaForCausalLM":
        return ()
    layer_types = raw.get("layer_types")
    if architecture.startswith("Qwen"):
        if not raw.get("use_sliding_window"):
            return ()
        if not layer_types:
            first = int(raw.get("max_window_layers") or 0)
            return tuple(int(window) if i >= first else 0 for i in range(num_layers))
    if layer_types:
        return tuple(int(window) if t == "sliding_attention" else 0 for t in layer_types)
    return (int(window),) * num_layers


def _gguf_rope_scaling(get: _Getter, max_positions: int) -> dict[str, Any]:
    kind = get.values.get(f"{get.prefix}rope.scaling.type") or "none"
    if kind == "none":
        return {}
    factor = get.float("rope.scaling.factor", 1.0)
    if kind == "linear":
        return {"rope_type": "linear", "scaling": {"factor": factor}}
    if kind == "yarn":
        original = get.int("rope.scaling.original_context_length", max_positions)
        scaling = {"factor": factor, "original_max_position_embeddings": original}
        return {"rope_type": "yarn", "scaling": scaling}
    raise ModelLoadError(f"GGUF: rope.scaling.type {kind!r} is not supported")
