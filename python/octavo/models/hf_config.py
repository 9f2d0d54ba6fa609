"""HfConfig: a config.json, read into the fields common to all decoders.

A family's class calls ``HfConfig.config`` with what is its own. Both spellings are read: what
transformers 4 wrote (``rope_theta``, ``rope_scaling``) and 5 writes (``rope_parameters``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.errors import ModelLoadError
from octavo.layers.rope import RopeConfig
from octavo.models.config import Getter, ModelConfig, token_ids

# HF's name of an activation -> the op set's.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
# HF's name of a size -> what older models call it.
_OLD_NAMES = (
    ("hidden_size", "n_embed"),
    ("hidden_size", "n_embd"),
    ("hidden_size", "d_model"),
    ("num_hidden_layers", "n_layer"),
    ("num_hidden_layers", "n_layers"),
    ("num_hidden_layers", "num_layers"),
    ("num_attention_heads", "n_head"),
    ("num_attention_heads", "n_heads"),
    ("num_attention_heads", "num_heads"),
    ("max_position_embeddings", "seq_length"),
    ("max_position_embeddings", "max_seq_len"),
    ("max_position_embeddings", "model_max_length"),
)
# What models of another library call it.
_ROPE_TYPES = {"mrope": "default", "su": "longrope"}


def architecture_of(raw: Mapping[str, Any]) -> str:
    """The class a config.json names.

    Raises:
        ModelLoadError: it names none.
    """
    names = raw.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise ModelLoadError("config.json: architectures is missing")
    return names[0]


class HfConfig(Getter):
    """A config.json over a family's defaults: files leave out what equals them."""

    def __init__(self, raw: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        given = {key: value for key, value in raw.items() if value is not None}
        # Older models have their own names of sizes.
        given = {name: given[old] for name, old in _OLD_NAMES if old in given} | given
        super().__init__({**defaults, **given}, "config.json")
        self.raw = raw
        kinds = self.values.get("layers_block_type")
        self.num_layers = self.int("num_hidden_layers", len(kinds) if kinds else None)
        self.max_positions = self.int("max_position_embeddings", 2048)

    @property
    def head_dim(self) -> int:
        """As given, else the hidden size divided by the heads."""
        num_heads = self.int("num_attention_heads")
        if num_heads < 1:
            raise ModelLoadError(f"config: num_heads must be positive, not {num_heads}")
        return self.int("head_dim", self.int("hidden_size") // num_heads)

    def bool(self, key: str) -> bool:
        """A switch; absent is off."""
        return bool(self.values.get(key, False))

    def windows(self, *, default_types: list[str] | None = None) -> tuple[int, ...]:
        """``sliding_window`` in the layers that ``layer_types`` calls sliding; in all without it.

        ``default_types``: for files that have no ``layer_types``.
        """
        window = self.values.get("sliding_window")
        if not window:
            return ()
        types = self.values.get("layer_types") or default_types
        if types is None:
            return (int(window),) * self.num_layers
        if len(types) < self.num_layers:
            raise ModelLoadError(
                f"config.json: layer_types has {len(types)} entries for {self.num_layers} layers"
            )
        return tuple(
            int(window) if kind == "sliding_attention" else 0 for kind in types[: self.num_layers]
        )

    def rope(self, kind: str = "full_attention", **overrides: Any) -> RopeConfig:
        """The rotary embedding; ``kind``: of the layers of that type, where types differ."""
        values = {**self.values, **overrides}
        scaling: dict[str, Any] = dict(values.get("rope_parameters") or {})
        if isinstance(scaling.get(kind), Mapping):
            scaling = dict(scaling[kind])
        scaling = scaling or dict(values.get("rope_scaling") or {})
        theta = float(scaling.pop("rope_theta", None) or values.get("rope_theta") or 10000.0)
        part = scaling.pop("partial_rotary_factor", None) or values.get("partial_rotary_factor")
        old_type = scaling.pop("type", None)
        rope_type = str(scaling.pop("rope_type", None) or old_type or "default")
        rope_type = _ROPE_TYPES.get(rope_type, rope_type)
        if rope_type in ("llama3", "yarn", "longrope"):
            original = values.get("original_max_position_embeddings")
            if original is not None:
                scaling["original_max_position_embeddings"] = original
            if not scaling.get("original_max_position_embeddings"):
                scaling["original_max_position_embeddings"] = self.max_positions
        if rope_type == "proportional" and part is not None:
            scaling["partial_rotary_factor"], part = float(part), None
        return RopeConfig(
            theta=theta,
            rot_dim=int(self.head_dim * float(part or 1.0)),
            rope_type=rope_type,
            scaling=scaling,
        )

    def config(self, **fields: Any) -> ModelConfig:
        """The fields common to all decoders, overridden by ``fields``."""
        rope = fields["rope"] if "rope" in fields else self.rope()
        act = str(self.values.get("hidden_act") or "silu")
        act = str(fields.pop("hidden_act", None) or act)
        if act not in ACTIVATIONS:
            raise ModelLoadError(f"config.json: hidden_act {act!r} is not supported")
        num_heads = self.int("num_attention_heads")
        common: dict[str, Any] = {
            "architecture": architecture_of(self.raw),
            "vocab_size": self.int("vocab_size"),
            "hidden_size": self.int("hidden_size"),
            "num_layers": self.num_layers,
            "num_heads": num_heads,
            "num_kv_heads": self.int("num_key_value_heads", num_heads),
            "head_dim": self.head_dim,
            "rope": rope,
            "max_position_embeddings": self.max_positions,
            "max_context_len": max_context_len(rope, self.max_positions),
            "hidden_act": ACTIVATIONS[act],
            "tie_word_embeddings": self.bool("tie_word_embeddings"),
            "eos_token_ids": token_ids(self.raw.get("eos_token_id")),
            "dtype": str(self.raw.get("dtype") or self.raw.get("torch_dtype") or "float32"),
            "raw": dict(self.raw),
        }
        if "intermediate_size" not in fields:
            common["intermediate_size"] = self.int("intermediate_size")
        if "rms_norm_eps" not in fields:
            common["rms_norm_eps"] = self.float("rms_norm_eps", 1e-6)
        return ModelConfig(**{**common, **fields})


def max_context_len(rope: RopeConfig, max_positions: int) -> int:
    """The longest context that leaves short texts as they are.

    llama3: the config's length is the scaled one. dynamic and longrope turn *all* positions
    otherwise in longer contexts, so those are an explicit choice (max_model_len), never a default.
    """
    factor = float(rope.scaling.get("factor") or 1.0)
    match rope.rope_type:
        case "linear":
            return int(max_positions * factor)
        case "yarn":
            original = int(rope.scaling["original_max_position_embeddings"])
            return max(max_positions, int(original * factor))
        case "longrope":
            return min(max_positions, int(rope.scaling["original_max_position_embeddings"]))
    return max_positions
