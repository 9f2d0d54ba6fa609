"""Certificates: a TLS context's chain and key, loaded again while connections are open."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from octavo.server.http.config import ServerConfig


class Certificates:
    """The files behind one context. Open connections keep what they were made with."""

    def __init__(self, config: ServerConfig, context: ssl.SSLContext) -> None:
        assert config.ssl_certfile is not None
        self._chain = config.ssl_certfile
        self._key = config.ssl_keyfile
        self._context = context
        self._loaded = self.stamp()

    def stamp(self) -> tuple[object, ...]:
        """A value that changes when a file does; None in it for a file that is not there."""
        return tuple(_stamp(Path(name)) for name in (self._chain, self._key) if name is not None)

    @property
    def is_stale(self) -> bool:
        """True where the files have changed since they were loaded."""
        return self.stamp() != self._loaded

    def reload(self) -> None:
        """Load the files for connections to come. What cannot be used changes nothing.

        Raises:
            ValueError: they are missing, no certificates, or do not belong together.
        """
        stamp = self.stamp()
        try:
            # A context that has taken the chain and not the key could greet nobody.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self._chain, self._key)
            self._context.load_cert_chain(self._chain, self._key)
        except OSError as error:  # ssl.SSLError is one
            raise ValueError(f"ssl_certfile: {self._chain} cannot be used: {error}") from None
        self._loaded = stamp


def _stamp(file: Path) -> object:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
