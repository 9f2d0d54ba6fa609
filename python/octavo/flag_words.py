"""Words of a command line in vLLM's spellings: underscores, keys behind dots, true and false."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any, Final

# Behind a switch only these words are its value: any other may be the model's name.
_SWITCHED: Final = {"true": True, "false": False}


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
    words = list(words)
    at = 0
    while at < len(words):
        word = words[at]
        at += 1
        if word == "--":
            plain += words[at - 1 :]
            break
        if not word.startswith("--"):
            plain.append(word)
            continue
        name, equals, value = word.partition("=")
        option, _, path = name.partition(".")
        option = option.replace("_", "-")
        if option in switches:
            if not equals and at < len(words) and words[at].lower() in _SWITCHED:
                equals, value = "=", words[at]
                at += 1
            plain.append(_switched(option, value) if equals else option)
            continue
        if option not in json_options:
            plain.append(name.replace("_", "-") + equals + value)
            continue
        if not equals:
            value = words[at] if at < len(words) else ""
            at += 1
            if not value or value.startswith("--"):
                raise ValueError(f"{name} needs a value")
        try:
            _put(objects.setdefault(option, {}), path, value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{option}: {error}") from None
    # In front of everything: a model's name may be the last word.
    return [*(f"{option}={json.dumps(value)}" for option, value in objects.items()), *plain]


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
