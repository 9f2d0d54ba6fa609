"""Checks of single JSON values: each takes a field's name and value and returns the clean value.

Every refusal is an InvalidParameterError that names the field; none quotes more than a hundred
characters of the value.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from octavo._core import TokenIds
from octavo.errors import InvalidParameterError, clip
from octavo.server.http import limits

Prompt = str | TokenIds

INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1

# Numbers and truth values that clients send as strings, from forms and environments; pydantic takes
# them, and so does vLLM.
_INTEGER: Final = re.compile(r"^\s*[+-]?[0-9]{1,20}(\.0{0,20})?\s*$")
_NUMBER: Final = re.compile(
    r"^\s*[+-]?([0-9]{1,40}(\.[0-9]{0,40})?|\.[0-9]{1,40})([eE][+-]?[0-9]{1,4})?\s*$"
)


# In each of their cases: patterns of JSON schemas know none.
_TRUTHS: Final = {
    form: is_true
    for is_true, words in (
        (True, ("true", "yes", "on", "t", "y", "1")),
        (False, ("false", "no", "off", "f", "n", "0")),
    )
    for word in words
    for form in (word, word.upper(), word.capitalize())
}


@dataclass(frozen=True, slots=True)
class Check:
    """A check of one value, and the JSON schema of the values that pass."""

    schema: dict[str, Any]
    run: Callable[[str, Any], Any]

    def __call__(self, name: str, value: Any) -> Any:
        """The clean value.

        Raises:
            InvalidParameterError: it is not what it must be.
        """
        return self.run(name, value)


def check(**schema: Any) -> Callable[[Callable[[str, Any], Any]], Check]:
    """Turn a function into a Check with this schema."""
    return lambda run: Check(schema, run)


def shorten(value: object) -> str:
    """A value as it may appear in a message; of a container the kind alone.

    A container may be nested as deeply as JSON allows, which is deeper than ``repr`` can go.
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return clip(repr(clip(value) if isinstance(value, str) else value))


def invalid(name: str, must: str, value: object) -> InvalidParameterError:
    """The error of a value that is not what it must be."""
    return InvalidParameterError(f"{name} must be {must}, not {shorten(value)}", name)


