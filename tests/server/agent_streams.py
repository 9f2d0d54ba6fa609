"""Streams of agents' dialects: their events, folded as clients fold them."""

from __future__ import annotations

import json
from typing import Any

from fake_engine import FakeEngine
from harness import RunningServer, StartServer

from families import TOOLS, Family
from octavo.server.anthropic.partial_json import read_object

MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"

ANTHROPIC_TOOLS = [
    {
        "name": tool["function"]["name"],
        "description": tool["function"].get("description", ""),
        "input_schema": tool["function"]["parameters"] or {"type": "object", "properties": {}},
    }
    for tool in TOOLS
]
FLAT_TOOLS = [{"type": "function", **tool["function"]} for tool in TOOLS]


def start_family(start_server: StartServer, family: Family, **flags: Any) -> RunningServer:
    engine = FakeEngine(max_model_len=32768)
    engine.chat_template = family.source
    engine.said = family.says
    return start_server(engine, **flags)


def events(body: bytes) -> list[tuple[str, dict[str, Any]]]:
    """The events of a whole stream: each has a name and data, which repeats the name."""
    assert body.endswith(b"\n\n")
    found = []
    for block in body.decode().removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append((event["type"], event))
    return found


def fold_message(stream: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """The message that a stream of Anthropic's events tells, and the rules of the order."""
    assert [name for name, _ in stream[:2]] == ["message_start", "ping"]
    message = dict(stream[0][1]["message"])
    assert (message["content"], message["stop_reason"]) == ([], None)
    content: list[dict[str, Any]] = []
    arguments = ""
    is_open = False
    for name, event in stream[2:-2]:
        match name:
            case "content_block_start":
                assert not is_open
                assert event["index"] == len(content)
                content.append(event["content_block"])
                is_open, arguments = True, ""
            case "content_block_delta":
                assert is_open
                assert event["index"] == len(content) - 1
                block, delta = content[-1], event["delta"]
                match delta["type"]:
                    case "text_delta":
                        block["text"] += delta["text"]
                    case "thinking_delta":
                        assert block["signature"] == ""
                        block["thinking"] += delta["thinking"]
                    case "signature_delta":
                        block["signature"] = delta["signature"]
                    case "input_json_delta":
                        arguments += delta["partial_json"]
                        # Clients parse each prefix.
                        assert arguments.lstrip().startswith("{")
                        block["input"] = read_object(arguments)
            case "content_block_stop":
                assert event["index"] == len(content) - 1
                is_open = False
            case _:
                raise AssertionError(name)
    assert not is_open
    (name, delta), (last, _) = stream[-2:]
    assert (name, last) == ("message_delta", "message_stop")
    return {**message, "content": content, **delta["delta"], "usage": delta["usage"]}


def fold_response(stream: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """The response that a stream of events tells, and the rules of their order."""
    assert [event["sequence_number"] for _, event in stream] == list(range(len(stream)))
    assert [name for name, _ in stream[:2]] == ["response.created", "response.in_progress"]
    created = stream[0][1]["response"]
    assert (created["status"], created["output"], created["usage"]) == ("in_progress", [], None)
    name, last = stream[-1]
    response: dict[str, Any] = last["response"]
    assert name == f"response.{response['status']}"
    assert response["id"] == created["id"]
    items: list[dict[str, Any]] = []
    texts: list[str] = []
    for name, event in stream[2:-1]:
        name = name.removeprefix("response.")
        if name == "output_item.added":
            assert event["output_index"] == len(items) == len(texts)
            assert event["item"]["status"] == "in_progress"
            items.append(event["item"])
            texts.append("")
            continue
        assert event["output_index"] == len(items) - 1
        item = items[-1]
        if name == "output_item.done":
            done = event["item"]
            assert done["id"] == item["id"]
            assert text_of(done) == texts[-1]
            items[-1] = done
            continue
        assert event["item_id"] == item["id"]
        match item["type"], name.split("."):
            case "message" | "reasoning", ["content_part", "added"]:
                assert event["part"]["text"] == ""
            case "message" | "reasoning", ["content_part", "done"]:
                assert event["part"]["text"] == texts[-1]
            case (
                ("message", ["output_text", step])
                | ("reasoning", ["reasoning_text", step])
                | ("function_call", ["function_call_arguments", step])
                | ("custom_tool_call", ["custom_tool_call_input", step])
            ):
                if step == "delta":
                    texts[-1] += event["delta"]
                else:
                    whole = [event[key] for key in ("text", "arguments", "input") if key in event]
                    assert whole == [texts[-1]]
            case _:
                raise AssertionError((item["type"], name))
    assert items == response["output"]
    return response


def text_of(item: dict[str, Any]) -> str:
    """What is in an item."""
    if "content" in item:
        return "".join(part["text"] for part in item["content"])
    return str(item.get("arguments", item.get("input")))


def without(value: Any, *names: str) -> Any:
    """A JSON value without the members of these names, which are new in every answer."""
    if isinstance(value, dict):
        return {key: without(one, *names) for key, one in value.items() if key not in names}
    if isinstance(value, list):
        return [without(one, *names) for one in value]
    return value
