"""Access: who may call. API keys, the Host header, and other origins' web pages."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from octavo.errors import AuthenticationError, ForbiddenHostError

if TYPE_CHECKING:
    from octavo.server.config import ServerConfig
    from octavo.server.exchange import Exchange

# Orchestrators ask these without a key; they tell nothing but the server's health.
OPEN_PATHS: Final = frozenset({"/health", "/ready", "/ping"})

_METHODS: Final = b"GET, POST, OPTIONS"
_PREFLIGHT_AGE_S: Final = b"600"


class Access:
    """The checks of one server, made once from its flags."""

    def __init__(self, config: ServerConfig) -> None:
        self._keys = [_digest(key.encode()) for key in config.api_key]
        self._open_paths = OPEN_PATHS | (set() if config.metrics_need_key else {"/metrics"})
        self._origins = frozenset(config.allowed_origins)
        # Without a key, being on loopback is all that protects the server: a web page that points
        # its own host name at 127.0.0.1 must not pass for a local program.
        self._checks_host = (
            not config.api_key and config.uds is None and is_loopback_name(config.host)
        )
        self._hosts = {host.lower() for host in (config.host, *config.allowed_hosts)}

    def check(self, exchange: Exchange) -> None:
        """Let a request pass, or not.

        Raises:
            ForbiddenHostError, AuthenticationError.
        """
        if self._checks_host:
            self._check_host(exchange.header(b"host"))
        if self._keys and exchange.path not in self._open_paths:
            self._check_key(exchange)

    def allow_origin(self, exchange: Exchange) -> bytes | None:
        """Put the CORS headers of an allowed origin into the answer's head.

        Returns:
            The origin, None if there is none or it is not allowed.
        """
        if not self._origins:
            return None
        # Caches must not hand one origin's answer to another.
        exchange.headers.append((b"vary", b"Origin"))
        origin = exchange.header(b"origin")
        if origin is None:
            return None
        if "*" in self._origins:
            # Keys travel in a header of the page's own making: no credentials mode is needed.
            origin = b"*"
        elif origin.decode("latin-1") not in self._origins:
            return None
        exchange.headers.append((b"access-control-allow-origin", origin))
        exchange.headers.append((b"access-control-expose-headers", b"x-request-id, retry-after"))
        return origin

    @staticmethod
    def is_preflight(exchange: Exchange) -> bool:
        """Whether a browser asks for leave to send the real request."""
        return (
            exchange.method == "OPTIONS"
            and exchange.header(b"access-control-request-method") is not None
        )

    @staticmethod
    async def answer_preflight(exchange: Exchange) -> None:
        """Give leave to an allowed origin."""
        headers = [
            (b"access-control-allow-methods", _METHODS),
            (b"access-control-max-age", _PREFLIGHT_AGE_S),
        ]
        wanted = exchange.header(b"access-control-request-headers")
        if wanted is not None:
            headers.append((b"access-control-allow-headers", wanted))
        await exchange.respond(b"", content_type=b"text/plain", headers=headers)

    def _check_host(self, header: bytes | None) -> None:
        # HTTP/1.0 clients send none; browsers always do.
        if header is None:
            return
        name = _host_name(header.decode("latin-1")).lower()
        if name not in self._hosts and not is_loopback_name(name):
            raise ForbiddenHostError(
                "the Host header does not name this machine: the server listens on loopback "
                "without an API key; see --api-key and --allowed-hosts"
            )

    def _check_key(self, exchange: Exchange) -> None:
        given = list(_given_keys(exchange))
        if not given:
            raise AuthenticationError(
                "no API key: send it as 'Authorization: Bearer KEY' or as 'x-api-key: KEY'"
            )
        ok = False
        # Digests have one length, every key is compared to its end: time tells nothing.
        for key in given:
            digest = _digest(key)
            for known in self._keys:
                ok |= hmac.compare_digest(digest, known)
        if not ok:
            raise AuthenticationError("the API key is wrong")


def _given_keys(exchange: Exchange) -> Iterable[bytes]:
    authorization = exchange.header(b"authorization")
    if authorization is not None:
        scheme, _, key = authorization.partition(b" ")
        if scheme.lower() == b"bearer" and key.strip():
            yield key.strip()
    key_header = exchange.header(b"x-api-key")
    if key_header:
        yield key_header


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _host_name(host: str) -> str:
    """The header without its port; an IPv6 address without its brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def is_loopback_name(name: str) -> bool:
    """``localhost``, its subdomains, and loopback addresses."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
