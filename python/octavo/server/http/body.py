"""Body: the fields of a route's JSON body, checked, none ignored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from octavo.errors import InvalidParameterError, UnsupportedParameterError, clip
from octavo.server.http.fields import Check

# OpenAI's notes to itself, which clients send to any route.
BOOKKEEPING_FIELDS: Final = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
)


@dataclass(frozen=True, slots=True)
class Body:
    """One route's body. Checks, refusals and /openapi.json follow from it.

    Args:
        fields: those that the route supports.
        required: names that must be there.
        one_of: names of which exactly one must be there.
        refused: fields of the API without an implementation: name -> the values that change
            nothing, which pass. null passes everywhere.
        ignored: fields that change no answer.
    """

    fields: Mapping[str, Check]
    required: tuple[str, ...] = ()
    one_of: tuple[str, ...] = ()
    refused: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()

    def clean(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The body's checked fields; null is absence.

        Raises:
            UnsupportedParameterError, InvalidParameterError: naming the field.
        """
        clean: dict[str, Any] = {}
        fields, ignored = self.fields, self.ignored
        for name, value in body.items():
            if value is None or name in ignored:
                continue
            check = fields.get(name)
            if check is not None:
                clean[name] = check.run(name, value)
                continue
            neutral = self.refused.get(name)
            if neutral is None:
                name = clip(name)
                raise UnsupportedParameterError(f"Unrecognized request argument: {name}", name)
            # 1 equals true in Python, not in JSON.
            if not any(type(value) is type(one) and value == one for one in neutral):
                raise UnsupportedParameterError(f"{name} is not supported by this server", name)
        for name in self.required:
            if name not in clean:
                raise InvalidParameterError(f"{name} is missing", name)
        if self.one_of and sum(name in clean for name in self.one_of) != 1:
            raise InvalidParameterError(f"give either {' or '.join(self.one_of)}", self.one_of[0])
        return clean
