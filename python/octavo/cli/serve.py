"""The HTTP server as a process.

What belongs to the process and not to the server is here: the event loop's kind, the interpreter's
switch interval, the garbage collector, signals, the lines on the terminal.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from octavo.config import EngineConfig
    from octavo.engine.engine import AsyncEngine
    from octavo.server.config import ServerConfig

# How long a thread may keep the GIL while another waits for it. The engine thread hands over
# tokens in the middle of the event loop's work: at the default 5 ms each of them comes 5 ms late,
# at 50 us 0.2 ms. Only once ready: threads that compile kernels hand the lock around too often with
# it (one H100, 135M, empty kernel cache: 10.7 s from torch's import to ready, 9.6 at 5 ms).
SWITCH_INTERVAL_S: Final = 50e-6


def serve(engine_config: EngineConfig, server_config: ServerConfig) -> int:
    """Load the model and serve until a signal; the process's exit status.

    Raises:
        OSError, ValueError: the address or the model cannot be had.
    """
    began = process_start()
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s"
    )
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    # They would report every request of a download, through the progress bar.
    for name in ("httpx", "httpx2"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with asyncio.Runner(loop_factory=_new_loop) as runner:
        status, is_loading = runner.run(_run(engine_config, server_config, began))
    if is_loading:
        # A thread is still inside the loader; the interpreter cannot tear itself down around it.
        _exit_now(status)
    return status


async def _run(
    engine_config: EngineConfig, server_config: ServerConfig, began: float
) -> tuple[int, bool]:
    from octavo.runner.open_device import open_device
    from octavo.server.lifecycle import Lifecycle

    def load() -> AsyncEngine:
        if engine_config.device != "cpu":
            open_device()
        # Here and not above: torch loads while the port already answers.
        from octavo.engine.engine import AsyncEngine

        return AsyncEngine(engine_config)

    lifecycle = Lifecycle(server_config, load)
    loop = asyncio.get_running_loop()

    def on_signal(number: int) -> None:
        if lifecycle.is_stopping:
            _exit_now(128 + number)
        print("stopping; once more to stop at once", file=sys.stderr, flush=True)
        lifecycle.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal, number)

    def on_ready(engine: AsyncEngine, url: str) -> None:
        # What start-up has built stays: full collections need not walk it again.
        gc.collect()
        gc.freeze()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        print_ready(engine, url, time.time() - began, server_config)

    status = await lifecycle.run(on_ready)
    return status, lifecycle.is_loading


def _new_loop() -> asyncio.AbstractEventLoop:
    import uvloop

    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


def _exit_now(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def process_start() -> float:
    """When this process began, in seconds since the epoch; now where the system does not say."""
    try:
        with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
            # The second field is the program's name in parentheses, which may hold anything.
            ticks = int(file.read().rpartition(")")[2].split()[19])
        since_boot = time.clock_gettime(time.CLOCK_BOOTTIME)
        age = since_boot - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        age = 0.0
    return time.time() - age


def print_ready(engine: AsyncEngine, url: str, seconds: float, server_config: ServerConfig) -> None:
    """The memory table, the ready line, and how to say the first word."""
    if engine.memory_table:
        width = max(len(name) for name, _ in engine.memory_table)
        for name, value in engine.memory_table:
            print(f"  {name:<{width}}  {value}")
    print(f"ready in {seconds:.1f} s on {url}", flush=True)
    task = "generate" if engine.pooling is None else engine.pooling.task
    chat = engine.chat_template is not None
    print(example_command(url, server_config, chat=chat, task=task), flush=True)


def example_command(url: str, config: ServerConfig, *, chat: bool, task: str = "generate") -> str:
    """A curl command that works as it stands."""
    target = url
    options = ""
    if config.uds is not None:
        options, target = f"--unix-socket {config.uds} ", "http://localhost"
    target = target.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
    if config.api_key:
        options += "-H 'Authorization: Bearer YOUR_KEY' "
    if task == "embed":
        path, body = "/v1/embeddings", '{"input":"The capital of France is Paris."}'
    elif task == "score":
        path = "/v1/score"
        body = '{"text_1":"What is the capital of France?","text_2":"Paris is."}'
    elif chat or config.chat_template is not None:
        path = "/v1/chat/completions"
        body = (
            '{"messages":[{"role":"system","content":"You are a helpful assistant."},'
            '{"role":"user","content":"What is the capital of France?"}]}'
        )
    else:
        path, body = "/v1/completions", '{"prompt":"The capital of France is"}'
    return f"try: curl {options}{target}{path} -H 'Content-Type: application/json' -d '{body}'"
