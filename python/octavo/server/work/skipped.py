"""Skipped: what was left out of a request, named in the head of its answer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from octavo.errors import clip

if TYPE_CHECKING:
    from octavo.server.http.exchange import Exchange

logger = logging.getLogger("octavo.server")


def warn_skipped(exchange: Exchange, kinds: Sequence[str]) -> None:
    """Name the types of tools and items that were skipped in a ``warning`` header (RFC 9111)."""
    if not kinds:
        return
    text = f"skipped, as this server does not know them: {', '.join(dict.fromkeys(kinds))}"
    logger.debug("request %s: %s", exchange.request_id, text)
    # A type is the client's text: what could end the header or its quotes does not get into it.
    plain = "".join(c if c.isascii() and c.isprintable() and c not in '"\\' else "?" for c in text)
    exchange.add_header(b"warning", f'299 octavo "{clip(plain, 512)}"'.encode())
