"""Logprob and FlatLogprobs: log probabilities of an output, under vLLM's names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableSequence
from dataclasses import dataclass, field
from typing import NoReturn, overload


@dataclass(slots=True)
class Logprob:
    """One candidate at one position.

    ``logprob`` is of the raw distribution, before temperature and penalties; ``rank`` 1 is the
    most likely token of the whole vocabulary, None where it was not looked for. ``decoded_token``
    is None where the request asked for no texts.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


# The candidates at one position by token id, the chosen one first.
LogprobsOnePosition = dict[int, Logprob]


@dataclass(slots=True)
class FlatLogprobs(MutableSequence[LogprobsOnePosition | None]):
    """The candidates of all positions in a few flat lists, which a garbage collector passes over.

    It reads like the list of dicts that it stands for, and grows by ``append`` and ``extend``.
    Position ``i`` has the candidates from ``start_indices[i]`` up to ``end_indices[i]`` of the four
    other lists; one without candidates, as a prompt's first, reads as an empty dict.
    """

    start_indices: list[int] = field(default_factory=list)
    end_indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ranks: list[int | None] = field(default_factory=list)
    decoded_tokens: list[str | None] = field(default_factory=list)

    def append(self, value: Mapping[int, Logprob] | None) -> None:
        """Add a position."""
        self.start_indices.append(len(self.token_ids))
        for token_id, candidate in (value or {}).items():
            self.token_ids.append(token_id)
            self.logprobs.append(candidate.logprob)
            self.ranks.append(candidate.rank)
            self.decoded_tokens.append(candidate.decoded_token)
        self.end_indices.append(len(self.token_ids))

    def extend(self, values: Iterable[Mapping[int, Logprob] | None]) -> None:
        """Add positions."""
        for value in values:
            self.append(value)

    def __len__(self) -> int:
        return len(self.start_indices)

    def __iter__(self) -> Iterator[LogprobsOnePosition]:
        return (self[index] for index in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> LogprobsOnePosition: ...

    @overload
    def __getitem__(self, index: slice) -> FlatLogprobs: ...

    def __getitem__(self, index: int | slice) -> LogprobsOnePosition | FlatLogprobs:
        if isinstance(index, slice):
            part = FlatLogprobs()
            part.extend(self[one] for one in range(*index.indices(len(self))))
            return part
        return {
            self.token_ids[at]: Logprob(self.logprobs[at], self.ranks[at], self.decoded_tokens[at])
            for at in range(self.start_indices[index], self.end_indices[index])
        }

    def __setitem__(self, index: object, value: object) -> NoReturn:
        raise TypeError("FlatLogprobs only grow at their end")

    def __delitem__(self, index: object) -> NoReturn:
        raise TypeError("FlatLogprobs only grow at their end")

    def insert(self, index: int, value: object) -> NoReturn:
        """Raise TypeError: positions are only added at the end."""
        raise TypeError("FlatLogprobs only grow at their end")
