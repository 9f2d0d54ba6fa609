"""octavo.ray on a real Ray: answers, leaving clients, a killed replica, scaling, routing, LLMConfig."""

from __future__ import annotations

import http.client
import json
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from harness import eventually

pytestmark = [pytest.mark.slow, pytest.mark.system, pytest.mark.timeout(600)]

APP = "octavo"
LONG = {"prompt": "x", "max_tokens": 1500, "ignore_eos": True, "temperature": 0}


class Application:
    """One application on the cluster, and how to talk to it."""

    def __init__(self, url: str) -> None:
        self._address = urllib.parse.urlsplit(url).netloc

    def request(self, method: str, path: str, body: Any = None) -> tuple[int, Any, bytes]:
        """(status, headers, body) of one request."""
        connection = http.client.HTTPConnection(self._address, timeout=120)
        headers = {"content-type": "application/json"}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        try:
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    def open(self, path: str, body: Any) -> tuple[http.client.HTTPConnection, Any]:
        """A stream under way."""
        connection = http.client.HTTPConnection(self._address, timeout=120)
        headers = {"content-type": "application/json"}
        connection.request("POST", path, json.dumps({**body, "stream": True}), headers)
        return connection, connection.getresponse()


def replicas() -> list[str]:
    """Names of the actors of the model's replicas."""
    import ray

    names = ray.util.list_named_actors(all_namespaces=True)
    found = [actor["name"] for actor in names if actor["namespace"] == "serve"]
    return [name for name in found if name.startswith(f"SERVE_REPLICA::{APP}#octavo#")]


def num_running() -> int:
    from ray import serve

    deployment = serve.status().applications[APP].deployments["octavo"]
    return int(deployment.replica_states.get("RUNNING", 0))


Deploy = Callable[..., Application]


@pytest.fixture
def deploy(cluster: str, model_flags: dict[str, Any]) -> Iterator[Deploy]:
    """``deploy(**replica_options)``: the application with these."""
    from ray import serve

    from octavo.ray import build_app

    def run(**options: Any) -> Application:
        serve.run(build_app({**model_flags, "replica": options}), name=APP, route_prefix="/")
        return Application(cluster)

    yield run
    serve.delete(APP)


def test_answers_are_those_of_a_server(deploy: Deploy) -> None:
    app = deploy(num_replicas=1)
    messages = [{"role": "user", "content": "x"}]
    status, headers, body = app.request(
        "POST", "/v1/chat/completions", {"messages": messages, "max_tokens": 5}
    )
    assert status == 200
    assert json.loads(body)["usage"]["completion_tokens"] == 5
    assert headers["x-request-id"]
    connection, response = app.open("/v1/chat/completions", {"messages": messages, "max_tokens": 5})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.read().endswith(b"data: [DONE]\n\n")
    connection.close()
    assert app.request("GET", "/")[2].startswith(b"<!doctype html>")
    assert json.loads(app.request("GET", "/v1/models")[2])["data"][0]["id"] == "tiny"
    status, _, body = app.request("POST", "/v1/completions", {"prompt": 3.5})
    assert (status, json.loads(body)["error"]["param"]) == (400, "prompt")
    assert app.request("GET", "/v1/nothing")[0] == 404
    # A client that leaves frees what its request holds.
    connection, response = app.open("/v1/completions", LONG)
    response.read(100)
    connection.close()
    response.close()
    eventually(lambda: json.loads(app.request("GET", "/load")[2])["server_load"] == 0, 10)


def test_a_killed_replica_loses_no_request_that_had_not_begun(deploy: Deploy) -> None:
    import ray

    app = deploy(num_replicas=2)
    over = threading.Event()
    whole: list[int] = []
    streams: list[bytes] = []

    def ask() -> None:
        while not over.is_set():
            whole.append(app.request("POST", "/v1/completions", LONG)[0])

    def stream() -> None:
        while not over.is_set():
            connection, response = app.open("/v1/completions", LONG)
            assert response.status == 200
            streams.append(response.read())
            connection.close()

    threads = [threading.Thread(target=work) for work in (ask, stream) * 4]
    for thread in threads:
        thread.start()
    eventually(lambda: len(whole) >= 4 and len(streams) >= 4, 120)
    before = set(replicas())
    assert len(before) == 2
    victim = sorted(before)[0]
    ray.kill(ray.get_actor(victim, namespace="serve"))
    count = len(whole) + len(streams)
    eventually(lambda: len(whole) + len(streams) >= count + 16, 120)
    # Another takes its place.
    eventually(lambda: num_running() == 2 and victim not in replicas(), 120)
    over.set()
    for thread in threads:
        thread.join(120)
    # Nothing of these had left: another replica answered.
    assert set(whole) == {200}
    cut = [text for text in streams if not text.endswith(b"data: [DONE]\n\n")]
    # Those that had begun end with an error that says so. They were on one replica of two.
    assert len(cut) <= 4
    for text in cut:
        last = text.rstrip().rpartition(b"data: ")[2]
        assert json.loads(last)["error"]["code"] == "replica_lost"


