"""ApiKeys: the keys that requests may bring, from flags and from a file that can be read again."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.datastructures import Headers

if TYPE_CHECKING:
    from starlette.types import Scope

    from octavo.server.http.config import ServerConfig


class ApiKeys:
    """Digests of the accepted keys. Touched on the event loop only.

    Raises:
        ValueError: the file of keys cannot be used.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._digests: tuple[bytes, ...] = ()
        self.reload()

    def __len__(self) -> int:
        return len(self._digests)

    def reload(self) -> None:
        """Read the file again. What cannot be used changes nothing.

        Raises:
            ValueError: it cannot be read, or holds no key: that would open the server to all.
        """
        file = self._config.api_key_file
        own = self._config.api_key
        keys = [*own, *(_read_keys(Path(file)) if file is not None else ())]
        self._digests = tuple(dict.fromkeys(_digest(key.encode()) for key in keys))

    def admits(self, given: Iterable[bytes]) -> bool:
        """True where one of ``given`` is a key.

        Digests have one length, every key is compared to its end: the time discloses nothing.
        """
        is_known = False
        for key in given:
            digest = _digest(key)
            for known in self._digests:
                is_known |= hmac.compare_digest(digest, known)
        return is_known

    def owner(self, scope: Scope) -> bytes:
        """The digest of the key that a request has brought; empty where there are no keys.

        The request has passed ``Access``.
        """
        known = set(self._digests)
        digests = map(_digest, given_keys(Headers(scope=scope)))
        return next((digest for digest in digests if digest in known), b"")


def given_keys(headers: Headers) -> Iterable[bytes]:
    """The keys that a request brings, by either of their headers."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        yield key.strip().encode("latin-1")
    if key_header := headers.get("x-api-key"):
        yield key_header.encode("latin-1")


def _read_keys(file: Path) -> list[str]:
    """One key a line; empty lines and those that begin with # are none."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ValueError(f"api_key_file: {file} cannot be read: {reason}") from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ValueError(f"api_key_file: {file} holds no key")
    return keys


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
