"""The least a Python server can do: a loop that writes the same bytes to every connection.

    python bench/bare_server.py --num-connections 256 --chunk-bytes 240 --pace-ms 20 [--uds PATH]

No HTTP is read, nothing is computed: what it costs is uvloop's ``transport.write`` and the
kernel's. It prints its port, waits until all connections are there, and writes until it is ended.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from typing import cast

import uvloop


class _Connections(asyncio.Protocol):
    def __init__(self, num_connections: int) -> None:
        self.transports: list[asyncio.Transport] = []
        self.all_there = asyncio.Event()
        self._num_connections = num_connections

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transports.append(cast(asyncio.Transport, transport))
        if len(self.transports) == self._num_connections:
            self.all_there.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.transports.clear()


async def serve(num_connections: int, chunk_bytes: int, pace_s: float, uds: str | None) -> None:
    """Write to every connection, a step further each time."""
    loop = asyncio.get_running_loop()
    connections = _Connections(num_connections)
    if uds is None:
        server = await loop.create_server(lambda: connections, "127.0.0.1", 0)
        print(server.sockets[0].getsockname()[1], flush=True)
    else:
        await loop.create_unix_server(lambda: connections, uds, backlog=num_connections)
        print(uds, flush=True)
    await connections.all_there.wait()
    # What the client counts as an event.
    event = b"data: {" + b"x" * (chunk_bytes - 10) + b"}\n\n"
    chunk = b"%x\r\n%b\r\n" % (len(event), event)
    next_s = time.perf_counter()
    while transports := connections.transports:
        next_s = max(next_s + pace_s, time.perf_counter())
        await asyncio.sleep(next_s - time.perf_counter())
        for transport in transports:
            transport.write(chunk)


def main() -> None:
    """Serve until a signal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-connections", type=int, default=256)
    parser.add_argument("--chunk-bytes", type=int, default=240)
    parser.add_argument("--pace-ms", type=float, default=20.0)
    parser.add_argument("--uds")
    given = parser.parse_args()
    uvloop.run(serve(given.num_connections, given.chunk_bytes, given.pace_ms / 1000, given.uds))


if __name__ == "__main__":
    main()
