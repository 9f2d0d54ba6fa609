"""``octavo bench startup``: from starting the server's process to its first token; its memory."""

from __future__ import annotations

import argparse
import asyncio
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

from octavo.bench import report
from octavo.bench.report import Report
from octavo.bench.stream_client import StreamClient
from octavo.bench.summary import Figures
from octavo.bench.workload import Workload


class StartupError(Exception):
    """The server did not come up; the message ends with what it printed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``octavo bench startup``."""
    parser.add_argument(
        "--serve-args", default="", help='flags of the server, as one word: "--model X --dtype Y"'
    )
    parser.add_argument("--input-len", type=int, default=32, help="tokens of the first prompt")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds until ready")
    report.add_arguments(parser)
    parser.set_defaults(repeat=3)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def _peak_rss_mib(pid: int) -> float | None:
    """The most memory the process has held at once; None where the kernel does not tell."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return None


def _import_torch_s() -> float:
    """Seconds of ``import torch`` alone in a new process: the part that is not octavo's."""
    start_s = time.monotonic()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.monotonic() - start_s


async def _until_ready(
    client: StreamClient, server: subprocess.Popen[bytes], deadline_s: float
) -> None:
    while time.monotonic() < deadline_s:
        if server.poll() is not None:
            raise StartupError(f"the server ended with status {server.returncode}")
        try:
            status, _ = await client.json("GET", "/ready", timeout_s=5)
        except OSError:
            status = 0  # not listening yet
            client.close()
        if status == 200:
            return
        # A look costs the server a fraction of a millisecond.
        await asyncio.sleep(0.02)
    raise StartupError("the server was not ready in time")


def _measure(args: argparse.Namespace, log: IO[bytes]) -> Figures:
    port = _free_port()
    command = [sys.executable, "-m", "octavo.serve", "--port", str(port)]
    start_s = time.monotonic()
    server = subprocess.Popen(
        [*command, *shlex.split(args.serve_args)], stdout=log, stderr=subprocess.STDOUT
    )
    try:
        figures = asyncio.run(_first_token(args, server, port, start_s))
        stop_s = time.monotonic()
        server.send_signal(signal.SIGTERM)
        status = server.wait(60)
        if status != 0:
            raise StartupError(f"the server ended with status {status} after SIGTERM")
        return figures | {"stop_s": time.monotonic() - stop_s}
    except subprocess.TimeoutExpired:
        raise StartupError("the server did not end within 60 s of SIGTERM") from None
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()


async def _first_token(
    args: argparse.Namespace, server: subprocess.Popen[bytes], port: int, start_s: float
) -> Figures:
    client = StreamClient(f"http://127.0.0.1:{port}")
    try:
        await _until_ready(client, server, start_s + args.timeout)
        ready_s = time.monotonic() - start_s
        body = Workload(input_len=args.input_len, output_len=8).body(0)
        timing = await client.stream("/v1/completions", body, args.timeout)
        if timing.error is not None or timing.first_s is None:
            raise StartupError(f"the first request failed: {timing.error}")
        figures = {"ready_s": ready_s, "first_token_s": timing.first_s - start_s}
        peak = _peak_rss_mib(server.pid)
        if peak is not None:
            figures["peak_rss_mib"] = peak
        return figures
    finally:
        client.close()


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; the process's exit status."""
    runs: list[Figures] = []
    for _ in range(args.repeat):
        with tempfile.TemporaryFile() as log:
            try:
                figures = {"import_torch_s": _import_torch_s()}
                runs.append(figures | _measure(args, log))
            except StartupError as error:
                log.seek(0)
                tail = log.read().decode("utf-8", "replace").splitlines()[-20:]
                print("\n".join([f"octavo bench startup: {error}", *tail]), file=sys.stderr)
                return 1
    Report(
        title=args.title or f"start-up: octavo serve {args.serve_args}".rstrip(),
        settings={"serve_args": args.serve_args, "input_len": args.input_len},
        runs=runs,
    ).write(args)
    return 0
