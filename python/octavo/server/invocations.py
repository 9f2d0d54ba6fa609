"""POST /invocations: SageMaker's one route, which answers as the route whose body a request has."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from octavo.errors import BadRequestError
from octavo.server.openai.chat import chat_completions
from octavo.server.openai.completions import completions
from octavo.server.pooling.classify import classify
from octavo.server.pooling.embeddings import embeddings
from octavo.server.pooling.encode import encode
from octavo.server.pooling.protocol import SCORE_NAMES
from octavo.server.pooling.rerank import rerank, score

if TYPE_CHECKING:
    from octavo.server.http.exchange import Exchange
    from octavo.server.work.state import ServerState


async def invocations(state: ServerState, exchange: Exchange) -> None:
    """The answer of the route whose body this is, by its fields and the model's task."""
    body = await exchange.peek()
    await _handler(state, body)(state, exchange)


def _handler(
    state: ServerState, body: dict[str, Any]
) -> Callable[[ServerState, Exchange], Awaitable[None]]:
    names = {name for name, value in body.items() if value is not None}
    if "messages" in names:
        return chat_completions
    if "prompt" in names and "input" not in names:
        return completions
    if "input" in names:
        if "task" in names:
            return encode
        model = body.get("model")
        pooling = state.model(model if isinstance(model, str) else None).engine.pooling
        if pooling is not None and pooling.is_per_token:
            return encode
        return embeddings if pooling is None or pooling.task == "embed" else classify
    if "query" in names:
        return rerank
    if any(names.issuperset(pair) for pair in SCORE_NAMES):
        return score
    raise BadRequestError(
        "the body is that of no route: give messages, prompt, input, query and documents, or "
        "text_1 and text_2"
    )
