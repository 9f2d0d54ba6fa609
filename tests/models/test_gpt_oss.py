"""gpt-oss in its released form: experts in 4-bit floats, against transformers with the same values."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fidelity import logits_of, make_prompt
from safetensors.torch import load_file, save_file

from octavo.errors import ModelLoadError
from octavo.kernels.cpu.linear import CpuExperts

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
CONFIG = {"num_local_experts": 5, "num_experts_per_tok": 2, "num_hidden_layers": 2, "head_dim": 32}


def round_to_mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(blocks, scales, values) of a weight [E, N, K]; two elements a byte, the first one low."""
    groups = weight.unflatten(-1, (-1, 32))
    exponent = (groups.abs().amax(-1, keepdim=True) / 6).log2().ceil()
    scaled = groups / exponent.exp2()
    code = (scaled.abs()[..., None] - E2M1).abs().argmin(-1)
    values = E2M1[code] * scaled.sign() * exponent.exp2()
    code = code + 8 * (scaled < 0)
    blocks = code[..., 0::2] | code[..., 1::2] << 4
    scales = (exponent[..., 0] + 127).to(torch.uint8)
    return blocks.to(torch.uint8), scales, values.flatten(-2)


@pytest.fixture
def released(save_tiny: Callable[..., Any]) -> tuple[Path, Any]:
    """A tiny model as OpenAI releases it, and transformers' with the weights that it stands for."""
    path, model = save_tiny("GptOss", **CONFIG)
    tensors = load_file(path / "model.safetensors")
    for name, parameter in model.named_parameters():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            blocks, scales, values = round_to_mxfp4(parameter.detach().transpose(1, 2))
            parameter.data.copy_(values.transpose(1, 2))
            del tensors[name]
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"],
    }
    (path / "config.json").write_text(json.dumps(config))
    return path, model


@pytest.mark.parametrize("options", [{}, {"mesh": "cpu,cpu"}, {"quantization": "mxfp4"}])
def test_released_files_are_what_transformers_computes(
    options: dict[str, Any], released: tuple[Path, Any], driver: Callable[..., Any]
) -> None:
    path, model = released
    token_ids = make_prompt(77)
    torch.testing.assert_close(
        driver(path, **options).logits(token_ids), logits_of(model, token_ids), atol=1e-4, rtol=1e-4
    )


def test_experts_stay_packed_on_a_cpu(
    released: tuple[Path, Any], driver: Callable[..., Any]
) -> None:
    engine = driver(released[0], dtype="auto")
    experts = engine.runner.mesh.lead.model.layers[0].mlp.experts
    assert isinstance(experts, CpuExperts)
    # 96 x 64 elements of 4 bits and an exponent for 32; rows may be padded to the kernel's tiles.
    assert sum(weight.nbytes for weight in experts.w2) < 5 * 64 * 96 * 0.75
    token_ids = make_prompt(77)
    want = logits_of(released[1], token_ids)
    found = engine.logits(token_ids)
    assert float((found - want).norm() / want.norm()) < 0.02


def test_another_activation_is_refused(
    save_tiny: Callable[..., Any], driver: Callable[..., Any]
) -> None:
    path, _ = save_tiny("GptOss", **CONFIG, swiglu_limit=5.0)
    with pytest.raises(ModelLoadError, match=r"swiglu_limit 5\.0 is not supported"):
        driver(path)
