"""The server as a process: signals and exit status. A fake engine, so that each start is quick."""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import cpu_s, eventually, make_certificate

pytestmark = pytest.mark.system

# Stands in for the engine's module before anything imports it; what it does is in the arguments.
PROGRAM = """
import sys, time, types
sys.path.insert(0, {folder!r})
from fake_engine import FakeEngine, FakeTemplate
import octavo._core
octavo._core.SseTemplate = FakeTemplate

def make(config):
    {setup}
    return engine

sys.modules["octavo.engine.engine"] = types.SimpleNamespace(AsyncEngine=make)
from octavo.serve import main
sys.exit(main(["--port", "0", *{flags!r}]))
"""


class Process:
    """One server process."""

    def __init__(self, setup: str, flags: list[str]) -> None:
        program = PROGRAM.format(folder=str(Path(__file__).parent), setup=setup, flags=flags)
        self.process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.output = ""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line

    def port(self) -> int:
        eventually(lambda: "try: curl" in self.output or self.process.poll() is not None, 60)
        match = re.search(r"ready in [\d.]+ s on http://127\.0\.0\.1:(\d+)", self.output)
        assert match is not None, self.output
        return int(match[1])

    def handles_signals(self) -> bool:
        """Whether SIGTERM has a handler yet."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        caught = int(next(x for x in status.splitlines() if x.startswith("SigCgt"))[7:], 16)
        return bool(caught >> (signal.SIGTERM - 1) & 1)

    def wait(self) -> int:
        status = self.process.wait(30)
        self._thread.join(10)
        return status


Start = Callable[..., Process]


@pytest.fixture
def start() -> Iterator[Start]:
    processes = []

    def make(*flags: str, setup: str = "engine = FakeEngine()") -> Process:
        processes.append(Process(setup, list(flags)))
        return processes[-1]

    yield make
    for process in processes:
        if process.process.poll() is None:
            process.process.kill()
        process.wait()


def request(port: int, **fields: Any) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    body = json.dumps({"prompt": "x", **fields})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    return connection.getresponse()


def load(port: int) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/load")
    return int(json.loads(connection.getresponse().read())["server_load"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_the_status_is_zero(start: Start, number: int) -> None:
    process = start(setup="engine = FakeEngine(); engine.delay_s = 0.05")
    stream = request(process.port(), stream=True, max_tokens=100, ignore_eos=True)
    stream.readline()
    process.process.send_signal(number)
    assert stream.read().endswith(b"data: [DONE]\n\n")
    assert process.wait() == 0, process.output
    assert "Traceback" not in process.output
    assert re.search(r"weights +1 byte\n.*KV cache +2 bytes\n.*ready in", process.output, re.DOTALL)


def test_a_second_signal_ends_at_once(start: Start) -> None:
    process = start("--shutdown-timeout", "60", setup="engine = FakeEngine(); engine.hold = True")
    port = process.port()

    def cut_off() -> None:
        with contextlib.suppress(ConnectionError):
            request(port)

    threading.Thread(target=cut_off, daemon=True).start()
    eventually(lambda: load(port) == 1)
    process.process.send_signal(signal.SIGTERM)
    eventually(lambda: "once more" in process.output)
    assert process.process.poll() is None
    process.process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM


def test_requests_that_take_too_long_are_cut_off(start: Start) -> None:
    process = start("--shutdown-timeout", "0.2", setup="engine = FakeEngine(); engine.hold = True")
    port = process.port()
    answers: list[int] = []
    post = threading.Thread(target=lambda: answers.append(request(port).status))
    post.start()
    eventually(lambda: load(port) == 1)
    process.process.send_signal(signal.SIGTERM)
    assert process.wait() == 0
    post.join(10)
    assert answers == [503]


def test_a_signal_while_loading(start: Start) -> None:
    process = start(setup="time.sleep(60); engine = FakeEngine()")
    eventually(process.handles_signals, 30)
    began = time.monotonic()
    process.process.send_signal(signal.SIGINT)
    assert process.wait() == 0
    assert time.monotonic() - began < 10
    assert "Traceback" not in process.output


def test_the_engine_s_death_is_the_process_s(start: Start) -> None:
    setup = (
        "engine = FakeEngine(); import asyncio, threading; begin = engine.start\n"
        "    async def start():\n"
        "        await begin(); asyncio.get_running_loop().call_later(0.3, engine.die)\n"
        "    engine.start = start"
    )
    process = start(setup=setup)
    assert process.wait() == 1
    assert "ready in" in process.output


@pytest.mark.parametrize(
    ("setup", "flags", "says"),
    [
        ("raise ValueError('tensor x is missing')", [], "octavo: error: tensor x is missing\n"),
        ("raise OSError('no file')", [], "octavo: error: no file\n"),
        ("engine = FakeEngine()", ["--host", "203.0.113.7"], "octavo: error: cannot listen on "),
        (
            "engine = FakeEngine()",
            ["--host", "no.such.host.invalid"],
            "octavo: error: cannot listen",
        ),
    ],
)
def test_what_prevents_the_start_is_one_line(
    start: Start, setup: str, flags: list[str], says: str
) -> None:
    process = start(*flags, setup=setup)
    assert process.wait() == 1
    assert says in process.output
    assert "Traceback" not in process.output


def test_an_unforeseen_failure_keeps_its_traceback(start: Start) -> None:
    process = start(setup="raise KeyError('bug')")
    assert process.wait() == 1
    assert "Traceback" in process.output


def test_an_idle_server_uses_no_cpu(start: Start) -> None:
    process = start()
    process.port()
    time.sleep(0.3)

    before = cpu_s(process.process.pid)
    time.sleep(2)
    assert cpu_s(process.process.pid) - before <= 0.01 * 2


def silenced(setup: str, flags: list[str], how: str) -> tuple[subprocess.Popen[bytes], int]:
    """A server whose standard error cannot be written, once it is ready, and its port."""
    program = PROGRAM.format(folder=str(Path(__file__).parent), setup=setup, flags=flags)
    full = open("/dev/full", "wb") if how == "full" else subprocess.PIPE  # noqa: SIM115
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=full, bufsize=0
    )
    assert process.stdout is not None
    line = b""
    while b"ready in" not in line:
        line = process.stdout.readline()
        assert line
    if how == "gone":
        assert process.stderr is not None
        process.stderr.close()
        process.stdout.close()
    elif how == "unread":
        assert process.stderr is not None
        fcntl.fcntl(process.stderr, fcntl.F_SETPIPE_SZ, 4096)
    return process, int(line.rpartition(b":")[2])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("how", ["gone", "full", "unread"])
def test_an_output_that_cannot_be_written_stops_nothing(how: str, number: int) -> None:
    """Nor delays it: neither the work nor the end."""
    process, port = silenced("engine = FakeEngine()", ["--enable-log-requests"], how)
    try:
        for _ in range(100):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request("GET", "/" + "x" * 200)
            assert connection.getresponse().status == 404
            connection.close()
        process.send_signal(number)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


@pytest.mark.parametrize("how", ["gone", "full", "unread"])
def test_a_second_signal_stops_at_once_whatever_becomes_of_the_output(how: str) -> None:
    process, port = silenced("engine = FakeEngine(); engine.hold = True", [], how)
    try:

        def ask() -> None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                request(port)

        threading.Thread(target=ask, daemon=True).start()
        eventually(lambda: load(port) == 1)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def test_an_output_that_is_closed_from_the_start(tmp_path: Path) -> None:
    """The ready line has no place to go: the server serves all the same."""
    path = tmp_path / "socket"
    program = PROGRAM.format(
        folder=str(Path(__file__).parent), setup="engine = FakeEngine()", flags=["--uds", str(path)]
    )
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.Popen([sys.executable, "-c", program], stdout=writer, stderr=writer)
    os.close(writer)
    try:
        eventually(path.exists, 60)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()


def test_sighup_reloads_and_the_log_is_json(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("old\n")
    flags = ["--api-key-file", str(file), "--log-format", "json", "--enable-log-requests"]
    process = start(*flags)
    eventually(lambda: '"message":"ready"' in process.output, 60)
    file.write_text("new\n")
    process.process.send_signal(signal.SIGHUP)
    eventually(lambda: '"message":"keys reloaded"' in process.output)
    process.process.send_signal(signal.SIGTERM)
    assert process.wait() == 0
    lines = [json.loads(line) for line in process.output.splitlines()]
    assert [line["message"] for line in lines] == ["ready", "keys reloaded", "stopping"]
    assert lines[0]["url"].startswith("http://127.0.0.1:")
    assert lines[0]["memory"] == {"weights": "1 byte", "KV cache": "2 bytes"}
    assert {line["level"] for line in lines} == {"INFO"}


def test_sighup_disturbs_nothing_that_runs(start: Start, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("old\n")
    key, certificate = make_certificate(tmp_path)
    flags = ["--api-key-file", str(keys), "--ssl-keyfile", str(key)]
    process = start(
        *flags,
        *("--ssl-certfile", str(certificate)),
        setup="engine = FakeEngine(); engine.delay_s = 0.05",
    )
    eventually(lambda: "ready in" in process.output, 60)
    [port] = re.findall(r"ready in [\d.]+ s on https://127\.0\.0\.1:(\d+)", process.output)

    def ask(api_key: str, **fields: Any) -> http.client.HTTPResponse:
        # Trusts the certificate that the file has now, and no other.
        context = ssl.create_default_context(cafile=str(certificate))
        connection = http.client.HTTPSConnection(
            "localhost", int(port), timeout=30, context=context
        )
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {api_key}"}
        connection.request(
            "POST", "/v1/completions", json.dumps({"prompt": "x", **fields}), headers
        )
        return connection.getresponse()

    stream = ask("old", stream=True, max_tokens=60, ignore_eos=True)
    stream.readline()
    make_certificate(tmp_path)
    keys.write_text("new\n")
    with pytest.raises(ssl.SSLCertVerificationError):
        ask("old")
    process.process.send_signal(signal.SIGHUP)
    eventually(lambda: "keys reloaded" in process.output)
    eventually(lambda: "certificate reloaded" in process.output)
    assert ask("old").status == 401
    assert ask("new", max_tokens=1).status == 200
    assert stream.read().endswith(b"data: [DONE]\n\n")
    process.process.send_signal(signal.SIGTERM)
    assert process.wait() == 0, process.output
