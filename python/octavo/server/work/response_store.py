"""ResponseStore: responses that clients may ask for again, or go on from, for a while.

Bounded in number, bytes and age. What is kept is JSON: the response, and the items of its whole
conversation, turn by turn. Turns are shared by all responses that go on from them, and counted
once.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import orjson

from octavo.errors import ResponseNotFoundError

# As many bytes as a few hundred long agents' conversations; a client that comes back after an hour
# has kept its own.
MAX_BYTES: Final = 64 * 1024 * 1024
MAX_RESPONSES: Final = 16 * 1024
MAX_AGE_S: Final = 3600.0


class ItemTurn(NamedTuple):
    """The items that went in with one request: as JSON, and their ids."""

    data: bytes
    ids: Sequence[str]


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """One response.

    Args:
        owner: digest of the key that made it.
        response: as it was answered, JSON.
        turns: lists of items in JSON: what went in and what came out, from the conversation's
            first response to this one.
        made_s: when, in seconds of a clock that only goes forward.
    """

    owner: bytes
    response: bytes
    turns: tuple[bytes, ...]
    made_s: float

    def items(self) -> list[dict[str, Any]]:
        """The conversation up to and with this response."""
        return [item for turn in self.turns for item in orjson.loads(turn)]

    def input_items(self) -> list[dict[str, Any]]:
        """The conversation without this response's own output."""
        return [item for turn in self.turns[:-1] for item in orjson.loads(turn)]


class ResponseStore:
    """The responses of one server; on the event loop only.

    Args:
        max_bytes, max_responses, max_age_s: beyond any of them the oldest go.
        clock: seconds that only go forward.
    """

    def __init__(
        self,
        max_bytes: int = MAX_BYTES,
        max_responses: int = MAX_RESPONSES,
        max_age_s: float = MAX_AGE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_bytes = max_bytes
        self._max_responses = max_responses
        self._max_age_s = max_age_s
        self._clock = clock
        # By owner and id, which a client may have chosen; oldest first.
        self._responses: dict[tuple[bytes, str], StoredResponse] = {}
        # By owner and turn: responses that hold it. By owner and an item's id: its last turn.
        self._num_users: Counter[tuple[bytes, bytes]] = Counter()
        self._turn_of: dict[tuple[bytes, str], bytes] = {}
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._responses)

    def put(
        self,
        owner: bytes,
        response: dict[str, Any],
        items: ItemTurn,
        previous: StoredResponse | None,
    ) -> None:
        """Keep a response that is over. ``items``: the new ones that went in."""
        old = () if previous is None else previous.turns
        output = ItemTurn(
            orjson.dumps(response["output"]), [item["id"] for item in response["output"]]
        )
        turns = (*old, items.data, output.data)
        stored = StoredResponse(owner, orjson.dumps(response), turns, self._clock())
        place = owner, response["id"]
        if place in self._responses:
            self._forget(place)
        self._responses[place] = stored
        self.num_bytes += len(stored.response)
        for turn in turns:
            if not self._num_users[owner, turn]:
                self.num_bytes += len(turn)
            self._num_users[owner, turn] += 1
        for turn, ids in (items, output):
            for item_id in ids:
                self._turn_of[owner, item_id] = turn
        self._shrink()

    def get(self, owner: bytes, response_id: str, param: str | None = None) -> StoredResponse:
        """A response of this owner's.

        Raises:
            ResponseNotFoundError: there is none, or no longer. ``param``: the field at fault.
        """
        self._shrink()
        stored = self._responses.get((owner, response_id))
        if stored is None:
            raise ResponseNotFoundError(response_id, param)
        return stored

    def delete(self, owner: bytes, response_id: str) -> None:
        """Forget a response; what goes on from it stays.

        Raises:
            ResponseNotFoundError: there is none, or no longer.
        """
        self.get(owner, response_id)
        self._forget((owner, response_id))

    def find_items(self, owner: bytes, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Items of this owner's by id, as many as there are."""
        self._shrink()
        turns = {self._turn_of[owner, one] for one in ids if (owner, one) in self._turn_of}
        items = (item for turn in turns for item in orjson.loads(turn))
        wanted = set(ids)
        return {item["id"]: item for item in items if item["id"] in wanted}

    def _shrink(self) -> None:
        latest = self._clock() - self._max_age_s
        while self._responses:
            place, oldest = next(iter(self._responses.items()))
            is_over = (
                self.num_bytes > self._max_bytes
                or len(self._responses) > self._max_responses
                or oldest.made_s < latest
            )
            if not is_over:
                return
            self._forget(place)

    def _forget(self, place: tuple[bytes, str]) -> None:
        stored = self._responses.pop(place)
        owner = stored.owner
        self.num_bytes -= len(stored.response)
        for turn in stored.turns:
            self._num_users[owner, turn] -= 1
            if not self._num_users[owner, turn]:
                del self._num_users[owner, turn]
                self.num_bytes -= len(turn)
                for item in orjson.loads(turn):
                    if self._turn_of.get((owner, item["id"])) is turn:
                        del self._turn_of[owner, item["id"]]
