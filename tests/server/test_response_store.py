"""ResponseStore: bounded in number, bytes and age; turns are counted once."""

from __future__ import annotations

import random
from typing import Any

import orjson
import pytest

from octavo.errors import ResponseNotFoundError
from octavo.server.work.response_store import ItemTurn, ResponseStore, StoredResponse

ME, YOU = b"me", b"you"


def response(name: str, text: str = "") -> dict[str, Any]:
    return {"id": name, "output": [{"type": "message", "id": f"out_{name}", "text": text}]}


def items(name: str, text: str = "") -> ItemTurn:
    item = {"type": "message", "id": f"in_{name}", "text": text}
    return ItemTurn(orjson.dumps([item]), [item["id"]])


def test_chains_share_their_turns() -> None:
    store = ResponseStore()
    previous: StoredResponse | None = None
    for n in range(50):
        store.put(ME, response(str(n), "x" * 1000), items(str(n), "y" * 1000), previous)
        previous = store.get(ME, str(n))
    # A response holds its output once itself, and once in its turn.
    assert 50 * 3000 < store.num_bytes < 50 * 3600
    assert previous is not None
    assert len(previous.items()) == 100
    assert [item["id"] for item in previous.input_items()][-2:] == ["out_48", "in_49"]
    for n in range(49):
        store.delete(ME, str(n))
    assert len(store) == 1
    assert len(store.get(ME, "49").items()) == 100
    store.delete(ME, "49")
    assert (store.num_bytes, len(store)) == (0, 0)
    assert store.find_items(ME, ["in_0", "out_49"]) == {}


def test_the_oldest_go_first() -> None:
    store = ResponseStore(max_responses=3)
    for n in range(5):
        store.put(ME, response(str(n)), items(str(n)), None)
    assert len(store) == 3
    with pytest.raises(ResponseNotFoundError):
        store.get(ME, "1")
    store.get(ME, "2")
    store = ResponseStore(max_bytes=10_000)
    for n in range(20):
        store.put(ME, response(str(n), "x" * 1000), items(str(n)), None)
        assert store.num_bytes <= 10_000
    assert 3 <= len(store) < 6
    # One that is larger than the whole store is not kept.
    store.put(ME, response("big", "x" * 20_000), items("big"), None)
    assert (len(store), store.num_bytes) == (0, 0)


def test_age() -> None:
    now = 0.0
    store = ResponseStore(max_age_s=10, clock=lambda: now)
    store.put(ME, response("a"), items("a"), None)
    now = 9.0
    store.put(ME, response("b"), items("b"), store.get(ME, "a"))
    now = 11.0
    with pytest.raises(ResponseNotFoundError):
        store.get(ME, "a")
    assert len(store.get(ME, "b").items()) == 4
    now = 30.0
    assert store.find_items(ME, ["in_b"]) == {}
    assert (len(store), store.num_bytes) == (0, 0)


def test_owners_are_apart() -> None:
    store = ResponseStore()
    store.put(ME, response("a"), items("a"), None)
    store.put(YOU, response("b"), items("a"), None)
    with pytest.raises(ResponseNotFoundError):
        store.get(YOU, "a")
    with pytest.raises(ResponseNotFoundError):
        store.delete(YOU, "a")
    assert store.find_items(YOU, ["out_a"]) == {}
    store.delete(YOU, "b")
    assert set(store.find_items(ME, ["in_a", "out_a"])) == {"in_a", "out_a"}


def test_an_id_that_is_given_twice() -> None:
    store = ResponseStore()
    store.put(ME, response("a", "one"), items("a"), None)
    store.put(YOU, response("a", "two"), items("b"), None)
    assert b"one" in store.get(ME, "a").response
    store.put(ME, response("a", "three"), items("c"), None)
    assert b"three" in store.get(ME, "a").response
    assert b"two" in store.get(YOU, "a").response
    store.delete(ME, "a")
    store.delete(YOU, "a")
    assert (len(store), store.num_bytes) == (0, 0)


def test_bytes_are_conserved() -> None:
    rng = random.Random(0)
    store = ResponseStore(max_bytes=20_000, max_responses=12)
    names: list[str] = []
    for n in range(500):
        # Some are given again.
        name = f"{n % 40}"
        alive = [one for one in names if (ME, one) in store._responses]
        if alive and rng.random() < 0.3:
            store.delete(ME, rng.choice(alive))
            continue
        previous = store.get(ME, rng.choice(alive)) if alive and rng.random() < 0.7 else None
        text = "x" * rng.randint(0, 900)
        store.put(ME, response(name, text), items(name, text), previous)
        names.append(name)
        kept = list(store._responses.values())
        turns = {turn for one in kept for turn in one.turns}
        assert store.num_bytes == sum(map(len, turns)) + sum(len(one.response) for one in kept)
        assert set(store._turn_of.values()) <= turns
