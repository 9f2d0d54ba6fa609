"""Agents' markers: text that changes with every request, and would keep a prompt out of the cache.

A prompt is found in the prefix cache up to the first token that differs. Some agents put counters
and clocks into their system text, before everything else. What informs the model is moved to the
end of the last message, where it costs no more than its own tokens; what does not is left out.

- ``x-anthropic-billing-header: ...cch=<hash>;``, Claude Code's, in the first system text: a hash
  of the request. Left out.
- ``<total_tokens>N tokens left</total_tokens>``: one more with every request. The newest is moved,
  the others are left out.
- A line of the system text that gives the current time of day. Moved.

A date alone changes once a day, and stays.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

Message = dict[str, Any]

_BILLING: Final = re.compile(r"\A\s*x-anthropic-billing-header:[^\n]*\n*")
# Not from inside of white space: a long run of it would be looked through from each of its places.
_TOKENS_LEFT: Final = re.compile(r"(?<!\s)\s*<total_tokens>([^<>]{0,100})</total_tokens>")
_CLOCK: Final = re.compile(
    r"""^[ \t]*(?:[-*][ \t]+)?(?:the[ ])?(?:current|today's)[ ]
    (?:(?:local|utc|system)[ ])?(?:date(?:[ ]?(?:and|/|&)[ ]?time)?|datetime|time|timestamp)
    \b[^\n]{0,80}?\d{1,2}:\d{2}[^\n]{0,80}$\n?""",
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)


def without_markers(messages: Sequence[Message]) -> list[Message]:
    """The messages with volatile markers moved or left out; most stay as they are."""
    moved: list[str] = []
    tokens_left = ""
    clean: list[Message] = []
    for message in messages:
        if message["role"] not in ("system", "developer"):
            clean.append(message)
            continue
        parts = []
        for text in _texts(message["content"]):
            text = _BILLING.sub("", text)
            if found := _TOKENS_LEFT.findall(text):
                tokens_left = found[-1]
                text = _TOKENS_LEFT.sub("", text)
            if _CLOCK.search(text):
                moved += [line.strip() for line in _CLOCK.findall(text)]
                text = _CLOCK.sub("", text)
            if text:
                parts.append({"type": "text", "text": text})
        if parts:
            clean.append({**message, "content": parts})
    if tokens_left:
        moved.append(f"<total_tokens>{tokens_left}</total_tokens>")
    if moved:
        _append(clean, "\n".join(moved))
    return clean


def _texts(content: Any) -> list[str]:
    return [content] if isinstance(content, str) else [part["text"] for part in content]


def _append(messages: list[Message], text: str) -> None:
    """Put a text at the end of the last message that is not the assistant's."""
    for at in range(len(messages) - 1, -1, -1):
        message = messages[at]
        if message["role"] in ("user", "tool"):
            content = message["content"]
            if isinstance(content, str):
                content = f"{content}\n{text}"
            else:
                content = [*content, {"type": "text", "text": text}]
            messages[at] = {**message, "content": content}
            return
    messages.append({"role": "user", "content": text})
