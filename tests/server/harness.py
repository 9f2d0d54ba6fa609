"""RunningServer: a real server on a free loopback port, in a thread of its own."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from octavo.server.http.config import ServerConfig
from octavo.server.lifecycle import Lifecycle


@dataclass
class Answer:
    """One whole HTTP answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return dict(error)


class RunningServer:
    """A server in a thread; its event loop is uvloop, as in production."""

    def __init__(self, engine: Any, config: ServerConfig) -> None:
        self.engine = engine
        self.lifecycle: Lifecycle = None  # type: ignore[assignment]
        self.exit_status: int | None = None
        self.may_load = threading.Event()
        self.ready = threading.Event()
        self.listening = threading.Event()
        self._config = config
        self._loop: asyncio.AbstractEventLoop = None  # type: ignore[assignment]
        self.thread = threading.Thread(target=self._main, daemon=True)
        self.thread.start()
        assert self.listening.wait(20)

    def _main(self) -> None:
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            self.exit_status = runner.run(self._run())

    async def _run(self) -> int:
        def load() -> Any:
            self.may_load.wait()
            return self.engine

        self._loop = asyncio.get_running_loop()
        self.lifecycle = Lifecycle(self._config, load)
        run = asyncio.create_task(self.lifecycle.run(lambda engine, url: self.ready.set()))
        while not self.lifecycle.http.url:
            await asyncio.sleep(0.005)
        self.listening.set()
        return await run

    def call(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Call on the server's loop."""
        self._loop.call_soon_threadsafe(function, *arguments)

    @property
    def url(self) -> str:
        return self.lifecycle.http.url

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        sent = {"Content-Type": "application/json"} if body is not None else {}
        payload = body if isinstance(body, bytes | None) else json.dumps(body)
        try:
            connection.request(method, path, payload, {**sent, **(headers or {})})
            response = connection.getresponse()
            names = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, names, response.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        return self.request(
            "GET", path, headers={k.replace("_", "-"): v for k, v in headers.items()}
        )

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> Answer:
        return self.request("POST", path, body, headers)

    def socket(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def stop(self) -> None:
        self.may_load.set()
        if self.thread.is_alive():
            self.call(self.lifecycle.stop)
        self.thread.join(20)
        assert not self.thread.is_alive()


TINY_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def tiny_server(
    folder: Path, *, max_logprobs: int = 20, context: int | None = None, **flags: Any
) -> RunningServer:
    """A server of a real engine over random weights, as small as a model can be.

    ``folder`` gets the model; ``flags`` are the server's.
    """
    from octavo.config import EngineConfig
    from octavo.engine.engine import AsyncEngine

    length = {} if context is None else {"max_position_embeddings": context}
    (folder / "config.json").write_text(json.dumps(TINY_MODEL | length))
    template = folder / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    config = EngineConfig(
        model=str(folder),
        load_format="dummy",
        dtype="float32",
        threads=1,
        max_num_seqs=8,
        max_logprobs=max_logprobs,
    )
    flags = {"shutdown_timeout": 1, "chat_template": str(template)} | flags
    server = RunningServer(AsyncEngine(config), ServerConfig(port=0, **flags))
    server.may_load.set()
    assert server.ready.wait(60)
    return server


StartServer = Callable[..., RunningServer]


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """(key, certificate) for localhost, of its own signature."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    command += ["-subj", "/CN=localhost", "-keyout", str(key), "-out", str(certificate)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    return key, certificate


def cpu_s(pid: int) -> float:
    """CPU seconds that all threads of a process have taken; finer than /proc's ticks of 10 ms."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def eventually(condition: Callable[[], Any], timeout_s: float = 5.0) -> None:
    """Wait for what another thread does."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.005)
