"""Body: the fields of a route's JSON body, checked, none ignored."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from octavo.errors import InvalidParameterError, UnsupportedParameterError, clip
from octavo.server.http.fields import Check

logger = logging.getLogger("octavo.server")

# OpenAI's notes to itself, which clients send to any route.
BOOKKEEPING_FIELDS: Final = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
    }
)


@dataclass(frozen=True, slots=True)
class Body:
    """One route's body. Checks, refusals and /openapi.json follow from it.

    Args:
        fields: those that the route supports.
        required: names that must be there.
        one_of: groups of names: all of exactly one group must be there.
        refused: fields of the API without an implementation: name -> the values that change
            nothing, which pass. null passes everywhere.
        ignored: fields that change no answer.
        is_open: fields of other names are ignored too: the API's clients send what is new to
            every server, and need an answer.
    """

    fields: Mapping[str, Check]
    required: tuple[str, ...] = ()
    one_of: tuple[tuple[str, ...], ...] = ()
    refused: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    is_open: bool = False

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
                if self.is_open:
                    logger.debug("a field of a name that is not known is ignored: %s", clip(name))
                    continue
                name = clip(name)
                raise UnsupportedParameterError(f"Unrecognized request argument: {name}", name)
            # 1 equals true in Python, not in JSON.
            if not any(type(value) is type(one) and value == one for one in neutral):
                raise UnsupportedParameterError(f"{name} is not supported by this server", name)
        for name in self.required:
            if name not in clean:
                raise InvalidParameterError(f"{name} is missing", name)
        if self.one_of:
            self._check_groups(clean)
        return clean

    def _check_groups(self, clean: Mapping[str, Any]) -> None:
        given = {name for group in self.one_of for name in group if name in clean}
        if any(given == set(group) for group in self.one_of):
            return
        # The group that the client seems to have meant.
        group = max(self.one_of, key=lambda group: len(given.intersection(group)))
        missing = [name for name in group if name not in clean]
        choices = " or ".join(" and ".join(group) for group in self.one_of)
        raise InvalidParameterError(f"give either {choices}", (missing or group)[0])
