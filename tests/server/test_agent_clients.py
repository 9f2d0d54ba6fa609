"""The clients that agents are made with: openai, anthropic and openai-agents, over scripted turns.

Each is skipped where it is not installed.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from harness import RunningServer, StartServer
from pydantic import BaseModel
from scripted_engine import ScriptedEngine, call

pytestmark = pytest.mark.system

TURNS = [
    call("clock", '{"zone": "Oslo"}'),
    call("clock", '{"zone": "Zürich"}'),
    call("clock", '{"zone": "東京"}'),
    "<think>\nEnough.\n</think>\n\nIt is noon everywhere.",
]
SCHEMA = {
    "type": "object",
    "properties": {"zone": {"type": "string"}},
    "required": ["zone"],
    "additionalProperties": False,
}
QUESTION = "What time is it?"
ZONES = ["Oslo", "Zürich", "東京"]


class Noon(BaseModel):
    """A time."""

    hour: int
    place: str


@pytest.fixture
def server(start_server: StartServer) -> RunningServer:
    return start_server(ScriptedEngine(TURNS), api_key=("key",))


def openai_client(server: RunningServer) -> Any:
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=server.url + "/v1", api_key="key", max_retries=0, timeout=30)


def anthropic_client(server: RunningServer, **options: Any) -> Any:
    anthropic = pytest.importorskip("anthropic")
    options = {"api_key": "key", **options}
    return anthropic.Anthropic(base_url=server.url, max_retries=0, timeout=30, **options)


# --------------------------------------------------------------------- openai, responses

FLAT = {"type": "function", "name": "clock", "parameters": SCHEMA, "strict": True}


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("stored", [False, True])
def test_openai_drives_a_loop_of_tools(server: RunningServer, stored: bool, streams: bool) -> None:
    responses = openai_client(server).responses
    zones = []
    new: list[Any] = [{"role": "user", "content": QUESTION}]
    history = list(new)
    previous = None
    while True:
        fields: dict[str, Any] = {"model": "alias", "tools": [FLAT], "store": stored}
        if stored:
            fields |= {"input": new, "previous_response_id": previous}
        else:
            fields |= {"input": history, "include": ["reasoning.encrypted_content"]}
        if streams:
            with responses.stream(**fields) as stream:
                kinds = [event.type for event in stream]
                response = stream.get_final_response()
            assert kinds[0] == "response.created"
            assert kinds[-1] == "response.completed"
        else:
            response = responses.create(**fields)
        assert response.status == "completed"
        calls = [item for item in response.output if item.type == "function_call"]
        new = []
        for one in calls:
            zones.append(json.loads(one.arguments)["zone"])
            new.append({"type": "function_call_output", "call_id": one.call_id, "output": "noon"})
        history += [item.model_dump(exclude_none=True) for item in response.output] + new
        previous = response.id
        if not calls:
            break
    assert zones == ZONES
    assert response.output_text == "It is noon everywhere."
    assert response.usage.output_tokens_details.reasoning_tokens > 0
    # What was thought between the calls is in the last prompt.
    assert server.engine.prompts[-1].count("Hm.") == 3


def test_openai_parses(server: RunningServer) -> None:
    server.engine.turns = ['<think>\nHm.\n</think>\n\n{"hour": 12, "place": "Oslo"}']
    responses = openai_client(server).responses
    parsed = responses.parse(model="alias", input=QUESTION, text_format=Noon)
    assert parsed.output_parsed == Noon(hour=12, place="Oslo")
    with responses.stream(model="alias", input=QUESTION, text_format=Noon) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_parsed == Noon(hour=12, place="Oslo")


def test_openai_keeps_and_forgets(server: RunningServer) -> None:
    openai = pytest.importorskip("openai")
    responses = openai_client(server).responses
    made = responses.create(model="alias", input=QUESTION)
    assert responses.retrieve(made.id) == made
    assert [item.type for item in responses.input_items.list(made.id)] == ["message"]
    count = responses.input_tokens.count(model="alias", input=QUESTION)
    assert count.input_tokens == made.usage.input_tokens
    with pytest.raises(openai.BadRequestError, match="Cannot cancel"):
        responses.cancel(made.id)
    responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        responses.retrieve(made.id)


# ----------------------------------------------------------------------------- anthropic

CLOCK = {"name": "clock", "description": "The time.", "input_schema": SCHEMA}


@pytest.mark.parametrize("streams", [False, True])
def test_anthropic_drives_a_loop_of_tools(server: RunningServer, streams: bool) -> None:
    messages = anthropic_client(server).messages
    history: list[Any] = [{"role": "user", "content": QUESTION}]
    zones = []
    while True:
        fields: dict[str, Any] = {
            "model": "claude-opus-5",
            "max_tokens": 32000,
            "messages": history,
            "tools": [CLOCK],
            "thinking": {"type": "enabled", "budget_tokens": 2048},
        }
        if streams:
            with messages.stream(**fields) as stream:
                kinds = {event.type for event in stream}
                message = stream.get_final_message()
            assert {"message_start", "content_block_stop", "thinking", "message_stop"} <= kinds
        else:
            # The client refuses long answers that are not streamed.
            message = messages.create(**{**fields, "max_tokens": 4000})
        uses = [block for block in message.content if block.type == "tool_use"]
        assert message.stop_reason == ("tool_use" if uses else "end_turn")
        assert message.content[0].type == "thinking"
        assert message.content[0].signature
        history.append({"role": "assistant", "content": message.content})
        if not uses:
            break
        zones += [use.input["zone"] for use in uses]
        results = [
            {"type": "tool_result", "tool_use_id": use.id, "content": "noon"} for use in uses
        ]
        history.append({"role": "user", "content": results})
    assert zones == ZONES
    assert message.content[-1].text == "It is noon everywhere."
    assert streams or message._request_id
    assert server.engine.prompts[-1].count("Hm.") == 3


def test_anthropic_runs_tools(server: RunningServer) -> None:
    anthropic = pytest.importorskip("anthropic")
    asked: list[str] = []

    @anthropic.beta_tool
    def clock(zone: str) -> str:
        """The time.

        Args:
            zone: a city.
        """
        asked.append(zone)
        return "noon"

    runner = anthropic_client(server).beta.messages.tool_runner(
        model="claude-opus-5",
        max_tokens=2000,
        tools=[clock],
        messages=[{"role": "user", "content": QUESTION}],
    )
    assert runner.until_done().content[-1].text == "It is noon everywhere."
    assert asked == ZONES


def test_anthropic_parses(server: RunningServer) -> None:
    server.engine.turns = ['{"hour": 12, "place": "Oslo"}']
    messages = anthropic_client(server).messages
    parsed = messages.parse(
        model="claude",
        max_tokens=1000,
        messages=[{"role": "user", "content": QUESTION}],
        output_format=Noon,
    )
    assert parsed.parsed_output == Noon(hour=12, place="Oslo")
    assert server.engine.submitted[-1][1].structured_outputs is not None


def test_anthropic_counts_lists_and_fails(server: RunningServer) -> None:
    anthropic = pytest.importorskip("anthropic")
    client = anthropic_client(server, api_key=None, auth_token="key")
    asked: Any = [{"role": "user", "content": QUESTION}]
    fields = {"model": "claude", "messages": asked, "tools": [CLOCK], "system": "Be brief."}
    count = client.messages.count_tokens(**fields).input_tokens
    usage = client.messages.create(max_tokens=1000, **fields).usage
    written = usage.cache_creation_input_tokens
    assert count == usage.input_tokens + usage.cache_read_input_tokens + written
    assert [model.id for model in client.models.list()] == ["fake/model", "alias"]
    assert client.models.retrieve("alias").type == "model"
    long: Any = [{"role": "user", "content": "x" * (1 << 17)}]
    with pytest.raises(
        anthropic.BadRequestError, match=r"prompt is too long: \d+ tokens > \d+ max"
    ):
        client.messages.create(model="claude", max_tokens=10, messages=long)
    with pytest.raises(anthropic.AuthenticationError):
        anthropic_client(server, api_key="no").messages.create(max_tokens=1, **fields)
    server.engine.max_unfinished = 0
    with pytest.raises(anthropic.InternalServerError) as caught:
        client.messages.create(max_tokens=10, **fields)
    assert caught.value.status_code == 529
    assert caught.value.type == "overloaded_error"
    server.engine.max_unfinished = 10
    server.engine.fail_after = 3
    with (
        pytest.raises(anthropic.APIStatusError),
        client.messages.stream(max_tokens=1000, **fields) as stream,
    ):
        stream.until_done()


# ------------------------------------------------------------------------- openai-agents


@pytest.mark.parametrize("streams", [False, True])
def test_openai_agents_run(server: RunningServer, streams: bool) -> None:
    import asyncio

    agents = pytest.importorskip("agents")
    import openai

    agents.set_tracing_disabled(True)
    asked: list[str] = []

    @agents.function_tool
    def clock(zone: str) -> str:
        """The time of a city."""
        asked.append(zone)
        return "noon"

    async def run() -> str:
        client = openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="key", max_retries=0)
        model = agents.OpenAIResponsesModel(model="alias", openai_client=client)
        agent = agents.Agent(name="Clock", instructions="Be brief.", tools=[clock], model=model)
        if not streams:
            return str((await agents.Runner.run(agent, QUESTION)).final_output)
        result = agents.Runner.run_streamed(agent, QUESTION)
        async for _ in result.stream_events():
            pass
        return str(result.final_output)

    assert asyncio.run(run()) == "It is noon everywhere."
    assert asked == ZONES
