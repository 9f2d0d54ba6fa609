"""Agents' and extraction's libraries against SmolLM2: calls and objects arrive in their own types.

Each library is skipped where it is not installed. The model is too small to be right; that what it
writes has the form which was asked for is the server's work, and all that is looked at.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field
from test_end_to_end import ServerProcess
from test_end_to_end import pytestmark as end_to_end

pytestmark = [*end_to_end, pytest.mark.slow]


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=20)
    size: Literal["small", "large"]
    number: int = Field(ge=0, le=99)


TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "enum": ["Paris", "Oslo"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
QUESTION = "What is the weather in Paris?"
MESSAGES: Any = [{"role": "user", "content": QUESTION}]


def check_weather(arguments: Any) -> None:
    assert arguments.keys() == {"city", "days"}
    assert arguments["city"] in ("Paris", "Oslo")
    assert 1 <= arguments["days"] <= 9


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", "none")
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        patch.setenv("LANGSMITH_TRACING", "false")
        server = ServerProcess(
            "--max-model-len", "4096", "--max-num-seqs", "8", "--served-model-name", "m"
        )
        try:
            yield server.wait_ready() + "/v1"
        finally:
            server.end()


def client(base_url: str) -> Any:
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=300)


# ---------------------------------------------------------------------------- openai


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        ("required", "tool_calls"),
        ({"type": "function", "function": {"name": "weather"}}, "stop"),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [TOOL]}},
            "tool_calls",
        ),
    ],
)
def test_openai_calls_what_it_must(base_url: str, choice: Any, reason: str) -> None:
    other = {"type": "function", "function": {"name": "nothing"}}
    fields = {
        "model": "m",
        "messages": MESSAGES,
        "tools": [TOOL, other],
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "temperature": 0,
        "max_tokens": 200,
    }
    answer = client(base_url).chat.completions.create(**fields)
    [call] = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == reason
    if call.function.name == "weather":
        check_weather(json.loads(call.function.arguments))
    else:
        assert choice == "required"
    streamed = ""
    for chunk in client(base_url).chat.completions.create(**fields, stream=True):
        for part in (chunk.choices[0].delta.tool_calls or ()) if chunk.choices else ():
            streamed += part.function.arguments
    assert streamed == call.function.arguments


def test_openai_goes_on_after_a_call(base_url: str) -> None:
    chat = client(base_url).chat.completions
    fields = {"model": "m", "tools": [TOOL], "temperature": 0, "max_tokens": 60}
    message = chat.create(messages=MESSAGES, tool_choice="required", **fields).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "Rain."}
    answer = chat.create(messages=[*MESSAGES, message, result], tool_choice="none", **fields)
    assert answer.choices[0].message.content
    assert not answer.choices[0].message.tool_calls


def test_openai_parses_objects_and_tools(base_url: str) -> None:
    openai = pytest.importorskip("openai")
    chat = client(base_url).chat.completions
    fields = {"model": "m", "messages": MESSAGES, "max_tokens": 200}
    parsed = chat.parse(response_format=City, **fields).choices[0].message.parsed
    assert isinstance(parsed, City)
    with chat.stream(response_format=City, **fields) as stream:
        for _ in stream:
            pass
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, City)
    tool = openai.pydantic_function_tool(City)
    message = chat.parse(tools=[tool], tool_choice="required", **fields).choices[0].message
    assert isinstance(message.tool_calls[0].function.parsed_arguments, City)


# ------------------------------------------------------------------------- extraction


# Mode JSON asks for objects of any form: that the model hits the class' is luck.
@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_instructor(base_url: str, mode: str) -> None:
    instructor = pytest.importorskip("instructor")
    patched = instructor.from_openai(client(base_url), mode=instructor.Mode[mode])
    city = patched.chat.completions.create(
        model="m", messages=MESSAGES, response_model=City, max_tokens=200, max_retries=3
    )
    assert isinstance(city, City)


# The same holds for PromptedOutput.
@pytest.mark.parametrize("output", ["ToolOutput", "NativeOutput"])
def test_pydantic_ai(base_url: str, output: str) -> None:
    pydantic_ai = pytest.importorskip("pydantic_ai")
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    model = OpenAIChatModel("m", provider=OpenAIProvider(base_url=base_url, api_key="none"))
    kind = getattr(pydantic_ai, output)
    agent = pydantic_ai.Agent(
        model, output_type=kind(City), model_settings={"max_tokens": 200}, retries=5
    )
    assert isinstance(agent.run_sync(QUESTION).output, City)


@pytest.mark.parametrize("method", ["function_calling", "json_schema"])
def test_langchain_structured_output(base_url: str, method: str) -> None:
    langchain = pytest.importorskip("langchain_openai")
    model = langchain.ChatOpenAI(model="m", base_url=base_url, api_key="none", max_tokens=200)
    assert isinstance(model.with_structured_output(City, method=method).invoke(QUESTION), City)


def test_langchain_tools(base_url: str) -> None:
    langchain = pytest.importorskip("langchain_openai")
    model = langchain.ChatOpenAI(model="m", base_url=base_url, api_key="none", max_tokens=200)
    bound = model.bind_tools([TOOL], tool_choice="any")
    [call, *_] = bound.invoke(QUESTION).tool_calls
    assert call["name"] == "weather"
    check_weather(call["args"])
    whole = None
    for part in bound.stream(QUESTION):
        whole = part if whole is None else whole + part
    assert whole is not None
    check_weather(whole.tool_calls[0]["args"])


def test_llama_index(base_url: str) -> None:
    pytest.importorskip("llama_index.core")
    like = pytest.importorskip("llama_index.llms.openai_like")
    from llama_index.core.tools import FunctionTool

    def weather(city: str, days: int) -> str:
        """The weather of a city."""
        return f"{city} {days}"

    model = like.OpenAILike(
        model="m",
        api_base=base_url,
        api_key="none",
        is_chat_model=True,
        is_function_calling_model=True,
        max_tokens=200,
        context_window=4096,
    )
    tool = FunctionTool.from_defaults(weather)
    answer = model.chat_with_tools([tool], user_msg=QUESTION, tool_required=True)
    [call, *_] = model.get_tool_calls_from_response(answer)
    assert call.tool_name == "weather"
    assert isinstance(call.tool_kwargs["city"], str)
    assert isinstance(call.tool_kwargs["days"], int)
    assert isinstance(model.as_structured_llm(City).complete(QUESTION).raw, City)


def test_smolagents(base_url: str) -> None:
    smolagents = pytest.importorskip("smolagents")
    model = smolagents.OpenAIServerModel(
        model_id="m",
        api_base=base_url,
        api_key="none",
        max_tokens=200,
        temperature=0,
        parallel_tool_calls=False,
    )
    agent = smolagents.ToolCallingAgent(tools=[], model=model, max_steps=1, verbosity_level=0)
    agent.run(QUESTION)
    steps = [one for one in agent.memory.steps if hasattr(one, "tool_calls")]
    calls = [call.name for one in steps for call in one.tool_calls or ()]
    assert calls
    assert set(calls) == {"final_answer"}


def test_litellm(base_url: str) -> None:
    litellm = pytest.importorskip("litellm")
    fields = {"model": "openai/m", "api_base": base_url, "api_key": "none", "messages": MESSAGES}
    answer = litellm.completion(**fields, tools=[TOOL], tool_choice="required", max_tokens=200)
    call = answer.choices[0].message.tool_calls[0]
    check_weather(json.loads(call.function.arguments))
    answer = litellm.completion(
        **fields, response_format=City, max_tokens=200, reasoning_effort="low", drop_params=True
    )
    City.model_validate_json(answer.choices[0].message.content)


def test_dspy(base_url: str) -> None:
    dspy = pytest.importorskip("dspy")
    model = dspy.LM("openai/m", api_base=base_url, api_key="none", max_tokens=300, cache=False)
    with (
        dspy.context(lm=model, adapter=dspy.JSONAdapter()),
        # It does not bind what this model writes: whether it can be parsed is luck.
        contextlib.suppress(dspy.utils.exceptions.AdapterParseError),
    ):
        dspy.Predict("question -> answer")(question=QUESTION)
    assert model.history[-1]["outputs"][0]


def test_outlines(base_url: str) -> None:
    outlines = pytest.importorskip("outlines")
    model = outlines.from_openai(client(base_url), "m")
    City.model_validate_json(model(QUESTION, City, max_tokens=200))


def test_guidance(base_url: str) -> None:
    guidance = pytest.importorskip("guidance")
    model = guidance.models.OpenAI("m", base_url=base_url, api_key="none", echo=False)
    with guidance.user():
        model += QUESTION
    with guidance.assistant():
        model += guidance.json(name="city", schema=City, max_tokens=200)
    City.model_validate_json(model["city"])


# --------------------------------------------------------------------------- examples


@pytest.mark.parametrize(
    ("name", "shows"), [("tool_loop", "calls temperature("), ("extraction", "quantity")]
)
def test_the_examples_run(base_url: str, name: str, shows: str) -> None:
    pytest.importorskip("openai")
    program = Path(__file__).parents[2] / "examples" / f"{name}.py"
    command = [sys.executable, str(program), "--url", base_url.removesuffix("/v1")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert shows in done.stdout
