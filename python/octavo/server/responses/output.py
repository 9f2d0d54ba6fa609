"""Output: the items of one response, and the events by which they come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from octavo.server.responses.custom_input import CustomInput
from octavo.server.responses.items import new_id, seal

if TYPE_CHECKING:
    from octavo.server.responses.tools import ResponseTools, ToolOrigin
    from octavo.server.work.blocks import Block, Step

# An event's name and its fields, without its number.
Event = tuple[str, dict[str, Any]]


class OutputItem:
    """One block as an item. Its id stays the same from its first event to the last.

    Args:
        origin: what the function of a call stands for.
        is_sealed: whether reasoning is given a second time, for clients that drop the first.
        is_raw: whether a custom call's text comes as it is, and not inside of arguments.
    """

    def __init__(self, block: Block, origin: ToolOrigin, *, is_sealed: bool, is_raw: bool) -> None:
        self.block = block
        self.logprobs: list[dict[str, Any]] = []
        self._origin = origin
        self._is_sealed = is_sealed
        self._is_raw = is_raw
        self._input = CustomInput()
        kind = {"text": "message", "reasoning": "reasoning"}.get(block.kind)
        if kind is None:
            kind = "custom_tool_call" if origin.is_custom else "function_call"
        self.kind = kind
        self.id = new_id(kind)

    @property
    def place(self) -> dict[str, Any]:
        """Fields of every event about the item."""
        return {"item_id": self.id, "output_index": self.block.index}

    def to_object(self, status: str) -> dict[str, Any]:
        """The item as far as it has come."""
        block = self.block
        item: dict[str, Any] = {"id": self.id, "type": self.kind, "status": status}
        match self.kind:
            case "message":
                parts = [self._part(block.text)] if status != "in_progress" else []
                return {**item, "role": "assistant", "content": parts}
            case "reasoning":
                parts = [self._part(block.text)] if status != "in_progress" else []
                item |= {"summary": [], "content": parts}
                if self._is_sealed:
                    item["encrypted_content"] = seal(block.text) if parts else ""
                return item
        item |= {"call_id": block.call_id, "name": self._origin.name}
        if self._origin.namespace is not None:
            item["namespace"] = self._origin.namespace
        if self.kind == "custom_tool_call":
            return {**item, "input": self._text}
        return {**item, "arguments": block.text}

    @property
    def _text(self) -> str:
        return self.block.text if self._is_raw else self._input.text

    def _part(self, text: str) -> dict[str, Any]:
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        logprobs = self.logprobs if text else []
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    # --------------------------------------------------------------------------- events

    def added(self) -> Iterator[Event]:
        """Events of an item that begins."""
        at = self.block.index
        yield "output_item.added", {"output_index": at, "item": self.to_object("in_progress")}
        if self.kind in ("message", "reasoning"):
            part = self._part("")
            yield "content_part.added", {**self.place, "content_index": 0, "part": part}

    def delta(self, text: str, logprobs: list[dict[str, Any]]) -> Iterator[Event]:
        """Events of more of its text."""
        own: dict[str, Any]
        match self.kind:
            case "message":
                self.logprobs += logprobs
                own = {"content_index": 0, "delta": text, "logprobs": logprobs}
                yield "output_text.delta", {**self.place, **own}
            case "reasoning":
                own = {"content_index": 0, "delta": text}
                yield "reasoning_text.delta", {**self.place, **own}
            case "function_call":
                yield "function_call_arguments.delta", {**self.place, "delta": text}
            case "custom_tool_call":
                yield from self._input_delta(text if self._is_raw else self._input.push(text))

    def _input_delta(self, text: str) -> Iterator[Event]:
        if text:
            yield "custom_tool_call_input.delta", {**self.place, "delta": text}

    def done(self) -> Iterator[Event]:
        """Events of an item that is complete, or that the answer's end has cut, but the last."""
        text = self.block.text
        done: dict[str, Any]
        match self.kind:
            case "message" | "reasoning":
                where: dict[str, Any] = {**self.place, "content_index": 0}
                name = "output_text" if self.kind == "message" else "reasoning_text"
                done = {**where, "text": text}
                if self.kind == "message":
                    done["logprobs"] = self.logprobs
                yield f"{name}.done", done
                yield "content_part.done", {**where, "part": self._part(text)}
            case "function_call":
                done = {"name": self._origin.name, "arguments": text}
                yield "function_call_arguments.done", {**self.place, **done}
            case "custom_tool_call":
                if self.block.is_whole and not self._is_raw:
                    yield from self._input_delta(self._input.finish())
                yield "custom_tool_call_input.done", {**self.place, "input": self._text}


class Output:
    """The items of one response so far.

    An item's last event waits for the next one's first: only then it is known that the answer was
    not cut inside it.

    Args:
        tools: the request's.
        is_sealed, is_raw: see ``OutputItem``.
    """

    def __init__(self, tools: ResponseTools, *, is_sealed: bool, is_raw: bool) -> None:
        self._tools = tools
        self._is_sealed = is_sealed
        self._is_raw = is_raw
        self._items: list[OutputItem] = []
        self._is_cut = False
        self._has_ended = True
        # Of tokens whose text has not come: half a character, or what is no text.
        self._logprobs: list[dict[str, Any]] = []

    def take(
        self, steps: Iterable[Step], logprobs: Sequence[dict[str, Any]] = ()
    ) -> Iterator[Event]:
        """The events of steps. ``logprobs``: of the tokens behind them, for the next text."""
        self._logprobs += logprobs
        for action, block, text in steps:
            match action:
                case "open":
                    yield from self.end(is_cut=False)
                    origin = self._tools.origin(block.name)
                    self._items.append(
                        OutputItem(block, origin, is_sealed=self._is_sealed, is_raw=self._is_raw)
                    )
                    self._has_ended = False
                    yield from self._items[-1].added()
                case "add":
                    item = self._items[-1]
                    own: list[dict[str, Any]] = []
                    if item.kind == "message":
                        own, self._logprobs = self._logprobs, own
                    yield from item.delta(text, own)
                case "close":
                    item = self._items[-1]
                    if item.kind == "message":
                        # Of the end of the text, which has none.
                        item.logprobs += self._logprobs
                        self._logprobs = []
                    yield from item.done()

    def end(self, *, is_cut: bool) -> Iterator[Event]:
        """The last event of the last item, unless it has come. ``is_cut``: its end is missing."""
        if self._has_ended:
            return
        self._has_ended, self._is_cut = True, is_cut
        item = self._items[-1]
        at = item.block.index
        yield "output_item.done", {"output_index": at, "item": item.to_object(self._status(item))}

    def to_list(self) -> list[dict[str, Any]]:
        """The items of a response that is over."""
        return [item.to_object(self._status(item)) for item in self._items]

    def _status(self, item: OutputItem) -> str:
        is_last = item is self._items[-1]
        return "incomplete" if is_last and self._is_cut else "completed"