def test_replicas_follow_the_load(deploy: Deploy) -> None:
    autoscaling = {
        "min_replicas": 1,
        "max_replicas": 2,
        "target_ongoing_requests": 2,
        "upscale_delay_s": 0.5,
        "downscale_delay_s": 2.0,
        "metrics_interval_s": 0.2,
        "look_back_period_s": 1.0,
    }
    app = deploy(autoscaling_config=autoscaling, graceful_shutdown_wait_loop_s=0.2)
    assert num_running() == 1
    over = threading.Event()
    answers: list[int] = []

    def ask() -> None:
        while not over.is_set():
            answers.append(app.request("POST", "/v1/completions", LONG)[0])

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    eventually(lambda: num_running() == 2, 120)
    over.set()
    for thread in threads:
        thread.join(120)
    # A trickle goes on while one of the two drains.
    deadline = time.monotonic() + 120
    while num_running() != 1:
        answers.append(app.request("POST", "/v1/completions", {"prompt": "x", "max_tokens": 20})[0])
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert set(answers) == {200}


def test_equal_beginnings_go_to_one_replica(deploy: Deploy) -> None:
    app = deploy(num_replicas=2)
    eventually(lambda: num_running() == 2, 60)

    def cached(number: int) -> int:
        text = f"{number} is the first of many words. " + f"word{number} " * 60
        body = {"prompt": text, "max_tokens": 2}
        usage = json.loads(app.request("POST", "/v1/completions", body)[2])["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert [cached(number) for number in range(8)].count(0) == 8
    # By chance one in 2**16 of these would be all hits.
    assert all(cached(number) > 0 for number in [*range(8), *range(8)])


def test_ray_serve_llm_takes_the_server_class(cluster: str, model_flags: dict[str, Any]) -> None:
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from octavo.ray.builder import PREFIX_ROUTER

    reason = "Ray's models of requests need more than ray[serve]: pip install python-multipart"
    llm = pytest.importorskip("ray.serve.llm", reason=reason, exc_type=ImportError)
    config = llm.LLMConfig(
        model_loading_config={"model_id": "mine", "model_source": model_flags["model"]},
        server_cls="octavo.ray:OctavoServer",
        engine_kwargs={
            name: model_flags[name]
            for name in ("load_format", "dtype", "device", "threads", "chat_template")
        },
        deployment_config={
            "num_replicas": 2,
            "max_ongoing_requests": 64,
            "request_router_config": RequestRouterConfig(request_router_class=PREFIX_ROUTER),
        },
    )
    serve.run(llm.build_openai_app({"llm_configs": [config]}), name="llm", route_prefix="/")
    try:
        app = Application(cluster)
        body = {"model": "mine", "messages": [{"role": "user", "content": "x"}], "max_tokens": 5}
        status, _, answer = app.request("POST", "/v1/chat/completions", body)
        assert status == 200, answer
        assert json.loads(answer)["usage"]["completion_tokens"] == 5
        assert json.loads(answer)["model"] == "mine"
        connection, response = app.open("/v1/chat/completions", body)
        text = response.read()
        assert text.count(b"[DONE]") == 1
        assert b'"finish_reason":"length"' in text
        connection.close()
        status, _, answer = app.request("POST", "/v1/chat/completions", {**body, "temperature": 77})
        assert status == 400
        assert "temperature" in answer.decode()
        completion = {"model": "mine", "prompt": "x", "max_tokens": 3}
        assert app.request("POST", "/v1/completions", completion)[0] == 200

        def cached(number: int) -> int:
            text = f"{number} is the first of many words. " + f"word{number} " * 60
            completion = {"model": "mine", "prompt": text, "max_tokens": 2}
            usage = json.loads(app.request("POST", "/v1/completions", completion)[2])["usage"]
            return int(usage["prompt_tokens_details"]["cached_tokens"])

        # Ray's router knows octavo's replicas too: by chance one in 2**8 of these would be all hits.
        assert [cached(number) for number in range(8)].count(0) == 8
        assert all(cached(number) > 0 for number in range(8))
    finally:
        serve.delete("llm")
