"""Flags: command line, environment and YAML, generated from the config dataclasses.

A dataclass field is a flag: its name the spelling, its annotation the type, its metadata the group
and the help. A value comes from the first of: command line, ``OCTAVO_<FLAG>``, the ``--config``
file, the field's default.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import itertools
import json
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any, Final, Literal, NoReturn

from octavo import vllm_flags
from octavo.flag_words import parse_object, plain_words

ENV_PREFIX: Final = "OCTAVO_"
VLLM_PREFIX: Final = "VLLM_"

# As vLLM reads them: a small letter counts in thousands, a capital in 1024s.
_POWERS: Final = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_NUMBER: Final = re.compile(r"([+-]?\d+(?:\.\d+)?)\s*(?:([kmgtKMGT])(i?)B?)?")

_KINDS: Final = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "json": "an object",
}
_TRUE: Final = frozenset({"1", "true", "yes", "on"})
_FALSE: Final = frozenset({"0", "false", "no", "off"})


class FlagError(ValueError):
    """A flag's value, wherever it came from, is not usable; the message names the flag."""


def parse_int(text: str) -> int:
    """A whole number: ``4096``, ``8k`` (8000), ``8K`` or ``8Ki`` (8192), ``1.5M``.

    Raises:
        ValueError: not a whole number.
    """
    match = _NUMBER.fullmatch(text.strip().replace("_", ""))
    if match is None:
        raise ValueError(f"{text!r} is not a number such as 4096, 8k or 2G")
    unit = match[2] or ""
    base = 1024 if unit.isupper() or match[3] else 1000
    # Exact: a float would round what is beyond 2**53.
    value = Decimal(match[1]) * base ** _POWERS[unit.lower()]
    if value != int(value):
        raise ValueError(f"{text!r} is not a whole number")
    return int(value)


def option_of(name: str) -> str:
    """``--max-model-len`` of ``max_model_len``."""
    return "--" + name.replace("_", "-")


