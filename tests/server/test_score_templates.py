"""Scores of pairs that a template makes one text of, and of texts that are cut before, over HTTP and
by LLM.score."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import RunningServer

from octavo.config import EngineConfig
from octavo.engine.engine import AsyncEngine
from octavo.llm import LLM
from octavo.server.http.config import ServerConfig
from tiny_encoders import save_encoder

# As reranker's templates find their two messages.
TEMPLATE = (
    "{{ instruction | default('w3') }} "
    "{{ (messages | selectattr('role', 'eq', 'query') | first).content }} w4 "
    "{{ messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first }}"
)
QUERY, DOCUMENTS = "w5 w6", ["w7 w8", "w9", "w10 w11 w12"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cross")
    save_encoder(path, "BertForSequenceClassification")
    return path


@pytest.fixture(scope="module")
def llm(path: Path) -> LLM:
    return LLM(str(path), threads=1)


@pytest.fixture(scope="module")
def server(path: Path) -> Iterator[RunningServer]:
    file = path / "pair.jinja"
    file.write_text(TEMPLATE)
    engine = AsyncEngine(EngineConfig(model=str(path), threads=1))
    server = ready(engine, chat_template=str(file))
    yield server
    server.stop()


def ready(engine: AsyncEngine, **config: Any) -> RunningServer:
    server = RunningServer(engine, ServerConfig(port=0, **config))
    server.may_load.set()
    assert server.ready.wait(60)
    return server


def alone(llm: LLM, texts: list[str]) -> list[float]:
    """The model's score of texts that are read as they are."""
    return [one.outputs.probs[0] for one in llm.classify(texts, use_tqdm=False)]


def scores(llm: LLM, **arguments: Any) -> list[float]:
    outputs = llm.score(QUERY, DOCUMENTS, use_tqdm=False, **arguments)
    return [one.outputs.score for one in outputs]


def test_a_template_makes_one_text_of_a_pair(llm: LLM, path: Path) -> None:
    expected = alone(llm, [f"w3 w5 w6 w4 {one}" for one in DOCUMENTS])
    assert scores(llm, chat_template=TEMPLATE) == pytest.approx(expected, abs=1e-6)
    other = scores(llm, chat_template=TEMPLATE, chat_template_kwargs={"instruction": "w20"})
    expected = alone(llm, [f"w20 w5 w6 w4 {one}" for one in DOCUMENTS])
    assert other == pytest.approx(expected, abs=1e-6)
    given = LLM(str(path), threads=1, chat_template=TEMPLATE)
    assert scores(given) == pytest.approx(scores(llm, chat_template=TEMPLATE), abs=1e-6)
    cut = scores(llm, chat_template=TEMPLATE, truncate_prompt_tokens=5)
    assert cut == pytest.approx(alone(llm, ["w3 w5 w6"]) * 3, abs=1e-6)


def test_a_template_is_for_pairs_alone(llm: LLM, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="chat_template_kwargs needs"):
        scores(llm, chat_template_kwargs={"instruction": "w20"})
    with pytest.raises(ValueError, match="chat template, line 1"):
        scores(llm, chat_template="{{")
    save_encoder(tmp_path, "BertModel")
    embedder = LLM(str(tmp_path), threads=1)
    with pytest.raises(ValueError, match="needs a cross-encoder"):
        scores(embedder, chat_template=TEMPLATE)


def test_the_operators_template_is_used(server: RunningServer, llm: LLM) -> None:
    body = {"query": QUERY, "documents": DOCUMENTS}
    for fields, first in (
        ({}, "w3"),
        ({"instruction": "w20"}, "w20"),
        ({"chat_template_kwargs": {"instruction": "w21"}, "instruction": "w20"}, "w21"),
    ):
        expected = alone(llm, [f"{first} w5 w6 w4 {one}" for one in DOCUMENTS])
        answer = server.post("/rerank", {**body, **fields}).json["results"]
        found = {one["index"]: one["relevance_score"] for one in answer}
        assert [found[index] for index in range(3)] == pytest.approx(expected, abs=1e-6)
        answer = server.post("/score", {"queries": QUERY, "documents": DOCUMENTS, **fields}).json
        assert [one["score"] for one in answer["data"]] == pytest.approx(expected, abs=1e-6)
    error = server.post("/rerank", {**body, "chat_template_kwargs": {"messages": []}}).error
    assert error["param"] == "chat_template_kwargs.messages"


@pytest.mark.parametrize("architecture", ["BertForSequenceClassification", "BertModel"])
def test_texts_are_cut_before_they_are_paired(tmp_path: Path, architecture: str) -> None:
    save_encoder(tmp_path, architecture)
    server = ready(AsyncEngine(EngineConfig(model=str(tmp_path), threads=1)))
    try:
        long = {"query": "w5 w6 w7", "documents": [" ".join(["w8"] * 400), "w9 w10 w11 w12"]}
        limits = {"max_tokens_per_query": 2, "max_tokens_per_doc": "3"}
        cut = server.post("/v2/rerank", {**long, **limits}).json
        short = {"query": "w5 w6", "documents": ["w8 w8 w8", "w9 w10 w11"]}
        expected = server.post("/v2/rerank", short).json
        for found, wanted in zip(cut["results"], expected["results"], strict=True):
            assert found["relevance_score"] == pytest.approx(wanted["relevance_score"], abs=1e-6)
            # What was sent comes back whole.
            assert found["document"] == {"text": long["documents"][found["index"]]}
        assert cut["usage"] == expected["usage"]
        all_of_it = {**short, "max_tokens_per_query": 0, "max_tokens_per_doc": 0}
        assert server.post("/v2/rerank", all_of_it).json["usage"] == expected["usage"]
        for name in limits:
            assert server.post("/v2/rerank", {**short, name: -5}).error["param"] == name
        for name in ("instruction", "chat_template_kwargs"):
            value: Any = "w1" if name == "instruction" else {"instruction": "w1"}
            error = server.post("/score", {"text_1": "w5", "text_2": "w6", name: value}).error
            assert error["param"] == name
            assert "--chat-template" in error["message"]
    finally:
        server.stop()
