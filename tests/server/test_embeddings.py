"""/v1/embeddings, /v1/score, /v1/rerank and their like over real engines: all-MiniLM-L6-v2 and a tiny model."""

from __future__ import annotations

import base64
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import RunningServer, eventually, tiny_server

from octavo import LLM
from octavo.config import EngineConfig
from octavo.engine.engine import AsyncEngine
from octavo.server.http import limits
from octavo.server.http.config import ServerConfig
from tiny_encoders import minilm_folder, save_encoder

pytestmark = pytest.mark.system

CATS, RAIN = "A cat sleeps on the mat.", "It will rain tomorrow."


def serve(path: Path, **config: Any) -> RunningServer:
    engine = AsyncEngine(
        EngineConfig(model=str(path), served_model_name=("m",), **{"threads": 1, **config})
    )
    server = RunningServer(engine, ServerConfig(port=0, shutdown_timeout=1, compat=("ollama",)))
    server.may_load.set()
    assert server.ready.wait(60)
    return server


@pytest.fixture(scope="module")
def minilm() -> Iterator[RunningServer]:
    server = serve(minilm_folder())
    yield server
    server.stop()


@pytest.fixture(scope="module")
def cross(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningServer, Path]]:
    path = tmp_path_factory.mktemp("cross")
    save_encoder(path, "BertForSequenceClassification")
    server = serve(path)
    yield server, path
    server.stop()


@pytest.fixture(scope="module")
def expected() -> list[list[float]]:
    outputs = LLM(str(minilm_folder()), threads=1).embed([CATS, RAIN], use_tqdm=False)
    return [output.outputs.embedding for output in outputs]


def test_ollama_s_form(minilm: RunningServer, expected: list[list[float]]) -> None:
    body = minilm.post("/api/embed", {"model": "m", "input": [CATS, RAIN]}).json
    assert (body["model"], body["load_duration"]) == ("m", 0)
    assert body["prompt_eval_count"] > 10
    for vector, wanted in zip(body["embeddings"], expected, strict=True):
        assert vector == pytest.approx(wanted, abs=1e-4)
    short = {"model": "m:latest", "input": CATS, "dimensions": 8, "keep_alive": "5m"}
    [vector] = minilm.post("/api/embed", short).json["embeddings"]
    assert len(vector) == 8
    long = {"model": "m", "input": "word " * 2000}
    assert minilm.post("/api/embed", long).status == 200
    answer = minilm.post("/api/embed", {**long, "truncate": False})
    assert answer.status == 400
    assert "error" in answer.json
    assert minilm.post("/api/embed", {"model": "m", "input": [[1, 2]]}).status == 400
    assert (
        minilm.post(
            "/api/chat", {"model": "m", "messages": [{"role": "user", "content": "x"}]}
        ).status
        == 400
    )


