"""The HTTP server as a process.

The process's own part: the event loop's kind, the interpreter's switch interval, the garbage
collector, signals, log, the lines on the terminal.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Final, NoReturn

from octavo.cli.agent_settings import agent_settings, reachable
from octavo.cli.log_format import set_up_logging
from octavo.cli.terminal import drain

if TYPE_CHECKING:
    from octavo.config import EngineConfig
    from octavo.engine.engine import AsyncEngine
    from octavo.server.http.config import ServerConfig

# How long a thread may keep the GIL while another waits for it. The engine thread hands over
# tokens in the middle of the event loop's work: at the default 5 ms each of them comes 5 ms late,
# at 50 us 0.2 ms. Only once ready: threads that compile kernels hand the lock around too often with
# it (one H100, 135M, empty kernel cache: 10.7 s from torch's import to ready, 9.6 at 5 ms).
SWITCH_INTERVAL_S: Final = 50e-6

logger = logging.getLogger("octavo")


def serve(engine_config: EngineConfig, server_config: ServerConfig) -> int:
    """Load the model and serve until a signal; the process's exit status.

    The event loop writes to standard output and error, which must not raise or wait: see
    ``Terminal``.

    Raises:
        OSError, ValueError: the address or the model cannot be had.
    """
    began = process_start()
    set_up_logging(server_config.log_format)
    with asyncio.Runner(loop_factory=_new_loop) as runner:
        status, is_loading = runner.run(_run(engine_config, server_config, began))
    if is_loading:
        # A thread is still inside the loader; the interpreter cannot tear itself down around it.
        _exit_now(status)
    return status


async def _run(
    engine_config: EngineConfig, server_config: ServerConfig, began: float
) -> tuple[int, bool]:
    from octavo.runner.open_device import open_compiler, open_device
    from octavo.server.lifecycle import Lifecycle

    def load() -> AsyncEngine:
        if engine_config.device != "cpu":
            open_device()
        # Here and not above: torch loads while the port already answers.
        from octavo.engine.engine import AsyncEngine

        if engine_config.device != "cpu":
            open_compiler()
        return AsyncEngine(engine_config)

    lifecycle = Lifecycle(server_config, load)
    loop = asyncio.get_running_loop()

    def on_signal(number: int) -> None:
        if lifecycle.is_stopping:
            _exit_now(128 + number)
        lifecycle.stop()
        if server_config.log_format == "json":
            logger.info("stopping")
        else:
            print("stopping; once more to stop at once", file=sys.stderr)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal, number)

    # Ends the process where nobody handles it.
    loop.add_signal_handler(signal.SIGHUP, lifecycle.reload)

    def on_ready(engine: AsyncEngine, url: str) -> None:
        # What start-up has built stays: full collections need not walk it again.
        gc.collect()
        gc.freeze()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        seconds = time.time() - began
        if server_config.log_format == "json":
            fields = {"url": url, "seconds": round(seconds, 3), "memory": dict(engine.memory_table)}
            logger.info("ready", extra={"fields": fields})
            return
        model = lifecycle.state.model()
        chat = model.chat_format.summary if model.has_template else None
        print_ready(engine, url, seconds, server_config, chat)

    status = await lifecycle.run(on_ready)
    return status, lifecycle.is_loading


def _new_loop() -> asyncio.AbstractEventLoop:
    import uvloop

    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


def _exit_now(status: int) -> NoReturn:
    drain()
    os._exit(status)


def process_start() -> float:
    """Start of this process, in seconds since the epoch; now where the system does not know."""
    try:
        with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
            # The second field is the program's name in parentheses, which may hold anything.
            ticks = int(file.read().rpartition(")")[2].split()[19])
        since_boot = time.clock_gettime(time.CLOCK_BOOTTIME)
        age = since_boot - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        age = 0.0
    return time.time() - age


def print_ready(
    engine: AsyncEngine,
    url: str,
    seconds: float,
    server_config: ServerConfig,
    chat_format: str | None = None,
) -> None:
    """Print the memory table, chat format, ready line, a request to try, and agents' settings."""
    table = list(engine.memory_table)
    if chat_format is not None and engine.pooling is None:
        table.append(("chat", chat_format))
    if table:
        width = max(len(name) for name, _ in table)
        for name, value in table:
            print(f"  {name:<{width}}  {value}")
    print(f"ready in {seconds:.1f} s on {url}", flush=True)
    task = "generate" if engine.pooling is None else engine.pooling.task
    chat = engine.chat_template is not None or server_config.chat_template is not None
    print(example_command(url, server_config, chat=chat, task=task), flush=True)
    if server_config.web_ui and server_config.uds is None:
        print(f"or open {reachable(url)}/ in a browser", flush=True)
    if server_config.print_clients and chat and task == "generate" and server_config.uds is None:
        model, needs_key = engine.served_model_names[0], server_config.has_keys
        print(agent_settings(url, model, engine.max_model_len, needs_key=needs_key), flush=True)


def example_command(url: str, config: ServerConfig, *, chat: bool, task: str = "generate") -> str:
    """A curl command that works as it stands."""
    target = url
    options = ""
    if config.uds is not None:
        options, target = f"--unix-socket {config.uds} ", "http://localhost"
    target = reachable(target)
    if config.has_keys:
        options += "-H 'Authorization: Bearer YOUR_KEY' "
    if task == "embed":
        path, body = "/v1/embeddings", '{"input":"The capital of France is Paris."}'
    elif task == "score":
        path = "/v1/score"
        body = '{"text_1":"What is the capital of France?","text_2":"Paris is."}'
    elif chat:
        path = "/v1/chat/completions"
        body = (
            '{"messages":[{"role":"system","content":"You are a helpful assistant."},'
            '{"role":"user","content":"What is the capital of France?"}]}'
        )
    else:
        path, body = "/v1/completions", '{"prompt":"The capital of France is"}'
    return f"try: curl {options}{target}{path} -H 'Content-Type: application/json' -d '{body}'"
