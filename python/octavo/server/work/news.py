"""News: what a sample has produced since its last news."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from octavo._core import Piece


class News(Protocol):
    """News of one sample. The core's ``Delta`` is one; its fields are explained there."""

    @property
    def text(self) -> str: ...
    @property
    def pieces(self) -> list[Piece] | None: ...
    @property
    def token_ids(self) -> list[int]: ...
    @property
    def logprobs(self) -> list[list[tuple[int, float, int]]] | None: ...
    @property
    def finish_reason(self) -> str | None: ...
    @property
    def stop_reason(self) -> str | int | None: ...
    @property
    def num_prompt_tokens(self) -> int: ...
    @property
    def num_cached_tokens(self) -> int: ...
    @property
    def num_output_tokens(self) -> int: ...
    @property
    def num_reasoning_tokens(self) -> int: ...
    @property
    def queue_s(self) -> float | None: ...
    @property
    def prefill_s(self) -> float | None: ...
    @property
    def decode_s(self) -> float | None: ...
    @property
    def extra(self) -> Any: ...


@dataclass(frozen=True, slots=True)
class Untouched:
    """News of a sample that no token is asked of, whose prompt no engine has read."""

    num_prompt_tokens: int
    text: str = ""
    pieces: None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: None = None
    finish_reason: str = "length"
    stop_reason: None = None
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_reasoning_tokens: int = 0
    queue_s: None = None
    prefill_s: None = None
    decode_s: None = None
    extra: None = None


def pieces_of(news: News) -> list[Piece]:
    """A sample's new output; without channels all of it is text."""
    return [("text", 0, news.text)] if news.pieces is None else news.pieces


def identified(pieces: Iterable[Piece]) -> Iterator[tuple[str, int, str, str]]:
    """The joined pieces, and beside a call's name the model's own id, if it is known so early."""
    last: Piece = ("end", 0, "")
    following = itertools.pairwise(itertools.chain(joined(pieces), [last]))
    for (kind, call, text), (next_kind, _, next_text) in following:
        yield kind, call, text, next_text if kind == "name" and next_kind == "id" else ""


def joined(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The pieces, those of one kind and call in a row as one."""
    for (kind, call), group in itertools.groupby(pieces, key=lambda piece: piece[:2]):
        if kind in ("text", "reasoning", "arguments"):
            yield kind, call, "".join(text for _, _, text in group)
        else:
            yield from group
