"""GET / and /page/: the page to talk to the model from a browser, and to watch it work."""

from __future__ import annotations

import functools
import hashlib
from importlib.resources import files
from typing import TYPE_CHECKING, Final

from starlette.responses import Response

from octavo.errors import RouteNotFoundError
from octavo.server.http.exchange import header

if TYPE_CHECKING:
    from octavo.server.http.exchange import Exchange
    from octavo.server.work.state import ServerState

MEDIA_TYPES: Final = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
# Nothing but the page's own files may run, be shown or be called, and nothing may frame it. Were a
# model's answer ever to become markup, it would still be refused: by `script-src`, and by trusted
# types before it is parsed.
CONTENT_SECURITY_POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS: Final = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # Always asked for again, seldom sent again: an update of the server is one of the page.
    "cache-control": "no-cache",
}


@functools.cache
def page_files() -> dict[str, tuple[bytes, str]]:
    """Each file's content and tag, by name. Read once; only what is there can be asked for."""
    folder = files("octavo.server").joinpath("page")
    contents = {file.name: file.read_bytes() for file in folder.iterdir()}
    return {
        name: (content, f'"{hashlib.sha256(content).hexdigest()[:32]}"')
        for name, content in contents.items()
        if name.rpartition(".")[2] in MEDIA_TYPES
    }


async def page(state: ServerState, exchange: Exchange) -> None:
    """The page itself."""
    await _respond(exchange, "index.html")


async def page_file(state: ServerState, exchange: Exchange) -> None:
    """A script, a style sheet or the icon of the page."""
    name: str = exchange.path_params["name"]
    if name not in page_files():
        raise RouteNotFoundError("the page has no such file")
    await _respond(exchange, name)


async def _respond(exchange: Exchange, name: str) -> None:
    content, tag = page_files()[name]
    headers = {**_HEADERS, "etag": tag, "content-type": MEDIA_TYPES[name.rpartition(".")[2]]}
    if header(exchange.scope, b"if-none-match") == tag.encode():
        await exchange.respond(Response(status_code=304, headers=headers))
        return
    await exchange.respond(Response(content, headers=headers))
