"""GET /health, /ready, /ping, /version and /load."""

from __future__ import annotations

from typing import TYPE_CHECKING

from octavo import __version__

if TYPE_CHECKING:
    from octavo.server.http.exchange import Exchange
    from octavo.server.work.state import ServerState


async def health(state: ServerState, exchange: Exchange) -> None:
    """200 while the engine lives and moves; 503 while it loads, after it died, when it stalls."""
    state.check_health()
    await exchange.respond_json({"status": "ok"})


async def ready(state: ServerState, exchange: Exchange) -> None:
    """200 while new requests are welcome: as health, and 503 while draining."""
    state.check_ready()
    await exchange.respond_json({"status": "ready"})


async def version(state: ServerState, exchange: Exchange) -> None:
    """octavo's version."""
    await exchange.respond_json({"version": __version__})


async def load(state: ServerState, exchange: Exchange) -> None:
    """Generation requests under way."""
    await exchange.respond_json({"server_load": len(state.generations)})