def test_texts_become_vectors(minilm: RunningServer, expected: list[list[float]]) -> None:
    answer = minilm.post("/v1/embeddings", {"model": "m", "input": [CATS, RAIN]})
    assert answer.status == 200
    body = answer.json
    assert body["object"] == "list"
    assert body["model"] == "m"
    assert [entry["index"] for entry in body["data"]] == [0, 1]
    assert {entry["object"] for entry in body["data"]} == {"embedding"}
    for entry, vector in zip(body["data"], expected, strict=True):
        assert entry["embedding"] == pytest.approx(vector, abs=1e-5)
    tokenizer = minilm.engine.tokenizer
    num_tokens = sum(len(tokenizer.encode(text)) for text in (CATS, RAIN))
    assert body["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


def test_every_form_of_input(minilm: RunningServer, expected: list[list[float]]) -> None:
    encode = minilm.engine.tokenizer.encode
    for form, count in (
        (CATS, 1),
        ([CATS], 1),
        (encode(CATS), 1),
        ([encode(CATS), encode(RAIN)], 2),
    ):
        data = minilm.post("/v1/embeddings", {"input": form}).json["data"]
        assert len(data) == count
        for entry, vector in zip(data, expected, strict=False):
            assert entry["embedding"] == pytest.approx(vector, abs=1e-5)
    plain = encode(CATS, False)
    for form in (plain, CATS):
        body = {"input": form, "add_special_tokens": False}
        assert minilm.post("/v1/embeddings", body).json["usage"]["prompt_tokens"] == len(plain)


def test_base64_and_dimensions(minilm: RunningServer, expected: list[list[float]]) -> None:
    body = {"input": CATS, "encoding_format": "base64"}
    [entry] = minilm.post("/v1/embeddings", body).json["data"]
    raw = base64.b64decode(entry["embedding"])
    assert struct.unpack(f"<{len(raw) // 4}f", raw) == pytest.approx(expected[0], abs=1e-5)
    [entry] = minilm.post("/v1/embeddings", {"input": CATS, "dimensions": 100}).json["data"]
    head = expected[0][:100]
    length = sum(value * value for value in head) ** 0.5
    assert entry["embedding"] == pytest.approx([value / length for value in head], abs=1e-5)
    error = minilm.post("/v1/embeddings", {"input": CATS, "dimensions": 385}).error
    assert error["param"] == "dimensions"
    assert "384" in error["message"]


def test_the_openai_client(minilm: RunningServer, expected: list[list[float]]) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=minilm.url + "/v1", api_key="none", max_retries=0)
    # It asks for base64 by itself.
    answer = client.embeddings.create(model="m", input=[CATS, RAIN])
    for entry, vector in zip(answer.data, expected, strict=True):
        assert entry.embedding == pytest.approx(vector, abs=1e-5)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens > 0
    floats = client.embeddings.create(
        model="m", input=CATS, encoding_format="float", dimensions=8, user="me"
    )
    assert len(floats.data[0].embedding) == 8
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="other", input=CATS)


def test_texts_are_cut_at_either_end(minilm: RunningServer) -> None:
    def vector(**fields: Any) -> Any:
        return minilm.post("/v1/embeddings", {"input": CATS, **fields}).json["data"][0]["embedding"]

    cls, *words, sep = minilm.engine.tokenizer.encode(CATS)
    for side, kept in (("left", words[-4:]), ("right", words[:4]), (None, words[:4])):
        cut = vector(truncate_prompt_tokens=6, truncation_side=side)
        assert cut == pytest.approx(vector(input=[[cls, *kept, sep]]), abs=1e-5)
        # Of token ids none is special.
        ids = [*words, *words]
        bare = vector(input=ids, truncate_prompt_tokens=4, truncation_side=side)
        assert bare == pytest.approx(vector(input=[kept]), abs=1e-5)
    for truncate, kept in (("START", words[-4:]), ("END", words[:4])):
        body = {"texts": [CATS], "max_tokens": 6, "truncate": truncate}
        [found] = minilm.post("/v2/embed", body).json["embeddings"]["float"]
        assert found == pytest.approx(vector(input=[[cls, *kept, sep]]), abs=1e-5)
    pair = {"text_1": CATS, "text_2": RAIN, "truncate_prompt_tokens": 5}
    scores = [
        minilm.post("/v1/score", {**pair, "truncation_side": side}).json["data"][0]["score"]
        for side in ("left", "right")
    ]
    assert scores[0] != pytest.approx(scores[1], abs=1e-4)


