"""The routes of each API that ``--compat`` names: rows of the table in ``server/routes.py``."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

from octavo.server.compat import ollama, ollama_models, ollama_protocol, tgi
from octavo.server.compat.errors import error_body

if TYPE_CHECKING:
    from octavo.server.http.app import ErrorBody
    from octavo.server.http.body import Body
    from octavo.server.http.exchange import Exchange
    from octavo.server.work.state import ServerState

    Handler = Callable[[ServerState, Exchange], Awaitable[None]]
    # An Entry's fields.
    Row = tuple[str, tuple[str, ...], Handler, Body | None, bool, ErrorBody]


def _post(path: str, handler: Handler, body: Body, *, admits: bool = True) -> Row:
    return path, ("POST",), handler, body, admits, error_body


def _get(path: str, handler: Handler) -> Row:
    return path, ("GET",), handler, None, False, error_body


COMPAT_ROUTES: Final[dict[str, tuple[Row, ...]]] = {
    "ollama": (
        _post("/api/chat", ollama.chat, ollama_protocol.CHAT_BODY),
        _post("/api/generate", ollama.generate, ollama_protocol.GENERATE_BODY),
        _post("/api/embed", ollama_models.embed, ollama_models.EMBED_BODY),
        _post("/api/show", ollama_models.show, ollama_models.SHOW_BODY, admits=False),
        _get("/api/tags", ollama_models.tags),
        _get("/api/version", ollama_models.version),
    ),
    "tgi": (
        _post("/generate", tgi.generate, tgi.BODY),
        _post("/generate_stream", tgi.generate_stream, tgi.BODY),
        _post("/", tgi.root, tgi.BODY),
        _get("/info", tgi.info),
    ),
}
