"""Prompts of texts, and forms of vectors, over a tiny sentence-transformers folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from harness import RunningServer

from octavo.config import EngineConfig
from octavo.engine.engine import AsyncEngine
from octavo.server.http.config import ServerConfig
from tiny_encoders import save_encoder, write_modules

pytestmark = pytest.mark.system

TEXT = "w5 w6"
PROMPTS = {"query": "w7 w8 ", "passage": "w9 ", "plain": ""}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    path = tmp_path_factory.mktemp("prompted")
    save_encoder(path)
    write_modules(path, {"pooling_mode_mean_tokens": True}, ("Normalize", "2_Normalize"))
    settings = {"prompts": PROMPTS, "default_prompt_name": "passage"}
    (path / "config_sentence_transformers.json").write_text(json.dumps(settings))
    engine = AsyncEngine(EngineConfig(model=str(path), served_model_name=("m",), threads=1))
    running = RunningServer(engine, ServerConfig(port=0, shutdown_timeout=1, compat=("ollama",)))
    running.may_load.set()
    assert running.ready.wait(60)
    yield running
    running.stop()


def vector(server: RunningServer, text: Any, **fields: Any) -> list[float]:
    answer = server.post("/v1/embeddings", {"input": text, **fields})
    assert answer.status == 200, answer.body
    return answer.json["data"][0]["embedding"]


def test_prompts_come_before_texts(server: RunningServer) -> None:
    def bare(text: str) -> Any:
        return pytest.approx(vector(server, text, prompt_name="plain"), abs=1e-5)

    query, passage = bare("w7 w8 w5 w6"), bare("w9 w5 w6")
    assert vector(server, TEXT) == passage
    assert vector(server, TEXT, prompt_name="query") == query
    assert vector(server, TEXT, prompt="w7 w8 ") == query
    assert vector(server, [2, 9, 10, 3]) == bare(TEXT)
    for path in ("/pooling", "/invocations"):
        body = {"input": TEXT, "task": "embed", "prompt_name": "query"}
        [entry] = server.post(path, body).json["data"]
        assert entry["data"] == query
    [entry] = server.post("/invocations", {"input": TEXT, "prompt": "w7 w8 "}).json["data"]
    assert entry["embedding"] == query
    for kind, wanted in (
        ("search_query", query),
        ("search_document", passage),
        ("query", query),
        (None, passage),
    ):
        body = {"texts": [TEXT], "input_type": kind}
        [found] = server.post("/v2/embed", body).json["embeddings"]["float"]
        assert found == wanted
    [found] = server.post("/api/embed", {"model": "m", "input": TEXT}).json["embeddings"]
    assert found == passage
    body = {"text_1": TEXT, "text_2": [TEXT]}
    assert server.post("/v1/score", body).json["usage"]["prompt_tokens"] == 5


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/embeddings", {"input": TEXT, "prompt_name": "document"}, "prompt_name"),
        ("/pooling", {"input": TEXT, "prompt_name": "document"}, "prompt_name"),
        ("/v2/embed", {"texts": [TEXT], "input_type": "clustering"}, "input_type"),
    ],
)
def test_unknown_prompts_name_the_known(
    server: RunningServer, path: str, body: dict[str, Any], param: str
) -> None:
    answer = server.post(path, body)
    assert (answer.status, answer.error["param"]) == (400, param)
    assert "'passage', 'plain', 'query'" in answer.error["message"]


@pytest.mark.parametrize(
    "body",
    [
        {"input": [2, 9, 3], "prompt_name": "query"},
        {"input": [TEXT], "prompt_name": 1},
        {"input": [[2, 9, 3]], "prompt": "w5"},
    ],
)
def test_bad_prompts_are_refused(server: RunningServer, body: dict[str, Any]) -> None:
    answer = server.post("/v1/embeddings", body)
    assert (answer.status, answer.error["param"] in body) == (400, True)
