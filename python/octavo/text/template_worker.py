"""The child process that renders templates of requests, within limits that the system keeps.

A sandbox in the language bounds what a template may touch, not what it may cost: a filter runs as
long as its arguments make it, and Python can make a gigabyte of one format. Here a template that
costs too much ends with its process. See ``template_process.py`` for the other end.

Frames on standard input and output: 8 bytes of length, then JSON.
"""

from __future__ import annotations

import resource
import struct
import sys
from collections import OrderedDict
from typing import Any, BinaryIO, Final

import orjson

from octavo.errors import BadRequestError, UnsupportedParameterError
from octavo.text.chat_template import ChatTemplate

LENGTH: Final = struct.Struct("<Q")

# Of what the interpreter has before the first template. The largest honest render is the text of
# MAX_RENDERED_CHARS, once in pieces and once joined.
MEMORY_BYTES: Final = 512 << 20
# Compiling a template takes milliseconds, a client sends few.
MAX_TEMPLATES: Final = 16


def read_frame(file: BinaryIO) -> bytes | None:
    """The next frame; None at the end."""
    head = file.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    return file.read(LENGTH.unpack(head)[0])


def limit_process() -> None:
    """Give up memory beyond MEMORY_BYTES, and writing files, for good."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            own = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        # Not Linux: as much as there is at most.
        own = MEMORY_BYTES
    most = own + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


class Worker:
    """Compiled templates, by their source."""

    def __init__(self) -> None:
        self._templates: OrderedDict[str, ChatTemplate] = OrderedDict()

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The rendered ``text``, or an ``error`` and the field at fault."""
        try:
            template = self._template(request["source"], request["special_tokens"])
            for name in request["needs"]:
                if not template.uses(name):
                    raise UnsupportedParameterError(
                        f"{name} is not supported: this chat template does not use it", name
                    )
            return {"text": template.render(request["messages"], **request["variables"])}
        except ValueError as error:
            param = getattr(error, "param", "chat_template")
            return {
                "error": str(error),
                "param": param,
                "unsupported": isinstance(error, UnsupportedParameterError),
            }

    def _template(self, source: str, special_tokens: dict[str, str]) -> ChatTemplate:
        template = self._templates.pop(source, None)
        if template is None:
            try:
                template = ChatTemplate(source, special_tokens, untrusted=True)
            except ValueError as error:
                raise BadRequestError(str(error), "chat_template") from None
        self._templates[source] = template
        if len(self._templates) > MAX_TEMPLATES:
            self._templates.popitem(last=False)
        return template


def main() -> None:
    """Answer frames until the other end is closed."""
    worker = Worker()
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    limit_process()
    # Ready.
    sink.write(LENGTH.pack(0))
    sink.flush()
    while (frame := read_frame(source)) is not None:
        body = orjson.dumps(worker.answer(orjson.loads(frame)))
        sink.write(LENGTH.pack(len(body)) + body)
        sink.flush()


if __name__ == "__main__":
    main()
