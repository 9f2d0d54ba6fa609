"""QuantizedWeights: matrices are rounded one at a time, and never held as floats together."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from octavo.checkpoints import quantize
from octavo.checkpoints.json_file import read_json
from octavo.checkpoints.safetensors import SafetensorsWeights, safetensors_files
from octavo.kernels.cpu.ops import OPS
from octavo.kernels.weights import Stored
from octavo.models.llama import LlamaForCausalLM
from octavo.models.registry import config_from_hf


@pytest.mark.parametrize("rounding", quantize.ROUNDINGS)
def test_no_matrix_is_held_while_the_next_is_read(
    rounding: str, save_tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are rounded are freed before another is read; copies for it are of so many rows."""
    path, _ = save_tiny("Llama", hidden_size=256, intermediate_size=512, tie_word_embeddings=False)
    cpu = torch.device("cpu")
    weights = SafetensorsWeights(
        safetensors_files(path), device=cpu, dtype=torch.bfloat16, act_dtype=torch.float32
    )
    read: list[weakref.ref[torch.Tensor]] = []
    most_rows = 0
    linear = weights.linear

    def watched(prefix: str, shape: tuple[int, int], part: Any = None) -> Stored:
        assert not [ref for ref in read if ref() is not None], prefix
        found = linear(prefix, shape, part)
        assert isinstance(found, torch.Tensor)
        if prefix != "lm_head":  # it may stay
            read.append(weakref.ref(found))
        return found

    monkeypatch.setattr(weights, "linear", watched)
    monkeypatch.setattr(quantize, "_ROWS", 128)
    found = quantize.ROUNDINGS[rounding]
    round_one = found.round

    def counted(weight: torch.Tensor) -> Any:
        nonlocal most_rows
        most_rows = max(most_rows, weight.shape[0])
        return round_one(weight)

    monkeypatch.setitem(quantize.ROUNDINGS, rounding, replace(found, round=counted))
    LlamaForCausalLM(
        config_from_hf(read_json(path / "config.json")),
        quantize.QuantizedWeights(weights, rounding),
        OPS,
        max_model_len=64,
        device=cpu,
    )
    assert len(read) == 3 * 7
    assert most_rows == (128 if found.by_rows else 512)