@dataclasses.dataclass(frozen=True, slots=True)
class Flag:
    """One field of one dataclass, as a flag."""

    name: str
    kind: Literal["bool", "int", "float", "str", "json"]
    default: Any
    group: str
    help: str
    many: bool
    human: bool
    choices: tuple[str, ...]
    short: str | None
    vllm_env: str | None
    words: Mapping[str, Any]
    aliases: tuple[str, ...]
    vllm_words: Mapping[str, tuple[Any, str]]
    lacks: Mapping[str, str]
    common: bool

    @property
    def option(self) -> str:
        """``--max-model-len``."""
        return option_of(self.name)

    @property
    def options(self) -> tuple[str, ...]:
        """Every spelling: the short one, its own, its aliases."""
        return (
            *((self.short,) if self.short else ()),
            self.option,
            *map(option_of, self.aliases),
        )

    @property
    def env(self) -> str:
        """``OCTAVO_MAX_MODEL_LEN``."""
        return ENV_PREFIX + self.name.upper()

    def parse(self, text: str) -> Any:
        """One value from text.

        Raises:
            ValueError: not of the flag's kind.
        """
        if self.kind == "bool":
            lowered = text.strip().lower()
            if lowered not in _TRUE | _FALSE:
                raise ValueError(f"{text!r} is not true or false")
            return lowered in _TRUE
        if text in self.words:
            return self.words[text]
        if (found := self.vllm_word(text)) is not None:
            return found[0]
        if self.kind in ("int", "float"):
            return self._number(text)
        if self.kind == "json":
            return parse_object(text)
        if text in self.lacks:
            raise ValueError(self.lacks[text])
        if self.choices and text not in self.choices:
            raise ValueError(f"{text!r} is not one of {', '.join(self.choices)}")
        return text

    def _number(self, text: str) -> int | float:
        if self.human:
            return parse_int(text)
        what = "a whole number" if self.kind == "int" else "a number"
        try:
            return int(text) if self.kind == "int" else float(text)
        except ValueError:
            raise ValueError(f"{text!r} is not {what}") from None

    def vllm_word(self, value: object) -> tuple[Any, str] | None:
        """Octavo's value for one of vLLM's, and why it makes no difference here."""
        if not isinstance(value, str):
            return None
        return self.vllm_words.get(value) or self.vllm_words.get(value.upper())

    def parse_many(self, text: str) -> list[Any]:
        """A word of a flag that takes several: a value, or a JSON list of them.

        Raises:
            ValueError: not of the flag's kind.
        """
        if not text.lstrip().startswith("["):
            # Of known words none holds a comma.
            return [self.parse(part) for part in (text.split(",") if self.choices else [text])]
        try:
            items = json.loads(text)
        except ValueError:
            raise ValueError(f"{text!r} is not a JSON list") from None
        return [self._convert_one(item) for item in items]

    def convert(self, value: Any) -> Any:
        """A value from anywhere: text as on the command line, or ready-made.

        Raises:
            ValueError: not of the flag's kind.
        """
        if not self.many:
            return self._convert_one(value)
        if isinstance(value, str) and not value.lstrip().startswith("["):
            value = [part.strip() for part in value.split(",") if part.strip()]
        items = value if isinstance(value, list | tuple) else [value]
        # Each of a list's words may be a list of them.
        many = (
            self.parse_many(item) if isinstance(item, str) else [self._convert_one(item)]
            for item in items
        )
        return tuple(itertools.chain.from_iterable(many))

    def _convert_one(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.parse(value)
        fits = {
            "bool": isinstance(value, bool),
            "int": isinstance(value, int) and not isinstance(value, bool),
            "float": isinstance(value, int | float) and not isinstance(value, bool),
            "str": isinstance(value, int | float) and not isinstance(value, bool),
            "json": isinstance(value, dict),
        }
        if value is None or not fits[self.kind]:
            raise ValueError(f"{value!r} is not {_KINDS[self.kind]}")
        return str(value) if self.kind == "str" else value


def flags_of(config: type[Any]) -> list[Flag]:
    """Every field of a config dataclass."""
    hints = typing.get_type_hints(config)
    flags = []
    for field in dataclasses.fields(config):
        meta = field.metadata
        kind, literal = _kind(hints[field.name])
        flags.append(
            Flag(
                name=field.name,
                kind=kind,
                default=field.default,
                group=meta["group"],
                help=meta["help"],
                many=meta.get("many", False),
                human=meta.get("human", False),
                choices=tuple(meta.get("choices", literal)),
                short=meta.get("short"),
                vllm_env=meta.get("vllm_env"),
                words=meta.get("words", {}),
                aliases=tuple(meta.get("aliases", ())),
                vllm_words=meta.get("vllm_words", {}),
                lacks=meta.get("lacks", {}),
                common=meta.get("common", False),
            )
        )
    return flags


def _kind(hint: Any) -> tuple[Literal["bool", "int", "float", "str", "json"], tuple[str, ...]]:
    """The parser of a field's text, by its annotation; and a Literal's values."""
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _kind(next(a for a in arguments if a is not type(None)))
    if origin is Literal:
        return "str", arguments
    if origin is tuple:
        return _kind(arguments[0])
    if origin is dict or hint is dict:
        return "json", ()
    kinds: dict[Any, Literal["bool", "int", "float", "str"]] = {
        bool: "bool",
        int: "int",
        float: "float",
        str: "str",
    }
    return kinds[hint], ()


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, with vLLM's spellings, and with a guess at what a misspelt
    flag should be.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)
        # What add_flags has added, by option.
        self.flags: dict[str, Flag] = {}

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        parsed, rest = self.parse_known_args(args, namespace)
        if rest:
            parsed.parser.refuse_unknown(rest)
        return parsed

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's; ``parser`` in the namespace is the chosen command's own.

        Flags of vLLM that octavo does not have are there under their names, for ``resolve``.
        """
        foreign: dict[str, Any] = {}
        if self.flags:
            words = list(sys.argv[1:] if args is None else args)
            try:
                words, foreign = vllm_flags.take(words, self._option_string_actions)
                args = plain_words(words, self._options("json"), self._options("bool"))
            except ValueError as error:
                self.error(str(error))
        parsed, rest = super().parse_known_args(args, namespace)
        for name, value in foreign.items():
            setattr(parsed, name, value)
        # A command's parser is called by that of the commands, and is there first.
        if not hasattr(parsed, "parser"):
            parsed.parser = self
        return parsed, rest

    def _options(self, kind: str) -> set[str]:
        return {option for option, flag in self.flags.items() if flag.kind == kind}

    def refuse_unknown(self, rest: Sequence[str]) -> NoReturn:
        """Name the flags nearest to the first unknown one."""
        unknown = next((word for word in rest if word.startswith("-")), rest[0])
        options = list(self._option_string_actions)
        name = unknown.partition("=")[0].replace("_", "-")
        near = difflib.get_close_matches(name, options, n=2, cutoff=0.6)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; see --help"
        self.error(f"unknown argument {unknown!r}{hint}")


def add_flags(parser: argparse.ArgumentParser, *configs: type[Any]) -> None:
    """Give a parser every flag, grouped. What is not given stays absent from the namespace.

    Values stay text: ``resolve`` converts them, wherever they come from.
    """
    parser.add_argument(
        "--config",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="YAML whose keys are the long flags; the command line and OCTAVO_* win",
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for flag in (flag for config in configs for flag in flags_of(config)):
        group = groups.get(flag.group)
        if group is None:
            group = groups[flag.group] = parser.add_argument_group(flag.group)
        keywords: dict[str, Any] = {
            "dest": flag.name,
            "default": argparse.SUPPRESS,
            "help": _help(flag),
        }
        if flag.kind == "bool":
            keywords["action"] = argparse.BooleanOptionalAction
        else:
            keywords["metavar"] = metavar(flag)
            if flag.many:
                keywords["nargs"] = "+"
        group.add_argument(*flag.options, **keywords)
        if isinstance(parser, Parser):
            parser.flags.update(dict.fromkeys(flag.options, flag))


def metavar(flag: Flag) -> str:
    """The name of a flag's value in the help; empty where it has none."""
    if flag.kind == "bool":
        return ""
    if flag.choices and not flag.many:
        return "{" + ",".join(flag.choices) + "}"
    kinds = {"int": "N", "float": "X", "json": "JSON"}
    return kinds.get(flag.kind) or flag.name.rpartition("_")[2].upper()


