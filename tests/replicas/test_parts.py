"""What octavo.ray is made of, without Ray: a request's text, a call of the application, flags."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "server"))

from fake_engine import FakeEngine, FakeTemplate

from octavo.ray.app_call import begin_call
from octavo.ray.request import MAX_ROUTING_CHARS, RoutedRequest, routing_text
from octavo.server.http.config import ServerConfig
from octavo.server.routes import make_app
from octavo.server.work.state import ServerState


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"prompt": "once"}, "once"),
        ({"prompt": ["a", "b"]}, "ab"),
        ({"prompt": [1, 2]}, ""),
        ({"messages": [{"role": "user", "content": "x"}]}, "userx"),
        ({"messages": [{"role": "u", "content": [{"type": "text", "text": "x"}]}]}, "utextx"),
        ({"input": "x", "instructions": "be brief"}, "be briefx"),
        ({"messages": [{"role": "u", "content": "x"}], "system": "s"}, "sux"),
        ({"prompt": "x" * 100_000}, "x" * MAX_ROUTING_CHARS),
        ({}, ""),
        ([1], ""),
    ],
)
def test_the_text_a_request_is_routed_by(body: Any, text: str) -> None:
    assert routing_text(json.dumps(body).encode()) == text


def test_a_body_that_is_no_json_has_no_text() -> None:
    assert routing_text(b"") == routing_text(b"{") == routing_text(b"\xff") == ""


class Served:
    """The application over a fake engine, in this process."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.state = ServerState(ServerConfig(host="0.0.0.0"))
        self.app = make_app(self.state)

    async def parts(self, path: str, body: Any) -> Any:
        await self.engine.start()
        self.state.set_engine(self.engine)  # type: ignore[arg-type]
        headers = [(b"content-type", b"application/json"), (b"host", b"anything")]
        request = RoutedRequest.of("POST", path, b"", headers, json.dumps(body).encode())
        return await begin_call(self.app, request)

    async def answer(self, path: str, body: Any) -> list[Any]:
        """The head, and every part."""
        head, parts = await self.parts(path, body)
        return [head, *[part async for part in parts]]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    monkeypatch.setattr("octavo._core.SseTemplate", FakeTemplate)
    return Served(FakeEngine())


def test_a_whole_answer(served: Served) -> None:
    (status, headers), *parts = asyncio.run(served.answer("/v1/completions", {"prompt": "x"}))
    assert status == 200
    assert (b"content-type", b"application/json") in headers
    assert json.loads(b"".join(parts))["usage"]["completion_tokens"] == 16


def test_a_stream_comes_in_parts(served: Served) -> None:
    served.engine.delay_s = 0.01
    body = {"prompt": "x", "stream": True, "max_tokens": 40, "ignore_eos": True}

    _, *parts = asyncio.run(served.answer("/v1/completions", body))
    assert len(parts) > 3
    # No frame is cut in two.
    assert all(part.endswith(b"\n\n") for part in parts)
    assert parts[-1].endswith(b"data: [DONE]\n\n")


def test_leaving_ends_the_samples(served: Served) -> None:
    served.engine.delay_s = 0.05
    body = {"prompt": "x", "stream": True, "max_tokens": 200, "ignore_eos": True, "n": 3}

    async def run() -> None:
        _, parts = await served.parts("/v1/completions", body)
        await anext(parts)
        assert len(served.engine.running) == 3
        await parts.aclose()
        assert not served.engine.running

    asyncio.run(run())
    assert len(served.engine.aborted) == 3
    assert not served.state.generations


def test_an_error_is_an_answer(served: Served) -> None:
    (status, _), body = asyncio.run(served.answer("/v1/completions", {"prompt": 3.5}))
    assert status == 400
    assert json.loads(body)["error"]["param"] == "prompt"


def test_flags_become_configs() -> None:
    pytest.importorskip("ray.serve", reason="ray is not installed")
    from octavo.ray import builder

    engine, server = builder.make_configs({"model": "m", "max_num_seqs": 8, "api_key": ["k"]})
    assert (engine.model, engine.max_num_seqs, server.api_key) == ("m", 8, ("k",))
    assert server.response_store is False
    with pytest.raises(ValueError, match="max_seqs is neither a flag"):
        builder.make_configs({"max_seqs": 8})
    with pytest.raises(ValueError, match="replicas is neither"):
        builder.build_app({"replicas": 2})


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ({"device": "cpu"}, {"num_cpus": 1}),
        ({"device": "cpu", "threads": 4}, {"num_cpus": 4}),
        ({}, {"num_cpus": 1, "num_gpus": 1}),
        ({"tensor_parallel_size": 4}, {"num_cpus": 1, "num_gpus": 4}),
    ],
)
def test_a_replica_is_one_actor_with_all_its_gpus(
    flags: dict[str, Any], options: dict[str, Any]
) -> None:
    pytest.importorskip("ray.serve", reason="ray is not installed")
    from octavo.config import EngineConfig
    from octavo.ray import builder

    assert builder.actor_options(EngineConfig(**flags)) == options


@pytest.mark.parametrize(("flags", "threshold"), [({}, 96), ({"max_num_seqs": 8}, 4)])
def test_a_queue_that_is_longer_by_half_a_batch_is_passed_over(
    flags: dict[str, Any], threshold: int
) -> None:
    pytest.importorskip("ray.serve", reason="ray is not installed")
    from octavo.config import EngineConfig
    from octavo.ray import builder

    router = builder.replica_defaults(EngineConfig(**flags))["request_router_config"]
    assert router.request_router_kwargs == {"imbalanced_threshold": threshold}
