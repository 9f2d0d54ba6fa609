"""errors.py: every exception class has a row, and no message leaks or grows."""

from __future__ import annotations

import inspect

import pytest

from octavo import errors
from octavo.errors import InvalidParameterError
from octavo.sampling_params import SamplingParams
from octavo.server.openai.errors import error_object


def subclasses() -> list[type[errors.OctavoError]]:
    """All but ModelLoadError, which ends a start and is answered to nobody."""
    return [
        cls
        for _, cls in inspect.getmembers(errors, inspect.isclass)
        if issubclass(cls, errors.OctavoError)
        and cls not in (errors.OctavoError, errors.ModelLoadError)
    ]


@pytest.mark.parametrize("cls", subclasses())
def test_every_error_has_a_row_of_its_own(cls: type[errors.OctavoError]) -> None:
    assert cls in errors.ERROR_TABLE


def test_too_long_names_both_numbers() -> None:
    error = errors.RequestTooLongError(9000, 8192)
    body = error_object(error)["error"]
    assert errors.error_kind(error).status == 400
    assert body["code"] == "context_length_exceeded"
    assert "9000" in body["message"]
    assert "8192" in body["message"]


def test_a_wrong_value_is_named_in_param() -> None:
    with pytest.raises(InvalidParameterError) as caught:
        SamplingParams(max_tokens=-1)
    body = error_object(caught.value)["error"]
    assert errors.error_kind(caught.value).status == 400
    assert body["param"] == "max_tokens"
    assert body["type"] == "invalid_request_error"


@pytest.mark.parametrize("cls", [c for c in subclasses() if errors.ERROR_TABLE[c].status == 400])
def test_a_request_that_cannot_be_answered_is_a_value_error(cls: type[errors.OctavoError]) -> None:
    """vLLM raises ValueError for these, and callers of LLM catch that."""
    assert issubclass(cls, ValueError)


def test_a_path_in_a_load_error_is_answered_to_nobody() -> None:
    body = error_object(errors.ModelLoadError("/home/someone/model: no such file"))["error"]
    assert body["message"] == "internal error"


def test_an_unforeseen_error_shows_nothing_but_the_request_id() -> None:
    error = RuntimeError("/home/someone/secret.py at 0x7f00")
    body = error_object(error, "abc")["error"]
    assert body["message"] == "internal error (request id abc)"
    assert errors.error_kind(error).status == 500


def test_messages_are_bounded() -> None:
    body = error_object(errors.BadRequestError("x" * 100_000))["error"]
    assert len(body["message"]) == errors.MAX_MESSAGE_CHARS
    body = error_object(errors.ModelNotFoundError("x" * 100_000))["error"]
    assert body["message"].count("x") < errors.MAX_QUOTED_CHARS
    body = error_object(errors.BadRequestError("bad", "x" * 100_000))["error"]
    assert len(body["param"]) == errors.MAX_QUOTED_CHARS