def test_long_texts_are_refused_or_cut(minilm: RunningServer) -> None:
    long = "word " * 300
    answer = minilm.post("/v1/embeddings", {"input": [CATS, long]})
    assert answer.status == 400
    assert answer.error["code"] == "context_length_exceeded"
    assert answer.error["param"] == "input"
    assert "256" in answer.error["message"]
    # Longer than is worth counting.
    error = minilm.post("/v1/embeddings", {"input": "x" * 1_000_000}).error
    assert error["code"] == "context_length_exceeded"
    for most, count in ((-1, 256), (10, 10)):
        body = {"input": long, "truncate_prompt_tokens": most}
        assert minilm.post("/v1/embeddings", body).json["usage"]["prompt_tokens"] == count
    for most in (0, 257, 2):
        error = minilm.post("/v1/embeddings", {"input": long, "truncate_prompt_tokens": most}).error
        assert error["param"] == "truncate_prompt_tokens"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": [1, "x"]}, "input"),
        ({"input": {"text": "x"}}, "input"),
        ({"input": ["x"] * (limits.MAX_EMBEDDING_INPUTS + 1)}, "input"),
        ({"input": "x", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "x", "dimensions": 0}, "dimensions"),
        ({"input": "x", "temperature": 1}, "temperature"),
        ({"input": "x", "priority": "1.5"}, "priority"),
        ({"input": [30522]}, "input"),
        ({"input": [-1]}, "input"),
    ],
)
def test_bad_requests_name_the_field(
    minilm: RunningServer, body: dict[str, Any], param: str
) -> None:
    answer = minilm.post("/v1/embeddings", body)
    assert answer.status == 400
    assert answer.error["param"] == param


def test_a_model_that_embeds_generates_nothing(minilm: RunningServer) -> None:
    chat = {"messages": [{"role": "user", "content": "x"}]}
    for path, body in (("/v1/chat/completions", chat), ("/v1/completions", {"prompt": "x"})):
        answer = minilm.post(path, body)
        assert answer.status == 400
        assert "/v1/embeddings" in answer.error["message"]
    assert minilm.post("/v1/embeddings", {"model": "x", "input": "x"}).status == 404
    assert minilm.get("/health").status == 200
    assert minilm.get("/ready").status == 200
    [model] = minilm.get("/v1/models").json["data"]
    assert model["max_model_len"] == 256


def test_a_model_that_generates_embeds_nothing(tmp_path: Path) -> None:
    server = tiny_server(tmp_path)
    try:
        pair = {"text_1": "a", "text_2": "b"}
        for path, body in (
            ("/v1/embeddings", {"input": "x"}),
            ("/v1/score", pair),
            ("/v1/rerank", {"query": "a", "documents": ["b"]}),
            ("/classify", {"input": "x"}),
            ("/pooling", {"input": "x"}),
            ("/v2/embed", {"texts": ["x"]}),
            ("/invocations", {"input": "x"}),
        ):
            answer = server.post(path, body)
            assert answer.status == 400
            assert "generates text" in answer.error["message"]
        chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
        answer = server.post("/invocations", chat).json
        assert answer["choices"][0]["message"]["role"] == "assistant"
        stream = server.post("/invocations", {"prompt": "x", "max_tokens": 2, "stream": True})
        assert stream.body.endswith(b"data: [DONE]\n\n")
    finally:
        server.stop()


def test_scores_are_cosines(minilm: RunningServer, expected: list[list[float]]) -> None:
    cosine = sum(a * b for a, b in zip(*expected, strict=True))
    body = minilm.post("/v1/score", {"text_1": CATS, "text_2": [RAIN, CATS]}).json
    assert [entry["score"] for entry in body["data"]] == pytest.approx([cosine, 1], abs=1e-5)
    assert [entry["index"] for entry in body["data"]] == [0, 1]
    body = minilm.post("/v1/score", {"text_1": [CATS, RAIN], "text_2": [RAIN, CATS]}).json
    assert [entry["score"] for entry in body["data"]] == pytest.approx([cosine] * 2, abs=1e-5)
    error = minilm.post("/v1/score", {"text_1": ["a", "b"], "text_2": "c"}).error
    assert error["param"] == "text_1"


