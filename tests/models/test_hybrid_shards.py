"""Models whose layers keep a state, split over shards and stages of a CPU, against transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fidelity import logits_of, make_prompt
from test_hybrid_families import CASES, prove_hybrid

from octavo.config import EngineConfig
from octavo.errors import ModelLoadError
from octavo.models.source import resolve_model
from octavo.models.split import check_split

# Ways to split that the first case of another family has as well are in the long list.
QUICK = {
    "Falcon-H1",
    "Jamba",
    "Kimi-Linear",
    "LFM2",
    "Mamba-2",
    "Nemotron 3",
    "OLMo-Hybrid",
    "Qwen3-Next",
    "Qwen3.5",
}


def cases() -> Iterator[Any]:
    for name in CASES:
        yield pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow])


def sizes(path: Any) -> list[int]:
    """Numbers of shards, up to four, that the model can be split over."""
    shape = resolve_model(EngineConfig(model=str(path))).model_config
    found = []
    for size in (2, 3, 4):
        try:
            check_split(shape, size)
        except ModelLoadError:
            continue
        found.append(size)
    return found


def mesh(size: int) -> str:
    return ",".join(["cpu"] * size)


@pytest.mark.parametrize("name", list(cases()))
def test_shards_compute_what_transformers_does(
    name: str, save_tiny: Callable[..., Any], driver: Callable[..., Any]
) -> None:
    family, config = CASES[name]
    path, model = save_tiny(family, **config)
    token_ids = make_prompt(77)
    want = logits_of(model, token_ids)
    found = sizes(path)
    assert found
    for size in found:
        logits = driver(path, mesh=mesh(size)).logits(token_ids)
        torch.testing.assert_close(logits, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", list(cases()))
def test_shards_serve_what_transformers_computes(
    name: str, save_tiny: Callable[..., Any], driver: Callable[..., Any]
) -> None:
    family, config = CASES[name]
    path, model = save_tiny(family, **config)
    prove_hybrid(driver, path, model, mesh=mesh(sizes(path)[0]))


@pytest.mark.parametrize("name", list(cases()))
def test_stages_serve_what_transformers_computes(
    name: str, save_tiny: Callable[..., Any], driver: Callable[..., Any]
) -> None:
    family, config = CASES[name]
    path, model = save_tiny(family, **config)
    prove_hybrid(driver, path, model, mesh=mesh(2), pipeline_parallel_size=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(cases()))
def test_stages_of_shards_serve_what_transformers_computes(
    name: str, save_tiny: Callable[..., Any], driver: Callable[..., Any]
) -> None:
    family, config = CASES[name]
    path, model = save_tiny(family, **config)
    size = sizes(path)[0]
    prove_hybrid(driver, path, model, mesh=mesh(2 * size), pipeline_parallel_size=2)
