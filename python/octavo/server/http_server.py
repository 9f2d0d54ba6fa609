"""HttpServer: uvicorn with a bound on request heads, JSON errors, and no hands on our signals."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

import orjson
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from octavo._core import SseWriter
from octavo.errors import BadRequestError, HeaderTooLargeError, error_body, error_kind
from octavo.server import limits

if TYPE_CHECKING:
    from octavo.server.app import App
    from octavo.server.config import ServerConfig

# Clients keep pools of idle connections; one that the server closes first loses a race and a
# request. Longer than the usual 60 s of proxies and client libraries.
KEEP_ALIVE_S: Final = 75
# What a closing server grants answers that are already written but not yet read.
FLUSH_S: Final = 2


class HttpProtocol(HttpToolsProtocol):
    """One connection. The parser itself would gather a head of any size."""

    _in_head = True
    _head_bytes = 0
    _head_is_too_large = False
    _writer: SseWriter | None = None
    _on_lost: Callable[[], None] | None = None

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if (
            self._in_head
            and self._head_bytes > limits.MAX_HEADER_BYTES
            and not self.transport.is_closing()
        ):
            self._head_is_too_large = True
            self.send_400_response("")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        # What this read holds beyond the head's beginning is not known; the exact count follows
        # in on_headers_complete. This one bounds heads that never end.
        self._head_bytes = 0

    def on_headers_complete(self) -> None:
        self._in_head = False
        size = len(self.parser.get_method()) + len(self.url) + len(b"  HTTP/1.1\r\n\r\n")
        size += sum(len(name) + len(value) + len(b": \r\n") for name, value in self.headers)
        if size > limits.MAX_HEADER_BYTES:
            self._head_is_too_large = True
            # The parser turns it into its own error, which data_received answers.
            raise HeaderTooLargeError("too large")
        super().on_headers_complete()
        if self.cycle is not None:
            self.scope["octavo.connection"] = self  # type: ignore[typeddict-unknown-key]

    # What Exchange knows of its connection, past ASGI.

    def has_body(self) -> bool:
        """Whether the last request has been received to its end."""
        return not self.cycle.more_body

    def on_lost(self, callback: Callable[[], None] | None) -> None:
        """Have this called when the connection is lost; once, and only the last one given."""
        self._on_lost = callback
        if callback is None:
            return
        # A connection that is not read from does not notice its end.
        self.flow.resume_reading()
        if self.transport.is_closing():
            self.loop.call_soon(self._call_on_lost)

    def _call_on_lost(self) -> None:
        callback, self._on_lost = self._on_lost, None
        if callback is not None:
            callback()

    def make_writer(self) -> SseWriter:
        """What writes body parts of the chunked answer that is under way, past ``cycle.send``.

        The way of nearly every token: a quarter of the cost of ``send``, which needs a task's turn.
        Not while a ``send`` is under way.
        """
        transport = self.transport
        connection = transport.get_extra_info("socket")
        is_plain = connection is not None and transport.get_extra_info("ssl_object") is None
        self._writer = SseWriter(
            transport.write,
            transport.get_write_buffer_size,
            connection.fileno() if is_plain else None,
        )
        self._writer.is_paused = self.flow.write_paused or self.transport.is_closing()
        return self._writer

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._writer is not None:
            self._writer.is_paused = True

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._writer is not None:
            self._writer.is_paused = False

    def connection_lost(self, exc: Exception | None) -> None:
        if self._writer is not None:
            self._writer.is_paused = True
            self._writer = None
        super().connection_lost(exc)
        self._call_on_lost()
        # Else the timer of a connection that was reset would hold all of it until it ran out.
        self._unset_keepalive_if_required()

    def send_400_response(self, msg: str) -> None:
        """The answer to what is not HTTP, or not acceptable as such, in OpenAI's shape."""
        error = (
            HeaderTooLargeError(f"the head is larger than {limits.MAX_HEADER_BYTES} bytes")
            if self._head_is_too_large
            else BadRequestError("invalid HTTP request")
        )
        body = orjson.dumps(error_body(error))
        self.transport.write(
            STATUS_LINE[error_kind(error).status]
            + b"content-type: application/json\r\nconnection: close\r\nx-request-id: "
            + secrets.token_hex(16).encode()
            + b"\r\ncontent-length: "
            + str(len(body)).encode()
            + b"\r\n\r\n"
            + body
        )
        self.transport.close()


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to the life cycle: they drain, they do not just stop."""
        yield


class HttpServer:
    """Listens from ``start`` to ``stop``. ``url`` is where, once started."""

    def __init__(self, app: App, config: ServerConfig) -> None:
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
                root_path=config.root_path.rstrip("/"),
                ssl_keyfile=config.ssl_keyfile,
                ssl_certfile=config.ssl_certfile,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=FLUSH_S,
            )
        )
        self.url = ""

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
