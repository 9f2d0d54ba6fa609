"""HttpServer: uvicorn with connections of our own, and signals left to the caller."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import uvicorn

from octavo.server.http.certificates import Certificates
from octavo.server.http.http_protocol import Application, HttpProtocol

if TYPE_CHECKING:
    from octavo.server.http.config import ServerConfig

# OpenSSL's own list.
DEFAULT_CIPHERS: Final = "DEFAULT"
# Clients keep pools of idle connections; one that the server closes first loses a race and a
# request. Longer than the usual 60 s of proxies and client libraries.
KEEP_ALIVE_S: Final = 75
# What a closing server grants answers that are already written but not yet read.
FLUSH_S: Final = 2


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to the life cycle: they drain, they do not just stop."""
        yield


class HttpServer:
    """Listens from ``start`` to ``stop``. ``url`` is where, once started."""

    def __init__(self, app: Application, config: ServerConfig) -> None:
        self._config = config
        self._socket: socket.socket | None = None
        self._task: asyncio.Task[None] | None = None
        self._server = _Uvicorn(
            uvicorn.Config(
                app,
                uds=config.uds,
                http=HttpProtocol,
                ws="none",
                # The loop is the caller's.
                loop="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                ssl_keyfile=config.ssl_keyfile,
                ssl_certfile=config.ssl_certfile,
                ssl_ca_certs=config.ssl_ca_certs,
                ssl_cert_reqs=config.ssl_cert_reqs,
                # OpenSSL's names; without TLS uvicorn does not look at them.
                ssl_ciphers=config.ssl_ciphers or DEFAULT_CIPHERS,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=FLUSH_S,
            )
        )
        self.url = ""
        # Once started, where there is TLS.
        self.certificates: Certificates | None = None

    async def start(self) -> None:
        """Bind and listen.

        Raises:
            OSError: the address is taken, or not this machine's; the message names it.
        """
        config = self._config
        sockets: list[socket.socket] | None = None
        if config.uds is None:
            self._socket = _bind(config.host, config.port)
            sockets = [self._socket]
            host, port = self._socket.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            self.url = f"{'https' if config.has_tls else 'http'}://{shown}:{port}"
        else:
            self.url = f"unix:{config.uds}"
        self._task = asyncio.create_task(self._server.serve(sockets=sockets))
        while not self._server.started:
            if self._task.done():
                self._task.result()
                raise OSError(f"cannot listen on {self.url}")
            await asyncio.sleep(0.001)
        if (context := self._server.config.ssl) is not None:
            self.certificates = Certificates(config, context)

    async def stop(self) -> None:
        """Stop listening, let written answers be read, close every connection."""
        self._server.should_exit = True
        if self._task is not None:
            await self._task
        if self._config.uds is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._config.uds)


def _bind(host: str, port: int) -> socket.socket:
    try:
        info: Any = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except socket.gaierror as error:
        raise OSError(f"cannot listen on {host!r}: {error.strerror}") from None
    family, kind, proto, _, address = info[0]
    listener = socket.socket(family, kind, proto)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(
            f"cannot listen on {host}:{port}: {error.strerror}; see --host and --port"
        ) from None
    listener.setblocking(False)
    return listener
