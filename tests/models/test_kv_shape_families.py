"""Families with caches of several shapes, or layers that read others', against transformers.

As ``test_families``, with what is these families' own: layers that keep no keys and values, heads of
two sizes, values that are keys or narrower, experts beside an MLP, vectors of each layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fidelity import logits_of, make_prompt, prove_greedy
from gemma_configs import (
    EXPERTS,
    GEMMA_3N,
    GEMMA_3N_READERS,
    GEMMA_4,
    GEMMA_4_EXPERTS,
    GEMMA_4_READERS,
    GLOBAL,
    LOCAL,
)

from octavo.config import EngineConfig
from octavo.errors import ModelLoadError
from octavo.kernels.rank import ALONE
from octavo.models.parts import part_config
from octavo.models.reading_attention import kv_sources
from octavo.models.source import resolve_model
from octavo.models.split import check_split
from octavo.models.stage import stages_of, whole
from octavo.runner.kv_cache import bytes_per_token

ROPE = {"rope_type": "default", "partial_rotary_factor": 0.5}
MIMO: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": [GLOBAL, LOCAL] * 2,
    "sliding_window": 24,
    "moe_intermediate_size": 40,
    "n_routed_experts": 5,
    "num_experts_per_tok": 2,
    "rope_parameters": {
        GLOBAL: {**ROPE, "rope_theta": 50000.0},
        LOCAL: {**ROPE, "rope_theta": 1000.0},
    },
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "Gemma 3n": (
        "Gemma3nText",
        GEMMA_3N_READERS,
    ),
    "Gemma 3n, widths of layers, untied, biases, own caches": (
        "Gemma3nText",
        {
            **GEMMA_3N,
            "head_dim": 96,
            "num_key_value_heads": 1,
            "num_kv_shared_layers": 0,
            "num_hidden_layers": 4,
            "layer_types": [LOCAL, GLOBAL] * 2,
            "intermediate_size": [96, 96, 104, 104],
            "attention_bias": True,
            "tie_word_embeddings": False,
            "altup_num_inputs": 3,
            "altup_active_idx": 1,
            "altup_correct_scale": False,
            "activation_sparsity_pattern": [0.0, 0.9, 0.0, 0.9],
        },
    ),
    "Gemma 4": (
        "Gemma4Text",
        {
            **GEMMA_4_READERS,
            # The first layer is read by none: it may be a stage.
            "num_hidden_layers": 5,
            "layer_types": [LOCAL, LOCAL, GLOBAL, LOCAL, GLOBAL],
        },
    ),
    "Gemma 4, values that are keys, experts": (
        "Gemma4Text",
        {
            **GEMMA_4_EXPERTS,
            "hidden_size": 96,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 48,
            "global_head_dim": 96,
        },
    ),
    "Gemma 4, experts, biases, untied, two shared": (
        "Gemma4Text",
        {
            **GEMMA_4,
            "head_dim": 96,
            "global_head_dim": 40,
            "num_key_value_heads": 1,
            "num_kv_shared_layers": 2,
            "attention_bias": True,
            "tie_word_embeddings": False,
            **EXPERTS,
        },
    ),
    "Gemma 4, unified": (
        "Gemma4UnifiedText",
        {
            **{key: value for key, value in GEMMA_4.items() if "per_layer" not in key},
            "head_dim": 40,
            "global_head_dim": 80,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
        },
    ),
    "MiMo-V2-Flash": ("MiMoV2Flash", {**MIMO, "head_dim": 40, "v_head_dim": 24}),
    "MiMo-V2-Flash, biases, tied, groups of experts": (
        "MiMoV2Flash",
        {
            **MIMO,
            "hidden_size": 96,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 96,
            "v_head_dim": 96,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.5,
            "norm_topk_prob": False,
        },
    ),
}
# A family's first case is the plainest; the others are in the longer run.
# Of shards, stages, and both: the rest is in the longer run.
QUICK = {("Gemma 3n", 2), ("MiMo-V2-Flash", 1)}
# Its last layers read the first's caches.
UNCUT = "Gemma 4, experts, biases, untied, two shared"
PARAMETERS = [pytest.param(name, marks=pytest.mark.slow) if "," in name else name for name in CASES]


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_family_is_what_transformers_computes(
    name: str,
    save_tiny: Callable[..., Any],
    driver: Callable[..., Any],
    backend: str,
) -> None:
    family, config = CASES[name]
    path, model = save_tiny(family, **config)
    probe = driver(path, attention_backend=backend)
    token_ids = [token % 290 for token in make_prompt(77)]
    torch.testing.assert_close(
        probe.logits(token_ids), logits_of(model, token_ids), atol=1e-4, rtol=1e-4
    )
    if backend == "reference":  # one request at a time and no more: it is slow
        return
    prove_greedy(driver, path, model, attention_backend=backend)


def sizes(path: Any) -> list[int]:
    """Numbers of shards, up to four, that the model can be split over."""
    shape = resolve_model(EngineConfig(model=str(path))).model_config
    found = []
    for size in (2, 3, 4):
        with contextlib.suppress(ModelLoadError):
            check_split(shape, size)
            found.append(size)
    return found


@pytest.mark.parametrize("name", PARAMETERS)
def test_shards_compute_what_transformers_does(
    name: str, save_tiny: Callable[..., Any], driver: Callable[..., Any]
) -> None:
    family, config = CASES[name]
    path, model = save_tiny(family, **config)
    token_ids = [token % 290 for token in make_prompt(77)]
    want, found = logits_of(model, token_ids), sizes(path)
    assert found
    for size in found:
        logits = driver(path, mesh=",".join(["cpu"] * size)).logits(token_ids)
        torch.testing.assert_close(logits, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        pytest.param(name, stages, marks=[] if (name, stages) in QUICK else [pytest.mark.slow])
        for name in CASES
        for stages in ([1] if name == UNCUT else [1, 2])
    ],
)
def test_shards_and_stages_serve_what_transformers_computes(
    name: str, stages: int, save_tiny: Callable[..., Any], driver: Callable[..., Any]
) -> None:
    """In one stage as many shards as the model can be split over, in two the fewest."""
    family, config = CASES[name]
    path, model = save_tiny(family, **config)
    size = sizes(path)[-1 if stages == 1 else 0]
    shape = resolve_model(EngineConfig(model=str(path))).model_config
    part = part_config(shape, ALONE.at(0, size), whole(shape))
    own, all_heads = (bytes_per_token(one, torch.float32) for one in (part, shape))
    options = {"mesh": ",".join(["cpu"] * size * stages), "pipeline_parallel_size": stages}
    prove_greedy(driver, path, model, kv_copies=size * own / all_heads, **options)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "Gemma 4" else [pytest.mark.slow])
        for name in CASES
        if name != UNCUT
    ],
)
def test_stages_serve_what_transformers_computes(
    name: str, save_tiny: Callable[..., Any], driver: Callable[..., Any]
) -> None:
    family, config = CASES[name]
    path, model = save_tiny(family, **config)
    prove_greedy(driver, path, model, mesh="cpu,cpu", pipeline_parallel_size=2)


def test_layers_and_those_that_they_read_are_of_one_stage(save_tiny: Callable[..., Any]) -> None:
    family, config = CASES["Gemma 3n"]
    path, _model = save_tiny(family, **config)
    shape = resolve_model(EngineConfig(model=str(path))).model_config
    assert shape.kv_sources == (0, 1, 2, 3, 2, 3)
    assert [stage.layers for stage in stages_of(shape, 3)] == [range(1), range(1, 2), range(2, 6)]
    with pytest.raises(ModelLoadError, match=r"6 layers, of which some read what .* at most 3$"):
        stages_of(shape, 4)


def test_a_layer_without_any_to_read_from_is_refused() -> None:
    with pytest.raises(ModelLoadError, match="num_kv_shared_layers 3 leaves no layer of type"):
        kv_sources([LOCAL, LOCAL, GLOBAL, LOCAL, GLOBAL], 3)
