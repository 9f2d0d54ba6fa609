"""ColBERT models as PyLate and colbert-ai save them: a vector of length 1 a token, and MaxSim."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo import LLM, AsyncEngineArgs, AsyncLLM, PoolingParams
from octavo.errors import InvalidParameterError, ModelLoadError
from tiny_encoders import save_colbert

LENGTHS = (5, 1, 40, 16, 17, 33)
QUERY, DOCUMENT, MASK = 294, 295, 293
SKIPPED = {284, 285}


def prompts() -> list[list[int]]:
    return [random.Random(n).choices(range(4, 300), k=n) for n in LENGTHS]


def text_ids(text: str) -> list[int]:
    return [2, *(int(word[1:]) + 4 for word in text.split()), 3]


def token_vectors(
    model: Any, weight: torch.Tensor, ids: list[int], num_seen: int | None = None
) -> torch.Tensor:
    mask = [int(i < (num_seen or len(ids))) for i in range(len(ids))]
    with torch.inference_mode():
        given = {"input_ids": torch.tensor([ids]), "attention_mask": torch.tensor([mask])}
        hidden = model(**given).last_hidden_state[0]
    return torch.nn.functional.normalize(hidden @ weight.T, dim=-1)


def query_vectors(model: Any, weight: torch.Tensor, text: str, attends: bool) -> torch.Tensor:
    ids = text_ids(text)
    ids = [*ids[:11][:-1], 3] if len(ids) > 11 else ids
    ids.insert(1, QUERY)
    filled = ids + [MASK] * (12 - len(ids))
    return token_vectors(model, weight, filled, None if attends else len(ids))


def document_vectors(model: Any, weight: torch.Tensor, text: str) -> torch.Tensor:
    ids = text_ids(text)
    ids = [*ids[:19][:-1], 3] if len(ids) > 19 else ids
    ids.insert(1, DOCUMENT)
    kept = torch.tensor([token_id not in SKIPPED for token_id in ids])
    return token_vectors(model, weight, ids)[kept]


def max_sim(query: torch.Tensor, document: torch.Tensor) -> float:
    return sum(max(float(q @ d) for d in document) for q in query)


PAIRS = [
    ("w5 w6 w7", "w8 w280 w9"),
    ("w5", "w20 w281 w22 w5"),
    (" ".join(f"w{n}" for n in range(30)), " ".join(f"w{n}" for n in range(40, 90))),
]


@pytest.mark.parametrize("fills", [True, False])
@pytest.mark.parametrize("architecture", ["BertModel", "RobertaModel", "ModernBertModel"])
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_each_token_has_the_vector_that_pylate_defines(
    architecture: str, backend: Any, fills: bool, tmp_path: Path
) -> None:
    model, weight = save_colbert(tmp_path, architecture, do_query_expansion=fills)
    # Steps of 64 tokens: several texts in one, and several steps.
    llm = LLM(
        str(tmp_path),
        threads=1,
        dtype="float32",
        attention_backend=backend,
        max_num_batched_tokens=64,
    )
    outputs = llm.encode(prompts(), pooling_task="token_embed", use_tqdm=False)
    for output, ids in zip(outputs, prompts(), strict=True):
        assert output.outputs.data.shape == (len(ids), 16)
        expected = token_vectors(model, weight, ids)
        torch.testing.assert_close(output.outputs.data, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("attends", [True, False])
@pytest.mark.parametrize("architecture", ["BertModel", "ModernBertModel"])
def test_queries_and_documents_have_forms(architecture: str, attends: bool, tmp_path: Path) -> None:
    settings = {"attend_to_expansion_tokens": attends}
    model, weight = save_colbert(tmp_path, architecture, **settings)
    llm = LLM(str(tmp_path), threads=1, dtype="float32")
    queries, documents = zip(*PAIRS, strict=True)
    # Of both kinds in one step.
    modes = ["query"] * len(queries) + ["document"] * len(documents)
    found = llm.encode(
        [*queries, *documents],
        [PoolingParams(embedding_mode=mode) for mode in modes],
        use_tqdm=False,
    )
    expected = [query_vectors(model, weight, text, attends) for text in queries]
    expected += [document_vectors(model, weight, text) for text in documents]
    for output, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(output.outputs.data, wanted, atol=1e-4, rtol=1e-4)
    scores = llm.score(queries, documents, use_tqdm=False)
    for index, score in enumerate(scores):
        wanted_score = max_sim(expected[index], expected[len(PAIRS) + index])
        assert score.outputs.score == pytest.approx(wanted_score, abs=1e-3)


def test_a_folder_of_colbert_ai_is_the_same(tmp_path: Path) -> None:
    path, other = tmp_path / "pylate", tmp_path / "colbert-ai"
    _, weight = save_colbert(path, query_prefix="w0", document_prefix="w1", skiplist_words=[])
    other.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).write_bytes((path / name).read_bytes())
    config = json.loads((path / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "architectures": ["HF_ColBERT"]}))
    tensors = {f"bert.{k}": v for k, v in load_file(path / "model.safetensors").items()}
    save_file({**tensors, "linear.weight": weight}, other / "model.safetensors")
    metadata = {"query_token_id": "w0", "doc_token_id": "w1", "query_maxlen": 12, "doc_maxlen": 20}
    metadata |= {"attend_to_mask_tokens": False, "similarity": "cosine", "dim": 16}
    (other / "artifact.metadata").write_text(json.dumps(metadata))
    queries, documents = zip(*PAIRS, strict=True)
    scores = [
        [one.outputs.score for one in LLM(str(each), threads=1).score(queries, documents)]
        for each in (path, other)
    ]
    assert scores[1] == pytest.approx(scores[0], abs=1e-4)
    (other / "artifact.metadata").write_text(json.dumps({**metadata, "similarity": "l2"}))
    with pytest.raises(ModelLoadError, match="similarity 'l2'"):
        LLM(str(other))
    (other / "artifact.metadata").write_text(json.dumps({**metadata, "doc_maxlen": "20"}))
    with pytest.raises(ModelLoadError, match="document_length"):
        LLM(str(other))


def test_the_async_engine_gives_the_same(tmp_path: Path) -> None:
    model, weight = save_colbert(tmp_path)

    async def run() -> list[torch.Tensor]:
        engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(model=str(tmp_path), threads=1, dtype="float32")
        )
        try:
            return [
                output.outputs.data
                for mode in (None, "query", "document")
                async for output in engine.encode("w5 w280", PoolingParams(embedding_mode=mode))
            ]
        finally:
            engine.shutdown()

    expected = [
        token_vectors(model, weight, text_ids("w5 w280")),
        query_vectors(model, weight, "w5 w280", False),
        document_vectors(model, weight, "w5 w280"),
    ]
    for found, wanted in zip(asyncio.run(run()), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_what_token_vectors_are_not(tmp_path: Path) -> None:
    save_colbert(tmp_path)
    llm = LLM(str(tmp_path), threads=1)
    with pytest.raises(ValueError, match="does not embed: use token_embed"):
        llm.embed("w5")
    with pytest.raises(ValueError, match="does not embed: use token_embed"):
        llm.encode("w5", pooling_task="embed")
    with pytest.raises(InvalidParameterError, match="dimensions must be at most 16"):
        llm.encode("w5", PoolingParams(dimensions=17))
    [whole], [short] = (
        llm.encode("w5", PoolingParams(dimensions=size), use_tqdm=False) for size in (None, 4)
    )
    first = torch.nn.functional.normalize(whole.outputs.data[:, :4], dim=-1)
    torch.testing.assert_close(short.outputs.data, first)
    with pytest.raises(InvalidParameterError, match="task must be token_embed"):
        llm.encode("w5", PoolingParams(task="embed"))
    with pytest.raises(InvalidParameterError, match="embedding_mode needs prompts of text"):
        llm.encode([[2, 5, 3]], PoolingParams(embedding_mode="query"))
    with pytest.raises(InvalidParameterError, match="query or document"):
        PoolingParams(embedding_mode="passage")
    LLM(str(tmp_path), threads=1, convert="embed")
    with pytest.raises(ModelLoadError, match="made to token_embed"):
        LLM(str(tmp_path), task="embed")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("1_Dense/config.json", {"use_residual": True}, "use_residual is not supported"),
        ("config_sentence_transformers.json", {"query_prefix": "[Q] "}, "not a token"),
        ("config_sentence_transformers.json", {"query_length": "12"}, "must be like 32"),
    ],
)
def test_folders_that_are_refused(
    file: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_colbert(tmp_path)
    path = tmp_path / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ModelLoadError, match=message):
        LLM(str(tmp_path))
