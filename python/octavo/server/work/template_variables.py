"""chat_template_kwargs: the variables of a chat template that a request brings, checked."""

from __future__ import annotations

from typing import Any, Final

from octavo.errors import InvalidParameterError, clip
from octavo.server.http import fields
from octavo.text.chat_template import RESERVED_VARIABLES

# Names that render() itself takes beside the template's variables.
_RESERVED: Final = RESERVED_VARIABLES | {"continue_final_message", "self"}


@fields.check(type="object")
def template_variables(name: str, value: Any) -> dict[str, Any]:
    """An object, none of whose keys is a variable that the server sets."""
    variables: dict[str, Any] = fields.json_object(name, value)
    for key in variables:
        if key in _RESERVED:
            field = f"{name}.{clip(key)}"
            raise InvalidParameterError(f"{field} is not a template's own variable", field)
    return variables
