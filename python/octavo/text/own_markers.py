"""own_markers: markers of calls that no format of the table has, taken out of a rendered turn.

A template that is none of the known families' still writes calls in one of three styles: an object
with name and arguments, a name and then its arguments as JSON, a name and then a tag for each
argument. What stands around these is compared between turns with one call, two and none. Each guess
is only a guess: the caller parses the turns with it, and takes it if the calls come back.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from octavo.text.template_probe import KEY, NAME, Calls, last_marker, next_marker

_DECODER: Final = json.JSONDecoder()
_BRACES: Final = re.compile(r"\{")

Overrides = dict[str, Any]


def own_markers(turns: Sequence[Calls]) -> Iterator[Overrides]:
    """Guesses of markers, as ``ChannelFormat`` takes them in its overrides."""
    one = next((turn for turn in turns if len(turn.arguments) == 1), None)
    if one is None or NAME not in one.text:
        return
    two = next((turn.text for turn in turns if len(turn.arguments) == 2), "")
    [arguments] = one.arguments
    guesses = itertools.chain(
        _objects(one.text, two, arguments),
        _values(one.text, arguments),
        _tags(one.text, arguments[KEY]),
    )
    for guess in guesses:
        opened = guess.get("section") or guess["call"]
        # What opens other turns too opens no call.
        if opened[0].strip() not in one.plain:
            yield guess


def _objects(text: str, two: str, arguments: Mapping[str, str]) -> Iterator[Overrides]:
    """``{"name": ..., "arguments": ...}``, alone or in an array."""
    for match in _BRACES.finditer(text, 0, text.find(NAME)):
        found = _decoded(text, match.start())
        if found is None:
            continue
        value, end = found
        keys = {json.dumps(one): key for key, one in value.items()}
        names = [keys.get(json.dumps(NAME)), keys.get(json.dumps(arguments))]
        if None in names:
            continue
        before, after = text[: match.start()], text[end:]
        in_array = before.rstrip().endswith("[") and after.lstrip().startswith("]")
        if in_array:
            before, after = before.rstrip()[:-1], after.lstrip()[1:]
        opened, closed = last_marker(before), next_marker(after)
        if not opened:
            return
        overrides: Overrides = {"keys": [*names, ""]}
        if in_array:
            yield {**overrides, "style": "array", "section": [opened, closed]}
        else:
            between = _between(two, opened, closed)
            yield {**overrides, "style": "object", "call": [opened, closed], "separator": between}
        return


def _between(two: str, opened: str, closed: str) -> str:
    """The text between two calls."""
    first = two.find(NAME)
    end = two.rfind(opened, first, two.rfind(NAME)) if first >= 0 else -1
    begin = two.find(closed, first, end) + len(closed) if end >= 0 and closed else -1
    return two[begin:end] if 0 <= begin <= end else ""


def _values(text: str, arguments: Mapping[str, str]) -> Iterator[Overrides]:
    """A name, something, and the arguments as JSON."""
    at = text.find(NAME)
    end = at + len(NAME)
    begin = text.find("{", end)
    found = _decoded(text, begin) if begin >= 0 else None
    if found is None or found[0] != arguments or begin == end:
        return
    opened, closed = last_marker(text[:at], is_whole=False), next_marker(text[found[1] :])
    if opened:
        yield {"style": "value", "call": [opened, closed], "name_end": [text[end:begin]]}


def _tags(text: str, value: str) -> Iterator[Overrides]:
    """A name, and a tag with a name for each argument."""
    parts = re.split(f"{NAME}|{KEY}|{re.escape(value)}", text)
    if len(parts) != 4:
        return
    before, name_end, key_end, after = parts
    parameter = last_marker(name_end, is_whole=False)
    name_end = name_end.removesuffix(parameter)
    parameter_end = next_marker(after)
    call_end = next_marker(after.removeprefix(parameter_end))
    opened = last_marker(before, is_whole=False)
    if not (parameter and parameter_end and opened and key_end):
        return
    tags = {
        "style": "tags",
        "call": [opened, call_end],
        "name_end": [name_end or parameter],
        "parameter": [parameter, key_end, parameter_end],
    }
    section = last_marker(before.removesuffix(opened), is_whole=False)
    if section:
        rest = after.removeprefix(parameter_end).removeprefix(call_end)
        yield {**tags, "section": [section, next_marker(rest)]}
    yield tags


def _decoded(text: str, begin: int) -> tuple[dict[str, Any], int] | None:
    """The JSON object at a place, and where it ends."""
    try:
        value, end = _DECODER.raw_decode(text, begin)
    except ValueError:
        return None
    return (value, end) if isinstance(value, dict) else None