def test_documents_are_ranked(minilm: RunningServer) -> None:
    documents = [RAIN, {"text": CATS}, "Stocks fell."]
    request = {"query": "Where does the cat sleep?", "documents": documents}
    results = minilm.post("/v1/rerank", request).json["results"]
    assert results[0]["index"] == 1
    assert results[0]["document"] == {"text": CATS}
    scores = [result["relevance_score"] for result in results]
    assert scores == sorted(scores, reverse=True)
    assert sorted(result["index"] for result in results) == [0, 1, 2]
    short = minilm.post("/v1/rerank", {**request, "top_n": 1, "return_documents": False}).json
    assert short["results"] == [{"index": 1, "relevance_score": pytest.approx(scores[0])}]
    for bad in ([], [{"text": 1}], [{"text": "x", "image": "y"}]):
        error = minilm.post("/v1/rerank", {**request, "documents": bad}).error
        assert error["param"].startswith("documents")


def without_ids(answer: Any) -> Any:
    return {key: value for key, value in answer.json.items() if key not in ("id", "created")}


def test_every_name_of_a_route(minilm: RunningServer) -> None:
    pair = {"text_1": CATS, "text_2": [RAIN, CATS]}
    search = {"query": CATS, "documents": [RAIN, CATS]}
    for body, paths in (
        (pair, ("/v1/score", "/score", "/invocations")),
        (search, ("/v1/rerank", "/rerank", "/v2/rerank", "/invocations")),
        ({"input": [CATS, RAIN]}, ("/v1/embeddings", "/invocations")),
        ({"input": CATS, "task": "embed"}, ("/pooling", "/invocations")),
    ):
        answers = [minilm.post(path, body) for path in paths]
        assert {answer.status for answer in answers} == {200}
        first, *others = map(without_ids, answers)
        assert others == [first] * len(others)


def test_every_name_of_the_two_texts(minilm: RunningServer) -> None:
    expected = without_ids(minilm.post("/score", {"text_1": CATS, "text_2": [RAIN, CATS]}))
    for first, second in (("data_1", "data_2"), ("queries", "documents"), ("queries", "items")):
        for path in ("/v1/score", "/invocations"):
            answer = minilm.post(path, {first: [CATS], second: [RAIN, CATS]})
            assert without_ids(answer) == expected
        error = minilm.post("/score", {first: [CATS, RAIN, CATS], second: [CATS, RAIN]}).error
        assert error["param"] == first
        assert second in error["message"]
        assert minilm.post("/score", {first: CATS}).error["param"] in (second, "documents")
        error = minilm.post("/score", {first: CATS, second: "word " * 300}).error
        assert (error["code"], error["param"]) == ("context_length_exceeded", second)
    for body, param in (
        ({}, "text_1"),
        ({"data_2": CATS}, "data_1"),
        ({"data_1": CATS, "text_2": CATS}, "text_1"),
    ):
        assert minilm.post("/score", body).error["param"] == param


def test_pooling_is_what_the_model_s_own_route_says(
    minilm: RunningServer, expected: list[list[float]]
) -> None:
    body = minilm.post("/pooling", {"model": "m", "input": [CATS, RAIN]}).json
    assert (body["object"], body["model"]) == ("list", "m")
    assert [(entry["index"], entry["object"]) for entry in body["data"]] == [
        (0, "pooling"),
        (1, "pooling"),
    ]
    for entry, vector in zip(body["data"], expected, strict=True):
        assert entry["data"] == pytest.approx(vector, abs=1e-5)
    request = {"input": CATS, "task": "embed", "encoding_format": "base64"}
    [entry] = minilm.post("/pooling", request).json["data"]
    raw = base64.b64decode(entry["data"])
    assert struct.unpack(f"<{len(raw) // 4}f", raw) == pytest.approx(expected[0], abs=1e-5)
    for bad, param in (
        ({"task": "classify"}, "task"),
        ({"task": "token_embed"}, "task"),
        ({"use_activation": False}, "use_activation"),
        ({"dimensions": 385}, "dimensions"),
    ):
        answer = minilm.post("/pooling", {"input": CATS, **bad})
        assert (answer.status, answer.error["param"]) == (400, param)


