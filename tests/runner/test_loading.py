"""LoadedModel: what loading decided, for a runner to read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from octavo.config import EngineConfig
from octavo.models.source import resolve_model
from octavo.runner.loading import LoadedModel, load

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


def test_what_was_decided_is_there_to_read(tmp_path: Path) -> None:
    made = loaded(tmp_path, {}, kv_cache_dtype="float16", dtype="float32")
    assert made.device == torch.device("cpu")
    assert made.kv_dtype is torch.float16
    assert made.dtypes.activations is torch.float32
    assert made.shape.num_layers == 2
    assert [part.rank for part in made.mesh.shards] == [0]
    assert made.mesh.lead.model is made.model
