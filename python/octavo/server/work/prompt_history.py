"""PromptHistory: agents' latest prompts, to see where a new one leaves what is cached.

An agent sends its whole conversation with every turn. Where the prompt goes on from an earlier
one, the prefix cache has nearly all of it; where something near its beginning has changed, all that
follows is computed again. Whoever runs the server sees a slow turn, and no reason: here is the
place.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from octavo._core import TokenIds, Tokenizer

    Ids = npt.NDArray[np.int32]

logger = logging.getLogger("octavo.server")

# As many conversations at once, and as many bytes of them, as one server's cache may hold.
MAX_PROMPTS: Final = 32
MAX_TOKENS: Final = 4 * 1024 * 1024
# Prompts share less by chance, or by a template's first words.
LEAST_COMMON: Final = 16
# A prompt ends with the opening of the answer, which is written otherwise once it is history, and
# with what agent_markers has moved there.
OPENING: Final = 128
# Characters of both sides in the log; as many tokens hold them.
NUM_CHARS: Final = 20
_CHUNK: Final = 8192

Outcome = Literal["new", "extended", "diverged"]


class Divergence(NamedTuple):
    """The place at which a prompt leaves the earlier one that it has most in common with.

    Args:
        outcome: "new": there is none; "extended": it goes on from its end; "diverged".
        position: the first token that differs.
        num_earlier: tokens of the earlier one.
        earlier, new: the texts from there on, a few characters.
    """

    outcome: Outcome
    position: int = 0
    num_earlier: int = 0
    earlier: str = ""
    new: str = ""


class PromptHistory:
    """The latest prompts of one model; on the event loop only.

    Args:
        tokenizer: the model's.
        shows_text: whether the log may hold what clients sent.
    """

    def __init__(self, tokenizer: Tokenizer, *, shows_text: bool) -> None:
        self._tokenizer = tokenizer
        self._shows_text = shows_text
        # Oldest first.
        self._prompts: deque[Ids] = deque()
        self._num_tokens = 0
        self.counts: Counter[str] = Counter()

    def add(self, token_ids: TokenIds | Sequence[int], request_id: str) -> Divergence:
        """Compare a prompt with those before it, count and log the outcome, and keep it."""
        prompt = np.asarray(token_ids, np.int32)
        found = self._compare(prompt)
        self.counts[found.outcome] += 1
        if found.outcome == "diverged":
            logger.debug(
                "request %s: its prompt of %d tokens leaves an earlier one of %d at token %d%s",
                request_id,
                len(prompt),
                found.num_earlier,
                found.position,
                f": {found.new!r} in place of {found.earlier!r}" if self._shows_text else "",
            )
        self._keep(prompt)
        return found

    def _compare(self, prompt: Ids) -> Divergence:
        best, position = None, LEAST_COMMON - 1
        for index in range(len(self._prompts) - 1, -1, -1):
            common = _num_common(prompt, self._prompts[index])
            if common > position:
                best, position = index, common
        if best is None:
            return Divergence("new")
        earlier = self._prompts[best]
        if position >= len(earlier) - OPENING:
            # The conversation goes on: its earlier turn is of no more use.
            self._forget(best)
            return Divergence("extended", position, len(earlier))
        texts = (self._text(ids, position) for ids in (earlier, prompt))
        return Divergence("diverged", position, len(earlier), *texts)

    def _text(self, ids: Ids, position: int) -> str:
        text = self._tokenizer.decode(ids[position : position + NUM_CHARS].tolist(), False)
        return text[:NUM_CHARS]

    def _keep(self, prompt: Ids) -> None:
        self._prompts.append(prompt)
        self._num_tokens += len(prompt)
        while len(self._prompts) > MAX_PROMPTS or self._num_tokens > MAX_TOKENS:
            self._forget(0)

    def _forget(self, index: int) -> None:
        self._num_tokens -= len(self._prompts[index])
        del self._prompts[index]


def _num_common(a: Ids, b: Ids) -> int:
    """The length of two prompts' common prefix. Most differ at once, or very late."""
    most = min(len(a), len(b))
    for start in range(0, most, _CHUNK):
        end = min(start + _CHUNK, most)
        differs = a[start:end] != b[start:end]
        if differs.any():
            return start + int(differs.argmax())
    return most
