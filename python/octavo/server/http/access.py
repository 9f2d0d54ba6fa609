"""Access: the need of a key, and the Host header on loopback."""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from octavo.errors import AuthenticationError, ForbiddenHostError
from octavo.server.http.api_keys import ApiKeys, given_keys
from octavo.server.http.exchange import header

if TYPE_CHECKING:
    from octavo.server.http.config import ServerConfig

# Orchestrators ask these without a key; they disclose the server's health alone.
OPEN_PATHS: Final = frozenset({"/health", "/ready", "/ping"})

# The page asks for the key itself: its files are the same for everyone, its requests carry the key.
PAGE_FILES: Final = "/page/"


def open_paths(config: ServerConfig) -> frozenset[str]:
    """Paths that are open without a key."""
    return OPEN_PATHS if config.metrics_need_key else OPEN_PATHS | {"/metrics"}


class Access:
    """Lets a request through to ``app``, or raises. Made once from the server's flags."""

    def __init__(self, app: ASGIApp, config: ServerConfig, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys
        self._open_paths = open_paths(config)
        self._has_page = config.web_ui
        # Without a key, being on loopback is all that protects the server: a web page that points
        # its own host name at 127.0.0.1 must not pass for a local program.
        self._checks_host = (
            not config.has_keys and config.uds is None and is_loopback_name(config.host)
        )
        self._hosts = {host.lower() for host in (config.host, *config.allowed_hosts)}

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Check the head, then hand on.

        Raises:
            ForbiddenHostError, AuthenticationError.
        """
        if self._checks_host:
            self._check_host(header(scope, b"host"))
        if self._keys and not self._is_open(scope):
            self._check_key(Headers(scope=scope))
        return self._app(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        path = route_path(scope)
        if path in self._open_paths:
            return True
        # By these methods alone: POST / is an API's route.
        reads_page = self._has_page and scope["method"] in ("GET", "HEAD")
        return reads_page and (path == "/" or path.startswith(PAGE_FILES))

    def _check_host(self, host: bytes | None) -> None:
        # HTTP/1.0 clients send none; browsers always do.
        if host is None:
            return
        name = _host_name(host.decode("latin-1")).lower()
        if name not in self._hosts and not is_loopback_name(name):
            raise ForbiddenHostError(
                "the Host header does not name this machine: the server listens on loopback "
                "without an API key; see --api-key and --allowed-hosts"
            )

    def _check_key(self, headers: Headers) -> None:
        given = list(given_keys(headers))
        if not given:
            raise AuthenticationError(
                "no API key: send it as 'Authorization: Bearer KEY' or as 'x-api-key: KEY'"
            )
        if not self._keys.admits(given):
            raise AuthenticationError("the API key is wrong")


def route_path(scope: Scope) -> str:
    """The path without ``--root-path``, where a proxy has left that on it."""
    path: str = scope["path"]
    root_path: str = scope.get("root_path", "")
    if root_path and path.startswith(root_path + "/"):
        return path[len(root_path) :]
    return path


def _host_name(host: str) -> str:
    """The header without its port; an IPv6 address without its brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


@functools.lru_cache(maxsize=64)
def is_loopback_name(name: str) -> bool:
    """``localhost``, its subdomains, and loopback addresses."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
