"""Encoders in GGUF files: a config.json of their keys, and transformers' names of their tensors.

BERT and RoBERTa run as octavo's own encoder, nomic-bert and modern-bert through transformers'
module. Files have no layers after the encoder: vectors get length 1, as llama.cpp's server gives.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from octavo._core import GgufFile
from octavo.checkpoints.gguf import GgufWeights
from octavo.errors import ModelLoadError
from octavo.models.config import Getter
from octavo.models.gguf_facts import GgufFacts

# llama.cpp's pooling types. Those of no kind, and of a classifier, are refused.
_POOLING: Final = {1: "mean", 2: "cls", 3: "last"}


def pooling_mode(file: GgufFile) -> str:
    """The pooling of a file's vectors; the mean where it names none.

    Raises:
        ModelLoadError: in another way.
    """
    metadata = file.metadata()
    kind = metadata.get(f"{metadata.get('general.architecture')}.pooling_type", 1)
    if kind not in _POOLING:
        raise ModelLoadError(f"{file.path}: pooling_type {kind} is not supported")
    return _POOLING[kind]


def encoder_config(metadata: Mapping[str, Any], facts: GgufFacts) -> dict[str, Any]:
    """The config.json of a file of one of GGUF_ENCODERS.

    Raises:
        ModelLoadError: a key is missing, or of another kind.
    """
    arch = str(metadata["general.architecture"])
    get = Getter(metadata, "GGUF", f"{arch}.")
    eps = float(f"{get.float('attention.layer_norm_epsilon', 1e-12):.6g}")
    common = {
        "vocab_size": facts.vocab_size,
        "hidden_size": get.int("embedding_length"),
        "intermediate_size": get.int("feed_forward_length"),
        "num_hidden_layers": get.int("block_count"),
        "num_attention_heads": get.int("attention.head_count"),
        "max_position_embeddings": get.int("context_length"),
        "layer_norm_eps": eps,
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id", 0),
    }
    return {**common, **GGUF_ENCODERS[arch](get)}


def _bert(get: Getter) -> dict[str, Any]:
    # RoBERTa's positions begin at 0 here, too: its file leaves out the rows before.
    return {"architectures": ["BertModel"], "hidden_act": "gelu"}


def _nomic_bert(get: Getter) -> dict[str, Any]:
    theta = get.float("rope.freq_base", 10000.0)
    return {
        "architectures": ["NomicBertModel"],
        "hidden_act": "silu",
        "type_vocab_size": int(get.values.get("tokenizer.ggml.token_type_count") or 2),
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    }


def _modern_bert(get: Getter) -> dict[str, Any]:
    theta = get.float("rope.freq_base", 160000.0)
    local = get.float("rope.freq_base_swa", 10000.0)
    every = get.int("attention.sliding_window_pattern", 3)
    layers = range(get.int("block_count"))
    act = get.values.get(f"{get.prefix}hidden_activation") or "gelu"
    return {
        "architectures": ["ModernBertModel"],
        "hidden_activation": act,
        "norm_eps": get.float("attention.layer_norm_epsilon", 1e-5),
        "local_attention": get.int("attention.sliding_window", 128),
        "layer_types": [
            "sliding_attention" if layer % every else "full_attention" for layer in layers
        ],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
    }


GGUF_ENCODERS: Final[Mapping[str, Callable[[Getter], dict[str, Any]]]] = {
    "bert": _bert,
    "modern-bert": _modern_bert,
    "nomic-bert": _nomic_bert,
}
# transformers' names -> the file's; ``attn_qkv`` holds the three of nomic-bert's.
_MODULES: Final = {
    "embeddings.tok_embeddings": "token_embd",
    "embeddings.word_embeddings": "token_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "token_embd_norm",
    "embeddings.norm": "token_embd_norm",
    "final_norm": "output_norm",
    "attn_norm": "attn_norm",
    "attn.Wqkv": "attn_qkv",
    "attn.Wo": "attn_output",
    "mlp_norm": "ffn_norm",
    "mlp.Wi": "ffn_up",
    "mlp.Wo": "ffn_down",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "attn_output_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_mlp_layernorm": "layer_output_norm",
}
_THIRDS: Final = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_NAME: Final = re.compile(r"(?:layers\.(\d+)\.)?(.+)\.(weight|bias)")


def foreign_tensors(weights: GgufWeights, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """A transformers module's tensors from a file's. ``shapes``: of all that it has, by name.

    Tensors of a head that gives no vectors are left out.

    Raises:
        ModelLoadError: one is missing or has another shape.
    """
    found = {}
    for name, shape in shapes.items():
        match = _NAME.fullmatch(name)
        if match is None or name.startswith("pooler."):
            continue
        layer, module, kind = match.groups()
        block = "" if layer is None else f"blk.{layer}."
        if module in _THIRDS:
            whole = weights.named(f"{block}attn_qkv.{kind}", (3 * shape[0], *shape[1:]))
            found[name] = whole.chunk(3)[_THIRDS.index(module)].contiguous()
        else:
            found[name] = weights.named(f"{block}{_MODULES[module]}.{kind}", tuple(shape))
    weights.finish()
    return found