@check(
    anyOf=[
        {"type": "boolean"},
        {"enum": [0, 1]},
        {"type": "string", "pattern": f"^({'|'.join(_TRUTHS)})$"},
    ]
)
def boolean(name: str, value: Any) -> bool:
    """true or false, or one of the numbers and words that stand for them."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value in _TRUTHS:
        return _TRUTHS[value]
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    raise invalid(name, "true or false", value)


def integer(least: int = -INT32_MAX, most: int = INT32_MAX) -> Check:
    """A whole number in [least, most], or a string of one.

    JSON knows no difference between 1 and 1.0.
    """

    @check(type=["integer", "string"], pattern=_INTEGER.pattern, minimum=least, maximum=most)
    def checked(name: str, value: Any) -> int:
        number = value
        if isinstance(value, str) and _INTEGER.match(value):
            number = int(value.partition(".")[0])
        elif isinstance(value, float) and value.is_integer():
            if abs(value) >= 2**63:
                # What the parser makes of integers past 64 bits: one past a bound rounds to it.
                raise invalid(name, f"between {least} and {most}", value)
            number = int(value)
        if not isinstance(number, int) or isinstance(number, bool):
            raise invalid(name, "an integer", value)
        if number < least:
            raise invalid(name, f"at least {least}", value)
        if number > most:
            raise invalid(name, f"at most {most}", value)
        return number

    return checked


# Of the scheduler's queue: any 64-bit integer, the lowest first.
PRIORITY: Final = integer(-INT64_MAX - 1, INT64_MAX)


def number(**bounds: float) -> Check:
    """A number, or a string of one.

    ``bounds``: the schema's, which are SamplingParams' to check.
    """

    @check(type=["number", "string"], pattern=_NUMBER.pattern, **bounds)
    def checked(name: str, value: Any) -> float:
        if isinstance(value, str) and _NUMBER.match(value):
            return float(value)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise invalid(name, "a number", value)
        return float(value)

    return checked


def string(most_chars: int = INT32_MAX, *, least_chars: int = 0) -> Check:
    """A string of bounded length."""

    @check(type="string", minLength=least_chars, maxLength=most_chars)
    def checked(name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise invalid(name, "a string", value)
        if not least_chars <= len(value) <= most_chars:
            raise InvalidParameterError(
                f"{name} must have between {least_chars} and {most_chars} characters", name
            )
        return value

    return checked


def string_or_strings(name: str, value: Any, most: int) -> tuple[str, ...]:
    """One string or a list of at most ``most``."""
    if isinstance(value, str):
        return (value,)
    return strings(name, value, most)


def strings(name: str, value: Any, most: int) -> tuple[str, ...]:
    """A list of at most ``most`` strings."""
    if isinstance(value, list):
        # Before each entry is checked.
        limits.check_count(name, value, most, "strings")
        if all(isinstance(item, str) for item in value):
            return tuple(value)
    raise invalid(name, "a list of strings", value)


def strings_schema(most: int, most_chars: int) -> dict[str, Any]:
    """The schema of at most ``most`` strings that are not empty."""
    item = {"type": "string", "minLength": 1, "maxLength": most_chars}
    return {"type": "array", "items": item, "maxItems": most}


def texts_or_ids(
    name: str, value: Any, check_count: Callable[[str, list[Any]], None]
) -> list[Prompt]:
    """str, [str], [int] or [[int]] as a list of texts or of token ids.

    Raises:
        InvalidParameterError: something else, an empty list, or what ``check_count`` raises.
    """
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        try:
            # An int first: a list of token ids or nothing valid.
            if type(value[0]) is int:
                return [TokenIds(value)]
            # Before each entry is checked.
            check_count(name, value)
            if all(isinstance(item, str) for item in value):
                return value
            if all(isinstance(item, list) for item in value):
                if [] in value:
                    raise InvalidParameterError(f"{name} must not hold empty lists", name)
                return [TokenIds(item) for item in value]
        except TypeError:
            pass
        except ValueError as error:
            if isinstance(error, InvalidParameterError):
                raise
            raise InvalidParameterError(f"{name} must hold token ids: {error}", name) from None
    raise invalid(
        name, "a string, a list of strings, of token ids, or of lists of token ids", value
    )


@check(**integer(-1).schema, **{"not": {"enum": [0, "0"]}})
def truncation(name: str, value: Any) -> int:
    """A number of tokens to keep; -1 keeps what fits."""
    most: int = integer(-1)(name, value)
    if most == 0:
        raise InvalidParameterError(f"{name} must be -1 or positive", name)
    return most


_TOKEN_ID: Final = integer()


def token_ids(most: int) -> Check:
    """A list of at most ``most`` token ids; the vocabulary's bound is the engine's to check."""

    @check(type="array", maxItems=most, items={**_TOKEN_ID.schema, "minimum": 0})
    def checked(name: str, value: Any) -> tuple[int, ...]:
        if not isinstance(value, list):
            raise invalid(name, "a list of token ids", value)
        # Before each entry is checked.
        limits.check_count(name, value, most)
        # true is no integer. A list of integers is the rule; others are looked at one by one.
        if not set(map(type, value)) <= {int}:
            if len(value) > limits.MAX_ALLOWED_TOKEN_IDS:
                raise invalid(name, "a list of token ids", value)
            value = [_TOKEN_ID(name, one) for one in value]
        if value and not 0 <= min(value) <= max(value) <= INT32_MAX:
            raise InvalidParameterError(f"{name} must hold token ids, which are positive", name)
        return tuple(value)

    return checked


def one_of(*choices: str) -> Check:
    """One of a few strings."""

    @check(enum=list(choices))
    def checked(name: str, value: Any) -> str:
        if value not in choices:
            raise invalid(name, "one of " + ", ".join(choices), value)
        return str(value)

    return checked


@check(type="object")
def json_object(name: str, value: Any) -> dict[str, Any]:
    """A JSON object."""
    if not isinstance(value, dict):
        raise invalid(name, "an object", value)
    return value


@check(type="array", items={"type": "object"})
def json_objects(name: str, value: Any) -> list[dict[str, Any]]:
    """A list of JSON objects."""
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise invalid(name, "a list of objects", value)
    return value


_BIAS = number()
# Enough to see what went wrong; a message is one line.
_MAX_NAMED: Final = 8


def logit_bias(name: str, value: Any, most: int) -> dict[int, float]:
    """Token id, as JSON's string key -> bias; at most ``most`` of them."""
    if not isinstance(value, dict):
        raise invalid(name, "an object of token id -> bias", value)
    limits.check_count(name, value, most)
    # Not int(key): it takes " 1_0", and digits of other scripts.
    wrong = [k for k in value if not (k.isascii() and k.isdigit() and len(k) <= 10)]
    if wrong:
        named = ", ".join(map(shorten, wrong[:_MAX_NAMED])) + (
            ", ..." if len(wrong) > _MAX_NAMED else ""
        )
        raise InvalidParameterError(
            f"{name} must be an object whose keys are token ids, not {named}", name
        )
    return {int(key): _BIAS(name, entry) for key, entry in value.items()}
