"""Modules of transformers in GraphRunner: the plain runner's tokens, and its own where the host waits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("transformers")
from octavo.llm import LLM
from octavo.models import fallback
from octavo.models.foreign_speed import replace_norms
from octavo.runner.eager import EagerRunner
from octavo.runner.graphs import GraphRunner
from octavo.sampling_params import SamplingParams
from two_runners import PROMPTS, SHARED, both_runners

COMMON: dict[str, Any] = {
    "vocab_size": 80,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MODELS: dict[str, dict[str, Any]] = {
    "RMS norms": {"architectures": ["HeliumForCausalLM"], "head_dim": 16},
    "layer norms": {"architectures": ["Starcoder2ForCausalLM"]},
    "learned positions": {
        "architectures": ["OPTForCausalLM"],
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
    },
}
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def folder_of(name: str, folder: Path, **config: Any) -> Path:
    architecture = MODELS[name]["architectures"][0]
    base = architecture.removesuffix("ForCausalLM").lower()
    (folder / "config.json").write_text(
        json.dumps(COMMON | {"model_type": base} | MODELS[name] | config)
    )
    return folder


def rounds(llm: LLM) -> list[list[list[int]]]:
    """Each prompt's tokens; in a second round their prefixes are in the cache."""
    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    asked = (
        [{"prompt_token_ids": ids} for ids in prompts] for prompts in (PROMPTS, [[*SHARED, 8]])
    )
    return [
        [list(output.outputs[0].token_ids) for output in llm.generate(part, params, use_tqdm=False)]
        for part in asked
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the plain runner is on a CPU")
@pytest.mark.parametrize(
    "name",
    [
        name if name == "RMS norms" else pytest.param(name, marks=pytest.mark.slow)
        for name in MODELS
    ],
)
def test_interpreted_steps_choose_the_plain_runners_tokens(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, interpreted = map(rounds, both_runners(folder_of(name, tmp_path), monkeypatch))
    assert interpreted == plain


OPTIONS: dict[str, Any] = {
    "load_format": "dummy",
    "device": "cuda",
    "dtype": "float32",
    "max_model_len": 64,
    "max_num_batched_tokens": 24,
    "max_num_seqs": 4,
    "kv_cache_memory_bytes": 16 << 20,
}


@pytest.fixture
def on_device(tmp_path: Path) -> Callable[..., LLM]:
    def make(name: str, **options: Any) -> LLM:
        shape = {
            "hidden_size": 128,
            "intermediate_size": 192,
            "word_embed_proj_dim": 128,
            "head_dim": 64,
        }
        return LLM(str(folder_of(name, tmp_path, **shape)), **OPTIONS | options)

    return make


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("name", MODELS)
def test_steps_are_captured(name: str, on_device: Callable[..., LLM]) -> None:
    expected = rounds(on_device(name, enforce_eager=True))
    llm = on_device(name)
    assert isinstance(llm._engine.runner, GraphRunner)
    for _ in range(3):  # kernel by kernel, captured, replayed
        assert rounds(llm) == expected
    assert len(llm._engine.runner.mesh.lead.graphs) > 0


@pytest.mark.gpu
@on_gpu
def test_a_module_that_has_the_host_wait_runs_without_graphs(
    on_device: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = rounds(on_device("RMS norms"))
    hidden = fallback.TransformersModel._hidden

    def waits(self: Any, input_ids: torch.Tensor, *arguments: Any) -> torch.Tensor:
        assert int(input_ids.min()) >= 0
        return hidden(self, input_ids, *arguments)

    monkeypatch.setattr(fallback.TransformersModel, "_hidden", waits)
    llm = on_device("RMS norms")
    assert isinstance(llm._engine.runner, EagerRunner)
    assert rounds(llm) == expected
    # A capture that failed leaves nothing behind for the process's other work.
    assert torch.rand(4, device="cuda").isfinite().all()


class OwnRMSNorm(torch.nn.Module):
    """y = x / rms(x) * (weight + offset), and another norm with ``scale``."""

    def __init__(self, offset: float = 0.0, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(24), requires_grad=False)
        self.eps, self.offset, self.scale = 1e-5, offset, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return y * (self.weight + self.offset) * self.scale


def test_norms_are_replaced_where_the_kernel_computes_the_same() -> None:
    from octavo.kernels.reference import OPS

    norms = [OwnRMSNorm(), OwnRMSNorm(offset=1.0), OwnRMSNorm(scale=1.1)]
    x = torch.randn(2, 5, 24)
    expected = [norm(x) for norm in norms]
    assert replace_norms(torch.nn.ModuleList(norms), OPS) == 2
    assert "forward" not in vars(norms[2])
    for norm, want in zip(norms, expected, strict=True):
        torch.testing.assert_close(norm(x), want)
