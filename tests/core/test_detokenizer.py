"""Detokenizer: the pieces are the one-shot text, whole characters only, cut at stop strings."""

import gc
import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo._core import Detokenizer, Tokenizer

TEXT = (
    "Naïve café: 漢字かな交じり文と한국어, עברית, हिन्दी! 😀👨‍👩‍👧‍👦🇯🇵 ½①\n"
    "\tdef f(x): return x**2  # 123\r\n<|im_end|>\n"
)
# Bytes that begin, continue and break characters, whole words, special and unknown ids.
ids = st.lists(
    st.one_of(
        st.integers(0, 49200),
        st.integers(17, 300),
        st.sampled_from([0, 1, 2, 49151, 49152, 2**32 - 1]),
    ),
    max_size=60,
)


def cut(token_ids: list[int], places: list[int]) -> list[list[int]]:
    """Token ids in pieces of the given lengths, over and over."""
    pieces = []
    at = 0
    while at < len(token_ids):
        length = places[len(pieces) % len(places)] if places else 1
        pieces.append(token_ids[at : at + length])
        at += length
    return pieces


@given(token_ids=ids, places=st.lists(st.integers(1, 9), max_size=5), skip=st.booleans())
@settings(max_examples=300, deadline=None)
def test_pieces_are_the_one_shot_text(
    smollm2: Tokenizer, token_ids: list[int], places: list[int], skip: bool
) -> None:
    detokenizer = Detokenizer(smollm2, skip_special_tokens=skip)
    text = "".join(detokenizer.push(piece)[0] for piece in cut(token_ids, places))
    text += detokenizer.finish()
    assert text == smollm2.decode(token_ids, skip)


def test_a_real_text_token_by_token(smollm2: Tokenizer) -> None:
    token_ids = smollm2.encode(TEXT)
    detokenizer = Detokenizer(smollm2, skip_special_tokens=False)
    pieces = [detokenizer.push([id])[0] for id in token_ids]
    assert "".join(pieces) == TEXT
    assert "" in pieces, "half a character is held back"
    assert "\ufffd" not in "".join(pieces)
    assert detokenizer.finish() == ""


def test_what_never_becomes_a_character_is_replaced_at_the_end(smollm2: Tokenizer) -> None:
    first, second, _ = smollm2.encode("①")
    detokenizer = Detokenizer(smollm2)
    assert detokenizer.push([first, second]) == ("", None)
    assert detokenizer.finish() == "\ufffd" == smollm2.decode([first, second])


@pytest.mark.parametrize("include", [False, True])
@given(
    token_ids=ids,
    places=st.lists(st.integers(1, 9), max_size=5),
    stops=st.lists(st.text("ab \n.é", min_size=1, max_size=3), max_size=3),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_text_ends_at_the_first_stop_string(
    smollm2: Tokenizer,
    include: bool,
    token_ids: list[int],
    places: list[int],
    stops: list[str],
    data: st.DataObject,
) -> None:
    whole = smollm2.decode(token_ids)
    if whole:  # one that occurs
        start = data.draw(st.integers(0, len(whole) - 1))
        stops = [*stops, whole[start : start + data.draw(st.integers(1, 5))]]
    # Complete first; of those complete at the same place the longest.
    found = min(
        ((whole.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in whole),
        default=None,
    )
    expected, expected_stop = whole, None
    if found is not None:
        end, minus_length, expected_stop = found
        expected = whole[: end if include else end + minus_length]

    detokenizer = Detokenizer(smollm2, stop=stops, include_stop_str_in_output=include)
    text, stopped = "", None
    for piece in cut(token_ids, places):
        new, stop = detokenizer.push(piece)
        assert stopped is None or (new, stop) == ("", None)
        text += new
        stopped = stopped or stop
    text += detokenizer.finish()
    assert text == expected
    # One that only the last, unfinished character completes is cut, but push() cannot tell.
    assert stopped == expected_stop or (stopped is None and "\ufffd" in (expected_stop or ""))


def test_stop_strings_across_tokens(smollm2: Tokenizer) -> None:
    token_ids = smollm2.encode("Answer: 42\nUser: next")
    for include, expected in ((False, "Answer: 42"), (True, "Answer: 42\nUser:")):
        detokenizer = Detokenizer(
            smollm2, stop=["</s>", "\nUser:"], include_stop_str_in_output=include
        )
        pushed = [detokenizer.push([id]) for id in token_ids]
        assert "".join(text for text, _ in pushed) == expected
        assert [stop for _, stop in pushed if stop] == ["\nUser:"]
        assert detokenizer.finish() == ""


def test_a_stop_string_that_does_not_come_is_let_go(smollm2: Tokenizer) -> None:
    detokenizer = Detokenizer(smollm2, stop=["abcdef"])
    assert detokenizer.push(smollm2.encode("x abc")) == ("x ", None)
    assert detokenizer.finish() == "abc"


def test_a_million_tokens_take_no_time_and_no_memory(smollm2: Tokenizer) -> None:
    token_ids = (smollm2.encode(TEXT * 20))[:2000]
    detokenizer = Detokenizer(smollm2, stop=["\n\nUser:"])
    detokenizer.push(token_ids)
    gc.collect()
    start = time.perf_counter()
    for _ in range(50):
        detokenizer.push(token_ids)
    per_token = (time.perf_counter() - start) / (50 * len(token_ids))
    assert per_token < 2e-6  # 0.1 us on a quiet machine; quadratic work would take far more
    tracemalloc.start()
    detokenizer.push(token_ids)
    assert tracemalloc.get_traced_memory()[0] < 10_000
    tracemalloc.stop()