def _help(flag: Flag) -> str:
    # Defaults of None and () say nothing; the help text does.
    shown = "" if flag.default in (None, ()) else f" [{flag.default}]"
    return (flag.help + shown).replace("%", "%%")


def resolve(
    arguments: Mapping[str, Any],
    configs: Sequence[type[Any]],
    environ: Mapping[str, str] | None = None,
    warn: Callable[[str], object] = lambda line: None,
) -> list[Any]:
    """Build each config from the command line, the environment, the YAML file and the defaults.

    Args:
        arguments: of the command line, by name; those that are no flag are left alone.
        configs: the dataclasses.
        environ: in place of the process's.
        warn: gets a line about each flag and value of vLLM's that makes no difference.

    Raises:
        FlagError: a value that cannot be used; names the flag and where it came from.
    """
    environ = os.environ if environ is None else environ
    flags = {flag.name: flag for config in configs for flag in flags_of(config)}
    notes: list[str] = []
    values: dict[str, Any] = {}
    path = arguments.get("config") or environ.get(ENV_PREFIX + "CONFIG")
    if path is not None:
        values.update(_read_yaml(path, flags, notes))
    for flag in flags.values():
        for name in filter(None, (flag.vllm_env, flag.env)):
            if name in environ:
                values[flag.name] = _converted(flag, environ[name], name, notes)
    for name, value in arguments.items():
        if name in flags:
            values[name] = _converted(flags[name], value, None, notes)
        elif name in vllm_flags.ROWS:
            _note(notes, name, value, "")
    for line in notes:
        warn(line)
    built = []
    for config in configs:
        names = {field.name for field in dataclasses.fields(config)}
        try:
            built.append(config(**{name: values[name] for name in names & values.keys()}))
        except ValueError as error:
            raise FlagError(_as_flag(str(error), names)) from None
    return built


def unread_variables(configs: Sequence[type[Any]], environ: Mapping[str, str]) -> list[str]:
    """The names of vLLM's environment variables that are set and mean nothing here."""
    read = {flag.vllm_env for config in configs for flag in flags_of(config)}
    return sorted(name for name in environ if name.startswith(VLLM_PREFIX) and name not in read)


def _as_flag(message: str, names: set[str]) -> str:
    """A config's complaint, with flags in place of the fields' names.

    It begins with one; further on only what has an underscore is sure to be none but a name.
    """
    first, space, rest = message.partition(" ")
    spelled = re.sub(r"\w+_\w+", lambda m: option_of(m[0]) if m[0] in names else m[0], rest)
    return (option_of(first) if first in names else first) + space + spelled


def _converted(flag: Flag, value: Any, source: str | None, notes: list[str]) -> Any:
    """A value as the config takes it; ``source``: None is the command line."""
    where = "" if source is None else f" (from {source})"
    if (found := flag.vllm_word(value)) is not None:
        notes.append(f"{flag.option} {value}{where} changes nothing here: {found[1]}")
    try:
        return flag.convert(value)
    except ValueError as error:
        raise FlagError(f"{flag.option}{where}: {error}") from None


def _note(notes: list[str], name: str, value: Any, where: str) -> None:
    row = vllm_flags.ROWS[name]
    if row.kind == "switch":
        spelling = row.option if value is not False else "--no-" + row.option[2:]
    elif row.kind == "value":
        spelling = f"{row.option} {value}"
    else:
        spelling = row.option
    try:
        notes.append(vllm_flags.note(row, value, spelling + where))
    except ValueError as error:
        raise FlagError(str(error)) from None


def _read_yaml(path: str, flags: Mapping[str, Flag], notes: list[str]) -> dict[str, Any]:
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except OSError as error:
        raise FlagError(f"--config: {error.strerror}: {path}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}"
        raise FlagError(f"--config: {path}{where} is not YAML") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise FlagError(f"--config: {path} does not hold keys and values")
    names = {name: flag for flag in flags.values() for name in (flag.name, *flag.aliases)}
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).removeprefix("--").replace("-", "_")
        if (flag := names.get(name)) is not None:
            if value is not None:
                values[flag.name] = _converted(flag, value, path, notes)
        elif name in vllm_flags.ROWS:
            _note(notes, name, value, f" (from {path})")
        else:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
            hint = f"; did you mean {near[0].replace('_', '-')}?" if near else ""
            raise FlagError(f"--config: {path}: unknown key {key!r}{hint}")
    return values
