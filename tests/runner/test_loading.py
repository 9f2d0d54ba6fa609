"""LoadedModel: what loading decided, for a runner to read."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.config import EngineConfig
from octavo.kernels.cpu.linear import CpuWeight
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


def test_activations_of_quantized_weights(tmp_path: Path) -> None:
    """8 bits where asked for, at every projection; the default and float32 as before."""
    for config, bits in (({"cpu_activation_bits": 8}, 8), ({}, 16), ({"dtype": "float32"}, 32)):
        before = {id(weight) for weight in gc.get_objects() if isinstance(weight, CpuWeight)}
        made = loaded(tmp_path, {"intermediate_size": 64}, quantization="w4", **config)
        weights = [weight for weight in gc.get_objects() if isinstance(weight, CpuWeight)]
        own = [weight for weight in weights if id(weight) not in before]
        assert len(own) >= 4 * made.shape.num_layers
        assert {weight.activation_bits for weight in own} == {bits}


def test_activation_bits_that_are_refused() -> None:
    with pytest.raises(ValueError, match="cpu_activation_bits must be 8 or 16"):
        EngineConfig(cpu_activation_bits=4)
    with pytest.raises(ValueError, match="cpu_activation_bits 8 does not go with dtype float32"):
        EngineConfig(cpu_activation_bits=8, dtype="float32")
