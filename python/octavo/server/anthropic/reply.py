"""MessagesReply: an answer as Anthropic's message, whole or as its events."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

import orjson

from octavo.server.anthropic.errors import error_object
from octavo.server.anthropic.partial_json import read_object
from octavo.server.work.blocks import Blocks
from octavo.server.work.news import pieces_of
from octavo.server.work.usage import num_written
from octavo.text.tools import call_id, num_tool_calls

if TYPE_CHECKING:
    from octavo._core import SseTemplate, TokenIds
    from octavo.engine.engine import AsyncEngine
    from octavo.prompt_logprobs import PromptLogprobs
    from octavo.server.anthropic.protocol import MessagesRequest
    from octavo.server.work.blocks import Block, Step
    from octavo.server.work.chat import ChatPlan
    from octavo.server.work.news import News
    from octavo.server.work.served_model import ServedModel
    from octavo.server.work.usage import Usage

# Placeholder of the text that the core puts in. Random: no other part of a frame may hold it.
_TEXT: Final = secrets.token_hex(16)

# Arguments that are no object, as some models write them, as the member of one: a block's input is
# always an object.
_WRAP: Final = ('{"arguments":', "}")


def event(kind: str, **fields: Any) -> bytes:
    """One event of a stream. Clients go by its name."""
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), orjson.dumps({"type": kind, **fields}))


PING: Final = event("ping")


class MessagesReply:
    """The answer to one request.

    Text that is nothing else is one block, which the core writes by itself. With channels the
    blocks follow from the pieces.
    """

    prompt_field = "messages"

    def __init__(
        self,
        request: MessagesRequest,
        model: ServedModel,
        request_id: str,
        prompt: TokenIds,
        plan: ChatPlan,
    ) -> None:
        self.request = request
        self.prompts: Sequence[TokenIds] = [prompt]
        self.scores: dict[int, PromptLogprobs] = {}
        self.plan = plan
        self._model = model
        self._request_id = request_id
        num_earlier = num_tool_calls(request.conversation.messages)
        form = model.chat_format.tool_calls

        def new_call_id(name: str, number: int, given: str) -> str:
            own = call_id(form, name, num_earlier + number, given)
            return "toolu_" + own.removeprefix("call_") if own.startswith("call_") else own

        self._blocks = Blocks(
            new_call_id,
            max_calls=None if request.tool_use.parallel else 1,
            shows_reasoning=request.thinks,
        )
        self._message: dict[str, Any] = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": request.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "stop_details": None,
            "container": None,
        }

    # ------------------------------------------------------------------------ the stream

    def templates(self) -> list[SseTemplate] | None:
        """One, where the answer is text and nothing else."""
        if self.plan.channels is not None:
            return None
        from octavo._core import SseTemplate

        opening = self._events(self._blocks.open("text"))
        [block] = self._blocks.all
        frame = self._delta(block, _TEXT)
        before, _, after = frame.partition(_TEXT.encode())
        return [SseTemplate(before, after, self.start(0) + opening)]

    def start(self, index: int) -> bytes:
        """The message without content."""
        usage = _usage(len(self.prompts[0]), 1)
        return event("message_start", message={**self._message, "usage": usage}) + PING

    def text(self, index: int, news: News) -> bytes:
        return self._events(self._blocks.take(pieces_of(news)))

    def end(self, index: int, news: News) -> bytes:
        """The rest of the blocks, and why they end."""
        frames = self._events(self._blocks.take(pieces_of(news))) + self._events(self._blocks.end())
        usage = _news_usage(self._model.engine, news)
        return frames + event("message_delta", delta=self._end(news), usage=usage)

    def close(self, usage: Usage) -> bytes:
        return event("message_stop")

    def error(self, error: BaseException) -> bytes:
        return event("error", **error_object(error, self._request_id))

    def _events(self, steps: Iterable[Step]) -> bytes:
        frames = []
        for action, block, text in steps:
            match action:
                case "open":
                    opened = self._content(block)
                    start = event("content_block_start", index=block.index, content_block=opened)
                    frames.append(start)
                case "add":
                    frames.append(self._delta(block, text))
                case "close":
                    frames.append(self._last_delta(block))
                    frames.append(event("content_block_stop", index=block.index))
        return b"".join(frames)

    def _delta(self, block: Block, text: str) -> bytes:
        match block.kind:
            case "text":
                delta = {"type": "text_delta", "text": text}
            case "reasoning":
                delta = {"type": "thinking_delta", "thinking": text}
            case "call":
                if len(block.parts) == 1 and not _is_object(block):
                    text = _WRAP[0] + text
                delta = {"type": "input_json_delta", "partial_json": text}
        return event("content_block_delta", index=block.index, delta=delta)

    def _last_delta(self, block: Block) -> bytes:
        """Events between a block's text and its stop."""
        if block.kind == "reasoning":
            delta = {"type": "signature_delta", "signature": _signature(block)}
        elif block.kind == "call" and block.parts and block.is_whole and not _is_object(block):
            delta = {"type": "input_json_delta", "partial_json": _WRAP[1]}
        else:
            return b""
        return event("content_block_delta", index=block.index, delta=delta)

    # ------------------------------------------------------------------ the whole answer

    def whole(self, news: Sequence[News], usage: Usage) -> bytes:
        [one] = news
        for _ in self._blocks.take(pieces_of(one)):
            pass
        for _ in self._blocks.end():
            pass
        content = [self._content(block) for block in self._blocks.all]
        counts = {"usage": _news_usage(self._model.engine, one)}
        return orjson.dumps({**self._message, "content": content, **self._end(one), **counts})

    def _content(self, block: Block) -> dict[str, Any]:
        """A block as far as it has come."""
        match block.kind:
            case "text":
                return {"type": "text", "text": block.text, "citations": None}
            case "reasoning":
                signature = _signature(block) if block.is_whole else ""
                return {"type": "thinking", "thinking": block.text, "signature": signature}
        text = block.text
        if text and not _is_object(block):
            text = _WRAP[0] + text + (_WRAP[1] if block.is_whole else "")
        arguments = read_object(text)
        return {
            "type": "tool_use",
            "id": block.call_id,
            "name": block.name,
            "input": arguments,
            "caller": {"type": "direct"},
        }

    def _end(self, news: News) -> dict[str, Any]:
        """The reason of the answer's end; counts the outcome of one that may have called tools."""
        calls = self._blocks.calls
        num_whole = sum(block.is_whole for block in calls)
        self._model.count_calls(self.request.tool_use, len(calls), num_whole)
        reason, stop = "end_turn", None
        if news.finish_reason == "length":
            reason = "max_tokens"
        elif isinstance(news.stop_reason, str):
            reason, stop = "stop_sequence", news.stop_reason
        elif calls:
            reason = "tool_use"
        return {"stop_reason": reason, "stop_sequence": stop}


