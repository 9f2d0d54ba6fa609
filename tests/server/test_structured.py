"""Structured output over HTTP: the fields, their errors, and the openai package as a client."""

from __future__ import annotations

import asyncio
import io
import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from harness import TINY_MODEL, RunningServer

from octavo.config import EngineConfig
from octavo.engine.engine import AsyncEngine
from octavo.server.batch_file import run_batch
from octavo.server.http.config import ServerConfig
from octavo.server.routes import make_app

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "ok": {"type": "boolean"},
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["ok", "n"],
    "additionalProperties": False,
}
MESSAGES: Any = [{"role": "user", "content": "x"}]
FORMAT: Any = {
    "type": "json_schema",
    "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("model")
    model = TINY_MODEL | {"max_position_embeddings": 512, "eos_token_id": 299}
    (folder / "config.json").write_text(json.dumps(model))
    template = folder / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    config = EngineConfig(
        model=str(folder), load_format="dummy", dtype="float32", threads=1, max_num_seqs=8
    )
    flags = ServerConfig(port=0, shutdown_timeout=1, chat_template=str(template))
    server = RunningServer(AsyncEngine(config), flags)
    server.may_load.set()
    assert server.ready.wait(60)
    yield server
    server.stop()


def client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def check(text: str) -> None:
    value = json.loads(text)
    assert set(value) == {"ok", "n"}
    assert isinstance(value["ok"], bool)
    assert 0 <= value["n"] <= 99


def ask(server: RunningServer, **body: Any) -> str:
    """A completion's text at temperature 2."""
    defaults = {"prompt": "x", "max_tokens": 200, "temperature": 2, "seed": 1}
    answer = server.post("/v1/completions", defaults | body)
    assert answer.status == 200, answer.body
    [choice] = answer.json["choices"]
    assert choice["finish_reason"] == "stop"
    return str(choice["text"])


def test_response_format_with_the_openai_client(tiny: RunningServer) -> None:
    settings: dict[str, Any] = {
        "model": tiny.engine.served_model_names[0],
        "messages": MESSAGES,
        "temperature": 2,
        "max_tokens": 200,
    }
    answer = client(tiny).chat.completions.create(**settings, response_format=FORMAT, n=3)
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        check(choice.message.content)
    chunks = client(tiny).chat.completions.create(**settings, response_format=FORMAT, stream=True)
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert len(pieces) > 3
    check("".join(pieces))
    streamed = list(
        client(tiny).chat.completions.create(
            **settings, response_format=FORMAT, stream=True, logprobs=True, top_logprobs=2
        )
    )
    check("".join(c.choices[0].delta.content or "" for c in streamed if c.choices))
    free = client(tiny).chat.completions.create(**settings, response_format={"type": "text"})
    assert free.choices[0].message.content


def test_parse_of_the_openai_client(tiny: RunningServer) -> None:
    pydantic = pytest.importorskip("pydantic")

    class Found(pydantic.BaseModel):  # type: ignore[name-defined, misc]
        ok: bool
        colors: list[str] = pydantic.Field(max_length=2)
        size: Literal[1, 2] | None

    answer = client(tiny).chat.completions.parse(
        model=tiny.engine.served_model_names[0],
        messages=MESSAGES,
        response_format=Found,
        temperature=0,
        max_tokens=300,
        # Else a random model's strings have no end.
        logit_bias={str(ord('"')): 20},
    )
    assert answer.choices[0].finish_reason == "stop"
    assert isinstance(answer.choices[0].message.parsed, Found)


def test_every_field_constrains(tiny: RunningServer) -> None:
    tag = {
        "structures": [{"begin": "<t>", "schema": {"type": "boolean"}, "end": "</t>"}],
        "triggers": ["<t>"],
    }
    fields: list[tuple[dict[str, Any], str]] = [
        ({"structured_outputs": {"regex": "[ab]{3}"}}, "[ab]{3}"),
        ({"structured_outputs": {"choice": ["yes", "no"], "backend": "guidance"}}, "yes|no"),
        ({"structured_outputs": {"grammar": 'root ::= "x" [0-9]{2}'}}, r"x\d\d"),
        ({"guided_regex": "a-[0-9]", "guided_decoding_backend": "outlines"}, r"a-\d"),
        ({"guided_choice": ["left", "right"]}, "left|right"),
        ({"guided_grammar": 'start: "q" /[a-z]/'}, "q[a-z]"),
        ({"guided_json": {"enum": [1, 2]}, "guided_whitespace_pattern": " "}, "[12]"),
        ({"guided_json": '{"const": "x"}'}, '"x"'),
        (
            {
                "response_format": {"type": "structural_tag", **tag},
                "stop": ["</t>"],
                "logit_bias": {"299": 100},
            },
            ".*",
        ),
        (
            {
                "response_format": {
                    "type": "structural_tag",
                    "format": {"type": "const_string", "value": "k"},
                }
            },
            "k",
        ),
        ({"response_format": {"type": "json_object", "schema": {"const": 7}}}, "7"),
        ({"response_format": {"type": "text"}, "guided_choice": ["one"]}, "one"),
    ]
    for body, pattern in fields:
        assert re.fullmatch(pattern, ask(tiny, **body), re.DOTALL), body
    check(ask(tiny, response_format=FORMAT))
    check(ask(tiny, structured_outputs={"json": SCHEMA, "disable_any_whitespace": True}))
    check(ask(tiny, guided_json=SCHEMA))
    text = ask(
        tiny,
        response_format={"type": "json_object"},
        temperature=0,
        logit_bias={str(ord("}")): 100},
    )
    assert isinstance(json.loads(text), dict)


TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
ONLY_N = {"allowed_token_ids": [ord("n")]}


@pytest.mark.parametrize(
    "body",
    [
        {"guided_choice": ["yes"], **ONLY_N},
        {"guided_choice": ["yes"], "allowed_token_ids": [ord("y")], "temperature": 0},
        {"guided_choice": ["yes"], "bad_words": ["ye", "yes"], "temperature": 0},
        {"tools": [TOOL], "tool_choice": "required", **ONLY_N},
        {
            "tools": [TOOL],
            "tool_choice": {"type": "function", "function": {"name": "look"}},
            **ONLY_N,
        },
    ],
)
def test_what_contradicts_itself_is_the_requests_own_mistake(
    tiny: RunningServer, body: dict[str, Any]
) -> None:
    """A 500 would have clients send it again."""
    path, body = "/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 20, **body}
    answer = tiny.post(path, body)
    assert (answer.status, answer.error["code"]) == (400, "contradiction"), answer.body
    assert answer.error["type"] == "invalid_request_error"
    assert "leave no token" in answer.error["message"]
    assert b'"contradiction"' in tiny.post(path, body | {"stream": True}).body
    assert re.fullmatch("yes", ask(tiny, guided_choice=["yes"]))


def test_what_is_wrong_is_a_400_that_names_the_field(tiny: RunningServer) -> None:
    bad: list[tuple[dict[str, Any], str, str]] = [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "schema"),
        ({"response_format": {"type": "yaml"}}, "response_format.type", "one of"),
        ({"response_format": "json"}, "response_format", "an object"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"not": {"type": "null"}}},
                }
            },
            "response_format",
            "not is not supported",
        ),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        (
            {"structured_outputs": {"regex": "a", "choice": ["a"]}},
            "structured_outputs",
            "exactly one",
        ),
        ({"structured_outputs": {"magic": 1}}, "structured_outputs.magic", "Unrecognized"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", "cannot be used"),
        ({"guided_choice": []}, "guided_choice", "none of them empty"),
        ({"guided_json": 3}, "guided_json", "an object"),
        ({"guided_grammar": "start: missing"}, "guided_grammar", "missing"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "guided_regex"),
        ({"guided_regex": "a", "response_format": FORMAT}, "guided_regex", "response_format"),
        ({"guided_json": {"$ref": "http://example.org/x"}}, "guided_json", "must begin with"),
    ]
    for body, param, why in bad:
        for route, own in (
            ("/v1/completions", {"prompt": "x"}),
            ("/v1/chat/completions", {"messages": MESSAGES}),
        ):
            answer = tiny.post(route, own | body)
            assert answer.status == 400, body
            assert answer.error["param"] == param, body
            assert why in answer.error["message"], answer.error
            assert "\n" not in answer.error["message"]


