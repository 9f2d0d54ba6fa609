"""Static scales of keys and values: read by every name they go by, used by a cache of fp8."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fidelity import make_prompt
from safetensors.torch import load_file, save_file

from octavo.config import EngineConfig
from octavo.errors import ModelLoadError
from octavo.kernels.kv_cache import scales_of
from octavo.llm import LLM
from octavo.models.source import resolve_model
from octavo.runner.dtypes import resolve_dtypes
from octavo.sampling_params import SamplingParams
from tiny_encoders import save_tokenizer

LAYERS = 2
NAMES = {
    "newest": ("k_scale", "v_scale"),
    "compressed-tensors": ("k_proj.output_scale", "v_proj.output_scale"),
    "modelopt": ("k_proj.k_scale", "v_proj.v_scale"),
    "both": ("kv_scale", "kv_scale"),
}
CT = {"quant_method": "compressed-tensors", "config_groups": {}, "ignore": []}
FP8_CACHE = {
    "ct": CT | {"kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor"}},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"},
}


def save(save_tiny: Callable[..., Any], names: tuple[str, str], scales: list[torch.Tensor]) -> Path:
    """A model's folder with these scales in each layer, and a config that says so."""
    path: Path
    path, _ = save_tiny("Llama", num_hidden_layers=LAYERS)
    save_tokenizer(path)
    tensors = load_file(path / "model.safetensors")
    for layer in range(LAYERS):
        for name, scale in zip(names, scales, strict=True):
            tensors[f"model.layers.{layer}.self_attn.{name}"] = scale.clone()
    save_file(tensors, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": CT}))
    return path


def stored_scales(path: Path, **options: Any) -> list[torch.Tensor]:
    """[tokens, heads] of the first layer's keys and values, of a prompt and a decoded token."""
    llm = LLM(str(path), device="cpu", dtype="float32", max_model_len=64, num_gpu_blocks_override=8,
              enable_prefix_caching=False, **options)  # fmt: skip
    caches = llm._engine.runner.mesh.lead.kv_caches[0]
    for cache in caches:
        cache.untyped_storage().fill_(0)
    llm.generate([make_prompt(20)], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
    found = [scales_of(cache).transpose(1, 2).flatten(0, 1) for cache in caches]
    return [rows[rows[:, 0] != 0] for rows in found]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("per_head", [False, True])
def test_a_cache_of_fp8_has_the_files_scales(
    name: str, per_head: bool, save_tiny: Callable[..., Any]
) -> None:
    shape = (2, 1, 1) if per_head else ()
    scales = [torch.rand(shape) * 0.02 + 0.01, torch.rand(shape) * 0.02 + 0.01]
    if name == "both":
        scales[1] = scales[0]
    path = save(save_tiny, NAMES[name], scales)
    for found, scale in zip(stored_scales(path, kv_cache_dtype="fp8"), scales, strict=True):
        assert len(found) == 21
        torch.testing.assert_close(found, scale.flatten().expand(21, 2))


@pytest.mark.parametrize("asked", ["fp8_per_token_head", "int8", "fp8_e5m2"])
def test_others_compute_each_rows_and_say_so(
    asked: str, save_tiny: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    path = save(save_tiny, NAMES["newest"], [torch.tensor(0.02)] * 2)
    with caplog.at_level(logging.WARNING, "octavo"):
        keys, _ = stored_scales(path, kv_cache_dtype=asked)
    assert len(keys.unique()) > 30
    [line] = [r.getMessage() for r in caplog.records if "static scales" in r.getMessage()]
    assert f"{2 * LAYERS} static scales of keys and values are not used" in line


def test_scales_that_cannot_be_are_refused(save_tiny: Callable[..., Any], tmp_path: Path) -> None:
    for scale, message in (
        (torch.tensor(0.0), "not positive"),
        (torch.rand(3), "3 scales of 2 heads"),
    ):
        path = save(save_tiny, NAMES["newest"], [scale, scale])
        with pytest.raises(ModelLoadError, match=message):
            stored_scales(path, kv_cache_dtype="fp8")


@pytest.mark.parametrize("name", FP8_CACHE)
def test_a_gpus_cache_is_what_the_config_says(name: str, save_tiny: Callable[..., Any]) -> None:
    """A CPU's is faster in bfloat16 than in floats of a byte, and has the memory."""
    path, _ = save_tiny("Llama", num_hidden_layers=1)
    values = json.loads((path / "config.json").read_text())

    def cache(device: str, quantization: dict[str, Any], asked: str = "auto") -> torch.dtype:
        config = values | {"quantization_config": quantization}
        (path / "config.json").write_text(json.dumps(config))
        engine = EngineConfig(model=str(path), kv_cache_dtype=asked, dtype="bfloat16")  # type: ignore[arg-type]
        source = resolve_model(engine)
        found = resolve_dtypes(engine, source.model_config, source, torch.device(device))
        assert found.kv_scales == (found.kv_cache == torch.float8_e4m3fn)
        return found.kv_cache

    assert cache("cuda", FP8_CACHE[name]) == torch.float8_e4m3fn
    assert cache("cuda", FP8_CACHE[name], "bfloat16") == torch.bfloat16
    assert cache("cpu", FP8_CACHE[name]) == torch.bfloat16
    assert cache("cuda", CT) == torch.bfloat16
