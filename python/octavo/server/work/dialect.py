"""Dialect: one API's requests for text, and the form of its answers.

The server has one way from a request for text to its last byte, ``work/answer.py``. An API is a
file that implements two protocols on it, ``Dialect`` and ``Reply``; openai/chat.py and
openai/completions.py are two. Nothing else knows the form of an API's bodies, frames or errors.

A ``Dialect`` is made once and belongs to its routes. Its ``parse`` turns a JSON body into a
``GenerationRequest``, which is the same for every API; its ``reply`` makes the prompts, and the
``Reply`` that writes the answer to this one request. A *sample* is one text for one prompt: sample
``i`` of prompt ``p`` has index ``p * n + i``. The answer is either ``whole``, or a stream of frames
in this order::

    start(index)           a sample's stream opens
    text(index, news)      a piece of its text                       ... zero or more times
    end(index, news)       the rest of its text, and why it ended
    close(usage)           after the last sample's end: token counts, an end mark
    error(error)           in place of everything that is left

Samples run at once: their frames alternate, each sample's own are in order. A frame is bytes, and
may be empty. One that must not be lost is written by ``start``, ``end`` or ``close``.

Frames of text are the many. Where their bytes depend on the text alone, ``templates`` hands the
bytes around it to the core, which then writes them to the socket by itself, and ``text`` is not
called. A reply whose plan has ``channels`` gets its samples' news in ``pieces``: text, reasoning,
tool calls. The core's frames hold text and reasoning up to the first call in a piece of news; what
is left is in ``pieces``, for ``text`` and ``end`` to write.

Errors before the first frame are raised, not written: the edge of the server (``http/app.py``)
answers them by ``error_body``, as it does for errors on the way to the route.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from octavo.server.work.request import GenerationRequest

if TYPE_CHECKING:
    from octavo._core import SseTemplate, TokenIds
    from octavo.prompt_logprobs import PromptLogprobs
    from octavo.server.work.chat import ChatPlan
    from octavo.server.work.news import News
    from octavo.server.work.served_model import ServedModel
    from octavo.server.work.usage import Usage


Request = TypeVar("Request", bound=GenerationRequest)


class Reply(Protocol):
    """The answer to one request.

    Attributes:
        prompts: what the model reads.
        prompt_field: the body's field that they came in, for errors.
        scores: by prompt, where the request asks for the prompts' logprobs; set before the first
            call about a sample of the prompt.
        plan: how the answers are bound, and taken apart.
    """

    prompts: Sequence[TokenIds]
    scores: dict[int, PromptLogprobs]
    plan: ChatPlan

    @property
    def prompt_field(self) -> str: ...

    def templates(self) -> list[SseTemplate] | None:
        """One per sample for the core to write ``start`` and ``text`` by.

        None: their frames hold more than the text.
        """

    def start(self, index: int) -> bytes:
        """The frame that opens a sample's stream."""

    def text(self, index: int, news: News) -> bytes:
        """The frame of a piece of text."""

    def end(self, index: int, news: News) -> bytes:
        """A sample's last frame: ``news`` holds the rest of its text, and why it ended."""

    def close(self, usage: Usage) -> bytes:
        """The stream's last frame."""

    def error(self, error: BaseException) -> bytes:
        """The frame of a failure after the first frame; it is the last."""

    def whole(self, news: Sequence[News], usage: Usage) -> bytes:
        """The whole answer, as JSON. ``news``: of every sample all its output, in order."""


class Dialect(Protocol[Request]):
    """One API's requests for text.

    Attributes:
        media_type: of streams.
        ping: what is written where a stream is silent for long; clients skip it.
        early_ping: the same before the stream's first frame.
    """

    @property
    def media_type(self) -> str: ...
    @property
    def ping(self) -> bytes: ...
    @property
    def early_ping(self) -> bytes: ...

    def parse(self, body: Mapping[str, Any]) -> Request:
        """Check a body. Knows no model, and may run on any thread.

        Raises:
            InvalidParameterError, UnsupportedParameterError: naming the field.
        """

    async def reply(self, request: Request, model: ServedModel, request_id: str) -> Reply:
        """The prompts of a request that ``parse`` made, and what will write its answer.

        Raises:
            InvalidRequestError: the prompts cannot be made.
        """

    def error_body(self, error: BaseException, request_id: str | None = None) -> bytes:
        """The body of an answer that is an error; its status is the table's in errors.py."""
