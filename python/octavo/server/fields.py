"""Checks of single JSON values: each takes a field's name and value and returns the clean value.

Every refusal is an InvalidParameterError that names the field; none quotes more than a little of
the value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from octavo.sampling_params import InvalidParameterError

Check = Callable[[str, Any], Any]

INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1


def shorten(value: object) -> str:
    """A value as it may appear in a message."""
    text = repr(value) if not isinstance(value, str) else repr(value[:100])
    return text if len(text) <= 100 else text[:97] + "..."


def invalid(name: str, must: str, value: object) -> InvalidParameterError:
    """The error of a value that is not what it must be."""
    return InvalidParameterError(f"{name} must be {must}, not {shorten(value)}", name)


def boolean(name: str, value: Any) -> bool:
    """true or false; numbers and strings are neither."""
    if not isinstance(value, bool):
        raise invalid(name, "true or false", value)
    return value


def integer(least: int = -INT32_MAX, most: int = INT32_MAX) -> Check:
    """A whole number in [least, most]; JSON knows no difference between 1 and 1.0."""

    def check(name: str, value: Any) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise invalid(name, "an integer", value)
        if value < least:
            raise invalid(name, f"at least {least}", value)
        if value > most:
            raise invalid(name, f"at most {most}", value)
        return value

    return check


def number(name: str, value: Any) -> float:
    """A number; its range is SamplingParams' to check."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise invalid(name, "a number", value)
    return float(value)


def string(most_chars: int = INT32_MAX, *, least_chars: int = 0) -> Check:
    """A string of bounded length."""

    def check(name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise invalid(name, "a string", value)
        if not least_chars <= len(value) <= most_chars:
            raise InvalidParameterError(
                f"{name} must have between {least_chars} and {most_chars} characters", name
            )
        return value

    return check


def string_or_strings(name: str, value: Any) -> tuple[str, ...]:
    """One string or a list of them."""
    if isinstance(value, str):
        return (value,)
    return strings(name, value)


def strings(name: str, value: Any) -> tuple[str, ...]:
    """A list of strings."""
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise invalid(name, "a list of strings", value)
    return tuple(value)


def is_token_ids(value: Any) -> bool:
    """Whether it is a list of integers; ``true`` is none."""
    return isinstance(value, list) and set(map(type, value)) <= {int}


def token_ids(most: int) -> Check:
    """A list of at most ``most`` token ids; the vocabulary's bound is the engine's to check."""

    def check(name: str, value: Any) -> tuple[int, ...]:
        if not is_token_ids(value):
            raise invalid(name, "a list of token ids", value)
        if len(value) > most:
            raise InvalidParameterError(f"{name} must have at most {most} entries", name)
        if value and not 0 <= min(value) <= max(value) <= INT32_MAX:
            raise InvalidParameterError(f"{name} must hold token ids, which are positive", name)
        return tuple(value)

    return check


def one_of(*choices: str) -> Check:
    """One of a few strings."""

    def check(name: str, value: Any) -> str:
        if value not in choices:
            raise invalid(name, "one of " + ", ".join(choices), value)
        return str(value)

    return check


def json_object(name: str, value: Any) -> dict[str, Any]:
    """A JSON object."""
    if not isinstance(value, dict):
        raise invalid(name, "an object", value)
    return value


def json_objects(name: str, value: Any) -> list[dict[str, Any]]:
    """A list of JSON objects."""
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise invalid(name, "a list of objects", value)
    return value


def logit_bias(name: str, value: Any) -> dict[int, float]:
    """Token id, as JSON's string key -> bias."""
    if not isinstance(value, dict):
        raise invalid(name, "an object of token id -> bias", value)
    bias: dict[int, float] = {}
    for key, entry in value.items():
        # Not int(key): it takes " 1_0", and digits of other scripts.
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise invalid(name, "an object whose keys are token ids", key)
        bias[int(key)] = number(name, entry)
    return bias
