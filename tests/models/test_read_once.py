"""Each shard reads its part of the files, and all of them together read each byte about once."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gguf_files import write_gguf
from test_schemes_files import BY_NAME, save

from octavo.config import EngineConfig
from octavo.models.source import resolve_model
from octavo.runner import loading

EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
# Matrices in the proportions that models have: norms are next to nothing.
SIZES = {"hidden_size": 192, "intermediate_size": 576, "num_attention_heads": 6, "head_dim": 32}
SIZES |= {"num_key_value_heads": 6, "vocab_size": 600, "num_hidden_layers": 4}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("Llama", SIZES),
    "a projection for all": ("Phi3", SIZES),
    "experts": ("Qwen3Moe", {**SIZES, **EXPERTS}),
    "experts in one tensor": (
        "GraniteMoe",
        {**SIZES, "intermediate_size": 96, "num_local_experts": 6, "num_experts_per_tok": 2},
    ),
    "states": ("Mamba", {**SIZES, "intermediate_size": 384}),
}


@pytest.fixture
def num_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What was read from files, tensor by tensor."""
    read: list[int] = []

    @contextlib.contextmanager
    def count(_source: Any) -> Iterator[Callable[[int], object]]:
        yield read.append

    monkeypatch.setattr(loading, "_progress_bar", count)
    return read


def bytes_of(path: Path, num_bytes: list[int], mesh: str | None, stages: int = 1) -> int:
    config = EngineConfig(
        model=str(path), dtype="float32", threads=1, mesh=mesh, pipeline_parallel_size=stages
    )
    num_bytes.clear()
    loading.load(config, resolve_model(config))
    return sum(num_bytes)


@pytest.mark.parametrize("name", CASES)
def test_shards_read_their_parts(
    name: str, save_tiny: Callable[..., Any], num_bytes: list[int]
) -> None:
    family, config = CASES[name]
    path, _model = save_tiny(family, **config)
    whole = bytes_of(path, num_bytes, None)
    assert whole == pytest.approx((path / "model.safetensors").stat().st_size, rel=0.03)
    for size in (2, 3):
        # Norms, and what every rank computes whole, are read by each.
        assert whole <= bytes_of(path, num_bytes, ",".join(["cpu"] * size)) < 1.06 * whole


# A way to pack words, pairs and groups each, and an order of columns that is not the groups'.
PACKED = ("awq-gemm", "gptq-desc-act", "ct-w4-asym", "ct-mxfp4", "fp8-block")


@pytest.mark.parametrize("name", PACKED)
def test_shards_read_their_parts_of_packed_weights(
    name: str, save_tiny: Callable[..., Any], num_bytes: list[int], tmp_path: Path
) -> None:
    sizes = {"hidden_size": 192, "intermediate_size": 384, "num_attention_heads": 6}
    sizes |= {"num_key_value_heads": 6, "head_dim": 32, "vocab_size": 600}
    case = dataclasses.replace(BY_NAME[name], model=sizes)
    path, _twin = save(case, save_tiny, tmp_path)
    whole = bytes_of(path, num_bytes, None)
    # Each shard has all scales of columns whose order is not theirs.
    most = 1.12 if name == "gptq-desc-act" else 1.06
    for size in (2, 3):
        assert whole <= bytes_of(path, num_bytes, ",".join(["cpu"] * size)) < most * whole


@pytest.mark.parametrize("stages", [2, 4])
def test_stages_read_their_layers(
    stages: int, save_tiny: Callable[..., Any], num_bytes: list[int]
) -> None:
    path, _model = save_tiny("Llama", **SIZES, tie_word_embeddings=False)
    whole = bytes_of(path, num_bytes, None)
    assert bytes_of(path, num_bytes, ",".join(["cpu"] * stages), stages) == whole


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_shards_read_their_parts_of_a_gguf_file(
    arch: str, save_tiny: Callable[..., Any], num_bytes: list[int], tmp_path: Path
) -> None:
    """One that orders the rows of queries and keys in its own way, and one that does not."""
    _path, model = save_tiny({"llama": "Llama", "qwen2": "Qwen2"}[arch], **SIZES)
    file = tmp_path / "model.gguf"
    write_gguf(file, arch, model)
    whole = bytes_of(file, num_bytes, None)
    for size in (2, 3):
        assert whole <= bytes_of(file, num_bytes, ",".join(["cpu"] * size)) < 1.06 * whole
