"""Routes: which handler answers which path, by which methods."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple

from starlette.requests import ClientDisconnect
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from octavo.errors import (
    DrainingError,
    LoadingError,
    QueueFullError,
    RequestTooLongError,
    RouteNotImplementedError,
    error_kind,
)
from octavo.server import health
from octavo.server.http.access import open_paths
from octavo.server.http.exchange import Exchange
from octavo.server.http.openapi import describe
from octavo.server.metrics import metrics
from octavo.server.openai import models
from octavo.server.openai.chat import chat_completions
from octavo.server.openai.completions import completions
from octavo.server.openai.protocol import (
    CHAT_BODY,
    COMPLETION_BODY,
    DETOKENIZE_BODY,
    TOKENIZE_BODY,
    Body,
)
from octavo.server.openai.tokenize import detokenize, tokenize
from octavo.server.pooling.classify import classify
from octavo.server.pooling.embeddings import embeddings
from octavo.server.pooling.protocol import (
    CLASSIFY_BODY,
    EMBEDDING_BODY,
    RERANK_BODY,
    SCORE_BODY,
)
from octavo.server.pooling.rerank import rerank, score
from octavo.server.work.state import ServerState

Handler = Callable[[ServerState, Exchange], Awaitable[None]]


class Entry(NamedTuple):
    """One row of the table. ``body``: what a POST may hold. ``admits``: its requests queue for the
    engine."""

    path: str
    methods: tuple[str, ...]
    handler: Handler
    body: Body | None = None
    admits: bool = False


async def openapi(state: ServerState, exchange: Exchange) -> None:
    """This description."""
    config = state.config
    document = describe(
        ROUTES,
        open_paths=open_paths(config) if config.api_key else None,
        root_path=config.root_path,
    )
    await exchange.respond_json(document)


async def not_implemented(state: ServerState, exchange: Exchange) -> None:
    """Not in this version: always 501."""
    path = exchange.url.path
    raise RouteNotImplementedError(f"{path} is not supported by this version of the server")


# The most used first: they are tried in this order.
ROUTES: Final[tuple[Entry, ...]] = (
    Entry("/v1/chat/completions", ("POST",), chat_completions, CHAT_BODY, admits=True),
    Entry("/v1/completions", ("POST",), completions, COMPLETION_BODY, admits=True),
    Entry("/v1/embeddings", ("POST",), embeddings, EMBEDDING_BODY, admits=True),
    Entry("/v1/score", ("POST",), score, SCORE_BODY, admits=True),
    Entry("/v1/rerank", ("POST",), rerank, RERANK_BODY, admits=True),
    # vLLM's name for it.
    Entry("/classify", ("POST",), classify, CLASSIFY_BODY, admits=True),
    Entry("/v1/models", ("GET",), models.list_models),
    # Names may hold slashes.
    Entry("/v1/models/{name:path}", ("GET",), models.get_model),
    Entry("/tokenize", ("POST",), tokenize, TOKENIZE_BODY),
    Entry("/detokenize", ("POST",), detokenize, DETOKENIZE_BODY),
    Entry("/health", ("GET",), health.health),
    Entry("/ready", ("GET",), health.ready),
    # SageMaker's name for it, by either method.
    Entry("/ping", ("GET", "POST"), health.health),
    Entry("/version", ("GET",), health.version),
    Entry("/load", ("GET",), health.load),
    Entry("/metrics", ("GET",), metrics),
    Entry("/openapi.json", ("GET",), openapi),
    Entry("/v1/responses", ("POST",), not_implemented),
    Entry("/v1/messages", ("POST",), not_implemented),
)

# Refusals that an operator counts: the server's state, not the client's mistake.
_COUNTED: Final = (QueueFullError, DrainingError, LoadingError, RequestTooLongError)


class Endpoint:
    """A handler as an ASGI application. Its refusals are counted where its requests queue: a probe
    of a loading server is none."""

    def __init__(self, state: ServerState, entry: Entry) -> None:
        self._state = state
        self._handler = entry.handler
        self._admits = entry.admits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._handler(self._state, Exchange(scope, receive, send))
        except ClientDisconnect:
            # Whatever ran for it has been aborted; there is nobody to tell.
            return
        except _COUNTED as error:
            if self._admits:
                self._state.rejections[error_kind(error).code or "other"] += 1
            raise


def make_routes(state: ServerState) -> list[Route]:
    """The table as Starlette's routes. A GET route answers HEAD too."""
    return [
        Route(entry.path, Endpoint(state, entry), methods=list(entry.methods)) for entry in ROUTES
    ]
