"""Routes: the handler of each path and method, and the application over them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Final, NamedTuple

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from octavo.errors import (
    DrainingError,
    LoadingError,
    QueueFullError,
    RequestTooLongError,
    error_kind,
)
from octavo.server import health
from octavo.server.anthropic import models
from octavo.server.anthropic.errors import STATUSES as ANTHROPIC_STATUSES
from octavo.server.anthropic.errors import error_body as anthropic_error_body
from octavo.server.anthropic.messages import count_tokens, messages
from octavo.server.anthropic.protocol import COUNT_TOKENS_BODY, MESSAGES_BODY
from octavo.server.compat.routes import COMPAT_ROUTES
from octavo.server.http.access import open_paths
from octavo.server.http.app import ApiRoute, App, ErrorBody, ErrorForm
from octavo.server.http.body import Body
from octavo.server.http.exchange import Exchange
from octavo.server.http.openapi import describe
from octavo.server.invocations import invocations
from octavo.server.metrics import metrics
from octavo.server.openai.chat import chat_completions
from octavo.server.openai.completions import completions
from octavo.server.openai.errors import error_body
from octavo.server.openai.protocol import (
    CHAT_BODY,
    COMPLETION_BODY,
    DETOKENIZE_BODY,
    TOKENIZE_BODY,
)
from octavo.server.openai.tokenize import detokenize, tokenize, tokenizer_info
from octavo.server.pooling.classify import classify
from octavo.server.pooling.cohere import embed
from octavo.server.pooling.embeddings import embeddings
from octavo.server.pooling.encode import encode
from octavo.server.pooling.protocol import (
    CLASSIFY_BODY,
    COHERE_EMBED_BODY,
    EMBEDDING_BODY,
    ENCODE_BODY,
    RERANK_BODY,
    SCORE_BODY,
)
from octavo.server.pooling.rerank import rerank, score
from octavo.server.responses.create import create, input_tokens
from octavo.server.responses.protocol import INPUT_TOKENS_BODY, RESPONSES_BODY
from octavo.server.responses.stored import (
    cancel_response,
    compact,
    delete_response,
    get_response,
    list_input_items,
    refuse_websocket,
)
from octavo.server.web_page import page, page_file
from octavo.server.work.state import ServerState
from octavo.server.work.tracing import Tracing

Handler = Callable[[ServerState, Exchange], Awaitable[None]]


class Entry(NamedTuple):
    """One row of the table.

    Args:
        path, methods, handler: whose requests it answers, and with what.
        body: the fields of a POST.
        admits: its requests queue for the engine.
        error_body: the form of errors on it, by its dialect.
        statuses, id_header, other_form: see ``ApiRoute``.
    """

    path: str
    methods: tuple[str, ...]
    handler: Handler
    body: Body | None = None
    admits: bool = False
    error_body: ErrorBody = error_body
    statuses: Mapping[type[BaseException], int] | None = None
    id_header: str | None = None
    other_form: tuple[bytes, ErrorForm] | None = None


_ANTHROPIC: Final = ErrorForm(anthropic_error_body, ANTHROPIC_STATUSES, "request-id")


def _anthropic(path: str, handler: Handler, body: Body, *, admits: bool = False) -> Entry:
    return Entry(
        path,
        ("POST",),
        handler,
        body,
        admits,
        *_ANTHROPIC,
    )


def _models(path: str, handler: Handler) -> Entry:
    """A route of OpenAI's, and of Anthropic's for clients that send its version."""
    return Entry(path, ("GET",), handler, other_form=(models.VERSION, _ANTHROPIC))


async def openapi(state: ServerState, exchange: Exchange) -> None:
    """This description."""
    config = state.config
    document = describe(
        _entries(state),
        open_paths=open_paths(config) if config.has_keys else None,
        root_path=config.root_path,
    )
    await exchange.respond_json(document)


# The most used first: they are tried in this order.
ROUTES: Final[tuple[Entry, ...]] = (
    Entry("/v1/chat/completions", ("POST",), chat_completions, CHAT_BODY, admits=True),
    Entry("/v1/completions", ("POST",), completions, COMPLETION_BODY, admits=True),
    Entry("/v1/responses", ("POST",), create, RESPONSES_BODY, admits=True),
    _anthropic("/v1/messages", messages, MESSAGES_BODY, admits=True),
    _anthropic("/v1/messages/count_tokens", count_tokens, COUNT_TOKENS_BODY),
    Entry("/v1/embeddings", ("POST",), embeddings, EMBEDDING_BODY, admits=True),
    # Jina's and Cohere's clients differ in the version before the name.
    *(
        Entry(path, ("POST",), rerank, RERANK_BODY, admits=True)
        for path in ("/v1/rerank", "/rerank", "/v2/rerank")
    ),
    *(Entry(path, ("POST",), score, SCORE_BODY, admits=True) for path in ("/v1/score", "/score")),
    # vLLM's names for these.
    Entry("/classify", ("POST",), classify, CLASSIFY_BODY, admits=True),
    Entry("/pooling", ("POST",), encode, ENCODE_BODY, admits=True),
    # Cohere's.
    Entry("/v2/embed", ("POST",), embed, COHERE_EMBED_BODY, admits=True),
    # SageMaker's. Its bodies are those of the routes above.
    Entry("/invocations", ("POST",), invocations, admits=True),
    _models("/v1/models", models.list_models),
    Entry("/v1/responses", ("GET",), refuse_websocket),
    Entry("/v1/responses/input_tokens", ("POST",), input_tokens, INPUT_TOKENS_BODY),
    Entry("/v1/responses/compact", ("POST",), compact),
    Entry("/v1/responses/{id}", ("GET",), get_response),
    Entry("/v1/responses/{id}", ("DELETE",), delete_response),
    Entry("/v1/responses/{id}/cancel", ("POST",), cancel_response),
    Entry("/v1/responses/{id}/input_items", ("GET",), list_input_items),
    # Names may hold slashes.
    _models("/v1/models/{name:path}", models.get_model),
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
)

# Off by default, as in vLLM: a template of one's own may be nobody's business.
TOKENIZER_INFO: Final = Entry("/tokenizer_info", ("GET",), tokenizer_info)

# For people, not for programs: not among what /openapi.json describes.
PAGE: Final = (
    Entry("/", ("GET",), page),
    Entry("/page/{name}", ("GET",), page_file),
)

# Refusals that an operator counts: the server's state, not the client's mistake.
_COUNTED: Final = (QueueFullError, DrainingError, LoadingError, RequestTooLongError)


class Endpoint:
    """A handler as an ASGI application.

    Refusals are counted where requests queue for the engine: a probe of a loading server is none.
    """

    def __init__(self, state: ServerState, entry: Entry) -> None:
        self._state = state
        self._handler = entry.handler
        self._admits = entry.admits
        self._tracing = state.tracing if entry.admits else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send)
        try:
            if self._tracing is None:
                await self._handler(self._state, exchange)
            else:
                await self._traced(self._tracing, exchange)
        except ClientDisconnect:
            # Its samples have been aborted, and there is nobody to answer.
            return
        except _COUNTED as error:
            if self._admits:
                self._state.rejections[error_kind(error).code or "other"] += 1
            raise

    async def _traced(self, tracing: Tracing, exchange: Exchange) -> None:
        trace = exchange.trace = tracing.begin(exchange.scope, exchange.request_id)
        try:
            await self._handler(self._state, exchange)
        except BaseException as error:
            trace.end(error)
            raise
        trace.end()


def _entries(state: ServerState) -> list[Entry]:
    """The table, and the routes that the operator wants beside it."""
    others = dict.fromkeys(state.config.compat)
    entries = [*ROUTES, *(Entry(*row) for name in others for row in COMPAT_ROUTES[name])]
    if state.config.enable_tokenizer_info_endpoint:
        entries.append(TOKENIZER_INFO)
    return entries


def _all_entries(state: ServerState) -> list[Entry]:
    return [*_entries(state), *(PAGE if state.config.web_ui else ())]


def make_app(state: ServerState, entries: Iterable[Entry] | None = None) -> App:
    """The application over a table of routes. A GET route answers HEAD too."""
    routes = [
        ApiRoute(
            entry.path,
            Endpoint(state, entry),
            entry.methods,
            entry.error_body,
            entry.statuses,
            entry.id_header,
            entry.other_form,
        )
        for entry in (_all_entries(state) if entries is None else entries)
    ]
    return App(routes, state.config, error_body, state.api_keys)
