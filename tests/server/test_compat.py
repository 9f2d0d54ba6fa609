"""--compat: Ollama's and TGI's APIs over the same engine; off unless asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import RunningServer, StartServer, tiny_server

from octavo.server.compat.routes import COMPAT_ROUTES

pytestmark = pytest.mark.system

CHAT, GENERATE = "/api/chat", "/api/generate"
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture
def server(start_server: StartServer) -> RunningServer:
    return start_server(compat=("ollama", "tgi"))


def lines(body: bytes) -> list[Any]:
    assert body.endswith(b"\n")
    return [json.loads(line) for line in body.splitlines()]


def ask(server: RunningServer, path: str, **fields: Any) -> Any:
    body = {"model": server.engine.served_model_names[0], "stream": False, **fields}
    answer = server.post(path, body)
    assert answer.status == 200, answer.body
    return answer.json


def test_they_are_off_by_default(start_server: StartServer) -> None:
    server = start_server()
    for rows in COMPAT_ROUTES.values():
        for path, methods, *_ in rows:
            # The page's place may be read, and takes no body.
            expected = 405 if path == "/" else 404
            assert server.request(methods[0], path, {}).status == expected, path
    assert "/api/chat" not in server.get("/openapi.json").json["paths"]
    only = start_server(compat=("tgi",))
    assert only.get("/info").status == 200
    assert only.get("/api/tags").status == 404


# --------------------------------------------------------------------------- Ollama


def openai(server: RunningServer, path: str, **fields: Any) -> str:
    choice = server.post(path, fields).json["choices"][0]
    text: str = choice["message"]["content"] if "message" in choice else choice["text"]
    return text


def test_ollama_s_answers_are_the_model_s(server: RunningServer) -> None:
    expected = openai(server, "/v1/chat/completions", messages=MESSAGES, max_tokens=5)
    found = ask(server, CHAT, messages=MESSAGES, options={"num_predict": 5})
    assert found["message"] == {"role": "assistant", "content": expected}
    assert (found["done"], found["done_reason"]) == (True, "length")
    assert found["eval_count"] == 5
    assert found["prompt_eval_count"] > 0
    assert all(isinstance(found[f"{part}_duration"], int) for part in ("total", "eval", "load"))
    # A prompt is a conversation of one message, unless it is raw.
    assert ask(server, GENERATE, prompt="hi", options={"num_predict": 5})["response"] == expected
    raw = openai(server, "/v1/completions", prompt="hi there", max_tokens=5)
    found = ask(server, GENERATE, prompt="hi there", raw=True, options={"num_predict": 5})
    assert found["response"] == raw
    system = [{"role": "system", "content": "be kind"}, *MESSAGES]
    expected = openai(server, "/v1/chat/completions", messages=system, max_tokens=5)
    found = ask(server, GENERATE, prompt="hi", system="be kind", options={"num_predict": 5})
    assert found["response"] == expected


@pytest.mark.parametrize(
    ("path", "fields"), [(CHAT, {"messages": MESSAGES}), (GENERATE, {"prompt": "hi"})]
)
def test_ollama_streams_by_default(
    server: RunningServer, path: str, fields: dict[str, Any]
) -> None:
    fields = {**fields, "options": {"num_predict": 6}}
    whole = ask(server, path, **fields)
    name = server.engine.served_model_names[0]
    answer = server.post(path, {"model": name, **fields})
    assert answer.headers["content-type"] == "application/x-ndjson"
    *pieces, last = lines(answer.body)
    assert not any(piece["done"] for piece in pieces)
    assert {piece["model"] for piece in [*pieces, last]} == {name}

    def text(piece: Any) -> str:
        return str(piece["message"]["content"] if path == CHAT else piece["response"])

    assert "".join(map(text, pieces)) == text(whole)
    assert text(last) == ""
    assert (last["done_reason"], last["eval_count"]) == ("length", 6)


def test_ollama_s_options(server: RunningServer) -> None:
    options = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": 3, "stop": ["x", "y"],
        "repeat_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.25,
        "num_predict": 9, "num_ctx": 4096, "num_thread": 8, "num_gpu": 1, "mirostat": 0,
        "mirostat_tau": 5.0, "tfs_z": 1, "typical_p": 1, "repeat_last_n": -1,
    }  # fmt: skip
    ask(server, CHAT, messages=MESSAGES, options=options, keep_alive="5m", think=False)
    _, params, _ = server.engine.submitted[-1]
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 7, 0.1)
    assert (params.seed, params.stop, params.max_tokens) == (3, ("x", "y"), 9)
    assert params.repetition_penalty == 1.2
    assert (params.presence_penalty, params.frequency_penalty) == (0.5, 0.25)
    body = {"model": server.engine.served_model_names[0], "messages": MESSAGES, "stream": False}
    for unlimited in (-1, -2, None):
        options = {"num_predict": unlimited, "stop": "a"}
        assert server.post(CHAT, {**body, "options": options}).status == 200
        assert server.engine.submitted[-1][1].max_tokens is None


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"messages": MESSAGES, "format": "yaml"}, "format"),
        (GENERATE, {"prompt": "x", "think": "much"}, "think"),
        (CHAT, {"messages": MESSAGES, "tools": [{}]}, "tools"),
        (CHAT, {"messages": MESSAGES, "think": True}, "think"),
        (CHAT, {"messages": [{**MESSAGES[0], "images": ["x"]}]}, "messages[0].images"),
        (CHAT, {"messages": [{"content": "x"}]}, "messages[0].role"),
        (CHAT, {"messages": MESSAGES, "options": {"mirostat": 1}}, "options.mirostat"),
        (CHAT, {"messages": MESSAGES, "options": {"temperature": 9}}, "temperature"),
        (CHAT, {"messages": MESSAGES, "options": {"frob": 1}}, "options.frob"),
        (
            CHAT,
            {"messages": MESSAGES, "options": {"repeat_penalty": 1.1, "repeat_last_n": 64}},
            "options.repeat_last_n",
        ),
        (CHAT, {"messages": MESSAGES, "options": {"num_predict": 0}}, "options.num_predict"),
        (GENERATE, {"prompt": "x", "suffix": "y"}, "suffix"),
        (GENERATE, {"prompt": "x", "template": "{{ .Prompt }}"}, "template"),
        (GENERATE, {"prompt": "x", "context": [1]}, "context"),
        (GENERATE, {"prompt": "x", "raw": True, "system": "y"}, "system"),
        (GENERATE, {"prompt": "x", "frob": 1}, "frob"),
    ],
)
def test_what_ollama_has_more_is_refused(
    server: RunningServer, path: str, fields: dict[str, Any], param: str
) -> None:
    answer = server.post(path, {"model": server.engine.served_model_names[0], **fields})
    assert answer.status == 400
    assert set(answer.json) == {"error", "error_type"}
    assert param in answer.json["error"]


def test_ollama_s_names_of_models(server: RunningServer) -> None:
    name = server.engine.served_model_names[0]
    for spelled in (name, f"{name}:latest"):
        body = {
            "model": spelled,
            "messages": MESSAGES,
            "stream": False,
            "options": {"num_predict": 1},
        }
        assert server.post(CHAT, body).json["model"] == spelled
    answer = server.post(CHAT, {"model": "other", "messages": MESSAGES})
    assert answer.status == 404
    assert "other" in answer.json["error"]
    assert server.post(CHAT, {"messages": MESSAGES}).status == 400


def test_ollama_s_loading_and_unloading(server: RunningServer) -> None:
    name = server.engine.served_model_names[0]
    loaded = server.post(GENERATE, {"model": name}).json
    assert (loaded["response"], loaded["done"], loaded["done_reason"]) == ("", True, "load")
    gone = server.post(CHAT, {"model": name, "messages": [], "keep_alive": 0}).json
    assert (gone["message"]["content"], gone["done_reason"]) == ("", "unload")
    assert server.post(GENERATE, {"model": "other"}).status == 404
    assert server.engine.submitted == []


def test_curl_needs_no_content_type(server: RunningServer) -> None:
    body = json.dumps(
        {"model": server.engine.served_model_names[0], "prompt": "x", "stream": False}
    )
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    assert server.request("POST", GENERATE, body.encode(), form).status == 200
    # A web page may send that anywhere.
    page = {**form, "Origin": "https://page.example"}
    answer = server.request("POST", GENERATE, body.encode(), page)
    assert (answer.status, answer.json["error_type"]) == (415, "validation")
    assert server.request("POST", "/v1/completions", body.encode(), form).status == 415


def test_ollama_s_stop_reasons_and_errors_in_streams(server: RunningServer) -> None:
    server.engine.fail_after = 2
    name = server.engine.served_model_names[0]
    body = {"model": name, "prompt": "x", "raw": True, "options": {"num_predict": 9}}
    answer = server.post(GENERATE, body)
    if answer.status == 200:
        assert "error" in lines(answer.body)[-1]
    else:
        assert set(answer.json) == {"error", "error_type"}


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[RunningServer]:
    server = tiny_server(tmp_path, compat=("ollama", "tgi"))
    yield server
    server.stop()


def test_ollama_s_models(tiny: RunningServer) -> None:
    name = tiny.engine.served_model_names[0]
    [model] = tiny.get("/api/tags").json["models"]
    assert (model["name"], model["model"]) == (name, name)
    assert len(model["digest"]) == 64
    assert model["details"]["family"]
    for body in ({"model": name}, {"name": name}):
        shown = tiny.post("/api/show", body).json
        assert shown["capabilities"] == ["completion", "tools"]
        assert shown["model_info"][f"{shown['details']['family']}.context_length"] > 0
    assert tiny.post("/api/show", {"model": "other"}).status == 404
    assert tiny.get("/api/version").json["version"]
    answer = tiny.post("/api/embed", {"model": name, "input": "x"})
    assert answer.status == 400
    assert "generates text" in answer.json["error"]
    # A real engine, whose core writes the lines.
    body = {"model": name, "messages": MESSAGES, "options": {"num_predict": 4, "seed": 1}}
    *pieces, last = lines(tiny.post(CHAT, body).body)
    whole = tiny.post(CHAT, {**body, "stream": False}).json
    assert "".join(piece["message"]["content"] for piece in pieces) == whole["message"]["content"]
    assert last["eval_count"] == whole["eval_count"]
    assert last["eval_duration"] > 0


# ------------------------------------------------------------------------------ TGI


def tgi(server: RunningServer, inputs: str, **parameters: Any) -> Any:
    answer = server.post("/generate", {"inputs": inputs, "parameters": parameters})
    assert answer.status == 200, answer.body
    return answer.json


def events(body: bytes) -> list[Any]:
    blocks = body.decode().removesuffix("\n\n").split("\n\n")
    assert all(block.startswith("data:{") for block in blocks)
    return [json.loads(block.removeprefix("data:")) for block in blocks]


def test_tgi_s_answers_are_the_model_s(tiny: RunningServer) -> None:
    prompt = {"prompt": "hello world", "max_tokens": 5, "temperature": 0}
    expected = tiny.post("/v1/completions", prompt).json["choices"][0]["text"]
    assert tgi(tiny, "hello world", max_new_tokens=5) == {"generated_text": expected}
    found = tgi(tiny, "hello world", max_new_tokens=5, return_full_text=True)
    assert found["generated_text"] == "hello world" + expected
    found = tgi(
        tiny, "hello world", max_new_tokens=5, details=True, decoder_input_details=True,
        top_n_tokens=2, seed=3,
    )  # fmt: skip
    details = found["details"]
    assert details["finish_reason"] == "length"
    assert (details["generated_tokens"], details["seed"]) == (5, 3)
    assert len(details["tokens"]) == len(details["top_tokens"]) == 5
    assert {len(top) for top in details["top_tokens"]} == {2}
    # Greedy: the best is the one that was taken.
    for token, top in zip(details["tokens"], details["top_tokens"], strict=True):
        assert set(token) == {"id", "text", "logprob", "special"}
        assert token["id"] == top[0]["id"]
        assert token["logprob"] == top[0]["logprob"] <= 0
    ids = tiny.post("/tokenize", {"prompt": "hello world"}).json["tokens"]
    assert [token["id"] for token in details["prefill"]] == ids
    assert details["prefill"][0]["logprob"] is None
    assert all(token["logprob"] <= 0 for token in details["prefill"][1:])


def test_tgi_s_streams(tiny: RunningServer) -> None:
    parameters = {"max_new_tokens": 6, "top_n_tokens": 1}
    whole = tgi(tiny, "hello", **parameters, details=True)
    answer = tiny.post("/generate_stream", {"inputs": "hello", "parameters": parameters})
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = events(answer.body)
    assert [event["index"] for event in found] == [1, 2, 3, 4, 5, 6]
    tokens = whole["details"]["tokens"]
    assert [event["token"]["id"] for event in found] == [token["id"] for token in tokens]
    assert [len(event["top_tokens"]) for event in found] == [1] * 6
    assert [event["generated_text"] for event in found[:-1]] == [None] * 5
    last = found[-1]
    assert last["generated_text"] == whole["generated_text"]
    shown = "".join(e["token"]["text"] for e in found if not e["token"]["special"])
    assert shown == whole["generated_text"]
    assert last["details"]["finish_reason"] == "length"
    assert last["details"]["generated_tokens"] == 6
    assert last["details"]["input_length"] > 0


def test_tgi_s_parameters(server: RunningServer) -> None:
    def params(**parameters: Any) -> Any:
        tgi(server, "x y z", max_new_tokens=2, **parameters)
        return server.engine.submitted[-1][1]

    assert params().temperature == 0
    assert params(do_sample=True).temperature == 1
    found = params(temperature=0.5, top_k=3, top_p=0.5, repetition_penalty=1.5, seed=4, stop=["a"])
    assert (found.temperature, found.top_k, found.top_p) == (0.5, 3, 0.5)
    assert (found.repetition_penalty, found.seed, found.stop) == (1.5, 4, ("a",))
    params(truncate=1)
    assert len(server.engine.submitted[-1][0]) == 1
    params(truncate=10**6, best_of=1, watermark=False, typical_p=None)
    answer = server.post("/generate", {"inputs": "x"})
    assert answer.status == 200
    assert server.engine.submitted[-1][1].max_tokens == 100
    for parameters in (
        {"best_of": 2}, {"watermark": True}, {"grammar": {"type": "json", "value": {}}},
        {"typical_p": 0.5}, {"adapter_id": "a"}, {"max_new_tokens": 0}, {"top_p": 2}, {"frob": 1},
        {"temperature": "hot"},
    ):  # fmt: skip
        answer = server.post("/generate", {"inputs": "x", "parameters": parameters})
        assert answer.status == 400, parameters
        assert answer.json["error_type"] == "validation"
        assert next(iter(parameters)) in answer.json["error"]
    assert server.post("/generate", {"parameters": {}}).status == 400
    assert server.post("/generate", {"inputs": "x", "stream": True}).status == 400
    stream = {"inputs": "x", "parameters": {"decoder_input_details": True}}
    assert server.post("/generate_stream", stream).status == 400


def test_tgi_s_ends(server: RunningServer) -> None:
    text = tgi(server, "x", max_new_tokens=8)["generated_text"]
    middle = text[len(text) // 2]
    found = tgi(server, "x", max_new_tokens=8, stop=[middle], details=True)
    assert found["details"]["finish_reason"] == "stop_sequence"
    answer = server.post("/generate_stream", {
        "inputs": "x", "parameters": {"max_new_tokens": 8, "stop": [middle]},
    })  # fmt: skip
    last = events(answer.body)[-1]
    assert last["generated_text"] == found["generated_text"]
    assert last["details"]["finish_reason"] == "stop_sequence"


def test_tgi_s_one_address(tiny: RunningServer) -> None:
    body = {"inputs": "hello", "parameters": {"max_new_tokens": 3}}
    whole = tiny.post("/generate", body).json
    assert tiny.post("/", body).json == [whole]
    assert tiny.post("/", {**body, "stream": False}).json == [whole]
    last = events(tiny.post("/", {**body, "stream": True}).body)[-1]
    assert last["generated_text"] == whole["generated_text"]


def test_huggingface_s_own_client(tiny: RunningServer) -> None:
    from huggingface_hub import InferenceClient

    client = InferenceClient(model=tiny.url)
    text = client.text_generation("hello", max_new_tokens=4)
    assert text == tiny.post("/generate", {
        "inputs": "hello", "parameters": {"max_new_tokens": 4},
    }).json["generated_text"]  # fmt: skip
    told = client.text_generation("hello", max_new_tokens=4, details=True)
    assert told.generated_text == text
    assert told.details.generated_tokens == 4
    assert "".join(client.text_generation("hello", max_new_tokens=4, stream=True)) == text
    [*_, last] = client.text_generation("hello", max_new_tokens=4, stream=True, details=True)
    assert last.generated_text == text


def test_tgi_s_info(tiny: RunningServer) -> None:
    info = tiny.get("/info").json
    assert info["model_id"] == tiny.engine.served_model_names[0]
    assert info["max_total_tokens"] == info["max_input_tokens"] + 1 == tiny.engine.max_model_len
