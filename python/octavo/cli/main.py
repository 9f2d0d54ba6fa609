"""``octavo``: serve, chat, complete, clients, run-batch, bench, doctor, collect-env.

Nothing heavy is imported before the command is known: ``octavo --help`` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from octavo import __version__
from octavo.flag_help import HelpAction
from octavo.flags import FlagError, Parser, add_flags, resolve, unread_variables


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the process's exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        parser = make_parser(words)
        if not words:
            parser.print_help()
            return 2
        arguments = parser.parse_args(words)
        status: int = arguments.run(arguments)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return status


def make_parser(words: Sequence[str] = ()) -> Parser:
    """The parser of every command. Only the modules of the command in ``words`` are imported."""
    parser = Parser(
        prog="octavo", description="A server for language models: vLLM's interface, one process."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    _add_serve(commands)
    _add_clients(commands)
    _add_run_batch(commands, is_asked=words[:1] == ["run-batch"])
    bench = commands.add_parser("bench", help="measure serving, throughput, latency or start-up")
    if words[:1] == ["bench"]:
        from octavo.bench import add_subcommands

        kinds: Any = bench.add_subparsers(metavar="KIND", dest="kind", required=True)
        add_subcommands(kinds)
    doctor = commands.add_parser(
        "doctor", help="what this machine can run, and what stands in the way"
    )
    doctor.add_argument(
        "model", nargs="?", metavar="MODEL", help="a folder, a .gguf file, a hub id on this machine"
    )
    doctor.set_defaults(run=_doctor)
    environment = commands.add_parser("collect-env", help="versions and hardware, for bug reports")
    environment.set_defaults(run=_collect_env)
    return parser


def _add_serve(commands: Any) -> None:
    from octavo.config import EngineConfig
    from octavo.server.http.config import ServerConfig

    parser = commands.add_parser(
        "serve",
        help="serve a model over HTTP",
        usage="octavo serve [MODEL] [flags]",
        description="Serve a model over HTTP. Every flag is also OCTAVO_<FLAG> in the environment.",
        add_help=False,
    )
    configs = (EngineConfig, ServerConfig)
    parser.add_argument("-h", "--help", action=HelpAction, configs=configs)
    parser.add_argument(
        "model_argument", metavar="MODEL", nargs="?", help="the same as --model", default=None
    )
    add_flags(parser, *configs)
    parser.set_defaults(run=_serve)


def _serve(arguments: argparse.Namespace) -> int:
    from octavo.config import EngineConfig
    from octavo.errors import OctavoError
    from octavo.server.http.config import ServerConfig

    given = vars(arguments)
    model = given.pop("model_argument")
    if model is not None:
        if given.get("model", model) != model:
            arguments.parser.error(f"MODEL {model!r} and --model {given['model']!r} differ")
        given["model"] = model
    try:
        engine_config, server_config = resolve(given, (EngineConfig, ServerConfig), warn=_warn)
    except FlagError as error:
        arguments.parser.error(str(error))
    for name in unread_variables((EngineConfig, ServerConfig), os.environ):
        _warn(f"{name} is set, and octavo does not read it")
    from octavo.cli.serve import serve
    from octavo.cli.terminal import Terminal

    with Terminal():
        try:
            return serve(engine_config, server_config)
        except (OSError, ValueError, OctavoError) as error:
            # What an operator can set right needs no traceback.
            print(f"octavo: error: {error}", file=sys.stderr)
            return 1


def _warn(line: str) -> None:
    print(f"octavo: warning: {line}", file=sys.stderr)


def _add_run_batch(commands: Any, *, is_asked: bool) -> None:
    parser = commands.add_parser(
        "run-batch",
        help="answer a file of requests (OpenAI's batch format)",
        usage="octavo run-batch -i FILE -o FILE --model MODEL [flags]",
    )
    parser.set_defaults(run=_run_batch)
    if is_asked:
        from octavo.cli.run_batch import add_arguments
        from octavo.config import EngineConfig

        add_arguments(parser)
        add_flags(parser, EngineConfig)


def _run_batch(arguments: argparse.Namespace) -> int:
    from octavo.cli.run_batch import run
    from octavo.config import EngineConfig
    from octavo.errors import OctavoError

    try:
        [engine_config] = resolve(vars(arguments), (EngineConfig,), warn=_warn)
    except FlagError as error:
        arguments.parser.error(str(error))
    from octavo.cli.terminal import Terminal

    with Terminal():
        try:
            return run(arguments, engine_config)
        except (OSError, ValueError, OctavoError) as error:
            print(f"octavo: error: {error}", file=sys.stderr)
            return 1


def _add_clients(commands: Any) -> None:
    chat = commands.add_parser("chat", help="talk to a running server")
    chat.add_argument("--system", metavar="TEXT", help="system message")
    chat.add_argument("-q", "--quick", metavar="TEXT", help="one message, one answer")
    chat.set_defaults(run=_chat)
    complete = commands.add_parser("complete", help="let a running server continue a text")
    complete.add_argument("prompt", nargs="?", metavar="TEXT", help="default: read lines")
    complete.set_defaults(run=_complete)
    settings = commands.add_parser("clients", help="settings of agents for a running server")
    settings.set_defaults(run=_clients)
    for parser in (chat, complete, settings):
        parser.add_argument(
            "--url", default="http://127.0.0.1:8000", help="the server [%(default)s]"
        )
        parser.add_argument("--model", metavar="NAME", help="default: the server's")
        parser.add_argument("--api-key", metavar="KEY", help="default: OCTAVO_API_KEY")
    for parser in (chat, complete):
        parser.add_argument("--max-tokens", type=int, metavar="N", help="longest answer")
        parser.add_argument("--temperature", type=float, metavar="X", help="0 is deterministic")


def _chat(arguments: argparse.Namespace) -> int:
    from octavo.cli.chat import chat

    return chat(arguments)


def _complete(arguments: argparse.Namespace) -> int:
    from octavo.cli.chat import complete

    return complete(arguments)


def _clients(arguments: argparse.Namespace) -> int:
    from octavo.cli.agent_settings import clients

    return clients(arguments)


def _doctor(arguments: argparse.Namespace) -> int:
    from octavo.cli.doctor import doctor

    return doctor(arguments.model)


def _collect_env(arguments: argparse.Namespace) -> int:
    from octavo.cli.collect_env import collect_env

    print(collect_env())
    return 0


if __name__ == "__main__":
    sys.exit(main())
