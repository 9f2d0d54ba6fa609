"""A tool loop: the model calls functions, gets their results, and answers.

Start a server with ``make serve``, then run this with the ``openai`` package installed. The first
turn insists on a call (``tool_choice``), as the smallest models seldom decide for one themselves;
with a larger model "auto" does.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import openai

TEMPERATURES = {"Paris": 19, "Oslo": 7, "Cairo": 31}


def temperature(city: str) -> str:
    """The temperature of a city, as the function's result."""
    if city not in TEMPERATURES:
        return json.dumps({"error": f"no such city; there are {', '.join(TEMPERATURES)}"})
    return json.dumps({"city": city, "celsius": TEMPERATURES[city]})


FUNCTIONS: dict[str, Callable[..., str]] = {"temperature": temperature}
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "temperature",
            "description": "The temperature in a city now, in degrees Celsius.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "enum": list(TEMPERATURES)}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]


def run(client: openai.OpenAI, model: str, question: str, max_turns: int = 4) -> str:
    """Ask, call what the model asks for, and return its answer."""
    messages: list[Any] = [{"role": "user", "content": question}]
    choice: Any = "required"
    for _ in range(max_turns):
        answer = client.chat.completions.create(
            model=model,
            messages=messages,
            tools=TOOLS,
            tool_choice=choice,
            parallel_tool_calls=False,
            temperature=0,
            max_tokens=200,
        )
        message = answer.choices[0].message
        if not message.tool_calls:
            return message.content or ""
        messages.append(message)
        for call in message.tool_calls:
            if call.type != "function":
                continue
            print(f"calls {call.function.name}({call.function.arguments})")
            result = FUNCTIONS[call.function.name](**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        choice = "none"
    return "(no answer)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question", nargs="?", default="How warm is it in Paris?")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    arguments = parser.parse_args()
    client = openai.OpenAI(base_url=arguments.url + "/v1", api_key="none")
    model = client.models.list().data[0].id
    print(run(client, model, arguments.question))


if __name__ == "__main__":
    main()
