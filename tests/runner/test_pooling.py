"""Padding to a graph's shape changes no vector.

Without a GPU nothing is captured, and Triton's kernels run in its interpreter.
"""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo import LLM
from octavo.layers.ops import get_ops
from octavo.runner import loading
from octavo.runner.pooling import PoolingRunner
from tiny_encoders import save_encoder, save_tokenizer, write_modules

LENGTHS = (5, 1, 40, 16, 17, 33)


def texts() -> list[list[int]]:
    return [random.Random(n).choices(range(4, 300), k=n) for n in LENGTHS]


@pytest.fixture
def op_by_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded shapes are a GPU's, where no call takes an encoder's layers as a whole."""
    ops = dataclasses.replace(get_ops(torch.device("cpu"), "native"), make_encoder=None)
    monkeypatch.setattr(loading, "get_ops", lambda *_: ops)


def padded(llm: LLM) -> LLM:
    """Steps of at most 96 tokens go through padded shapes; longer ones fit none."""
    runner = llm._engine.runner
    assert isinstance(runner, PoolingRunner)
    runner._graphs = runner._make_graphs((16, 64, 96))
    return llm


def vectors(llm: LLM, prompts: list[list[int]]) -> torch.Tensor:
    outputs = llm.embed(prompts, use_tqdm=False)
    return torch.tensor([output.outputs.embedding for output in outputs])


@pytest.mark.usefixtures("op_by_op")
@pytest.mark.parametrize("mode", ["cls_token", "mean_tokens", "lasttoken"])
def test_padding_changes_no_vector(mode: str, tmp_path: Path) -> None:
    save_encoder(tmp_path, "BertModel")
    write_modules(tmp_path, {f"pooling_mode_{mode}": True}, ("Normalize", "2_Normalize"))
    expected = vectors(LLM(str(tmp_path), threads=1), texts())
    llm = padded(LLM(str(tmp_path), threads=1))
    torch.testing.assert_close(vectors(llm, texts()), expected)  # 112 tokens: no shape
    for size in (1, 2, 3, 5):
        found = vectors(llm, texts()[:size])
        torch.testing.assert_close(found, expected[:size])


@pytest.mark.usefixtures("op_by_op")
def test_padding_changes_no_score(tmp_path: Path) -> None:
    save_encoder(tmp_path, "BertForSequenceClassification")
    first, second = "w1 w2 w3", ["w4", "w5 w6 w7", "w8 " * 20]

    def scores(llm: LLM) -> list[float]:
        return [one.outputs.score for one in llm.score(first, second, use_tqdm=False)]

    expected = scores(LLM(str(tmp_path), threads=1))
    assert scores(padded(LLM(str(tmp_path), threads=1))) == pytest.approx(expected, abs=1e-6)


def save_decoder(path: Path) -> None:
    """A tiny Qwen3 without its output head."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=300,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=40,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    transformers.Qwen3Model(config).save_pretrained(path)
    save_tokenizer(path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run in the interpreter")
@pytest.mark.parametrize("save", [save_encoder, save_decoder])
def test_the_gpus_kernels_leave_padding_alone(
    save: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = pytest.importorskip("octavo.kernels.gpu.ops")
    save(tmp_path)
    prompts = texts()[:3]
    expected = vectors(LLM(str(tmp_path), threads=1, dtype="float32"), prompts)
    monkeypatch.setattr(loading, "get_ops", lambda *_: gpu.OPS)
    llm = padded(LLM(str(tmp_path), threads=1, dtype="float32"))
    torch.testing.assert_close(vectors(llm, prompts), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("dtype", "least"), [("float32", 0.99999), ("float16", 0.9999), ("bfloat16", 0.999)]
)
def test_graphs_compute_what_transformers_does(dtype: Any, least: float, tmp_path: Path) -> None:
    model = save_encoder(tmp_path, "BertModel")
    with torch.inference_mode():
        hidden = [model(torch.tensor([ids])).last_hidden_state[0] for ids in texts()]
    expected = torch.stack([rows.mean(0) for rows in hidden])
    llm = LLM(str(tmp_path), device="cuda", dtype=dtype)
    for _ in range(3):  # kernel by kernel, captured, replayed
        found = vectors(llm, texts())
        assert float(torch.cosine_similarity(found, expected).min()) >= least
    for size in (1, 3, 5):
        found = vectors(llm, texts()[:size])
        assert found.shape == (size, 120)
        assert float(torch.cosine_similarity(found, expected[:size]).min()) >= least
