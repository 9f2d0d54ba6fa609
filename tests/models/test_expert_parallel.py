"""Mixtures whose experts are split over shards, each whole, against transformers and one shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fidelity import logits_of, make_prompt, tiny_config
from test_families import CASES
from test_hybrid_families import CASES as HYBRIDS

from octavo.config import EngineConfig
from octavo.errors import ModelLoadError
from octavo.models.registry import config_from_hf
from octavo.models.source import resolve_model
from octavo.models.split import check_split

ALL = CASES | HYBRIDS


def cases() -> Iterator[Any]:
    """A case of each family with experts, and every other one in the long list."""
    seen: set[str] = set()
    for name, (family, config) in ALL.items():
        architecture = f"{family.removesuffix('Text')}ForCausalLM"
        kept = tiny_config(family, **{"num_hidden_layers": 2, **config})
        shape = config_from_hf({**kept.to_dict(), "architectures": [architecture]})
        if shape.num_experts:
            marks = [pytest.mark.slow] if family in seen else []
            seen.add(family)
            yield pytest.param(name, marks=marks)


def sizes(path: Any) -> list[int]:
    shape = resolve_model(EngineConfig(model=str(path))).model_config
    found = []
    for size in (2, 3, 4):
        try:
            check_split(shape, size, whole_experts=True)
        except ModelLoadError:
            continue
        found.append(size)
    return found


def mesh(size: int) -> dict[str, Any]:
    return {"mesh": ",".join(["cpu"] * size), "enable_expert_parallel": True}


@pytest.mark.parametrize("name", list(cases()))
def test_whole_experts_compute_what_transformers_does(
    name: str, save_tiny: Callable[..., Any], driver: Callable[..., Any]
) -> None:
    family, config = ALL[name]
    path, model = save_tiny(family, **{"num_hidden_layers": 2, **config})
    token_ids = make_prompt(77)
    want = logits_of(model, token_ids)
    for size in sizes(path):
        engine = driver(path, **mesh(size))
        torch.testing.assert_close(engine.logits(token_ids), want, atol=1e-4, rtol=1e-4)