def _is_object(block: Block) -> bool:
    """True if a call's arguments, of which there are some, are an object."""
    return block.parts[0].lstrip().startswith("{")


def _signature(block: Block) -> str:
    """Anthropic's is proof that its model has thought this; here it only must be there."""
    return hashlib.sha256(block.text.encode()).hexdigest()


def _usage(
    num_prompt_tokens: int,
    num_output: int,
    *,
    num_cached: int = 0,
    num_written: int = 0,
    num_reasoning: int = 0,
) -> dict[str, Any]:
    """Anthropic's ``usage``, whose ``input_tokens`` are those that the cache has no part in."""
    return {
        "input_tokens": num_prompt_tokens - num_cached - num_written,
        "cache_creation": None,
        "cache_creation_input_tokens": num_written,
        "cache_read_input_tokens": num_cached,
        "output_tokens": num_output,
        "output_tokens_details": {"thinking_tokens": num_reasoning},
        "server_tool_use": None,
        "service_tier": "standard",
        "inference_geo": None,
    }


def _news_usage(engine: AsyncEngine, news: News) -> dict[str, Any]:
    return _usage(
        news.num_prompt_tokens,
        news.num_output_tokens,
        num_cached=news.num_cached_tokens,
        num_written=num_written(engine, news),
        num_reasoning=news.num_reasoning_tokens,
    )
