"""Benchmarks: ``octavo bench serve|latency|throughput|startup``.

Each module has ``add_arguments(parser)`` and ``run(args) -> exit status``.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING

from octavo.flags import Parser

if TYPE_CHECKING:
    _Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

BENCHMARKS = {
    "serve": "load on a running server: throughput and latencies",
    "latency": "one batch in process: time to first token and per step",
    "throughput": "many requests in process: tokens a second",
    "startup": "from starting the server to its first token, and its memory",
}


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"octavo.bench.{name}")


def add_subcommands(subparsers: _Subparsers) -> None:
    """Add the benchmarks; ``args.run(args)`` of the parsed arguments runs the chosen one."""
    for name, text in BENCHMARKS.items():
        module = _module(name)
        parser = subparsers.add_parser(name, help=text, description=text)
        module.add_arguments(parser)
        parser.set_defaults(run=partial(run_reporting_errors, module))


def main(name: str) -> int:
    """One benchmark as a program of its own, as the files in ``bench/`` run it."""
    module = _module(name)
    parser = Parser(prog=f"octavo bench {name}", description=BENCHMARKS[name])
    module.add_arguments(parser)
    return run_reporting_errors(module, parser.parse_args())


def run_reporting_errors(module: ModuleType, args: argparse.Namespace) -> int:
    """Run it; a wrong flag or a model that cannot be loaded is one line and status 2."""
    try:
        status: int = module.run(args)
    except (ValueError, OSError) as error:
        print(f"octavo bench: {error}", file=sys.stderr)
        return 2
    return status
