"""Loading: a model's weights are counted by element, each memory once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.config import EngineConfig
from octavo.models.source import resolve_model
from octavo.runner.loading import LoadedModel, load, num_weights

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def loaded(folder: Path, shape: dict[str, Any], **config: Any) -> LoadedModel[Any]:
    (folder / "config.json").write_text(json.dumps(CONFIG | shape))
    engine = EngineConfig(model=str(folder), load_format="dummy", device="cpu", threads=1, **config)
    return load(engine, resolve_model(engine))


@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_counts_once(tmp_path: Path, tied: bool) -> None:
    layer = 32 * (32 + 2 * 16) + 32 * 32 + 3 * 32 * 48 + 2 * 32
    table = 256 * 8  # of the rotary embedding, shared by the layers
    vocab = 200 * 32 * (1 if tied else 2)
    made = loaded(tmp_path, {"tie_word_embeddings": tied}, attention_backend="reference")
    assert num_weights(made.model) == vocab + 2 * layer + 32 + table


def test_what_was_decided_is_there_to_read(tmp_path: Path) -> None:
    made = loaded(tmp_path, {}, kv_cache_dtype="float16", dtype="float32")
    assert made.device == torch.device("cpu")
    assert made.kv_dtype is torch.float16
    assert made.dtypes.activations is torch.float32
    assert made.shape.num_layers == 2
    assert [part.rank for part in made.mesh.shards] == [0]
    assert made.mesh.lead.model is made.model
