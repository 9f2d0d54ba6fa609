"""A quantized format is a format and a scheme: a toy one runs through a whole model without more."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from octavo.checkpoints.safetensors import TENSOR_KINDS
from octavo.checkpoints.schemes import registry
from octavo.checkpoints.schemes.scheme import Scheme, Tensors
from octavo.errors import ModelLoadError
from octavo.kernels.formats.format import Format, PlaneMap
from octavo.kernels.formats.registry import FORMATS
from octavo.kernels.weights import Columns, Part, Planes, Stored, part_of, share


class ToyFormat(Format):
    """int8 "q" [N, K] times "scale" float32 [N, 1]."""

    name = "TOY"
    block = 1

    def check(self, planes: PlaneMap, shape: tuple[int, int]) -> None:
        if tuple(planes["q"].shape) != shape or tuple(planes["scale"].shape) != (shape[0], 1):
            raise ValueError("planes of another shape")

    def dequantize(self, planes: PlaneMap, shape: tuple[int, int]) -> Tensor:
        return planes["q"].float() * planes["scale"]

    def columns(self, planes: PlaneMap, begin: int, end: int) -> dict[str, Tensor]:
        return {"q": planes["q"][:, begin:end].contiguous(), "scale": planes["scale"]}


class ToyScheme(Scheme):
    """Projections in TOY under ``prefix.qweight`` and ``prefix.scales``; the head stays dense."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._dense = config["ignore"]

    def linear(self, tensors: Tensors, prefix: str, shape: tuple[int, int], part: Part) -> Stored:
        if prefix in self._dense:
            return tensors.read(f"{prefix}.weight", shape, dtype=tensors.dtype, part=part)
        planes = {
            "q": tensors.read(f"{prefix}.qweight", shape, kinds=TENSOR_KINDS),
            "scale": tensors.read(f"{prefix}.scales", (shape[0], 1)),
        }
        return part_of(Planes("TOY", planes, shape), part)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "TOY", ToyFormat())
    monkeypatch.setitem(registry.SCHEMES, "toy", ToyScheme)


def quantize_folder(path: Path, dense: Path) -> None:
    """Rewrite a checkpoint in the toy's scheme, and its rounded numbers into ``dense``."""
    tensors = load_file(path / "model.safetensors")
    found: dict[str, Tensor] = {}
    rounded: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        prefix = name.removesuffix(".weight")
        if tensor.ndim != 2 or "proj" not in name:
            found[name] = rounded[name] = tensor
            continue
        scale = tensor.abs().amax(1, keepdim=True) / 127
        q = (tensor / scale).round().to(torch.int8)
        found |= {f"{prefix}.qweight": q, f"{prefix}.scales": scale}
        rounded[name] = q.float() * scale
    save_file(found, path / "model.safetensors")
    dense.mkdir()
    save_file(rounded, dense / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps(config))
    config["quantization_config"] = {"quant_method": "toy", "ignore": ["lm_head"]}
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.usefixtures("toy")
def test_a_toy_format_runs_a_whole_model(
    save_tiny: Callable[..., Any], driver: Callable[..., Any], backend: str, tmp_path: Path
) -> None:
    path, _ = save_tiny("Llama")
    quantize_folder(path, tmp_path / "dense")
    token_ids = list(range(3, 60))
    want = driver(tmp_path / "dense", attention_backend=backend).logits(token_ids)
    got = driver(path, attention_backend=backend).logits(token_ids)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("toy")
def test_a_plane_of_another_width_is_split_by_its_format() -> None:
    planes = {"q": torch.randint(-9, 9, (4, 6), dtype=torch.int8), "scale": torch.rand(4, 1)}
    weight = Planes("TOY", planes, (4, 6))
    parts = [part_of(weight, Columns(*share(weight.shape[1], i, 2))) for i in range(2)]
    assert all(isinstance(part, Planes) for part in parts)
    whole = torch.cat([part.dequantize() for part in parts if isinstance(part, Planes)], 1)
    assert torch.equal(whole, weight.dequantize())


@pytest.mark.usefixtures("toy")
def test_a_quantized_model_without_a_native_implementation_is_refused(
    save_tiny: Callable[..., Any], driver: Callable[..., Any], tmp_path: Path
) -> None:
    path, _ = save_tiny("GPTNeoX")
    file = path / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] = {"quant_method": "toy", "ignore": []}
    file.write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match="'GPTNeoXForCausalLM' is not supported quantized"):
        driver(path)