def test_cohere_s_embeddings(minilm: RunningServer, expected: list[list[float]]) -> None:
    kinds = ["float", "base64", "binary", "ubinary"]
    request = {"model": "m", "texts": [CATS, RAIN], "embedding_types": kinds}
    body = minilm.post("/v2/embed", request).json
    assert body["texts"] == [CATS, RAIN]
    tokenizer = minilm.engine.tokenizer
    num_tokens = sum(len(tokenizer.encode(text)) for text in (CATS, RAIN))
    count = {"input_tokens": num_tokens}
    version = {"version": "2"}
    billed = {**count, "image_tokens": 0}
    assert body["meta"] == {"api_version": version, "billed_units": billed, "tokens": count}
    assert list(body["embeddings"]) == kinds
    for index, vector in enumerate(expected):
        found = {kind: rows[index] for kind, rows in body["embeddings"].items()}
        assert found["float"] == pytest.approx(vector, abs=1e-5)
        raw = base64.b64decode(found["base64"])
        assert struct.unpack(f"<{len(raw) // 4}f", raw) == pytest.approx(vector, abs=1e-5)
        bits = "".join("01"[value >= 0] for value in found["float"])
        octets = [int(bits[at : at + 8], 2) for at in range(0, len(bits), 8)]
        assert found["ubinary"] == octets
        assert found["binary"] == [octet - 128 for octet in octets]
    plain = minilm.post("/v2/embed", {"texts": [CATS], "output_dimension": 9}).json["embeddings"]
    short = minilm.post("/v1/embeddings", {"input": CATS, "dimensions": 9}).json["data"][0]
    assert plain == {"float": [short["embedding"]]}


def test_cohere_s_embeddings_of_long_texts(minilm: RunningServer) -> None:
    long = "word " * 300
    for fields, count in (({}, 256), ({"max_tokens": 10}, 10), ({"max_tokens": 999}, 256)):
        body = minilm.post("/v2/embed", {"texts": [long], **fields}).json
        assert body["meta"]["tokens"]["input_tokens"] == count
    for fields in ({}, {"max_tokens": 300}):
        error = minilm.post("/v2/embed", {"texts": [long], "truncate": "NONE", **fields}).error
        assert (error["code"], error["param"]) == ("context_length_exceeded", "texts")
    body = {"texts": [CATS], "truncate": "NONE", "max_tokens": 3}
    assert minilm.post("/v2/embed", body).error["param"] == "texts"
    for bad, param in (
        ({"output_dimension": 385}, "output_dimension"),
        ({"output_dimension": 9, "embedding_types": ["binary"]}, "embedding_types"),
        ({"embedding_types": ["int4"]}, "embedding_types"),
        ({"truncate": "MIDDLE"}, "truncate"),
        ({"input_type": "search_query"}, "input_type"),
        ({"images": ["data:"]}, "images"),
        ({"texts": []}, "texts"),
    ):
        answer = minilm.post("/v2/embed", {"texts": [CATS], **bad})
        assert (answer.status, answer.error["param"]) == (400, param)


def test_bodies_of_no_route(minilm: RunningServer) -> None:
    for body in ({}, {"text_1": "a"}, {"model": "m"}, {"input": None}):
        answer = minilm.post("/invocations", body)
        assert answer.status == 400
        assert "give messages, prompt, input" in answer.error["message"]
    answer = minilm.post("/invocations", {"input": CATS, "model": "other"})
    assert answer.error["code"] == "model_not_found"
    assert minilm.post("/invocations", {"input": CATS, "model": 7}).error["param"] == "model"
    assert minilm.post("/invocations", {"input": CATS, "x": 7}).error["param"] == "x"
    assert minilm.post("/invocations", b"[]").status == 400
    # Larger than what is parsed on the event loop.
    large = {"input": CATS, "metadata": {"a": "x" * 1_000_000}}
    assert len(minilm.post("/invocations", large).json["data"]) == 1


