"""Blocks: an answer as blocks in a row, each opened, added to and closed before the next.

OpenAI's chat interface lets a message's parts grow side by side. Anthropic's messages and OpenAI's
responses are lists: text, reasoning and calls of tools in the order in which the model writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from octavo.server.work.news import identified

if TYPE_CHECKING:
    from octavo._core import Piece

BlockKind = Literal["text", "reasoning", "call"]


@dataclass(slots=True)
class Block:
    """One block.

    Args:
        kind: what it is.
        index: its place in the answer.
        name, call_id: of a call.
        parts: its text so far; a call's arguments.
        is_whole: whether the model has ended it; false where the answer was cut inside a call.
    """

    kind: BlockKind
    index: int
    name: str = ""
    call_id: str = ""
    parts: list[str] = field(default_factory=list)
    is_whole: bool = False

    @property
    def text(self) -> str:
        """All of its text."""
        return "".join(self.parts)


# What happens to a block. The text is that of "add".
Step = tuple[Literal["open", "add", "close"], Block, str]


class Blocks:
    """The blocks of one sample so far.

    Args:
        new_call_id: an id for a call, from its name, its number within the answer, and what the
            model has written for one.
        max_calls: calls beyond so many are left out; None: all are kept.
        shows_reasoning: whether reasoning becomes blocks.
    """

    def __init__(
        self,
        new_call_id: Callable[[str, int, str], str],
        *,
        max_calls: int | None = None,
        shows_reasoning: bool = True,
    ) -> None:
        self._new_call_id = new_call_id
        self._max_calls = max_calls
        self._shows_reasoning = shows_reasoning
        self._open: Block | None = None
        self.all: list[Block] = []

    @property
    def calls(self) -> list[Block]:
        """The calls among them."""
        return [block for block in self.all if block.kind == "call"]

    def take(self, pieces: Iterable[Piece]) -> Iterator[Step]:
        """The steps of what came, in order; text of one kind in a row is one."""
        for kind, call, text, given in identified(pieces):
            match kind:
                case "text" | "reasoning" if text:
                    if kind == "text" or self._shows_reasoning:
                        yield from self._say(kind, text)
                case "name" if self._max_calls is None or call < self._max_calls:
                    yield from self.open("call", text, self._new_call_id(text, call, given))
                case "arguments" if text and self._open is not None and self._open.kind == "call":
                    yield self._add(self._open, text)
                case "end" if self._open is not None and self._open.kind == "call":
                    yield from self._close()

    def open(self, kind: BlockKind, name: str = "", call_id: str = "") -> Iterator[Step]:
        """Close the open block and open a new one."""
        yield from self._close()
        block = self._open = Block(kind, len(self.all), name, call_id)
        self.all.append(block)
        yield "open", block, ""

    def end(self) -> Iterator[Step]:
        """The steps at the answer's end. One without a block gets an empty text.

        Clients that expect an answer to say something take the first block unasked.
        """
        if not self.all:
            yield from self.open("text")
        if self._open is not None and self._open.kind == "call":
            # Cut: its end would have come as a piece.
            block, self._open = self._open, None
            yield "close", block, ""
        yield from self._close()

    def _say(self, kind: str, text: str) -> Iterator[Step]:
        if self._open is None or self._open.kind != kind:
            yield from self.open("text" if kind == "text" else "reasoning")
        assert self._open is not None
        yield self._add(self._open, text)

    def _add(self, block: Block, text: str) -> Step:
        block.parts.append(text)
        return "add", block, text

    def _close(self) -> Iterator[Step]:
        block, self._open = self._open, None
        if block is not None:
            block.is_whole = True
            yield "close", block, ""
