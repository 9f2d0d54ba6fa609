"""ollama_reply: an answer as lines of JSON, each with a piece of it, the last one with counts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Protocol

import orjson

from octavo.server.anthropic.partial_json import read_object
from octavo.server.compat.errors import error_body
from octavo.server.work.blocks import Block, Blocks
from octavo.server.work.news import pieces_of
from octavo.text.tools import call_id, num_tool_calls

if TYPE_CHECKING:
    from octavo._core import SseTemplate, TokenIds
    from octavo.prompt_logprobs import PromptLogprobs
    from octavo.server.compat.ollama_protocol import OllamaRequest
    from octavo.server.work.blocks import Step
    from octavo.server.work.chat import ChatPlan
    from octavo.server.work.news import News
    from octavo.server.work.served_model import ServedModel
    from octavo.server.work.usage import Usage


class Route(Protocol):
    """Of a dialect: whether its answers are messages, and the field its prompts come in."""

    is_chat: bool
    prompt_field: str


class OllamaReply:
    """One sample: a line a piece, and one with the counts at its end."""

    def __init__(
        self,
        request: OllamaRequest,
        model: ServedModel,
        prompts: Sequence[TokenIds],
        plan: ChatPlan,
        route: Route,
    ) -> None:
        self.prompts = prompts
        self.prompt_field = route.prompt_field
        self.scores: dict[int, PromptLogprobs] = {}
        self.plan = plan
        self._is_chat = route.is_chat
        self._model = model
        self._use = request.tool_use
        self._shows_thinking = plan.channels is not None and request.think is not False
        self._head = {"model": request.model or model.names[0], "created_at": now()}
        conversation = request.conversation
        num_earlier = 0 if conversation is None else num_tool_calls(conversation.messages)

        def new_id(name: str, number: int, given: str) -> str:
            return call_id(model.chat_format.tool_calls, name, num_earlier + number, given)

        self._blocks = Blocks(new_id, shows_reasoning=self._shows_thinking)

    def templates(self) -> list[SseTemplate] | None:
        """The frames around a text and around a thought, for the core."""
        from octavo._core import SseTemplate

        # Not in a model's name: the field is the last but one.
        before, _, after = self._piece("text", _MARK).rpartition(_MARK.encode())
        thought = None
        if self._shows_thinking:
            first, _, last = self._piece("reasoning", _MARK).rpartition(_MARK.encode())
            thought = [first, last]
        return [SseTemplate(before, after, b"", thought)]

    def start(self, index: int) -> bytes:
        """Nothing: the first piece opens the stream."""
        return b""

    def text(self, index: int, news: News) -> bytes:
        """A line of each piece."""
        return self._lines(self._blocks.take(pieces_of(news)))

    def end(self, index: int, news: News) -> bytes:
        """The rest of the answer, and the counts."""
        rest = self.text(index, news) + self._lines(self._blocks.end())
        self._count_calls()
        return rest + line(**self._head, **content("", self._is_chat), **_counts(news))

    def close(self, usage: Usage) -> bytes:
        """Nothing: the end has said it all."""
        return b""

    def error(self, error: BaseException) -> bytes:
        """A line with the error."""
        return error_body(error) + b"\n"

    def whole(self, news: Sequence[News], usage: Usage) -> bytes:
        """The answer and the counts."""
        one = news[0]
        for _ in self._blocks.take(pieces_of(one)):
            pass
        for _ in self._blocks.end():
            pass
        self._count_calls()
        texts = {"text": "", "reasoning": ""}
        for block in self._blocks.all:
            if block.kind != "call":
                texts[block.kind] += block.text
        calls = [_call(number, block) for number, block in enumerate(self._whole_calls())]
        answer = content(texts["text"], self._is_chat, texts["reasoning"], calls)
        return line(**self._head, **answer, **_counts(one))

    def _whole_calls(self) -> list[Block]:
        """The calls that the model has ended: half an object of arguments is of no use."""
        return [block for block in self._blocks.calls if block.is_whole]

    def _count_calls(self) -> None:
        num_whole = len(self._whole_calls())
        self._model.count_calls(self._use, len(self._blocks.calls), num_whole)

    def _lines(self, steps: Iterable[Step]) -> bytes:
        lines = []
        for step, block, text in steps:
            if step == "add" and block.kind != "call":
                lines.append(self._piece(block.kind, text))
            elif step == "close" and block.kind == "call" and block.is_whole:
                call = _call(len(self._whole_calls()) - 1, block)
                lines.append(line(**self._head, done=False, **content("", True, calls=[call])))
        return b"".join(lines)

    def _piece(self, kind: str, text: str) -> bytes:
        piece = content(text, self._is_chat) if kind == "text" else content("", self._is_chat, text)
        return line(**self._head, done=False, **piece)


# A text that JSON leaves as it is.
_MARK: Final = "octavo-text-goes-here-7d02"


def now() -> str:
    """The time, as Ollama writes it."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def line(**value: Any) -> bytes:
    """A line of JSON."""
    return orjson.dumps(value) + b"\n"


def content(
    text: str, is_chat: bool, thinking: str = "", calls: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """A piece of an answer, or all of it, as /api/chat or /api/generate has it."""
    more: dict[str, Any] = {"thinking": thinking} if thinking else {}
    if not is_chat:
        return {"response": text, **more}
    if calls:
        more["tool_calls"] = list(calls)
    return {"message": {"role": "assistant", "content": text, **more}}


def _call(number: int, block: Block) -> dict[str, Any]:
    function = {"index": number, "name": block.name, "arguments": read_object(block.text)}
    return {"id": block.call_id, "function": function}


def _counts(news: News) -> dict[str, Any]:
    """The reason of a sample's end, its tokens, and nanoseconds."""
    parts = [_nanoseconds(s) for s in (news.queue_s, news.prefill_s, news.decode_s)]
    return {
        "done": True,
        "done_reason": news.finish_reason,
        "total_duration": sum(parts),
        "load_duration": 0,
        "prompt_eval_count": news.num_prompt_tokens,
        "prompt_eval_duration": parts[1],
        "eval_count": news.num_output_tokens,
        "eval_duration": parts[2],
    }


def _nanoseconds(seconds: float | None) -> int:
    return round((seconds or 0.0) * 1e9)
