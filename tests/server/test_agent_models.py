"""The SDKs of responses and messages against SmolLM2: calls and objects arrive in their own types.

Each SDK is skipped where it is not installed. The model is too small to be right; that what it
writes has the form which was asked for is the server's work, and all that is looked at.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, Literal

import pytest
from pydantic import BaseModel
from test_agents import QUESTION, TOOL, City, check_weather
from test_end_to_end import ROOT, ServerProcess
from test_end_to_end import pytestmark as end_to_end

pytestmark = [*end_to_end, pytest.mark.slow]

SCHEMA: Any = TOOL["function"]["parameters"]
EASY = "What is the capital of France?"


class Choice(BaseModel):
    """What Anthropic's client leaves of a schema: it takes bounds out."""

    size: Literal["small", "large"]
    place: Literal["Paris", "Oslo"]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ServerProcess("--max-model-len", "4096", "--max-num-seqs", "8")
    try:
        yield server.wait_ready()
    finally:
        server.end()


def responses(url: str) -> Any:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=300)
    model = client.models.list().data[0].id

    def bound(name: str) -> Any:
        return lambda **fields: getattr(client.responses, name)(model=model, **fields)

    return bound


def messages(url: str) -> Any:
    anthropic = pytest.importorskip("anthropic")
    client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=300)

    def bound(name: str) -> Any:
        method = getattr(client.messages, name)
        return lambda **fields: method(model="claude", max_tokens=200, **fields)

    return bound


def test_responses_stream_what_they_answer(url: str) -> None:
    fields: Any = {"input": EASY, "temperature": 0, "max_output_tokens": 100}
    whole = responses(url)("create")(**fields)
    assert whole.output_text
    with responses(url)("stream")(**fields) as stream:
        text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
        assert stream.get_final_response().output_text == text == whole.output_text


def test_responses_call_and_go_on(url: str) -> None:
    tool = {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": True}
    fields: Any = {"tools": [tool], "temperature": 0, "max_output_tokens": 200}
    create = responses(url)("create")
    first = create(input=QUESTION, tool_choice="required", parallel_tool_calls=False, **fields)
    [call] = [item for item in first.output if item.type == "function_call"]
    check_weather(json.loads(call.arguments))
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Rain."}
    again = create(input=[result], previous_response_id=first.id, tool_choice="none", **fields)
    assert again.output_text
    assert all(item.type == "message" for item in again.output)


@pytest.mark.parametrize("with_tools", [False, True])
def test_responses_parse(url: str, with_tools: bool) -> None:
    tool = {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": True}
    response = responses(url)("parse")(
        input="Describe a city as JSON.",
        text_format=City,
        max_output_tokens=200,
        tools=[tool] if with_tools else [],
    )
    # With tools it may call instead.
    assert with_tools or isinstance(response.output_parsed, City)
    for item in response.output:
        if item.type == "function_call":
            check_weather(json.loads(item.arguments))
        else:
            assert isinstance(item.content[0].parsed, City)


def test_a_custom_tool_follows_its_grammar(url: str) -> None:
    form = {
        "type": "grammar",
        "syntax": "lark",
        "definition": 'start: "on " /[A-Z]/ " at " /[0-9]+/',
    }
    tool = {"type": "custom", "name": "plan", "format": form}
    response = responses(url)("create")(
        input="When?",
        tools=[tool],
        tool_choice={"type": "custom", "name": "plan"},
        max_output_tokens=20,
    )
    [call] = response.output
    assert call.type == "custom_tool_call"
    assert call.input.startswith("on ")
    assert call.input[4:8] == " at "


def test_messages_stream_what_they_answer(url: str) -> None:
    fields: Any = {
        "messages": [{"role": "user", "content": QUESTION}],
        "extra_body": {"temperature": 0},
    }
    whole = messages(url)("create")(**fields)
    with messages(url)("stream")(**fields) as stream:
        text = "".join(stream.text_stream)
        assert stream.get_final_message().content[0].text == text == whole.content[0].text


def test_messages_call_and_go_on(url: str) -> None:
    tool = {"name": "weather", "description": "The weather.", "input_schema": SCHEMA}
    create = messages(url)("create")
    history: list[Any] = [{"role": "user", "content": QUESTION}]
    choice = {"type": "tool", "name": "weather"}
    first = create(messages=history, tools=[tool], tool_choice=choice)
    [use] = first.content
    check_weather(use.input)
    assert first.stop_reason == "tool_use"
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "Rain."}
    history += [
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [result]},
    ]
    again = create(messages=history, tools=[tool], tool_choice={"type": "none"})
    assert [block.type for block in again.content] == ["text"]
    # The turns before the result were in the cache.
    assert again.usage.cache_read_input_tokens > again.usage.input_tokens


def test_messages_parse(url: str) -> None:
    parsed = messages(url)("parse")(
        messages=[{"role": "user", "content": "Describe a city as JSON."}], output_format=Choice
    )
    assert isinstance(parsed.parsed_output, Choice)


def test_the_example_runs(url: str) -> None:
    pytest.importorskip("agents")
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples/agents/agent_loop.py"), "--url", url],
        capture_output=True,
        text=True,
        timeout=300,
        env={"PYTHONPATH": ":".join(sys.path), "PATH": "", "OPENAI_API_KEY": "none"},
    )
    assert done.returncode == 0, done.stderr
    assert "temperature('" in done.stdout
