"""AnswerParts: a whole answer taken apart into content, reasoning and calls."""

from __future__ import annotations

from dataclasses import dataclass, field

from octavo._core import ChannelParser, Channels


@dataclass(slots=True)
class AnswerParts:
    """The parts of one answer. ``calls``: (name, arguments as JSON) of each, in order."""

    content: str = ""
    reasoning: str | None = None
    calls: list[tuple[str, str]] = field(default_factory=list)


def answer_parts(text: str, channels: Channels) -> AnswerParts:
    """Take a whole answer apart. ``text``: with the special tokens that are markers."""
    parser = ChannelParser(channels)
    texts: dict[str, list[str]] = {"text": [], "reasoning": []}
    names: list[str] = []
    arguments: list[list[str]] = []
    for kind, call, piece in [*parser.push(text), *parser.finish()]:
        if kind == "name":
            names.append(piece)
            arguments.append([])
        elif kind == "arguments":
            arguments[call].append(piece)
        elif kind in texts:
            texts[kind].append(piece)
    calls = [(name, "".join(parts)) for name, parts in zip(names, arguments, strict=True)]
    return AnswerParts("".join(texts["text"]), "".join(texts["reasoning"]) or None, calls)
