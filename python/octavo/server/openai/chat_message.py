"""ChatMessage: one sample's message, put together from the pieces of its channels.

The core takes an answer apart (``Delta.pieces``): text, reasoning, and of each call a name, then
fragments of its arguments, then an end. Here they become the deltas of a stream, or one message.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from octavo.server.work.news import identified
from octavo.text.tools import call_id

if TYPE_CHECKING:
    from octavo._core import Piece


class ChatMessage:
    """The message of one sample so far.

    Args:
        tool_calls: name of the model's format, whose templates may want ids of a certain form.
        num_earlier_calls: calls in the conversation; Kimi's ids count on from them.
        shows_reasoning: whether reasoning is written at all.
    """

    def __init__(
        self, tool_calls: str | None, num_earlier_calls: int, *, shows_reasoning: bool
    ) -> None:
        self._format = tool_calls
        self._num_earlier_calls = num_earlier_calls
        self._shows_reasoning = shows_reasoning
        self.num_calls = 0
        self.num_ended = 0

    def deltas(self, pieces: Iterable[Piece]) -> list[dict[str, Any]]:
        """The deltas of a stream, in order; pieces of one kind in a row are one."""
        deltas: list[dict[str, Any]] = []
        for kind, call, text, given in identified(pieces):
            match kind:
                case "text" if text:
                    deltas.append({"content": text})
                case "reasoning" if text and self._shows_reasoning:
                    # DeepSeek's name is the second, which most clients read.
                    deltas.append({"reasoning": text, "reasoning_content": text})
                case "name":
                    self.num_calls += 1
                    number = self._num_earlier_calls + call
                    opened = {
                        "index": call,
                        "id": call_id(self._format, text, number, given),
                        "type": "function",
                        "function": {"name": text, "arguments": ""},
                    }
                    deltas.append({"tool_calls": [opened]})
                case "arguments" if text:
                    fragment = {"index": call, "function": {"arguments": text}}
                    deltas.append({"tool_calls": [fragment]})
                case "end":
                    self.num_ended += 1
        return deltas

    def whole(self, pieces: Iterable[Piece]) -> dict[str, Any]:
        """The message's fields that pieces make: content, tool_calls, reasoning."""
        content: list[str] = []
        reasoning: list[str] = []
        calls: dict[int, dict[str, Any]] = {}
        arguments: dict[int, list[str]] = {}
        for delta in self.deltas(pieces):
            content.append(delta.get("content", ""))
            reasoning.append(delta.get("reasoning", ""))
            for call in delta.get("tool_calls", ()):
                index = call.pop("index")
                calls.setdefault(index, call)
                arguments.setdefault(index, []).append(call["function"]["arguments"])
        for index, call in calls.items():
            call["function"]["arguments"] = "".join(arguments[index])
        text, thought = "".join(content), "".join(reasoning)
        return {
            # Null where there is something else in place of it.
            "content": None if not text and (calls or thought) else text,
            "tool_calls": list(calls.values()),
            "reasoning": thought or None,
            "reasoning_content": thought or None,
        }
