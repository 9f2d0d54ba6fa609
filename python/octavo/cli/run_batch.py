"""``octavo run-batch``: load a model, answer a file of requests, end."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
from typing import BinaryIO, TextIO

from tqdm import tqdm

from octavo.config import EngineConfig
from octavo.engine.engine import AsyncEngine
from octavo.server.batch_file import BatchCounts, run_batch
from octavo.server.http.config import ServerConfig
from octavo.server.routes import make_app
from octavo.server.work.state import ServerState


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags beside the engine's."""
    parser.add_argument("-i", "--input-file", metavar="FILE", required=True, help="JSON lines")
    parser.add_argument(
        "-o", "--output-file", metavar="FILE", required=True, help="gets one line per answer"
    )
    parser.add_argument(
        "--concurrency", type=int, default=256, metavar="N", help="requests under way [%(default)s]"
    )
    parser.add_argument("--chat-template", metavar="FILE", help="in place of the model's")
    for kind in ("tool-call", "reasoning"):
        parser.add_argument(
            f"--{kind}-parser", metavar="NAME", help="a name, auto or none; default: found"
        )


def run(arguments: argparse.Namespace, config: EngineConfig) -> int:
    """The process's exit status: 0 once every line has its answer, good or bad.

    Raises:
        OSError, ValueError: a file or the model cannot be had.
    """
    if arguments.concurrency < 1:
        raise ValueError("--concurrency must be at least 1")
    with contextlib.ExitStack() as stack:
        # Before the model: a wrong name is found at once.
        lines = stack.enter_context(open(arguments.input_file, "rb"))
        if _is_same_file(arguments.input_file, arguments.output_file):
            raise ValueError("--output-file is --input-file: its lines would be lost")
        state = ServerState(
            ServerConfig(
                chat_template=arguments.chat_template,
                tool_call_parser=arguments.tool_call_parser,
                reasoning_parser=arguments.reasoning_parser,
            )
        )
        output = stack.enter_context(open(arguments.output_file, "w", encoding="utf-8"))
        engine = AsyncEngine(config)
        counts = asyncio.run(_run(state, engine, lines, output, arguments.concurrency))
    print(f"{counts.num_answered} answered, {counts.num_failed} failed", file=sys.stderr)
    return 0


def _is_same_file(one: str, other: str) -> bool:
    return os.path.exists(other) and os.path.samefile(one, other)


async def _run(
    state: ServerState, engine: AsyncEngine, lines: BinaryIO, output: TextIO, concurrency: int
) -> BatchCounts:
    await engine.start()
    try:
        state.set_engine(engine)
        with tqdm(unit=" requests", desc="batch") as progress:
            return await run_batch(
                make_app(state), lines, output, concurrency=concurrency, on_done=progress.update
            )
    finally:
        await engine.stop()
