"""FakeServer: an OpenAI-compatible event stream with known delays, in a thread of the test."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import orjson


class FakeServer:
    """Answers /v1/completions and /v1/chat/completions; remembers what it was asked.

    ``max_in_flight`` is the most requests it has had at once.
    """

    def __init__(self, first_s: float = 0.02, step_s: float = 0.002) -> None:
        self.first_s = first_s
        self.step_s = step_s
        self.bodies: list[dict[str, object]] = []
        self.authorizations: set[str | None] = set()
        self.max_in_flight = 0
        self.fail_every = 0
        # The stream breaks off before [DONE].
        self.truncate = False
        # Events are cut into pieces of this many bytes; 0: one write per event.
        self.piece_len = 0
        # The connection is closed after each answer.
        self.close_after = False
        self.base_url = ""
        self._in_flight = 0
        self._lock = threading.Lock()

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._request(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            return  # the client left
        finally:
            writer.close()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        lines = head.split("\r\n")
        headers = {k.lower(): v.strip() for k, v in (x.split(":", 1) for x in lines[1:] if x)}
        body = await reader.readexactly(int(headers["content-length"]))
        path = lines[0].split()[1]
        if path == "/v1/models":
            self._plain(writer, 200, {"data": [{"id": "fake-model"}]})
            return True
        if path == "/version":
            self._plain(writer, 200, {"version": "1"})
            return True
        request = orjson.loads(body)
        if not request.get("stream"):
            message = {"role": "assistant", "content": " Paris\n"}
            self._plain(writer, 200, {"choices": [{"message": message}]})
            return True
        with self._lock:
            self.bodies.append(request)
            self.authorizations.add(headers.get("authorization"))
            number = len(self.bodies)
            self._in_flight += 1
            self.max_in_flight = max(self.max_in_flight, self._in_flight)
        try:
            if self.fail_every and number % self.fail_every == 0:
                self._plain(writer, 503, {"error": {"message": "the queue is full"}})
                return True
            await self._stream(writer, request, chat="chat" in path)
        finally:
            with self._lock:
                self._in_flight -= 1
        return not (self.close_after or self.truncate)

    @staticmethod
    def _plain(writer: asyncio.StreamWriter, status: int, value: object) -> None:
        body = orjson.dumps(value)
        writer.write(
            f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )

    def _event(self, writer: asyncio.StreamWriter, value: object) -> None:
        data = value if isinstance(value, bytes) else orjson.dumps(value)
        event = b"data: " + data + b"\n\n"
        step = self.piece_len or len(event)
        for start in range(0, len(event), step):
            piece = event[start : start + step]
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))

    async def _stream(
        self, writer: asyncio.StreamWriter, request: dict[str, object], chat: bool
    ) -> None:
        connection = "Connection: close\r\n" if self.close_after else ""
        writer.write(
            f"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n{connection}"
            "Transfer-Encoding: chunked\r\n\r\n".encode()
        )
        num_tokens = int(str(request["max_tokens"]))
        if chat:
            role = {"role": "assistant", "content": ""}
            self._event(writer, {"choices": [{"index": 0, "delta": role}]})
        await asyncio.sleep(self.first_s)
        for number in range(num_tokens):
            if number:
                await asyncio.sleep(self.step_s)
            choice = {"delta": {"content": "x"}} if chat else {"text": "x"}
            self._event(writer, {"choices": [{"index": 0, **choice}]})
        if self.truncate:
            return
        prompt = request.get("prompt")
        usage = {
            "prompt_tokens": len(prompt) if isinstance(prompt, list) else 7,
            "completion_tokens": num_tokens,
            "prompt_tokens_details": {"cached_tokens": 3},
        }
        self._event(writer, {"choices": [], "usage": usage})
        self._event(writer, b"[DONE]")
        writer.write(b"0\r\n\r\n")

    @contextmanager
    def running(self) -> Iterator[FakeServer]:
        """Serve on a free port of the loopback until the end of the block."""
        started = threading.Event()
        stop = asyncio.Event()
        loop = asyncio.new_event_loop()

        async def serve() -> None:
            server = await asyncio.start_server(self._handle, "127.0.0.1", 0)
            port = server.sockets[0].getsockname()[1]
            self.base_url = f"http://127.0.0.1:{port}/v1"
            started.set()
            await stop.wait()
            server.close()

        thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
        thread.start()
        assert started.wait(10)
        try:
            yield self
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join(10)
