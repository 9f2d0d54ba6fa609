"""EngineArgs: an engine's arguments in Python, octavo's and vLLM's, as a dataclass.

They are judged by the tables of the command line: what octavo has, it takes; what makes no
difference is noted in the log; anything else is refused in one line.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import operator
import os
from collections.abc import Mapping
from typing import Any, Final

from octavo import vllm_flags
from octavo.config import EngineConfig
from octavo.flags import Flag, add_flags, flags_of
from octavo.pooler_config import PoolerConfig

logger = logging.getLogger("octavo.engine")

_FLAGS: Final = {
    name: flag for flag in flags_of(EngineConfig) for name in (flag.name, *flag.aliases)
}
# Flags of the server that vLLM also has as arguments of its engine.
_SERVER_FLAGS: Final = frozenset({"disable_log_stats", "enable_log_requests", "shutdown_timeout"})


def make_engine_config(call: str, given: Mapping[str, Any]) -> EngineConfig:
    """The configuration that a call's arguments describe; None is an argument's default.

    Args:
        call: the name of what was called, for messages.
        given: its arguments, octavo's names or vLLM's.

    Raises:
        TypeError: an argument that neither octavo nor vLLM has.
        ValueError: a value that cannot be used, or an argument that octavo refuses.
    """
    given = {name: value for name, value in given.items() if name not in _SERVER_FLAGS}
    kept, notes = vllm_flags.arguments(call, given, _FLAGS)
    values = {}
    for name, value in kept.items():
        flag = _FLAGS[name]
        if (found := flag.vllm_word(value)) is not None:
            notes.append(f"{call}({name}={value!r}) changes nothing here: {found[1]}")
        try:
            values[flag.name] = flag.convert(_plain(flag, value))
        except ValueError as error:
            raise ValueError(f"{call}({name}=...): {error}") from None
    for note in notes:
        logger.warning(note)
    return EngineConfig(**values)


def _plain(flag: Flag, value: Any) -> Any:
    """A value of a library's type as Python's own."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, PoolerConfig):
        return value.settings()
    if type(value).__name__ == "dtype":
        return str(value).removeprefix("torch.")
    if flag.kind == "int" and hasattr(value, "__index__") and not isinstance(value, bool):
        return operator.index(value)
    return value


class _Arguments:
    """The methods of EngineArgs."""

    @staticmethod
    def add_cli_args(
        parser: argparse.ArgumentParser, async_args_only: bool = False
    ) -> argparse.ArgumentParser:
        """Give a parser the engine's flags."""
        add_flags(parser, EngineConfig)
        return parser

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> Any:
        """Arguments from what ``add_cli_args`` has parsed; other attributes are left alone."""
        return cls(**{k: v for k, v in vars(args).items() if k in NAMES})

    def create_engine_config(self, usage_context: Any = None) -> EngineConfig:
        """The configuration.

        Raises:
            ValueError: a value that cannot be used, or an argument that octavo refuses.
        """
        given = {name: getattr(self, name) for name in NAMES}
        return make_engine_config(type(self).__name__, given)


# The model first, as everybody writes it; None is an argument's default.
NAMES: Final = tuple(
    dict.fromkeys((*(flag.name for flag in flags_of(EngineConfig)), *_FLAGS, *vllm_flags.ROWS))
) + tuple(sorted(_SERVER_FLAGS))
_FIELDS: Final = [(name, Any, dataclasses.field(default=None)) for name in NAMES]

EngineArgs: Any = dataclasses.make_dataclass(
    "EngineArgs",
    _FIELDS,
    bases=(_Arguments,),
    namespace={"__doc__": "Arguments of LLM and of vLLM's engines.", "__module__": __name__},
)
AsyncEngineArgs: Any = dataclasses.make_dataclass(
    "AsyncEngineArgs",
    [],
    bases=(EngineArgs,),
    namespace={"__doc__": "The same, for AsyncLLM.", "__module__": __name__},
)
