"""A folder or file of each kind of model, tiny and random, through the real server."""

from __future__ import annotations

import http.client
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fidelity import tiny_config
from gguf_files import write_gguf
from safetensors.torch import save_file
from test_end_to_end import ServerProcess
from test_gguf_encoders import word_piece, write_encoder

from tiny_encoders import VOCAB_SIZE, save_colbert, save_encoder, save_tokenizer, write_modules

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(600)]


def save_decoder(folder: Path, family: str) -> Any:
    torch.manual_seed(0)
    # The text half of a model with other halves has a config of its own name.
    cls = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")
    model = cls(tiny_config(family))
    model.eval().save_pretrained(folder)
    save_tokenizer(folder)
    return model


def decoder(folder: Path) -> list[str]:
    save_decoder(folder, "Llama")
    return [str(folder)]


def hybrid(folder: Path) -> list[str]:
    save_decoder(folder, "Qwen3_5Text")
    return [str(folder)]


def gguf_decoder(folder: Path) -> list[str]:
    write_gguf(folder / "model.gguf", "llama", save_decoder(folder, "Llama"))
    return [str(folder / "model.gguf"), "--tokenizer", str(folder)]


def embedder(folder: Path) -> list[str]:
    save_encoder(folder)
    write_modules(folder, {"pooling_mode_mean_tokens": True}, ("Normalize", "2_Normalize"))
    return [str(folder)]


def gguf_encoder(folder: Path) -> list[str]:
    tokenizer = word_piece()
    model = save_encoder(folder, vocab_size=tokenizer.get_vocab_size())
    write_encoder(folder / "model.gguf", "bert", model, tokenizer, "mean")
    return [str(folder / "model.gguf")]


def table(folder: Path) -> list[str]:
    save_tokenizer(folder)
    save_file({"embedding.weight": torch.randn(VOCAB_SIZE, 24)}, folder / "model.safetensors")
    modules = [{"path": "", "type": "sentence_transformers.models.StaticEmbedding"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    return [str(folder)]


def reranker(folder: Path) -> list[str]:
    save_encoder(folder, "BertForSequenceClassification")
    return [str(folder)]


def colbert(folder: Path) -> list[str]:
    save_colbert(folder)
    return [str(folder)]


def sparse(folder: Path) -> list[str]:
    save_encoder(folder, "BertForMaskedLM")
    modules = [
        {"path": path, "type": f"sentence_transformers.models.{kind}"}
        for kind, path in (("MLMTransformer", ""), ("SpladePooling", "1_SpladePooling"))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_SpladePooling").mkdir()
    (folder / "1_SpladePooling" / "config.json").write_text('{"pooling_strategy": "max"}')
    return [str(folder)]


TEXT = {"prompt": "w5 w6 w7", "max_tokens": 5, "temperature": 0, "ignore_eos": True}
PAIR = {"query": "w5", "documents": ["w6 w7", "w8", "w5 w9"]}


def answers_text(found: Any) -> None:
    assert found["usage"]["completion_tokens"] == 5
    assert found["choices"][0]["finish_reason"] == "length"


def is_vector(size: int, length: float | None = None) -> Callable[[Any], None]:
    def check(found: Any) -> None:
        vector = found["data"][0]["embedding"]
        assert len(vector) == size
        norm = math.hypot(*vector)
        assert norm > 0
        assert length is None or norm == pytest.approx(length, abs=1e-4)

    return check


def ranks(found: Any) -> None:
    scores = [one["relevance_score"] for one in found["results"]]
    assert sorted(scores, reverse=True) == scores
    assert {one["index"] for one in found["results"]} == {0, 1, 2}
    assert len(set(scores)) == 3


def is_vector_a_token(found: Any) -> None:
    rows = found["data"][0]["data"]
    assert len(rows) > 2
    assert {len(row) for row in rows} == {16}


KINDS: dict[str, tuple[Callable[[Path], list[str]], str, dict[str, Any], Callable[[Any], None]]] = {
    "decoder": (decoder, "/v1/completions", TEXT, answers_text),
    "hybrid": (hybrid, "/v1/completions", TEXT, answers_text),
    "GGUF decoder": (gguf_decoder, "/v1/completions", TEXT, answers_text),
    "embedder": (embedder, "/v1/embeddings", {"input": "w5 w6"}, is_vector(120, 1.0)),
    "GGUF encoder": (gguf_encoder, "/v1/embeddings", {"input": "fox two"}, is_vector(120, 1.0)),
    "table": (table, "/v1/embeddings", {"input": "w5 w6"}, is_vector(24)),
    "reranker": (reranker, "/v1/rerank", PAIR, ranks),
    "ColBERT": (colbert, "/pooling", {"input": "w5 w6"}, is_vector_a_token),
    "sparse": (sparse, "/v1/embeddings", {"input": "w5 w6"}, is_vector(VOCAB_SIZE)),
}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ServerProcess]]:
    """One of each kind: they start at the same time."""
    started: dict[str, ServerProcess] = {}
    try:
        for name, (save, *_) in KINDS.items():
            model, *flags = save(tmp_path_factory.mktemp("model"))
            started[name] = ServerProcess("--model", model, *flags, "--threads", "1")
        yield started
    finally:
        for server in started.values():
            server.end()


@pytest.mark.parametrize("name", KINDS)
def test_it_answers(name: str, servers: dict[str, ServerProcess]) -> None:
    _, path, body, check = KINDS[name]
    address = servers[name].wait_ready().removeprefix("http://")
    connection = http.client.HTTPConnection(address, timeout=120)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    assert response.status == 200, answer
    check(answer)
    servers[name].end()
