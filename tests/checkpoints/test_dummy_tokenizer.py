"""The made-up tokenizer of random weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from octavo.checkpoints.dummy_tokenizer import make_dummy_tokenizer
from octavo.config import EngineConfig
from octavo.errors import ModelLoadError
from octavo.models.source import resolve_model


def test_bytes_are_tokens_and_every_other_id_is_a_word() -> None:
    tokenizer = make_dummy_tokenizer(1000)
    assert tokenizer.vocab_size == 1000
    text = "Grüße,\n 你好 \x00"
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert len({tokenizer.decode([i]) for i in range(256, 1000)}) == 744


def test_a_folder_without_a_tokenizer_gets_one_only_with_random_weights(tmp_path: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    engine = EngineConfig(model=str(tmp_path), load_format="dummy")
    assert resolve_model(engine).tokenizer.vocab_size == 300
    missing = EngineConfig(model=str(tmp_path), load_format="dummy", tokenizer="/none.json")
    with pytest.raises(ModelLoadError, match="no such tokenizer"):
        _ = resolve_model(missing).tokenizer
