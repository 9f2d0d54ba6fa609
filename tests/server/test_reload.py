"""Keys and certificates that change while the server runs, and logs for collectors."""

from __future__ import annotations

import json
import logging
import ssl
import sys
from pathlib import Path

import pytest
from harness import RunningServer, StartServer, eventually, make_certificate

from octavo.cli.log_format import JsonFormatter
from octavo.server import lifecycle
from octavo.server.http.api_keys import ApiKeys
from octavo.server.http.config import ServerConfig

pytestmark = pytest.mark.system


def status(server: RunningServer, key: str) -> int:
    return server.get("/v1/models", x_api_key=key).status


def reload(server: RunningServer) -> None:
    server.call(server.lifecycle.reload)


def test_keys_are_read_again(start_server: StartServer, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# of June\nold\n\n")
    server = start_server(api_key=("given",), api_key_file=str(file))
    assert [status(server, key) for key in ("given", "old", "new", "# of June")] == [
        200,
        200,
        401,
        401,
    ]
    file.write_text("new\n")
    assert status(server, "new") == 401
    reload(server)
    eventually(lambda: status(server, "new") == 200)
    assert [status(server, key) for key in ("given", "old")] == [200, 401]


@pytest.mark.parametrize("content", [b"", b"# none\n", b"\xff\xfe", None])
def test_a_bad_file_of_keys_changes_nothing(
    start_server: StartServer,
    tmp_path: Path,
    content: bytes | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    file = tmp_path / "keys"
    file.write_text("key")
    server = start_server(api_key_file=str(file))
    file.unlink() if content is None else file.write_bytes(content)
    reload(server)
    eventually(lambda: "keys not reloaded: api_key_file" in caplog.text)
    assert (status(server, "key"), status(server, "")) == (200, 401)
    with pytest.raises(ValueError, match="api_key_file"):
        ApiKeys(ServerConfig(api_key_file=str(file)))


def shown(server: RunningServer) -> bytes:
    """The certificate that a new connection is shown."""
    context = ssl.create_default_context()
    # Which one it is, and not whether to trust it.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with server.socket() as plain, context.wrap_socket(plain) as secure:
        certificate = secure.getpeercert(binary_form=True)
        assert certificate
        return certificate


def test_certificates_are_read_again(
    start_server: StartServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "octavo")
    key, certificate = make_certificate(tmp_path)
    server = start_server(ssl_keyfile=str(key), ssl_certfile=str(certificate))
    first = shown(server)
    context = ssl.create_default_context(cafile=str(certificate))
    with (
        server.socket() as plain,
        context.wrap_socket(plain, server_hostname="localhost") as before,
    ):
        make_certificate(tmp_path)
        reload(server)
        eventually(lambda: "certificate reloaded" in caplog.text)
        assert shown(server) != first
        # A connection that was there goes on.
        before.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert before.recv(64).startswith(b"HTTP/1.1 200")
    # A key of another certificate: both are kept as they were.
    second = shown(server)
    (tmp_path / "other").mkdir()
    make_certificate(tmp_path / "other")[0].replace(key)
    caplog.clear()
    reload(server)
    eventually(lambda: "certificate not reloaded" in caplog.text)
    assert shown(server) == second


def test_certificates_can_be_watched(
    start_server: StartServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "CERTIFICATE_POLL_S", 0.02)
    key, certificate = make_certificate(tmp_path)
    server = start_server(
        ssl_keyfile=str(key), ssl_certfile=str(certificate), enable_ssl_refresh=True
    )
    first = shown(server)
    make_certificate(tmp_path)
    eventually(lambda: shown(server) != first)
    with pytest.raises(ValueError, match="enable_ssl_refresh needs ssl_certfile"):
        ServerConfig(enable_ssl_refresh=True)


def test_a_request_is_an_object_of_the_log(
    start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "octavo")
    server = start_server(enable_log_requests=True)
    server.get("/health", x_request_id="mine")
    eventually(lambda: caplog.records)
    value = json.loads(JsonFormatter().format(caplog.records[-1]))
    assert (value["method"], value["path"], value["status"]) == ("GET", "/health", 200)
    assert (value["request_id"], value["logger"]) == ("mine", "octavo.server")
    assert value["duration_ms"] >= 0
    assert value["time"].endswith("Z")


def test_a_json_record_is_one_line_whatever_is_in_it() -> None:
    try:
        raise ValueError("no\n\ud800")
    except ValueError:
        record = logging.LogRecord(
            "octavo", logging.ERROR, "x", 1, "a\n%s", ("\ud800\x1b[0m",), sys.exc_info()
        )
    record.fields = {"path": Path("/x"), "nested": {"a": 1}}
    text = JsonFormatter().format(record)
    assert "\n" not in text
    value = json.loads(text)
    assert value["message"] == "a\n\\ud800\x1b[0m"
    assert "ValueError" in value["exception"]
    assert (value["path"], value["nested"]) == ("/x", {"a": 1})
