"""The OpenAPI document: routes and their bodies, from the tables that check them."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from typing import Any, Final, Protocol

from octavo import __version__
from octavo.server.http.body import Body

_ERROR: Final = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string", "maxLength": 1024},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


class Described(Protocol):
    """A route, as far as the document describes it."""

    @property
    def path(self) -> str: ...
    @property
    def methods(self) -> tuple[str, ...]: ...
    @property
    def handler(self) -> Any: ...
    @property
    def body(self) -> Body | None: ...


def describe(
    routes: Iterable[Described], *, open_paths: Container[str] | None, root_path: str
) -> dict[str, Any]:
    """The OpenAPI 3.1 document. ``open_paths``: those that need no key; None: no route does."""
    paths: dict[str, Any] = {}
    for route in routes:
        needs_key = open_paths is not None and route.path not in open_paths
        # One path may have a handler for each method.
        paths.setdefault(_path(route.path), {}).update(_operations(route, needs_key))
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "octavo",
            "version": __version__,
            "description": "OpenAI's interface with vLLM's additions. A field that would change "
            "the answer is either honoured or refused by name; null is the same as absence.",
        },
        "servers": [{"url": root_path or "/"}],
        "paths": paths,
        "components": {"schemas": {"Error": _ERROR}},
    }
    if open_paths is not None:
        document["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
    return document


def _path(path: str) -> str:
    """The path in OpenAPI's form, which has no parameters that hold slashes."""
    return path.replace(":path}", "}")


def _words(path: str) -> str:
    return re.sub(r"\W+", "_", _path(path)).rstrip("_")


def _operations(route: Described, needs_key: bool) -> dict[str, Any]:
    name = route.handler.__name__
    summary, _, _ = (route.handler.__doc__ or name).partition("\n")
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    operation: dict[str, Any] = {
        "summary": summary,
        "responses": {
            "200": {"description": "The answer."},
            "default": {"description": "What went wrong.", "content": error},
        },
    }
    parameters = [
        {"name": part[1:-1], "in": "path", "required": True, "schema": {"type": "string"}}
        for part in _path(route.path).split("/")
        if part.startswith("{")
    ]
    if parameters:
        operation["parameters"] = parameters
    if route.body is not None:
        content = {"application/json": {"schema": body_schema(route.body)}}
        operation["requestBody"] = {"required": True, "content": content}
    if needs_key:
        operation["security"] = [{"bearer": []}, {"key": []}]
    return {
        # Of the path: several may have one handler.
        method.lower(): {**operation, "operationId": f"{method.lower()}{_words(route.path)}"}
        for method in route.methods
    }


def body_schema(body: Body) -> dict[str, Any]:
    """The schema of one route's body."""
    properties: dict[str, Any] = {}
    for name, values in body.refused.items():
        # Refused unless they ask for nothing.
        properties[name] = {"enum": [None, *values], "description": "Not supported."}
    for name in sorted(body.ignored):
        properties[name] = {"description": "Changes no answer."}
    for name, check in body.fields.items():
        required = name in body.required
        properties[name] = check.schema if required else {"anyOf": [check.schema, {"type": "null"}]}
    schema: dict[str, Any] = {
        "type": "object",
        "properties": properties,
        "required": list(body.required),
        "additionalProperties": body.is_open,
    }
    if body.one_of:
        names = dict.fromkeys(name for group in body.one_of for name in group)
        schema["oneOf"] = [
            {
                "required": list(group),
                "not": {"anyOf": [{"required": [name]} for name in names if name not in group]},
            }
            for group in body.one_of
        ]
    return schema
