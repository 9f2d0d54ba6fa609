"""Loading, draining, dying: what the health routes say, and how the process would end."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from harness import StartServer, eventually, make_certificate

from octavo.server import lifecycle
from octavo.server.http.config import ServerConfig
from octavo.server.lifecycle import Lifecycle

pytestmark = pytest.mark.system

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


def test_while_loading(start_server: StartServer) -> None:
    server = start_server(ready=False)
    for path in ("/health", "/ready", "/ping", "/v1/models", "/metrics"):
        answer = server.get(path)
        assert answer.status == 503, path
        assert answer.error["code"] == "loading"
        assert int(answer.headers["retry-after"]) >= 1
    assert server.post(COMPLETION, {"prompt": "x"}).error["code"] == "loading"
    assert server.get("/version").status == 200
    server.may_load.set()
    assert server.ready.wait(10)
    assert server.get("/health").status == 200
    assert server.get("/ready").status == 200
    assert server.post(COMPLETION, {"prompt": "x"}).status == 200
    assert 'reason="loading"} 1.0' in server.get("/metrics").body.decode()


def test_a_stop_while_loading_does_not_wait(start_server: StartServer) -> None:
    server = start_server(ready=False)
    server.call(server.lifecycle.stop)
    server.thread.join(5)
    assert server.exit_status == 0
    assert server.lifecycle.is_loading


def test_drain(start_server: StartServer) -> None:
    server = start_server(shutdown_timeout=10)
    server.engine.hold = True
    answers: list[Any] = []
    body = {"prompt": "x", "stream": True}
    streams = [
        threading.Thread(target=lambda: answers.append(server.post(COMPLETION, body)))
        for _ in range(3)
    ]
    for stream in streams:
        stream.start()
    eventually(lambda: len(server.engine.running) == 3)
    server.call(server.lifecycle.stop)
    eventually(lambda: server.get("/ready").status == 503)
    assert server.get("/ready").error["code"] == "draining"
    assert server.get("/health").status == 200
    refused = server.post(COMPLETION, {"prompt": "x"})
    assert (refused.status, refused.error["code"]) == (503, "draining")
    assert "retry-after" in refused.headers
    server.engine.hold = False
    server.thread.join(10)
    for stream in streams:
        stream.join(10)
    assert server.exit_status == 0
    assert [answer.body.endswith(b"data: [DONE]\n\n") for answer in answers] == [True] * 3
    assert not any(b'"error"' in answer.body for answer in answers)


def test_a_drain_that_takes_too_long_is_cut_off(start_server: StartServer) -> None:
    server = start_server(shutdown_timeout=0.2)
    server.engine.hold = True
    answers: list[Any] = []
    post = threading.Thread(target=lambda: answers.append(server.post(COMPLETION, {"prompt": "x"})))
    post.start()
    eventually(lambda: server.engine.running)
    began = time.monotonic()
    server.call(server.lifecycle.stop)
    server.thread.join(10)
    post.join(10)
    assert time.monotonic() - began < 3
    assert server.exit_status == 0
    assert (answers[0].status, answers[0].error["code"]) == (503, "draining")


def test_a_dead_engine_ends_the_process(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "DEATH_NOTICE_S", 1.0)
    server = start_server()
    server.engine.hold = True
    answers: list[Any] = []
    post = threading.Thread(target=lambda: answers.append(server.post(COMPLETION, {"prompt": "x"})))
    post.start()
    eventually(lambda: server.engine.running)
    server.call(server.engine.die)
    post.join(10)
    server.thread.join(10)
    assert (answers[0].status, answers[0].error["code"]) == (503, "engine_dead")
    assert server.exit_status == lifecycle.EXIT_ENGINE_DEAD


def test_a_dead_engine_is_not_healthy(start_server: StartServer) -> None:
    server = start_server()
    server.lifecycle.state.phase = "dead"
    assert server.get("/health").status == 503
    assert server.get("/health").error["code"] == "engine_dead"
    assert server.post(COMPLETION, {"prompt": "x"}).status == 503


def test_a_stalled_engine_is_not_healthy(start_server: StartServer) -> None:
    server = start_server()
    server.engine.is_healthy = False
    assert server.get("/health").error["code"] == "stalled"
    assert server.get("/ready").status == 503
    server.engine.is_healthy = True
    assert server.get("/health").status == 200


def test_a_model_that_cannot_be_loaded() -> None:
    import asyncio

    def load() -> Any:
        raise ValueError("no such model")

    async def run() -> None:
        await Lifecycle(ServerConfig(port=0), load).run(lambda engine, url: None)

    with pytest.raises(ValueError, match="no such model"):
        asyncio.run(run())


def test_a_port_that_is_taken(start_server: StartServer) -> None:
    import asyncio

    taken = start_server().port

    async def run() -> None:
        await Lifecycle(ServerConfig(port=taken), FakeEngine).run(lambda engine, url: None)

    with pytest.raises(OSError, match=f"{taken}.*--port"):
        asyncio.run(run())


def test_unix_sockets(start_server: StartServer, tmp_path: Path) -> None:
    path = tmp_path / "octavo.sock"
    server = start_server(uds=str(path))
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: whatever\r\nConnection: close\r\n\r\n")
        assert sock.recv(4096).startswith(b"HTTP/1.1 200 ")
    server.stop()
    assert not path.exists()


def test_tls(start_server: StartServer, tmp_path: Path) -> None:
    import ssl

    key, certificate = make_certificate(tmp_path)
    server = start_server(ssl_keyfile=str(key), ssl_certfile=str(certificate))
    assert server.url.startswith("https://")
    context = ssl.create_default_context(cafile=str(certificate))
    connection = http.client.HTTPSConnection("localhost", server.port, context=context)
    context.check_hostname = False
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200
    connection.close()


@pytest.mark.parametrize(
    ("required", "brings", "passes"), [(2, False, False), (2, True, True), (0, False, True)]
)
def test_clients_certificates(
    start_server: StartServer, tmp_path: Path, required: int, brings: bool, passes: bool
) -> None:
    import ssl

    key, certificate = map(str, make_certificate(tmp_path))
    server = start_server(
        ssl_keyfile=key, ssl_certfile=certificate, ssl_ca_certs=certificate, ssl_cert_reqs=required
    )
    context = ssl.create_default_context(cafile=certificate)
    context.check_hostname = False
    if brings:
        context.load_cert_chain(certificate, key)
    connection = http.client.HTTPSConnection("localhost", server.port, context=context)
    try:
        connection.request("GET", "/health")
        status = connection.getresponse().status
    except OSError:
        status = None
    assert status == (200 if passes else None)
    connection.close()


def test_load_counts_what_runs(start_server: StartServer) -> None:
    server = start_server()
    server.engine.hold = True
    post = threading.Thread(target=lambda: server.post(COMPLETION, {"prompt": "x", "n": 3}))
    post.start()
    eventually(lambda: server.get("/load").json == {"server_load": 1})
    server.engine.hold = False
    post.join(10)
    assert server.get("/load").json == {"server_load": 0}


def test_a_bad_template_flag_is_found_before_the_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No such file"):
        Lifecycle(ServerConfig(chat_template=str(tmp_path / "missing.jinja")), FakeEngine)
    with pytest.raises(ValueError, match="line 1"):
        Lifecycle(ServerConfig(chat_template="{% if %}"), FakeEngine)


def test_a_template_of_the_operator_s(start_server: StartServer, tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_text("{{ messages[-1].content }}!{{ mood }}")
    server = start_server(chat_template=str(path))
    body = {
        "messages": [{"role": "user", "content": "hi"}],
        "chat_template_kwargs": {"mood": "?"},
    }
    assert server.post("/v1/chat/completions", body).status == 200
    assert bytes(server.engine.submitted[0][0]) == b"hi!?"


def test_a_template_of_the_request_s(start_server: StartServer) -> None:
    server = start_server(trust_request_chat_template=True)
    messages = [{"role": "user", "content": "hi"}]
    for template in ("{{ messages[0].content }}1", "{{ messages[0].content }}2"):
        body = {"messages": messages, "chat_template": template}
        assert server.post("/v1/chat/completions", body).status == 200
    assert [bytes(prompt) for prompt, _, _ in server.engine.submitted] == [b"hi1", b"hi2"]
    answer = server.post("/v1/chat/completions", {"messages": messages, "chat_template": "{% if"})
    assert (answer.status, answer.error["param"]) == (400, "chat_template")
    answer = server.post(
        "/v1/chat/completions",
        {"messages": messages, "chat_template": "{{ raise_exception('no') }}"},
    )
    assert (answer.status, answer.error["message"]) == (400, "chat template: no")


def test_a_hostile_template_holds_up_nobody(start_server: StartServer) -> None:
    server = start_server(trust_request_chat_template=True)
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    assert server.post(CHAT, {**chat, "chat_template": "x"}).status == 200
    hostile = {**chat, "chat_template": "{{ lipsum(100000000) }}"}
    answers: list[Any] = []
    post = threading.Thread(target=lambda: answers.append(server.post(CHAT, hostile)))
    post.start()
    waits = []
    while post.is_alive():
        began = time.monotonic()
        assert server.post(CHAT, chat).status == 200
        waits.append(time.monotonic() - began)
        post.join(0.1)
    assert len(waits) > 5
    # In the mean: any one of them may meet a busy machine.
    assert sorted(waits)[len(waits) // 2] < 0.5
    assert answers[0].status == 400
    assert answers[0].error["message"] == "the chat template takes too long"
