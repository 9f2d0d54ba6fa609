"""Wire: how one generation route writes its answers, whole or as a stream of chunks."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Final

import orjson

from octavo import __version__
from octavo.server.work import usage
from octavo.server.work.usage import Usage

if TYPE_CHECKING:
    from octavo._core import Delta, SseTemplate
    from octavo.prompt_logprobs import PromptLogprobs
    from octavo.server.openai.protocol import GenerationRequest
    from octavo.server.work.state import ServerState

FINGERPRINT: Final = f"octavo-{__version__}"

DONE: Final = b"data: [DONE]\n\n"

# Stand in the places that the core fills. Random: a model's name or a request's id may hold any
# text, but not these.
_TEXT: Final = secrets.token_hex(16)
_FINISH: Final = secrets.token_hex(16)
_STOP: Final = secrets.token_hex(16)


def sse_event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + orjson.dumps(value) + b"\n\n"


class Wire(ABC):
    """The answer to one request, apart from what the model says.

    ``id`` and ``created`` are the same in every chunk.
    """

    object_name: ClassVar[str]
    chunk_object_name: ClassVar[str]
    id_prefix: ClassVar[str]
    # The field that holds the prompt.
    prompt_field: ClassVar[str]

    def __init__(
        self, state: ServerState, request: GenerationRequest, model: str, request_id: str
    ) -> None:
        self.state = state
        self.request = request
        self.model = model
        self.id = f"{self.id_prefix}-{request.request_id or request_id}"
        self.created = int(time.time())
        # One per prompt, where the request asks for them; complete when its first delta comes.
        self.scores: list[PromptLogprobs] = []

    # ------------------------------------------------------------- what routes differ in

    @abstractmethod
    def first_event(self, index: int) -> bytes:
        """The event that opens a sample's stream; empty: it opens with its text."""

    @abstractmethod
    def text_choice(
        self, index: int, text: str, finish_reason: str | None, stop_reason: str | int | None
    ) -> dict[str, Any]:
        """The choice of a chunk that carries text."""

    @abstractmethod
    def decorate_choice(self, choice: dict[str, Any], index: int, delta: Delta) -> None:
        """Add what a plain stream does not carry: logprobs, token ids."""

    @abstractmethod
    def final_choice(self, index: int, delta: Delta) -> dict[str, Any]:
        """The choice of a whole answer. ``delta`` holds all of the sample's output."""

    # ------------------------------------------------------------------ what they share

    @property
    def is_plain(self) -> bool:
        """Whether the core can write the chunks by itself."""
        request = self.request
        return not (
            request.sampling.get("logprobs") is not None
            or request.return_token_ids
            or request.continuous_usage_stats
        )

    def chunk(self, choices: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
        """One chunk of a stream."""
        chunk = {
            "id": self.id,
            "object": self.chunk_object_name,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
            "choices": choices,
            **fields,
        }
        if self.request.include_usage:
            # Null until the last chunk, as OpenAI has it.
            chunk.setdefault("usage", None)
        return chunk

    def sse_template(self, index: int) -> SseTemplate:
        """The chunks of choice ``index``, for the core to fill."""
        from octavo._core import SseTemplate

        event = sse_event(self.chunk([self.text_choice(index, _TEXT, _FINISH, _STOP)]))
        before, _, rest = event.partition(_TEXT.encode())
        between, _, rest = rest.partition(f'"{_FINISH}"'.encode())
        after, _, end = rest.partition(f'"{_STOP}"'.encode())
        return SseTemplate((before, between, after, end), first=self.first_event(index))

    def delta_event(self, index: int, delta: Delta) -> bytes:
        """A chunk with all its decorations."""
        choice = self.text_choice(index, delta.text, delta.finish_reason, delta.stop_reason)
        self.decorate_choice(choice, index, delta)
        fields: dict[str, Any] = {}
        if self.request.continuous_usage_stats:
            fields["usage"] = usage.usage_object(
                delta.num_prompt_tokens, delta.num_cached_tokens, delta.num_output_tokens
            )
        if delta.finish_reason is not None:
            fields["timings"] = usage.timings_object(delta)
        return sse_event(self.chunk([choice], **fields))

    def usage_event(self, tally: Usage) -> bytes:
        """The extra chunk of ``include_usage``."""
        return sse_event(self.chunk([], usage=tally.to_object()))

    def answer(self, deltas: list[Delta]) -> dict[str, Any]:
        """The whole answer, from every choice's one Delta in order."""
        tally = Usage(self.request.n)
        choices = []
        for index, delta in enumerate(deltas):
            tally.add(index, delta)
            choices.append(self.final_choice(index, delta))
        return {
            **self.envelope(choices),
            "usage": tally.to_object(),
            "timings": usage.slowest_timings(deltas),
        }

    def envelope(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """A whole answer but for its usage."""
        return {
            "id": self.id,
            "object": self.object_name,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
            "choices": choices,
        }


def add_timings(event: bytes, delta: Delta) -> bytes:
    """Put ``timings`` into the core's last chunk of a sample, which ends with ``}`` and a blank."""
    timings = orjson.dumps(usage.timings_object(delta))
    return event[:-3] + b',"timings":' + timings + b"}\n\n"
