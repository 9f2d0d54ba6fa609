"""Vectors of tokens over HTTP, MaxSim, and the forms that vectors are answered in."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import RunningServer

from octavo import LLM, PoolingParams
from octavo.config import EngineConfig
from octavo.engine.engine import AsyncEngine
from octavo.server.http.config import ServerConfig
from tiny_encoders import save_colbert, save_encoder, write_modules

pytestmark = pytest.mark.system

QUERY, DOCUMENTS = "w5 w6", ["w7 w280 w8", "w5", "w9 w281"]


def serve(path: Path) -> RunningServer:
    engine = AsyncEngine(EngineConfig(model=str(path), served_model_name=("m",), threads=1))
    running = RunningServer(engine, ServerConfig(port=0, shutdown_timeout=1))
    running.may_load.set()
    assert running.ready.wait(60)
    return running


@pytest.fixture(scope="module")
def colbert(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningServer, LLM]]:
    path = tmp_path_factory.mktemp("colbert")
    save_colbert(path)
    server = serve(path)
    yield server, LLM(str(path), threads=1)
    server.stop()


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    path = tmp_path_factory.mktemp("embedder")
    save_encoder(path)
    write_modules(path, {"pooling_mode_mean_tokens": True}, ("Normalize", "2_Normalize"))
    server = serve(path)
    yield server
    server.stop()


def offline(llm: LLM, texts: list[str], mode: str | None) -> list[np.ndarray[Any, Any]]:
    outputs = llm.encode(texts, PoolingParams(embedding_mode=mode), use_tqdm=False)
    return [output.outputs.data.numpy() for output in outputs]


@pytest.mark.parametrize("mode", [None, "query", "document"])
def test_pooling_answers_a_vector_a_token(
    colbert: tuple[RunningServer, LLM], mode: str | None
) -> None:
    server, llm = colbert
    body = {"input": DOCUMENTS, "task": "token_embed", "embedding_mode": mode}
    expected = offline(llm, DOCUMENTS, mode)
    for path in ("/pooling", "/invocations"):
        answer = server.post(path, body)
        assert answer.status == 200, answer.body
        for entry, wanted in zip(answer.json["data"], expected, strict=True):
            np.testing.assert_allclose(entry["data"], wanted, atol=1e-5)
    [entry] = server.post("/pooling", {"input": "w5", "dimensions": 4}).json["data"]
    short = np.array(offline(llm, ["w5"], None)[0])[:, :4]
    short /= np.linalg.norm(short, axis=1, keepdims=True)
    np.testing.assert_allclose(entry["data"], short, atol=1e-5)
    [entry] = server.post("/pooling", {"input": "w5", "encoding_format": "base64"}).json["data"]
    raw = np.frombuffer(base64.b64decode(entry["data"]), np.float32).reshape(3, 16)
    np.testing.assert_allclose(raw, offline(llm, ["w5"], None)[0], atol=1e-5)


def test_scores_are_those_of_a_query_and_documents(colbert: tuple[RunningServer, LLM]) -> None:
    server, llm = colbert
    [query] = offline(llm, [QUERY], "query")
    documents = offline(llm, DOCUMENTS, "document")
    wanted = [float((query @ document.T).max(1).sum()) for document in documents]
    answer = server.post("/score", {"text_1": QUERY, "text_2": DOCUMENTS})
    found = [entry["score"] for entry in answer.json["data"]]
    assert found == pytest.approx(wanted, abs=1e-4)
    answer = server.post("/rerank", {"query": QUERY, "documents": DOCUMENTS, "top_n": 2})
    best = sorted(range(3), key=lambda index: -wanted[index])[:2]
    assert [entry["index"] for entry in answer.json["results"]] == best


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/embeddings", {"input": "w5"}, "model"),
        ("/v2/embed", {"texts": ["w5"]}, "model"),
        ("/classify", {"input": "w5"}, "model"),
        ("/pooling", {"input": "w5", "task": "embed"}, "task"),
        ("/pooling", {"input": "w5", "embedding_mode": "passage"}, "embedding_mode"),
        ("/pooling", {"input": [2, 9, 3], "embedding_mode": "query"}, "embedding_mode"),
        ("/pooling", {"input": "w5", "use_activation": False}, "use_activation"),
        ("/pooling", {"input": "w5", "dimensions": 17}, "dimensions"),
    ],
)
def test_what_vectors_of_tokens_are_not(
    colbert: tuple[RunningServer, LLM], path: str, body: dict[str, Any], param: str
) -> None:
    answer = colbert[0].post(path, body)
    assert (answer.status, answer.error["param"]) == (400, param), answer.body


def torch_values(raw: bytes, dtype: str, swaps: bool) -> np.ndarray[Any, Any]:
    kinds = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
    kind = kinds.get(dtype) or getattr(torch, dtype)
    whole = np.frombuffer(raw, {1: np.uint8, 2: np.uint16, 4: np.uint32}[kind.itemsize]).copy()
    whole = whole.byteswap() if swaps else whole
    return torch.from_numpy(whole).view(kind).float().numpy()


@pytest.mark.parametrize("endianness", ["native", "little", "big"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "fp8_e4m3", "fp8_e5m2"])
def test_types_and_orders_of_bytes(embedder: RunningServer, dtype: str, endianness: str) -> None:
    texts = ["w5 w6", "w7", "w8 w9"]
    plain = embedder.post("/v1/embeddings", {"input": texts}).json
    expected = np.array([entry["embedding"] for entry in plain["data"]], np.float32)
    kind = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}.get(dtype)
    expected = torch.tensor(expected).to(kind or getattr(torch, dtype)).float().numpy()
    form = {"embed_dtype": dtype, "endianness": endianness}
    for path, key in (("/v1/embeddings", "embedding"), ("/pooling", "data")):
        body = {"input": texts, "encoding_format": "base64", **form}
        entries = embedder.post(path, body).json["data"]
        raws = [base64.b64decode(entry[key]) for entry in entries]
        body["encoding_format"] = "bytes"
        answer = embedder.post(path, body)
        assert answer.status == 200, answer.body
        assert answer.headers["content-type"] == "application/octet-stream"
        about = json.loads(answer.headers["metadata"])
        assert about["usage"] == plain["usage"]
        for index, (entry, raw) in enumerate(zip(about["data"], raws, strict=True)):
            assert (entry["index"], entry["shape"]) == (index, [120])
            assert (entry["embed_dtype"], entry["endianness"]) == (dtype, endianness)
            assert answer.body[entry["start"] : entry["end"]] == raw
            found = torch_values(raw, dtype, endianness == "big")
            np.testing.assert_allclose(found, expected[index], atol=1e-6)
        body["encoding_format"] = "bytes_only"
        answer = embedder.post(path, body)
        assert (answer.body, "metadata" in answer.headers) == (b"".join(raws), False)


def test_precisions_are_sentence_transformers(embedder: RunningServer) -> None:
    types = ["float", "int8", "uint8", "binary", "ubinary"]
    body = {"texts": ["w5 w6", "w7"], "embedding_types": types}
    found = embedder.post("/v2/embed", body).json["embeddings"]
    rows = np.array(found["float"], np.float32)
    # quantize_embeddings with ranges of -1 and 1.
    steps = (rows + 1) / np.float32(2 / 255)
    np.testing.assert_array_equal(found["uint8"], steps.astype(np.uint8))
    np.testing.assert_array_equal(found["int8"], (steps - 128).astype(np.int8))
    np.testing.assert_array_equal(found["ubinary"], np.packbits(rows >= 0, axis=1))
    back = np.array(found["int8"], np.float32)
    cosine = (back * rows).sum(1) / np.linalg.norm(back, axis=1) / np.linalg.norm(rows, axis=1)
    assert cosine.min() > 0.99


@pytest.mark.parametrize(
    ("field", "value"),
    [("embed_dtype", "int4"), ("endianness", "middle"), ("encoding_format", "hex")],
)
def test_unknown_forms_are_refused(embedder: RunningServer, field: str, value: str) -> None:
    answer = embedder.post("/v1/embeddings", {"input": "w5", field: value})
    assert (answer.status, answer.error["param"]) == (400, field)
