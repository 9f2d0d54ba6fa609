"""TokenIds: a list's manners, a buffer's cost."""

from __future__ import annotations

import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo._core import TokenIds

IDS = st.lists(st.integers(0, 2**31 - 1), max_size=40)
INDEX = st.one_of(st.none(), st.integers(-50, 50))


@given(ids=IDS, start=INDEX, stop=INDEX, step=INDEX.filter(lambda step: step != 0))
def test_it_is_the_list_it_was_made_of(
    ids: list[int], start: int | None, stop: int | None, step: int | None
) -> None:
    tokens = TokenIds(ids)
    assert isinstance(tokens, Sequence)
    assert tokens == ids
    assert tokens == TokenIds(ids)
    assert list(tokens) == tokens.tolist() == ids
    assert len(tokens) == len(ids)
    assert bool(tokens) == bool(ids)
    cut = tokens[start:stop:step]
    assert isinstance(cut, TokenIds)
    assert cut == ids[start:stop:step]
    assert [tokens[i] for i in range(-len(ids), len(ids))] == ids + ids
    for past in (len(ids), -len(ids) - 1):
        with pytest.raises(IndexError):
            tokens[past]
    if ids:
        assert tokens.max() == max(ids)
        assert tokens != [*ids[:-1], (ids[-1] + 1) % 2**31]
    assert tokens != [*ids, 0]


@given(ids=IDS)
def test_it_is_a_read_only_buffer(ids: list[int]) -> None:
    tokens = TokenIds(ids)
    view = memoryview(tokens)
    assert (view.format, view.itemsize, view.shape, view.readonly) == ("i", 4, (len(ids),), True)
    assert view.tolist() == ids
    found = np.asarray(tokens)
    assert found.dtype == np.int32
    assert found.tolist() == ids
    assert TokenIds(found) == TokenIds(array.array("i", ids)) == TokenIds(iter(ids)) == ids


def test_a_view_keeps_the_ids_alive() -> None:
    view = memoryview(TokenIds(range(1000)))
    assert view.tolist() == list(range(1000))
    with pytest.raises(TypeError):
        view[0] = 1


def test_an_empty_one_has_no_greatest() -> None:
    with pytest.raises(ValueError, match="no token ids"):
        TokenIds([]).max()


@pytest.mark.parametrize(
    ("ids", "error"),
    [
        ([-1], ValueError),
        ([2**31], ValueError),
        ([2**80], ValueError),
        (np.array([-1], np.int32), ValueError),
        ([True], TypeError),
        ([1.0], TypeError),
        (["1"], TypeError),
        ([None], TypeError),
        (7, TypeError),
    ],
)
def test_what_is_no_token_id(ids: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        TokenIds(ids)
