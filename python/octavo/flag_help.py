"""Help for flags: the common ones on one screen; a group, a flag or all of them at length."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, Final

from octavo import vllm_flags
from octavo.flags import Flag, flags_of, metavar

WIDTH: Final = 112
_INDENT: Final = 38


class HelpAction(argparse.Action):
    """``--help``, ``--help=all``, ``--help=GROUP``, ``--help=FLAG`` or a part of a name.

    Args:
        configs: the dataclasses whose fields are the flags.
    """

    def __init__(self, option_strings: Sequence[str], dest: str, configs: Any) -> None:
        super().__init__(option_strings, dest, nargs="?", default=argparse.SUPPRESS)
        self._flags = [flag for config in configs for flag in flags_of(config)]

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Print and exit."""
        head = f"usage: {parser.usage}\n{parser.description}\n\n"
        text = short_help(self._flags) if values is None else long_help(self._flags, values)
        if text is None:
            parser.error(f"--help={values}: no such group or flag; try --help=all")
        print((head if values in (None, "all") else "") + text, end="")
        parser.exit()


def short_help(flags: Iterable[Flag]) -> str:
    """The common flags by group, the names of the others, and where to find more."""
    lines = []
    for group, members in _by_group(flags):
        lines.append(f"{group}:")
        lines += [_line(flag) for flag in members if flag.common]
        if others := [flag.option for flag in members if not flag.common]:
            prefix = "  also: " if len(others) < len(members) else "  "
            lines += textwrap.wrap(
                ", ".join(others),
                WIDTH,
                initial_indent=prefix,
                subsequent_indent="    ",
                break_on_hyphens=False,
            )
    lines += [
        "--config FILE: YAML whose keys are the long flags; a switch is turned off by --no-FLAG.",
        "More: --help=all, --help=GROUP, --help=FLAG. vLLM's other flags: docs/flags.md.",
    ]
    return "\n".join(lines) + "\n"


def long_help(flags: Sequence[Flag], topic: str) -> str | None:
    """Everything about a group, a flag, the flags of a part of a name, or all; None: no such.

    ``listgroup``: the groups' names.
    """
    wanted = topic.strip().lower().lstrip("-").replace("-", "_")
    groups = _by_group(flags)
    # vLLM's words: "page" is all of it, a group's name ends in "Config".
    if wanted in ("all", "page"):
        return "\n".join(_section(group, members) for group, members in groups)
    if wanted == "listgroup":
        return "".join(f"{group}\n" for group, _ in groups)
    if wanted.removesuffix("config") in {group for group, _ in groups}:
        wanted = wanted.removesuffix("config")
    for group, members in groups:
        if group.replace(" ", "_") == wanted.replace(" ", "_"):
            return _section(group, members)
    if (row := vllm_flags.ROWS.get(wanted)) is not None:
        return f"{row.option} (vLLM's): {effect(row)}\n"
    exact = [flag for flag in flags if wanted in (flag.name, *flag.aliases)]
    found = exact or [flag for flag in flags if wanted in flag.name]
    return "\n".join(map(_entry, found)) + "\n" if found and wanted else None


def effect(row: vllm_flags.Row) -> str:
    """The treatment of a flag that is vLLM's alone."""
    if row.passes is None:
        return f"accepted, and changes nothing: {row.reason}"
    if row.passes:
        return f"only {' or '.join(row.passes)}: {row.reason}"
    return f"refused: {row.reason}"


def _by_group(flags: Iterable[Flag]) -> list[tuple[str, list[Flag]]]:
    groups: dict[str, list[Flag]] = {}
    for flag in flags:
        groups.setdefault(flag.group, []).append(flag)
    return list(groups.items())


def _section(group: str, members: Iterable[Flag]) -> str:
    return f"{group}:\n" + "\n".join(map(_entry, members)) + "\n"


def _spelling(flag: Flag) -> str:
    """``-tp, --tensor-parallel-size N``."""
    names = ", ".join(filter(None, (flag.short, flag.option)))
    return f"  {names} {metavar(flag)}".rstrip() + (" ..." if flag.many else "")


def _line(flag: Flag) -> str:
    spelling = _spelling(flag)
    if len(spelling) >= _INDENT:
        # Choices are in the long help.
        spelling = spelling.partition("{")[0].rstrip()
    return f"{spelling:<{_INDENT}}{flag.help}{default_of(flag)}"


def default_of(flag: Flag) -> str:
    """The default in brackets; nothing where there is none, or the help tells it."""
    value = flag.default
    if flag.kind == "bool":
        return " [on]" if value else ""
    if value in (None, (), ""):
        return ""
    return f" [{' '.join(map(str, value)) if isinstance(value, tuple) else value}]"


def _entry(flag: Flag) -> str:
    about = [flag.help + default_of(flag)]
    if flag.kind == "bool":
        about.append(f"--no-{flag.option[2:]} turns it off")
    if flag.aliases:
        about.append("also " + ", ".join("--" + name.replace("_", "-") for name in flag.aliases))
    about.append("environment: " + " or ".join(filter(None, (flag.env, flag.vllm_env))))
    body = textwrap.wrap("; ".join(about), WIDTH - 6, break_on_hyphens=False)
    return "\n".join([_spelling(flag), *("      " + line for line in body)])
