"""An agent of OpenAI's Agents SDK that calls a tool and answers, over /v1/responses.

Start a server with ``make serve``, then run this with the ``openai-agents`` package installed. The
first turn insists on a call (``tool_choice``), as the smallest models seldom decide for one
themselves; the SDK lets the model choose from then on.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import Literal

import openai
from agents import Agent, ModelSettings, OpenAIResponsesModel, Runner, function_tool
from agents.tracing import set_tracing_disabled

TEMPERATURES = {"Paris": 19, "Oslo": 7, "Cairo": 31}


@function_tool
def temperature(city: Literal["Paris", "Oslo", "Cairo"]) -> str:
    """The temperature in a city now, in degrees Celsius."""
    print(f"  temperature({city!r}) = {TEMPERATURES[city]}")
    return f"It is {TEMPERATURES[city]} degrees Celsius in {city}."


async def run(client: openai.AsyncOpenAI, model: str, question: str) -> str:
    """The agent's answer; what it calls is printed on the way."""
    agent = Agent(
        name="Weather",
        instructions="Answer questions about the weather in one sentence.",
        tools=[temperature],
        model=OpenAIResponsesModel(model=model, openai_client=client),
        model_settings=ModelSettings(
            tool_choice="required", parallel_tool_calls=False, temperature=0, max_tokens=200
        ),
    )
    result = Runner.run_streamed(agent, question, max_turns=5)
    async for event in result.stream_events():
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
            print(event.data.delta, end="", flush=True)
    print()
    return str(result.final_output)


async def main() -> None:
    """Ask the first model of a server."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("question", nargs="?", default="How warm is it in Oslo?")
    arguments = parser.parse_args()
    # The SDK would send what it does to OpenAI.
    set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=arguments.url + "/v1", api_key=arguments.api_key)
    models = await client.models.list()
    await run(client, models.data[0].id, arguments.question)


if __name__ == "__main__":
    asyncio.run(main())
