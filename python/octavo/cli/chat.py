"""Client: ``octavo chat`` and ``octavo complete``, streaming to the terminal."""

from __future__ import annotations

import http.client
import json
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import argparse

# A long prompt on a CPU may take this long to its first token.
TIMEOUT_S = 600.0


class ClientError(Exception):
    """The server cannot be reached, or refused; the message is for the terminal."""


class Client:
    """Streams answers from one OpenAI-compatible server.

    Args:
        url: the server's address, with or without ``/v1``.
        api_key: None: none is sent.

    Raises:
        ClientError: the address is not one of HTTP.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ClientError(f"not an http:// or https:// address: {url}")
        self._parts = parts
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The chunks of a streamed answer.

        Raises:
            ClientError: no connection, or an error instead of an answer, or inside it.
        """
        connection = self._connect()
        try:
            payload = json.dumps({**body, "stream": True})
            connection.request("POST", self._path + path, payload, self._headers)
            response = connection.getresponse()
            if response.status != 200:
                raise ClientError(_error_text(response.status, response.read()))
            yield from _events(response)
        except (OSError, http.client.HTTPException) as error:
            raise self._broken(error) from None
        finally:
            connection.close()

    def get(self, path: str) -> Any:
        """The JSON at a path.

        Raises:
            ClientError: no connection, or an error instead of an answer.
        """
        connection = self._connect()
        try:
            connection.request("GET", self._path + path, headers=self._headers)
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise self._broken(error) from None
        finally:
            connection.close()
        if response.status != 200:
            raise ClientError(_error_text(response.status, body))
        return json.loads(body)

    def _connect(self) -> http.client.HTTPConnection:
        is_secure = self._parts.scheme == "https"
        kind = http.client.HTTPSConnection if is_secure else http.client.HTTPConnection
        assert self._parts.hostname is not None
        return kind(self._parts.hostname, self._parts.port, timeout=TIMEOUT_S)

    def _broken(self, error: Exception) -> ClientError:
        if isinstance(error, OSError):
            address = f"{self._parts.hostname}:{self._parts.port}"
            return ClientError(f"no answer from {address}: {error}")
        return ClientError(f"the server broke off: {type(error).__name__}")


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in response:
        if not line.startswith(b"data: "):
            continue
        data = line[len(b"data: ") :].strip()
        if data == b"[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise ClientError(event["error"]["message"])
        yield event


def _error_text(status: int, body: bytes) -> str:
    try:
        return f"{status}: {json.loads(body)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"the server answered with status {status}"


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("model", "max_tokens", "temperature")
    given = {name: getattr(arguments, name) for name in names}
    return {name: value for name, value in given.items() if value is not None}


def _client(arguments: argparse.Namespace) -> Client:
    return Client(arguments.url, arguments.api_key or os.environ.get("OCTAVO_API_KEY"))


def _print_text(pieces: Iterator[str]) -> str:
    text = ""
    for piece in pieces:
        print(piece, end="", flush=True)
        text += piece
    print()
    return text


def _lines(prompt: str) -> Iterator[str]:
    """Lines of standard input, until its end."""
    if sys.stdin.isatty():
        # Imported for its effect: history and line editing in input().
        import readline  # noqa: F401
    while True:
        try:
            line = input(prompt if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line


def chat(arguments: argparse.Namespace) -> int:
    """``octavo chat``: a conversation; ``--quick`` for one exchange."""
    try:
        client = _client(arguments)
        messages: list[dict[str, str]] = []
        if arguments.system:
            messages.append({"role": "system", "content": arguments.system})
        lines = iter([arguments.quick]) if arguments.quick else _lines("> ")
        for line in lines:
            messages.append({"role": "user", "content": line})
            body = {**_options(arguments), "messages": messages}
            chunks = client.stream("/v1/chat/completions", body)
            text = _print_text(
                choice["delta"].get("content") or "" for c in chunks for choice in c["choices"]
            )
            messages.append({"role": "assistant", "content": text})
    except ClientError as error:
        print(f"octavo: error: {error}", file=sys.stderr)
        return 1
    return 0


def complete(arguments: argparse.Namespace) -> int:
    """``octavo complete``: each text and its continuation."""
    try:
        client = _client(arguments)
        for prompt in iter([arguments.prompt]) if arguments.prompt else _lines("> "):
            body = {**_options(arguments), "prompt": prompt}
            chunks = client.stream("/v1/completions", body)
            _print_text(choice["text"] for c in chunks for choice in c["choices"])
    except ClientError as error:
        print(f"octavo: error: {error}", file=sys.stderr)
        return 1
    return 0
