"""Encoders that run through transformers' own modules: vectors, scores and classes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo import LLM
from octavo.errors import ModelLoadError
from octavo.models.foreign_encoder import FOREIGN_FAMILIES
from tiny_encoders import save_encoder

LENGTHS = (5, 1, 40, 16, 17, 33)
# The others are a long list of its own.
QUICK = ("DistilBert", "MPNet", "ModernBert")
CLASSIFIERS = ("Albert", "DebertaV2", "DistilBert", "Electra", "ModernBert")
SIZES: dict[str, dict[str, Any]] = {
    "Albert": {"embedding_size": 48},
    "DebertaV2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "Deberta": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "Electra": {"embedding_size": 48},
    "EuroBert": {"num_key_value_heads": 1},
    "MobileBert": {"embedding_size": 48, "intra_bottleneck_size": 60, "initializer_range": 0.05},
    "ModernBert": {"local_attention": 16, "num_hidden_layers": 4},
    "RemBert": {"input_embedding_size": 48, "output_embedding_size": 48},
    "RoCBert": {
        "enable_pronunciation": False,
        "enable_shape": False,
        "pronunciation_vocab_size": 10,
        "shape_vocab_size": 10,
    },
}


def prompts() -> list[list[int]]:
    return [random.Random(n).choices(range(4, 300), k=n) for n in LENGTHS]


def save(path: Path, family: str, kind: str) -> Any:
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2}
    sizes = {**special, "sep_token_id": 3, **SIZES.get(family, {})}
    return save_encoder(path, f"{family}{kind}", **sizes)


@pytest.mark.parametrize("kind", ["Model", "ForMaskedLM"])
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow])
        for name in FOREIGN_FAMILIES
    ],
)
def test_a_family_is_what_transformers_computes(family: str, kind: str, tmp_path: Path) -> None:
    model = save(tmp_path, family, kind)
    base = model if kind == "Model" else model.base_model
    with torch.inference_mode():
        want = [base(torch.tensor([ids]))[0][0].mean(0) for ids in prompts()]
    llm = LLM(str(tmp_path), threads=1, dtype="float32", max_num_batched_tokens=64)
    found = [output.outputs.embedding for output in llm.embed(prompts(), use_tqdm=False)]
    torch.testing.assert_close(torch.tensor(found), torch.stack(want), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in CLASSIFIERS],
)
@pytest.mark.parametrize("num_labels", [1, 3])
def test_a_classifier_is_what_transformers_computes(
    family: str, num_labels: int, tmp_path: Path
) -> None:
    SIZES.setdefault(family, {})
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2}
    model = save_encoder(
        tmp_path,
        f"{family}ForSequenceClassification",
        **{**special, "sep_token_id": 3, **SIZES[family], "num_labels": num_labels},
    )
    texts = ["w5 w6 w7", "w8 " * 20, "w9"]
    llm = LLM(str(tmp_path), threads=1, dtype="float32")
    with torch.inference_mode():
        logits = [
            model(torch.tensor([[2, *(int(w[1:]) + 4 for w in text.split()), 3]])).logits[0]
            for text in texts
        ]
    if num_labels == 1:
        pairs = llm.score("w5", ["w6 w7", "w8"], use_tqdm=False)
        assert all(0 < output.outputs.score < 1 for output in pairs)
        return
    found = [output.outputs.probs for output in llm.classify(texts, use_tqdm=False)]
    want = torch.stack(logits).softmax(-1)
    torch.testing.assert_close(torch.tensor(found), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("strategy", ["max", "sum"])
@pytest.mark.parametrize("family", ["Bert", "DistilBert"])
def test_a_weight_for_each_word(family: str, strategy: str, tmp_path: Path) -> None:
    """SPLADE: as sentence-transformers' sparse encoders are laid out."""
    model = save(tmp_path, family, "ForMaskedLM")
    modules = [("MLMTransformer", ""), ("SpladePooling", "1_SpladePooling")]
    kind = "sentence_transformers.sparse_encoder.models."
    listed = [{"path": path, "type": kind + name} for name, path in modules]
    (tmp_path / "modules.json").write_text(json.dumps(listed))
    (tmp_path / "1_SpladePooling").mkdir()
    pooling = {"pooling_strategy": strategy, "activation_function": "relu"}
    (tmp_path / "1_SpladePooling" / "config.json").write_text(json.dumps(pooling))
    with torch.inference_mode():
        words = [model(torch.tensor([ids])).logits[0].relu().log1p() for ids in prompts()]
    want = torch.stack([w.amax(0) if strategy == "max" else w.sum(0) for w in words])
    llm = LLM(str(tmp_path), threads=1, dtype="float32", max_num_batched_tokens=64)
    found = torch.tensor([o.outputs.embedding for o in llm.embed(prompts(), use_tqdm=False)])
    assert found.shape[1] == 300
    torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-4)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save(tmp_path, "DistilBert", "Model")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("q_lin.weight"))
    save_file({k: v for k, v in tensors.items() if k != name}, file, metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=f"tensor {name} is missing"):
        LLM(str(tmp_path), threads=1)