def test_batches_are_constrained_too(tiny: RunningServer) -> None:
    body = {"messages": MESSAGES, "response_format": FORMAT, "temperature": 2, "max_tokens": 200}
    line = {"custom_id": "1", "url": "/v1/chat/completions", "body": body}
    output = io.StringIO()

    async def run() -> None:
        await run_batch(
            make_app(tiny.lifecycle.state), [json.dumps(line).encode()], output, concurrency=1
        )

    asyncio.run_coroutine_threadsafe(run(), tiny._loop).result(60)
    [choice] = json.loads(output.getvalue())["response"]["body"]["choices"]
    check(choice["message"]["content"])


def test_hostile_grammars_leave_others_alone(tiny: RunningServer) -> None:
    """Many grammars at once, each refused or followed; plain requests go on meanwhile."""
    hostile: list[dict[str, Any]] = [
        {"guided_regex": "((a{0,100}){0,100}){0,100}"},
        {"guided_regex": "(.*a){25}.*"},
        {"guided_choice": [f"value {i}" for i in range(10_000)]},
        {"guided_json": {"enum": [f"value {i}" for i in range(10_000)]}},
        {
            "guided_json": {
                "allOf": [
                    {"anyOf": [{"properties": {f"p{i}": {"const": j}}} for j in range(20)]}
                    for i in range(20)
                ]
            }
        },
        {
            "guided_json": {
                "$ref": "#/$defs/d0",
                "$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(3000)},
            }
        },
        {"guided_json": {"type": "string", "const": "x" * 300_000}},
        {"guided_grammar": "start: " + "(" * 1000 + '"a"' + ")" * 1000},
        *({"guided_regex": f"[a-z]{{3}}{i}"} for i in range(40)),
    ]

    async def run() -> None:
        async with openai.AsyncOpenAI(
            base_url=tiny.url + "/v1", api_key="none", max_retries=0
        ) as one:
            model = tiny.engine.served_model_names[0]

            async def post(body: dict[str, Any]) -> int:
                try:
                    await one.completions.create(
                        model=model, prompt="x", max_tokens=4, extra_body=body
                    )
                except openai.APIStatusError as error:
                    return error.status_code
                return 200

            waiting = [asyncio.create_task(post(body)) for body in hostile]
            # One whose client goes away while its grammar is compiled.
            gone = asyncio.create_task(post({"guided_regex": "(.*b){25}.*"}))
            await asyncio.sleep(0.05)
            gone.cancel()
            slowest = 0.0
            for _ in range(10):
                began = asyncio.get_running_loop().time()
                assert await post({"ignore_eos": True}) == 200
                slowest = max(slowest, asyncio.get_running_loop().time() - began)
            statuses = await asyncio.gather(*waiting)
            # A token at a time fails where a mask is beyond the limits: that request's own 500.
            assert set(statuses) <= {200, 400, 500}
            assert statuses[8:] == [200] * 40
            # Other work may have the machine's cores.
            assert slowest < 5

    asyncio.run(run())
    assert tiny.get("/health").status == 200
