"""Weights: every source hands out the same parts, by a module's prefix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo._core import GgufFile
from octavo.checkpoints import quantize as quantize_module
from octavo.checkpoints.dummy import DummyWeights
from octavo.checkpoints.gguf import GgufWeights
from octavo.checkpoints.quantize import ROUNDINGS, QuantizedWeights
from octavo.checkpoints.safetensors import SafetensorsWeights
from octavo.checkpoints.schemes.dense import DenseScheme
from octavo.checkpoints.schemes.registry import find_scheme
from octavo.checkpoints.weights import RenamedWeights, Weights
from octavo.errors import ModelLoadError
from octavo.kernels.weights import Columns, Planes, Rows, dense, share

CPU = torch.device("cpu")
Q = "model.layers.0.self_attn.q_proj"
SHAPE = (8, 64)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        f"{Q}.weight": torch.randn(SHAPE),
        f"{Q}.bias": torch.randn(8),
        "model.embed_tokens.weight": torch.randn(16, 64),
        **{f"mlp.experts.{i}.up_proj.weight": torch.randn(4, 64) for i in range(3)},
    }


@pytest.fixture
def open_file(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> Callable[..., SafetensorsWeights]:
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)

    def open_again(*, ahead: bool = False) -> SafetensorsWeights:
        loaded = load_file(file)
        return SafetensorsWeights(
            [file],
            device=CPU,
            dtype=None,
            act_dtype=torch.float32,
            take=(lambda _, name: loaded[name]) if ahead else None,
        )

    return open_again


def gguf_weights(folder: Path, tensors: dict[str, torch.Tensor], packed: bool) -> GgufWeights:
    file = folder / "model.gguf"
    writer = gguf.GGUFWriter(str(file), "llama")
    data = gguf.quantize(tensors[f"{Q}.weight"].numpy(), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.attn_q.weight", data, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.attn_q.bias", tensors[f"{Q}.bias"].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufWeights(
        GgufFile(str(file)),
        heads=(2, 2),
        device=CPU,
        dtype=None,
        act_dtype=torch.float32,
        packed=packed,
    )


@pytest.mark.parametrize(
    "source", ["safetensors", "ahead", "packed", "floats", "dummy", "w8", "renamed"]
)
def test_parts_of_a_module_together_are_the_module(
    source: str,
    tmp_path: Path,
    tensors: dict[str, torch.Tensor],
    open_file: Callable[..., SafetensorsWeights],
) -> None:
    def open_source() -> Weights:
        match source:
            case "safetensors" | "ahead":
                return open_file(ahead=source == "ahead")
            case "packed" | "floats":
                return gguf_weights(tmp_path, tensors, packed=source == "packed")
            case "dummy":
                return DummyWeights(device=CPU, dtype=torch.float32, act_dtype=torch.float32)
            case "w8":
                return QuantizedWeights(open_file(), "Q8_0")
            case _:
                return RenamedWeights(open_file(), lambda name: name.removeprefix("x."))

    name = f"x.{Q}" if source == "renamed" else Q
    whole = open_source().linear(name, SHAPE)
    assert isinstance(whole, Planes) == (source in ("packed", "w8"))
    for dim in (0, 1):
        bounds = [share(SHAPE[dim], i, 2) for i in range(2)]
        halves = [Rows((b,)) if dim == 0 else Columns(*b) for b in bounds]
        parts = [dense(open_source().linear(name, SHAPE, half)) for half in halves]
        assert parts[0].shape[dim] == SHAPE[dim] // 2
        assert torch.equal(torch.cat(parts, dim), dense(whole))
    bias = open_source().vector(f"{name}.bias", 8)
    biases = [open_source().vector(f"{name}.bias", 8, Rows((share(8, i, 2),))) for i in range(2)]
    assert torch.equal(torch.cat(biases), bias)


def test_experts_come_in_order_and_only_when_they_are_taken(
    tensors: dict[str, torch.Tensor], open_file: Callable[..., SafetensorsWeights]
) -> None:
    weights = open_file()
    experts: Iterator[object] = weights.experts("mlp.experts", 4, "up_proj", (4, 64))
    for i in range(3):
        found = next(experts)
        assert isinstance(found, torch.Tensor)
        assert torch.equal(found, tensors[f"mlp.experts.{i}.up_proj.weight"])
    with pytest.raises(ModelLoadError, match=r"mlp\.experts\.3\.up_proj\.weight is missing"):
        next(experts)
    with pytest.raises(ModelLoadError, match=r"embed_tokens\.weight is not part .* 2 more"):
        weights.finish()


def test_embeddings_and_the_head_keep_eight_bits(
    open_file: Callable[..., SafetensorsWeights],
) -> None:
    weights = QuantizedWeights(open_file(), "Q4_1")
    embedding = weights.embedding("model.embed_tokens", (16, 64))
    projection = weights.linear(Q, SHAPE)
    assert isinstance(embedding, Planes)
    assert isinstance(projection, Planes)
    assert (embedding.format, projection.format) == ("Q8_0", "Q4_1")


@pytest.mark.parametrize(
    ("rounding", "shape", "groups", "error"),
    [
        ("FP8 by channel", (10, 60), 1, 0.03),
        ("FP8 by tensor", (10, 60), 1, 0.03),
        ("FP8 by block", (300, 200), 2, 0.03),
        ("INT4", (10, 256), 2, 0.12),
    ],
)
def test_float_matrices_are_rounded(
    rounding: str, shape: tuple[int, int], groups: int, error: float
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape).bfloat16()
    weight[1] = 0
    weight[2] = weight[2].abs() + 1  # all of one sign
    found = ROUNDINGS[rounding].round(weight)
    assert found.dtype == torch.bfloat16
    assert found.planes["scale"].shape == (shape[0], groups)
    rounded, exact = found.dequantize(), weight.float()
    assert 0 < (rounded - exact).norm() / exact.norm() < error
    assert not rounded[1].any()
    if rounding == "FP8 by tensor":
        assert found.planes["scale"].unique().numel() == 1
        assert rounded.abs().max() == exact.abs().max()


@pytest.mark.parametrize("rounding", ["FP8 by channel", "FP8 by tensor", "FP8 by block"])
def test_rows_are_rounded_a_few_at_a_time(rounding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(600, 200)
    whole = ROUNDINGS[rounding].round(weight)
    monkeypatch.setattr(quantize_module, "_ROWS", 256)
    found = quantize_module._rounded(weight, ROUNDINGS[rounding])
    assert isinstance(found, Planes)
    assert torch.equal(found.dequantize(), whole.dequantize())


def test_what_a_rounding_cannot_take_stays_as_it_is(
    open_file: Callable[..., SafetensorsWeights],
) -> None:
    weights = QuantizedWeights(open_file(), "FP8 by channel")
    assert isinstance(weights.linear(Q, SHAPE), Planes)
    assert isinstance(weights.embedding("model.embed_tokens", (16, 64)), torch.Tensor)
    # There are no kernels for experts of it.
    expert = next(weights.experts("mlp.experts", 4, "up_proj", (4, 64)))
    assert isinstance(expert, torch.Tensor)
    assert isinstance(QuantizedWeights(open_file(), "INT4").linear(Q, SHAPE), torch.Tensor)


def test_a_checkpoint_without_a_quantization_is_dense() -> None:
    assert isinstance(find_scheme(None), DenseScheme)
    assert isinstance(find_scheme({}), DenseScheme)
    with pytest.raises(ModelLoadError, match="quantization method 'hqq' is not supported"):
        find_scheme({"quant_method": "hqq"})