def test_cross_encoders(cross: tuple[RunningServer, Path]) -> None:
    server, path = cross
    pair = {"text_1": "a", "text_2": "b", "truncation_side": "left"}
    assert server.post("/v1/score", pair).error["param"] == "truncation_side"
    llm = LLM(str(path), threads=1)
    texts = ["w7 w8", "w9", "w10 w11 w12"]
    scores = [o.outputs.score for o in llm.score("w5 w6", texts, use_tqdm=False)]
    body = server.post("/v1/score", {"text_1": "w5 w6", "text_2": texts}).json
    assert [entry["score"] for entry in body["data"]] == pytest.approx(scores, abs=1e-5)
    assert body["usage"]["prompt_tokens"] == 3 * (2 + 3) + 6
    raw = server.post(
        "/v1/score", {"text_1": "w5 w6", "text_2": texts, "use_activation": False}
    ).json
    logits = llm.score("w5 w6", texts, use_activation=False, use_tqdm=False)
    found = [entry["score"] for entry in raw["data"]]
    assert found == pytest.approx([o.outputs.score for o in logits], abs=1e-5)
    ranked = server.post("/v1/rerank", {"query": "w5 w6", "documents": texts}).json["results"]
    order = sorted(range(3), key=lambda index: -scores[index])
    assert [result["index"] for result in ranked] == order
    probs = server.post("/classify", {"input": texts}).json["data"]
    for task in ("score", "classify", None):
        pooled = server.post("/pooling", {"input": texts, "task": task}).json["data"]
        assert [entry["data"] for entry in pooled] == [
            pytest.approx(entry["probs"], abs=1e-6) for entry in probs
        ]
    answer = server.post("/v1/embeddings", {"input": "w5"})
    assert answer.status == 400
    assert "/v1/score" in answer.error["message"]


def test_classes(tmp_path: Path) -> None:
    labels = {"id2label": {0: "no", 1: "maybe", 2: "yes"}, "num_labels": 3}
    save_encoder(tmp_path, "BertForSequenceClassification", **labels)
    llm = LLM(str(tmp_path), threads=1)
    texts = ["w7 w8", "w9", "w10 w11 w12"]
    expected = [o.outputs.probs for o in llm.classify(texts, use_tqdm=False)]
    server = serve(tmp_path)
    try:
        body = server.post("/classify", {"input": texts}).json
        assert [entry["probs"] for entry in body["data"]] == pytest.approx(
            [pytest.approx(probs, abs=1e-6) for probs in expected]
        )
        best = [("no", "maybe", "yes")[probs.index(max(probs))] for probs in expected]
        assert [entry["label"] for entry in body["data"]] == best
        assert {entry["num_classes"] for entry in body["data"]} == {3}
        assert body["usage"]["prompt_tokens"] == 6 + 2 * 3
        for pooling in ({"input": texts}, {"input": texts, "task": "classify"}):
            found = [entry["data"] for entry in server.post("/pooling", pooling).json["data"]]
            assert found == [pytest.approx(entry["probs"], abs=1e-6) for entry in body["data"]]
        classes = server.post("/invocations", {"input": texts}).json
        assert classes["data"] == body["data"]
        raw = server.post("/classify", {"input": [11, 12], "use_activation": False}).json
        pooled = server.post("/pooling", {"input": [11, 12], "use_activation": False}).json
        assert pooled["data"][0]["data"] == pytest.approx(raw["data"][0]["probs"])
        assert server.post("/pooling", {"input": "w5", "task": "embed"}).error["param"] == "task"
        assert sum(raw["data"][0]["probs"]) != pytest.approx(1, abs=1e-3)
        for path, other in (
            ("/v1/score", {"text_1": "w5", "text_2": "w6"}),
            ("/v1/rerank", {"query": "w5", "documents": ["w6"]}),
            ("/v1/embeddings", {"input": "w5"}),
            ("/v1/completions", {"prompt": "w5"}),
        ):
            answer = server.post(path, other)
            assert answer.status == 400
            assert "use /classify" in answer.error["message"]
    finally:
        server.stop()


