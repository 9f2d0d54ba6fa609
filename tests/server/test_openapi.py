"""/openapi.json and docs/api.md say what the protocol's tables say, and its bounds are the server's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import RunningServer, StartServer

from octavo.errors import InvalidParameterError, UnsupportedParameterError
from octavo.server.anthropic import protocol as anthropic_protocol
from octavo.server.http import limits
from octavo.server.http.body import BOOKKEEPING_FIELDS, Body
from octavo.server.http.openapi import body_schema
from octavo.server.openai import protocol, structured
from octavo.server.pooling import protocol as pooling_protocol
from octavo.server.responses import protocol as responses_protocol
from octavo.server.routes import ROUTES

DOCS = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
TABLES: dict[str, Body] = {
    "/v1/chat/completions": protocol.CHAT_BODY,
    "/v1/completions": protocol.COMPLETION_BODY,
    "/tokenize": protocol.TOKENIZE_BODY,
    "/detokenize": protocol.DETOKENIZE_BODY,
    "/v1/embeddings": pooling_protocol.EMBEDDING_BODY,
    "/v1/score": pooling_protocol.SCORE_BODY,
    "/v1/rerank": pooling_protocol.RERANK_BODY,
    "/classify": pooling_protocol.CLASSIFY_BODY,
    "/pooling": pooling_protocol.ENCODE_BODY,
    "/v2/embed": pooling_protocol.COHERE_EMBED_BODY,
}
# Bodies whose fields depend on each other: their bounds have tests of their own.
AGENTS: dict[str, Body] = {
    "/v1/responses": responses_protocol.RESPONSES_BODY,
    "/v1/responses/input_tokens": responses_protocol.INPUT_TOKENS_BODY,
    "/v1/messages": anthropic_protocol.MESSAGES_BODY,
    "/v1/messages/count_tokens": anthropic_protocol.COUNT_TOKENS_BODY,
}


def test_every_route_and_field_is_described(server: RunningServer) -> None:
    document = server.get("/openapi.json").json
    assert document["openapi"].startswith("3.1")
    paths = document["paths"]
    assert set(paths) == {entry.path.replace(":path", "") for entry in ROUTES}
    for entry in ROUTES:
        operations = paths[entry.path.replace(":path", "")]
        methods = {method.lower() for method in entry.methods}
        same_path = [one for one in ROUTES if one.path == entry.path]
        assert set(operations) == {m.lower() for one in same_path for m in one.methods}
        for operation in (operations[method] for method in methods):
            assert operation["summary"]
            assert ("requestBody" in operation) == (entry.body is not None)
    ids = [op["operationId"] for path in paths.values() for op in path.values()]
    assert len(ids) == len(set(ids))
    bodies = {entry.path: entry.body for entry in ROUTES if entry.body is not None}
    assert {**TABLES, **AGENTS}.items() <= bodies.items()
    for path, body in bodies.items():
        content = paths[path]["post"]["requestBody"]["content"]["application/json"]
        known = {*body.fields, *body.ignored, *body.refused}
        assert set(content["schema"]["properties"]) == known
        assert content["schema"]["additionalProperties"] is body.is_open
        assert content["schema"]["required"] == list(body.required)
    assert "securitySchemes" not in document["components"]


def test_keys_and_prefixes_are_described(start_server: StartServer) -> None:
    server = start_server(api_key=("k",), root_path="/api", metrics_need_key=False)
    assert server.get("/openapi.json").status == 401
    document = server.get("/openapi.json", x_api_key="k").json
    assert document["servers"] == [{"url": "/api"}]
    assert set(document["components"]["securitySchemes"]) == {"bearer", "key"}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            is_open = path in ("/health", "/ready", "/ping", "/metrics")
            assert ("security" in operation) != is_open


@pytest.mark.parametrize("path", {**TABLES, **AGENTS})
def test_schemas_are_schemas_and_hold_for_what_passes(path: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = body_schema({**TABLES, **AGENTS}[path])
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for body in (
        {"messages": [{"role": "user", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]},
        {"prompt": "x"},
        {"prompt": [1, 2]},
        {"prompt": [[1], [2]], "max_tokens": 0, "echo": True, "logprobs": 3},
        {"prompt": "x", "stop": ["a"], "logit_bias": {"5": -1}, "temperature": None},
        {"prompt": "x", "temperature": 3},
        {"prompt": "x", "n": 1.5},
        {"prompt": "x", "n": 129},
        {"prompt": "x", "n": "2", "temperature": " 1.5", "stop_token_ids": ["4"]},
        {"prompt": "x", "n": "two"},
        {"prompt": "x", "stream": "True", "echo": 0, "ignore_eos": "off"},
        {"prompt": "x", "stream": "tRUE"},
        {"prompt": "x", "stream": 2},
        {"prompt": "x", "temperature": "1,5"},
        {"prompt": "x", "truncate_prompt_tokens": "0"},
        {"messages": [{"role": "critic", "content": "x", "id": 1}]},
        {"messages": [{"role": "user", "content": ["x", {"type": "refusal", "refusal": "y"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "refusal", "text": "y"}]}]},
        {"prompt": "x", "tools": [], "user": "me", "best_of": 1},
        {"prompt": "x", "tools": [{}]},
        {"prompt": "x", "surprise": 1},
        {"tokens": [1, 2, 3]},
        {"tokens": [-1]},
        {"input": "x"},
        {"input": [[1], [2]], "encoding_format": "base64", "dimensions": 3},
        {"input": []},
        {"input": "x", "encoding_format": "int8"},
        {"text_1": "x", "text_2": ["y", "z"]},
        {"text_1": "x"},
        {"text_1": [], "text_2": "y"},
        {"queries": "x", "documents": ["y", "z"]},
        {"queries": "x", "items": "y"},
        {"queries": "x", "items": "y", "documents": "z"},
        {"data_1": "x", "data_2": "y"},
        {"data_1": "x", "text_2": "y"},
        {"data_1": "x", "data_2": "y", "text_2": "z"},
        {"input": "x", "task": "embed", "encoding_format": "base64"},
        {"input": "x", "task": "token_embed"},
        {"texts": ["x"], "embedding_types": ["float", "binary"], "truncate": "NONE"},
        {"texts": "x"},
        {"texts": ["x"], "truncate": "START"},
        {"texts": ["x"], "embedding_types": ["int8"]},
        {"texts": ["x"], "images": []},
        {"query": "x", "documents": ["y", {"text": "z"}], "top_n": 1},
        {"query": "x", "documents": [{"text": 1}]},
        {"query": ["x"], "documents": ["y"]},
        {"input": [{"role": "user", "content": "x"}], "reasoning": {"effort": "low"}},
        {"input": "x", "reasoning": {"effort": "huge"}},
        {"input": "x", "metadata": {"a": 1}, "store": False},
        {"input": "x", "text": {"format": {"type": "json_object"}}, "temperature": 3},
        {"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
        {"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 0},
        {"model": "m", "messages": [{"role": "user", "content": "x"}], "thinking": {"type": "x"}},
        {},
    ):
        assert validator.is_valid(body) == (refusal(path, body) is None), body


def refusal(path: str, body: dict[str, Any]) -> str | None:
    """The field that a body is refused for."""
    parsers: dict[str, Callable[[dict[str, Any]], Any]] = {
        "/v1/chat/completions": lambda b: protocol.parse_chat(b).sampling_params({}),
        "/v1/completions": lambda b: protocol.parse_completion(b).sampling_params({}),
        "/tokenize": protocol.parse_tokenize,
        "/detokenize": protocol.parse_detokenize,
        "/v1/embeddings": pooling_protocol.parse_embedding,
        "/v1/score": pooling_protocol.parse_score,
        "/v1/rerank": pooling_protocol.parse_rerank,
        "/classify": pooling_protocol.parse_classify,
        "/pooling": pooling_protocol.parse_encode,
        "/v2/embed": pooling_protocol.parse_cohere_embed,
        "/v1/responses": lambda b: responses_protocol.parse_response(b).sampling_params({}),
        "/v1/responses/input_tokens": responses_protocol.parse_input_tokens,
        "/v1/messages": lambda b: anthropic_protocol.parse_messages(b).sampling_params({}),
        "/v1/messages/count_tokens": anthropic_protocol.parse_count_tokens,
    }
    try:
        parsers[path](body)
    except (InvalidParameterError, UnsupportedParameterError) as error:
        return error.param
    return None


# ---------------------------------------------------------------------------------------- bounds

# What a field needs beside it to be looked at alone.
BESIDE: dict[str, dict[str, Any]] = {
    "top_logprobs": {"logprobs": True},
    "min_tokens": {"max_tokens": 2**31 - 1},
    "chat_template": {"messages": [{"role": "user", "content": "x"}]},
    "tool_choice": {"tools": [{"type": "function", "function": {"name": "f"}}]},
}
NUM_EDGES = {
    "/detokenize": 2,
    "/tokenize": 4,
    "/v1/embeddings": 20,
    "/v1/score": 36,
    "/v1/rerank": 5,
    "/classify": 16,
    "/pooling": 20,
    "/v2/embed": 12,
}
LEAST: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
    "/v1/completions": {"prompt": "x"},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [1]},
    "/v1/embeddings": {"input": "x"},
    "/v1/score": {"text_1": "x", "text_2": "y"},
    "/v1/rerank": {"query": "x", "documents": ["y"]},
    "/classify": {"input": "x"},
    "/pooling": {"input": "x"},
    "/v2/embed": {"texts": ["x"]},
}
PARTNERS = dict(pooling_protocol.SCORE_NAMES) | {b: a for a, b in pooling_protocol.SCORE_NAMES}


def edges(schema: dict[str, Any]) -> Iterator[tuple[Any, bool]]:
    """(value, whether it passes) at each bound of a schema and one past it."""
    step = 1 if "integer" in schema.get("type", ()) else 1e-3
    for bound, outwards in (("minimum", -step), ("maximum", step)):
        if bound in schema:
            yield schema[bound], True
            yield schema[bound] + outwards, False
    if "exclusiveMinimum" in schema:
        yield schema["exclusiveMinimum"], False
        yield schema["exclusiveMinimum"] + step, True
    for bound, outwards in (("minLength", -1), ("maxLength", 1)):
        if schema.get(bound, 0) not in (0, 2**31 - 1):
            yield "x" * schema[bound], True
            yield "x" * (schema[bound] + outwards), False
    if schema.get("type") == "array":
        item = example(schema["items"])
        if schema.get("minItems"):
            yield [item] * schema["minItems"], True
            yield [item] * (schema["minItems"] - 1), False
        if schema.get("maxItems", 2**31 - 1) < 2**31 - 1:
            yield [item] * schema["maxItems"], True
            yield [item] * (schema["maxItems"] + 1), False
        for value, passes in edges(schema["items"]):
            yield [value], passes
    if "maxProperties" in schema:
        most = schema["maxProperties"]
        yield {str(i): 1 for i in range(most)}, True
        yield {str(i): 1 for i in range(most + 1)}, False
    if isinstance(schema.get("additionalProperties"), dict):
        for value, passes in edges(schema["additionalProperties"]):
            yield {"5": value}, passes
    for choice in schema.get("anyOf", ()):
        yield from edges(choice)
    if "enum" in schema:
        yield from ((value, True) for value in schema["enum"])
        yield "none of these", False


def example(schema: dict[str, Any]) -> Any:
    if "anyOf" in schema:
        return example(schema["anyOf"][0])
    if "enum" in schema:
        return schema["enum"][0]
    if schema["type"] == "array":
        return [example(schema["items"])]
    if "function" in schema.get("properties", ()):
        return {"type": "function", "function": {"name": "f"}}
    if "parameters" in schema.get("properties", ()):
        return {"name": "f"}
    if schema["type"] == "object":
        return {"role": "user", "content": "x"}
    # A number may be a string of one, too.
    return "x" if schema["type"] == "string" else 5


@pytest.mark.parametrize("path", TABLES)
def test_every_bound_holds_at_itself_and_not_past_it(path: str) -> None:
    num_edges = 0
    for name, check in TABLES[path].fields.items():
        for value, passes in edges(check.schema):
            others = {} if name == "messages" else LEAST[path]
            if name in ("prompt", "messages", "chat_template") and path == "/tokenize":
                others = BESIDE["chat_template"] if name == "chat_template" else {}
            elif name == "max_tokens" and path == "/v1/completions":
                others = others | {"echo": True}  # which alone goes with 0
            elif path == "/v1/score" and name in PARTNERS:
                # As many second texts as first ones.
                is_many = isinstance(value, list) and passes
                others = {PARTNERS[name]: ["y"] * len(value) if is_many else "y"}
            elif name == "logprob_token_ids":
                others = others | {"logprobs": True if "chat" in path else 1}
            elif name in BESIDE:
                others = others | BESIDE[name]
            refused = refusal(path, {**others, name: value})
            assert (refused is None) == passes, (name, str(value)[:80], refused)
            assert passes or refused.startswith(name) or refused in ("max_tokens", "prompt")
            num_edges += 1
    assert num_edges >= NUM_EDGES.get(path, 50)


def test_the_samples_of_a_request_are_bounded() -> None:
    prompts = ["x"] * (limits.MAX_SAMPLES // limits.MAX_N)
    body = {"prompt": prompts, "n": limits.MAX_N}
    assert refusal("/v1/completions", body) is None
    assert refusal("/v1/completions", {**body, "prompt": [*prompts, "x"]}) == "n"


# ------------------------------------------------------------------------------------------ docs


def section(title: str) -> str:
    """One section of docs/api.md."""
    _, _, rest = DOCS.partition(f"\n## {title}\n")
    assert rest, title
    return rest.partition("\n## ")[0]


def named(text: str) -> set[str]:
    """What the tables' first columns name."""
    rows = re.findall(r"^\|([^|]*)\|", text, re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def test_the_documented_fields_are_the_protocol_s() -> None:
    sampling, common = set(protocol.SAMPLING_FIELDS), set(protocol.COMMON_FIELDS)
    assert named(section("Sampling fields of both generation routes")) == sampling
    assert named(section("Further fields of both generation routes")) == common
    constraints = named(section("Constraints of both generation routes"))
    assert constraints == set(structured.FIELDS)
    shared = sampling | common | set(structured.FIELDS)
    chat = named(section("`/v1/chat/completions` only"))
    assert chat == set(protocol.CHAT_FIELDS) - shared
    completion = named(section("`/v1/completions` only"))
    assert completion - {"max_tokens"} == set(protocol.COMPLETION_FIELDS) - shared
    assert named(section("`/tokenize`")) == set(protocol.TOKENIZE_FIELDS)
    assert named(section("`/detokenize`")) == set(protocol.DETOKENIZE_FIELDS)
    embedding = named(section("`/v1/embeddings`"))
    assert embedding == set(pooling_protocol.EMBEDDING_BODY.fields)
    scores = named(section("`/v1/score` and `/v1/rerank`"))
    encoding = named(section("`/pooling`"))
    assert encoding == {*pooling_protocol.ENCODE_BODY.fields}
    cohere = named(section("`/v2/embed`"))
    assert cohere == {*pooling_protocol.COHERE_EMBED_BODY.fields}
    bodies = (pooling_protocol.SCORE_BODY, pooling_protocol.RERANK_BODY)
    assert scores == {name for body in bodies for name in body.fields}
    classes = named(section("`/classify`"))
    assert classes == set(pooling_protocol.CLASSIFY_BODY.fields)
    sampling = set(protocol.SAMPLING_FIELDS) - {"n", "max_tokens", "stream_interval"}
    responses = named(section("`/v1/responses`"))
    assert responses == set(responses_protocol.RESPONSES_BODY.fields) - sampling
    assert named(section("`/v1/messages`")) == set(anthropic_protocol.MESSAGES_BODY.fields)
    refused = named(section("Refused, unless they ask for nothing")) - {"text"}
    assert refused == {*protocol.CHAT_BODY.refused, *protocol.COMPLETION_BODY.refused}
    assert set(re.findall(r"`(\w+)`", DOCS.partition("\n## ")[0])) >= BOOKKEEPING_FIELDS


def test_the_documented_routes_are_the_server_s() -> None:
    found = re.findall(r"(/[\w./{}-]+)`", "\n".join(section("Routes").splitlines()))
    served = {entry.path.replace("{name:path}", "{id}") for entry in ROUTES}
    assert set(found) == served


def test_the_documented_errors_are_the_table_s() -> None:
    from octavo.errors import ERROR_TABLE

    rows = re.findall(r"^\| (\d{3}) \|([^|]*)\|", section("Errors"), re.MULTILINE)
    found = {
        (int(status), code) for status, codes in rows for code in re.findall(r"`(\w+)`", codes)
    }
    assert found == {(kind.status, kind.code) for kind in ERROR_TABLE.values() if kind.code}


def test_the_documented_metrics_are_the_server_s() -> None:
    from octavo.server.metrics import COUNTERS, GAUGES, HISTOGRAMS

    served = {"cache_config_info", "admission_rejections_total"}
    served.add("tool_call_parser_invocations_total")
    for rows, suffix in ((GAUGES, ""), (COUNTERS, "_total"), (HISTOGRAMS, "")):
        vllm = [name for row in rows if row.prefix == "vllm:" for name in row.names]
        served |= {name.removeprefix("vllm:") + suffix for name in vllm}
    table = re.findall(r"^\|[^|]*\|([^|]*)\|$", section("Metrics"), re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", "".join(table))) == served
    assert "`octavo:step_seconds{phase}`" in section("Metrics")
