"""sentence-transformers folders whose model lies in a folder of its own, or is a table of vectors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from octavo import LLM
from octavo.errors import ModelLoadError
from tiny_encoders import VOCAB_SIZE, WORDS, save_encoder, save_tokenizer, write_modules

TEXTS = ["w5 w6 w7", "w9", "w8 w8 w200 w17"]
POOLING = {"word_embedding_dimension": 120, "pooling_mode_mean_tokens": True}


def embed(path: Path, **config: Any) -> torch.Tensor:
    llm = LLM(str(path), **{"threads": 1, "dtype": "float32", **config})
    outputs = llm.embed(TEXTS, use_tqdm=False)
    return torch.tensor([output.outputs.embedding for output in outputs])


def ids_of(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def modules(path: Path, *kinds: tuple[str, str]) -> None:
    named = [
        {"path": where, "type": f"sentence_transformers.models.{kind}"} for kind, where in kinds
    ]
    (path / "modules.json").write_text(json.dumps(named))


def test_a_transformer_in_a_folder_of_its_own(tmp_path: Path) -> None:
    flat, nested = tmp_path / "flat", tmp_path / "nested"
    flat.mkdir()
    save_encoder(flat)
    write_modules(flat, POOLING, ("Normalize", "2_Normalize"))
    (flat / "sentence_bert_config.json").write_text('{"max_seq_length": 9}')
    prompts = {"prompts": {"query": "w30 "}, "default_prompt_name": "query"}
    (flat / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    inner = nested / "0_Transformer"
    shutil.copytree(flat, inner)
    for name in ("modules.json", "config_sentence_transformers.json", "1_Pooling"):
        (inner / name).rename(nested / name)
    modules(nested, ("Transformer", "0_Transformer"), ("Pooling", "1_Pooling"), ("Normalize", "2"))
    torch.testing.assert_close(embed(nested), embed(flat), atol=0, rtol=0)
    llm = LLM(str(nested), threads=1)
    with pytest.raises(ValueError, match="9"):
        llm.embed("w5 " * 8)


@pytest.mark.parametrize("where", ["", "0_StaticEmbedding"])
@pytest.mark.parametrize("normalizes", [False, True])
def test_a_table_of_sentence_transformers(where: str, normalizes: bool, tmp_path: Path) -> None:
    """Its tokenizer's frame of special tokens is left out; a text's vector is its tokens' mean."""
    folder = tmp_path / where
    folder.mkdir(exist_ok=True)
    save_tokenizer(folder)
    table = torch.randn(VOCAB_SIZE, 24)
    save_file({"embedding.weight": table}, folder / "model.safetensors")
    modules(tmp_path, ("StaticEmbedding", where), *([("Normalize", "1")] if normalizes else []))
    want = torch.stack([table[ids_of(text)].mean(0) for text in TEXTS])
    want = torch.nn.functional.normalize(want) if normalizes else want
    torch.testing.assert_close(embed(tmp_path), want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("weighs", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.int8, torch.float64])
def test_a_table_of_model2vec(weighs: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    """Tokens may share rows, and have weights; without modules.json its config tells of length 1."""
    save_tokenizer(tmp_path)
    table = (torch.randn(40, 24) * 30).to(dtype)
    tensors = {
        "embeddings": table if weighs else table.repeat(VOCAB_SIZE // 40 + 1, 1)[:VOCAB_SIZE]
    }
    rows = tensors["embeddings"].double()
    if weighs:
        mapping = torch.randint(0, 40, (VOCAB_SIZE,))
        weights = torch.rand(VOCAB_SIZE, dtype=torch.float64)
        tensors |= {"mapping": mapping, "weights": weights}
        rows = rows[mapping] * weights[:, None]
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        tmp_path / "model.safetensors",
    )
    config = {"model_type": "model2vec", "architectures": ["StaticModel"], "normalize": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    want = torch.stack([rows[ids_of(text)].mean(0) for text in TEXTS])
    want = torch.nn.functional.normalize(want).float()
    torch.testing.assert_close(embed(tmp_path), want, atol=1e-5, rtol=1e-5)


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    modules(tmp_path, ("StaticEmbedding", ""))
    save_file({"other": torch.zeros(3, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelLoadError, match="no table of vectors"):
        embed(tmp_path)
    tensors = {"embeddings": torch.zeros(3, 4), "mapping": torch.full((VOCAB_SIZE,), 3)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelLoadError, match="mapping names rows outside"):
        embed(tmp_path)
    modules(tmp_path, ("StaticEmbedding", "../elsewhere"))
    with pytest.raises(ModelLoadError, match="outside the folder"):
        embed(tmp_path)
