"""RequestTemplate: a chat template that came with a request, rendered in a process of its own."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, Final

import orjson

from octavo.errors import BadRequestError, UnsupportedParameterError
from octavo.text.chat_template import MAX_RENDER_S
from octavo.text.template_worker import LENGTH

# Compiling is not counted by the template's own clock. Beyond this the process is ended.
MAX_ANSWER_S: Final = 2 * MAX_RENDER_S
# Importing jinja2 takes a fraction of a second, on a loaded machine a few.
MAX_START_S: Final = 30.0


class TemplateProcess:
    """One child, started by the first render, and anew after one that had to be ended.

    ``executor``: the thread that waits for it. Renders come one after another: who sends templates
    that take long holds up those of others, and nothing else.
    """

    def __init__(self) -> None:
        self.executor: Executor = ThreadPoolExecutor(1, thread_name_prefix="octavo-template")
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def render(self, request: Mapping[str, Any]) -> str:
        """The text of one template; blocks.

        Raises:
            BadRequestError: the template is none, fails, or costs too much.
            UnsupportedParameterError: it does not use what the request needs.
        """
        with self._lock:
            answer = orjson.loads(self._exchange(orjson.dumps(request)))
        if "text" in answer:
            text: str = answer["text"]
            return text
        if answer["unsupported"]:
            raise UnsupportedParameterError(answer["error"], answer["param"])
        raise BadRequestError(answer["error"], answer["param"])

    def _exchange(self, frame: bytes) -> bytes:
        child = self._child or self._start()
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(LENGTH.pack(len(frame)) + frame)
            child.stdin.flush()
            deadline = time.monotonic() + MAX_ANSWER_S
            head = _read(child.stdout.fileno(), LENGTH.size, deadline)
            return _read(child.stdout.fileno(), LENGTH.unpack(head)[0], deadline)
        except TimeoutError:
            self.close()
            raise BadRequestError("the chat template takes too long", "chat_template") from None
        except (EOFError, OSError):
            # It has ended in the middle of the work.
            self.close()
            raise BadRequestError(
                "the chat template needs too much memory", "chat_template"
            ) from None

    def _start(self) -> subprocess.Popen[bytes]:
        # Nothing of the server's environment, its keys above all, is within a template's reach.
        environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-m", "octavo.text.template_worker"]
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            # A Ctrl-C on the terminal is the server's.
            start_new_session=True,
        )
        self._child = child
        assert child.stdout is not None
        try:
            _read(child.stdout.fileno(), LENGTH.size, time.monotonic() + MAX_START_S)
        except (EOFError, TimeoutError):
            self.close()
            raise RuntimeError("the process that renders templates does not start") from None
        return child

    def close(self) -> None:
        """End the child, if there is one."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    try:
                        pipe.close()
                    except OSError:
                        # What was not written yet has nobody to read it.
                        continue


def _read(descriptor: int, size: int, deadline: float) -> bytes:
    """So many bytes.

    Raises:
        TimeoutError: they do not come in time.
        EOFError: the other end is closed.
    """
    pieces = []
    while size:
        ready, _, _ = select.select([descriptor], [], [], max(deadline - time.monotonic(), 0))
        if not ready:
            raise TimeoutError
        piece = os.read(descriptor, min(size, 1 << 20))
        if not piece:
            raise EOFError
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


class RequestTemplate:
    """A ChatTemplate's methods for a source that came with a request. Knows nothing of it before
    the render.

    ``executor``: where to render.
    """

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], process: TemplateProcess
    ) -> None:
        self._source = source
        self._special_tokens = dict(special_tokens)
        self._process = process
        self.executor: Executor | None = process.executor

    def uses(self, variable: str) -> bool:
        """True: ``render`` refuses documents that the template does not use."""
        return True

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The prompt's text; blocks.

        Raises:
            BadRequestError: the template is none, refuses the messages, or costs too much.
            UnsupportedParameterError: it does not use the documents.
        """
        needs = ["documents"] if variables.get("documents") is not None else []
        return self._process.render(
            {
                "source": self._source,
                "special_tokens": self._special_tokens,
                "messages": messages,
                "variables": variables,
                "needs": needs,
            }
        )
