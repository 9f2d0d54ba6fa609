"""CustomInput: the text of a custom tool's call, out of the JSON in which a model writes it.

To the model a custom tool is a function of one argument, ``{"input": "..."}``. Clients are given
the text itself, as it comes.
"""

from __future__ import annotations

import json
import re
from typing import Final

from octavo.server.responses.tools import INPUT

_HEAD: Final = re.compile(rf'\s*\{{\s*"{INPUT}"\s*:\s*"')
# Characters of a JSON string that are complete: an escape, both halves of a surrogate pair.
_CHARACTERS: Final = re.compile(
    r"""(?:[^"\\]|\\["\\/bfnrt]|\\u(?![dD][89a-fA-F])[0-9a-fA-F]{4}
    |\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})*""",
    re.VERBOSE,
)


class CustomInput:
    """The text of one call so far."""

    def __init__(self) -> None:
        self._arguments: list[str] = []
        # What of them has not become text.
        self._rest = ""
        self._has_begun = False
        self._said: list[str] = []

    @property
    def text(self) -> str:
        """All that has been given out."""
        return "".join(self._said)

    def push(self, arguments: str) -> str:
        """The text of a fragment of arguments, as far as it is certain."""
        self._arguments.append(arguments)
        self._rest += arguments
        if not self._has_begun:
            head = _HEAD.match(self._rest)
            if head is None:
                return ""
            self._has_begun = True
            self._rest = self._rest[head.end() :]
        found = _CHARACTERS.match(self._rest)
        assert found is not None
        text = str(json.loads(f'"{found.group()}"', strict=False))
        self._rest = self._rest[found.end() :]
        return self._say(text)

    def finish(self) -> str:
        """The rest, once the arguments are complete: those of another form are the text."""
        arguments = "".join(self._arguments)
        try:
            value = json.loads(arguments)
        except ValueError:
            value = arguments
        if isinstance(value, dict) and isinstance(value.get(INPUT), str):
            value = value[INPUT]
        whole = value if isinstance(value, str) else arguments
        said = self.text
        return self._say(whole[len(said) :] if whole.startswith(said) else "")

    def _say(self, text: str) -> str:
        self._said.append(text)
        return text
