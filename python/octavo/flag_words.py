"""Words of a command line in vLLM's spellings: underscores, keys behind dots, true and false."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Final, NamedTuple

# Behind a switch only these words are its value: any other may be the model's name.
_SWITCHED: Final = {"true": True, "false": False}


class Option(NamedTuple):
    """An option as its word spells it: ``--hf_overrides.a.b=1``.

    ``name``: ``--hf-overrides``; ``path``: the keys behind dots, ``a.b``; ``value``: what stands
    behind the equals sign, None where there is none.
    """

    name: str
    path: str
    value: str | None

    @classmethod
    def of(cls, word: str) -> Option:
        """A word taken apart; one with a single dash has no underscores to replace."""
        head, equals, value = word.partition("=")
        name, _, path = head.partition(".")
        if name.startswith("--"):
            name = name.replace("_", "-")
        return cls(name, path, value if equals else None)


class Line:
    """A command line, read from the left; whoever takes a word may take those behind it."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = list(words)
        self._at = 0

    def __iter__(self) -> Iterator[str]:
        """The words in front of ``--``."""
        while (word := self.take(lambda word: word != "--")) is not None:
            yield word

    def take(self, fits: Callable[[str], bool]) -> str | None:
        """The next word, if there is one and it fits."""
        if self._at == len(self._words) or not fits(self._words[self._at]):
            return None
        self._at += 1
        return self._words[self._at - 1]

    def take_switched(self) -> str | None:
        """The next word, if it is a switch's value."""
        return self.take(lambda word: word.lower() in _SWITCHED)

    def rest(self) -> list[str]:
        """The words not taken: ``--`` and those after it, once the iteration is over."""
        return self._words[self._at :]


def plain_words(
    words: Sequence[str], json_options: Collection[str], switches: Collection[str] = ()
) -> list[str]:
    """The same command line as argparse knows it.

    ``--max_model_len`` becomes ``--max-model-len``; ``--hf-overrides.a.b 1`` and
    ``--hf-overrides.c+ 2`` (an item of a list) become one ``--hf-overrides`` with the object they
    spell, merged into the object that is given, if one is; ``--enforce-eager false`` becomes
    ``--no-enforce-eager``. ``json_options``: the options that take objects; ``switches``: those
    that take nothing.

    Raises:
        ValueError: a key stands for a value and for an object, or has no value.
    """
    plain: list[str] = []
    objects: dict[str, dict[str, Any]] = {}
    line = Line(words)
    for word in line:
        name, path, value = Option.of(word)
        if not word.startswith("--"):
            plain.append(word)
        elif name in switches:
            value = line.take_switched() if value is None else value
            plain.append(name if value is None else _switched(name, value))
        elif name not in json_options:
            head, equals, text = word.partition("=")
            plain.append(head.replace("_", "-") + equals + text)
        else:
            if value is None:
                value = line.take(lambda word: bool(word) and not word.startswith("--"))
            if value is None:
                raise ValueError(f"{word} needs a value")
            try:
                _put(objects.setdefault(name, {}), path, value)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name}: {error}") from None
    # In front of everything: a model's name may be the last word.
    objects_first = [f"{option}={json.dumps(value)}" for option, value in objects.items()]
    return [*objects_first, *plain, *line.rest()]


def _switched(option: str, value: str) -> str:
    """A switch as its value has it.

    Raises:
        ValueError: it is neither true nor false.
    """
    if (on := _SWITCHED.get(value.lower())) is None:
        raise ValueError(f"{option}: {value!r} is not true or false")
    return option if on else "--no-" + option[2:]


def parse_object(text: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: it is something else.
    """
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{text!r} is not a JSON object")
    return value


def _put(into: dict[str, Any], path: str, text: str) -> None:
    """Set one key; an empty path merges a whole object."""
    if not path:
        into.update(parse_object(text))
        return
    *parents, last = path.split(".")
    for key in parents:
        into = into.setdefault(key, {})
        if not isinstance(into, dict):
            raise ValueError(f"{key} is given as a value and as an object")
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    if last.endswith("+"):
        items = into.setdefault(last[:-1], [])
        if not isinstance(items, list):
            raise ValueError(f"{last[:-1]} is given as a value and as a list")
        items += value if isinstance(value, list) else [value]
    else:
        into[last] = value