def test_clients_share_steps_and_are_counted(tmp_path: Path) -> None:
    """While the first step runs, others' texts gather; the next step takes them all."""
    save_encoder(tmp_path)
    server = serve(tmp_path)
    try:
        launch = server.engine._engine_loop.runner.launch
        may_go, sizes = threading.Event(), list[int]()

        def slow(batch: Any, *rest: Any) -> Any:
            sizes.append(batch.num_reqs)
            assert may_go.wait(20)
            return launch(batch, *rest)

        server.engine._engine_loop.runner.launch = slow
        answers: list[Any] = []

        def ask(n: int) -> None:
            answers.append(server.post("/v1/embeddings", {"input": [f"w{n}", "w2 w3"]}))

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(6)]
        threads[0].start()
        eventually(lambda: sizes)
        for thread in threads[1:]:
            thread.start()
        eventually(lambda: server.engine.num_unfinished == 12)
        may_go.set()
        for thread in threads:
            thread.join()
        assert [answer.status for answer in answers] == [200] * 6
        # The first client's two texts may have been split between the first steps.
        assert sum(sizes) == 12
        assert max(sizes) >= 10
        text = server.get("/metrics").body.decode()
        labels = 'engine="0",model_name="m"'

        def value(name: str, more: str = "") -> float:
            [line] = [
                line
                for line in text.splitlines()
                if line.startswith(name + "{") and more in line and 'model_name="m"' in line
            ]
            return float(line.rpartition(" ")[2])

        assert labels.partition(",")[0] in text
        assert value("vllm:num_requests_running") == 0
        assert value("vllm:num_requests_waiting") == 0
        assert value("vllm:prompt_tokens_total") == 6 * (3 + 4)
        assert value("vllm:generation_tokens_total") == 0
        assert value("vllm:request_success_total", 'finished_reason="length"') == 12
        assert value("vllm:e2e_request_latency_seconds_count") == 12
        assert value("vllm:time_to_first_token_seconds_count") == 0
    finally:
        server.stop()


def test_a_client_that_leaves_and_a_full_queue(tmp_path: Path) -> None:
    save_encoder(tmp_path)
    server = serve(tmp_path, max_num_seqs=2, max_num_queued_reqs=8)
    try:
        launch = server.engine._engine_loop.runner.launch
        may_go, entered = threading.Event(), threading.Event()

        def slow(*arguments: Any) -> Any:
            entered.set()
            assert may_go.wait(20)
            return launch(*arguments)

        server.engine._engine_loop.runner.launch = slow
        body = b'{"input":["w1","w2","w3","w4","w5","w6"]}'
        head = (
            b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        )
        connection = server.socket()
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        eventually(lambda: server.engine.num_unfinished == 6 and entered.is_set())
        full = server.post("/v1/embeddings", {"input": ["w1", "w2", "w3"]})
        assert full.status == 503
        assert full.error["code"] == "queue_full"
        assert full.headers["retry-after"]
        connection.close()
        eventually(lambda: server.get("/load").json["server_load"] == 0)
        may_go.set()
        eventually(lambda: server.engine.num_unfinished == 0)
        assert server.post("/v1/embeddings", {"input": "w1"}).status == 200
    finally:
        server.stop()


def test_a_step_that_fails_fails_its_texts_alone(tmp_path: Path) -> None:
    save_encoder(tmp_path)
    server = serve(tmp_path)
    try:
        runner = server.engine._engine_loop.runner
        launch = runner.launch

        def broken(*arguments: Any) -> Any:
            runner.launch = launch
            raise RuntimeError("no memory")

        runner.launch = broken
        answer = server.post("/v1/embeddings", {"input": "w1"})
        assert answer.status == 500
        assert answer.error["code"] == "generation_failed"
        assert server.post("/v1/embeddings", {"input": "w1"}).status == 200
    finally:
        server.stop()
