"""What is wrong with a checkpoint is one line that names the file, and the tensor: both formats.

From the engine's side: whole models on disk, loaded as a server would.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo.checkpoints.dummy_tokenizer import dummy_tokenizer_json
from octavo.config import EngineConfig
from octavo.errors import ModelLoadError
from octavo.models.source import load_tokenizer, resolve_model

HIDDEN, FFN, VOCAB = 32, 64, 300


def tensors() -> dict[str, np.ndarray]:
    """A Llama of one layer, under GGUF's names."""
    shapes = {
        "token_embd.weight": (VOCAB, HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.attn_q.weight": (HIDDEN, HIDDEN),
        "blk.0.attn_k.weight": (HIDDEN, HIDDEN),
        "blk.0.attn_v.weight": (HIDDEN, HIDDEN),
        "blk.0.attn_output.weight": (HIDDEN, HIDDEN),
        "blk.0.ffn_norm.weight": (HIDDEN,),
        "blk.0.ffn_gate.weight": (FFN, HIDDEN),
        "blk.0.ffn_up.weight": (FFN, HIDDEN),
        "blk.0.ffn_down.weight": (HIDDEN, FFN),
    }
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write_gguf(
    file: Path, arrays: dict[str, np.ndarray], arch: str = "llama", without: str = ""
) -> None:
    writer = gguf.GGUFWriter(str(file), arch)
    numbers = {
        "context_length": 64,
        "embedding_length": HIDDEN,
        "block_count": 1,
        "feed_forward_length": FFN,
        "attention.head_count": 2,
    }
    for key, value in numbers.items():
        if key != without:
            writer.add_uint32(f"{arch}.{key}", value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5)
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def assert_refused(driver: Callable[..., Any], path: Path, *said: str, names: str = "") -> None:
    with pytest.raises(ModelLoadError) as error:
        driver(path)
    message = str(error.value)
    assert "\n" not in message
    assert (names or str(path)) in message
    for part in said:
        assert part in message


# ------------------------------------------------------------------------------------------ GGUF


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("blk.0.ffn_up.weight"), "tensor blk.0.ffn_up.weight is missing"),
        (lambda t: t.pop("token_embd.weight"), "tensor token_embd.weight is missing"),
        (
            lambda t: t.update({"blk.0.attn_q.weight": np.ones((HIDDEN, 64), np.float32)}),
            "tensor blk.0.attn_q.weight has shape [32, 64], the config says [32, 32]",
        ),
        (
            lambda t: t.update({"blk.0.attn_norm.weight": np.ones(33, np.float32)}),
            "tensor blk.0.attn_norm.weight has shape [33], the config says [32]",
        ),
        (
            lambda t: t.update({"blk.0.attn_q.weight": np.ones((HIDDEN, HIDDEN), np.int32)}),
            "tensor blk.0.attn_q.weight has type I32, not supported",
        ),
        (
            lambda t: t.update({"blk.1.attn_q.weight": np.ones((HIDDEN, HIDDEN), np.float32)}),
            "tensor blk.1.attn_q.weight is not part of this model",
        ),
        (
            lambda t: t.update({"odd": np.ones(3, np.float32)}),
            "tensor odd is not part of this model",
        ),
    ],
)
def test_gguf_tensors(
    change: Callable[[dict[str, np.ndarray]], object],
    said: str,
    tmp_path: Path,
    driver: Callable[..., Any],
) -> None:
    file = tmp_path / "model.gguf"
    arrays = tensors()
    write_gguf(file, arrays)
    driver(file)
    change(arrays)
    write_gguf(file, arrays)
    assert_refused(driver, file, said)


def test_gguf_architecture_and_keys(tmp_path: Path, driver: Callable[..., Any]) -> None:
    file = tmp_path / "model.gguf"
    for arch in ("martian", "t5"):
        write_gguf(file, tensors(), arch=arch)
        said = f"GGUF architecture '{arch}' is not supported; known: "
        assert_refused(driver, file, said, "cohere2, ", "llama, ")
    for key in ("embedding_length", "block_count", "attention.head_count"):
        write_gguf(file, tensors(), without=key)
        assert_refused(driver, file, f"llama.{key} is missing")


def test_a_gguf_file_cut_anywhere(tmp_path: Path, driver: Callable[..., Any]) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(file, tensors())
    whole = file.read_bytes()
    for length in [*range(0, 64), *range(64, len(whole), len(whole) // 50), len(whole) - 1]:
        file.write_bytes(whole[:length])
        assert_refused(driver, file)


def test_a_tokenizer_that_is_not_the_gguf_files(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(file, tensors())
    other = tmp_path / "tokenizer.json"
    other.write_text(dummy_tokenizer_json(VOCAB + 1000))
    config = EngineConfig(model=str(file), tokenizer=str(other))
    with pytest.raises(ModelLoadError) as error:
        load_tokenizer(resolve_model(config), config)
    assert str(other) in str(error.value)
    assert "1300 tokens, the model 300" in str(error.value)
    other.write_text(dummy_tokenizer_json(VOCAB))
    assert load_tokenizer(resolve_model(config), config).vocab_size == VOCAB


# ----------------------------------------------------------------------------------- safetensors


def test_a_safetensors_file_cut_anywhere(
    save_tiny: Callable[..., Any], driver: Callable[..., Any]
) -> None:
    path, _model = save_tiny("Llama", num_hidden_layers=1)
    file = path / "model.safetensors"
    whole = file.read_bytes()
    for length in [*range(0, 64), *range(64, len(whole), len(whole) // 50), len(whole) - 1]:
        file.write_bytes(whole[:length])
        assert_refused(driver, path, str(file), "not a whole safetensors file")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}']
)
def test_an_index_that_is_none(
    content: str, save_tiny: Callable[..., Any], driver: Callable[..., Any]
) -> None:
    path, _model = save_tiny("Llama", num_hidden_layers=1)
    index = path / "model.safetensors.index.json"
    index.write_text(content)
    assert_refused(driver, path, str(index), "not a safetensors index")


def test_an_index_names_no_file_elsewhere(
    save_tiny: Callable[..., Any], driver: Callable[..., Any]
) -> None:
    path, _model = save_tiny("Llama", num_hidden_layers=1)
    (path.parent / "other.safetensors").write_bytes((path / "model.safetensors").read_bytes())
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    assert_refused(driver, path, str(index), "other.safetensors")


# ----------------------------------------------------------------- through transformers' module


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t, n: t.pop(n), "is missing"),
        (lambda t, n: t.update({n: torch.zeros(64, 95)}), "has shape [64, 95], the config says"),
        (lambda t, n: t.update({f"{n}.odd": torch.zeros(3)}), ".odd is not part of this model"),
    ],
)
def test_tensors_of_a_model_of_no_family(
    change: Callable[[dict[str, torch.Tensor], str], object],
    said: str,
    save_tiny: Callable[..., Any],
    driver: Callable[..., Any],
) -> None:
    path, _model = save_tiny("Starcoder2", num_hidden_layers=1)
    file = path / "model.safetensors"
    name = "model.layers.0.mlp.c_proj.weight"
    arrays = load_file(file)
    change(arrays, name)
    save_file(arrays, file, metadata={"format": "pt"})
    assert_refused(driver, path, f"tensor {name}", said, names=str(file))


def test_a_cut_file_of_a_model_of_no_family(
    save_tiny: Callable[..., Any], driver: Callable[..., Any]
) -> None:
    path, _model = save_tiny("Starcoder2", num_hidden_layers=1)
    file = path / "model.safetensors"
    whole = file.read_bytes()
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert_refused(driver, path, str(file), "not a whole safetensors file")
