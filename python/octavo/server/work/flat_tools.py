"""flat_tools: functions of APIs that do not nest them, checked as chat's are."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from octavo.errors import InvalidParameterError
from octavo.text.tools import Tool, parse_tools

_PARAM: Final = re.compile(r"tools\[(\d+)\]\.function(?:\.(\w+))?")


def flat_tools(
    functions: Sequence[tuple[str, dict[str, Any]]], names: Mapping[str, str]
) -> tuple[Tool, ...]:
    """Check functions.

    Args:
        functions: where each stands in the body, and the function as chat has it.
        names: chat's name of a field -> the API's.

    Raises:
        InvalidParameterError: naming the field by its place in the body.
    """
    try:
        return parse_tools("tools", [{"function": function} for _, function in functions])
    except InvalidParameterError as error:
        found = _PARAM.fullmatch(error.param or "")
        if found is None:
            raise
        place, field = functions[int(found[1])][0], found[2]
        param = place if field is None else f"{place}.{names.get(field, field)}"
        message = str(error).replace(found[0], param)
        raise InvalidParameterError(message, param) from None
