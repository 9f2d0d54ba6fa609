"""RoutedRequest: an HTTP request on its way to a replica, and the text it is routed by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson

# Of a conversation's beginning: as much as tells apart what replicas may have cached. Ray's router
# keeps a tree of these texts.
MAX_ROUTING_CHARS: Final = 8192

# A head: the status and headers. Then come parts of the body.
Head = tuple[int, list[tuple[bytes, bytes]]]


@dataclass(frozen=True, slots=True)
class RoutedRequest:
    """One request, as it is sent between processes.

    Attributes:
        prompt: the beginning of its text, by which Ray's prefix-aware router chooses; that router
            looks for an attribute of this name.
    """

    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes
    prompt: str = ""

    @classmethod
    def of(
        cls,
        method: str,
        path: str,
        query: bytes,
        headers: list[tuple[bytes, bytes]],
        body: bytes,
    ) -> RoutedRequest:
        """A request with its text found."""
        return cls(method, path, query, headers, body, routing_text(body))


def routing_text(body: bytes) -> str:
    """The beginning of a body's prompt or conversation, in any of the APIs; "" where none is."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        return ""
    if not isinstance(value, Mapping):
        return ""
    text = ""
    for part in _texts(value):
        text += part
        if len(text) >= MAX_ROUTING_CHARS:
            break
    return text[:MAX_ROUTING_CHARS]


def _texts(body: Mapping[str, Any]) -> Iterator[str]:
    # What a template writes first, first: equal beginnings are what can be found cached.
    for name in ("system", "instructions", "tools", "messages", "input", "prompt"):
        if body.get(name):
            yield from _leaves(body[name])


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
