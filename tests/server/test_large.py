"""Large bodies: what no request needs is refused before it is parsed, the rest is parsed elsewhere."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from harness import RunningServer

from octavo._core import json_size
from octavo.server.http import exchange, limits
from octavo.server.openai import completions

pytestmark = pytest.mark.system

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
MIB = 1 << 20


def many(start: bytes, item: bytes, end: bytes, num_bytes: int = 30 * MIB) -> bytes:
    count = num_bytes // (len(item) + 1)
    return start + b",".join([item] * count) + end


# Path, body, the field at fault where it is one's.
HOSTILE: list[tuple[str, bytes, str | None]] = [
    (COMPLETION, many(b'{"prompt":[', b"[]", b"]}"), None),
    (COMPLETION, many(b'{"prompt":[', b"{}", b"]}"), None),
    (COMPLETION, many(b'{"prompt":"x","stop":[', b'""', b"]}"), None),
    (CHAT, many(b'{"messages":[', b'{"a":1}', b"]}"), None),
    (
        COMPLETION,
        b'{"prompt":"x","logit_bias":{%b}}' % b",".join(b'"%d":1' % i for i in range(2_000_000)),
        None,
    ),
    ("/detokenize", many(b'{"tokens":[', b"1", b"]}", 8 * MIB - 100), "tokens"),
    ("/detokenize", many(b'{"tokens":[', b"123", b"]}"), None),
    (COMPLETION, many(b'{"prompt":["x",', b"1", b"]}", 4 * MIB), "prompt"),
    (COMPLETION, many(b'{"prompt":"x","stop":[', b'"y"', b"]}", 4 * MIB), "stop"),
    (COMPLETION, many(b'{"prompt":"x","bad_words":[', b'"y"', b"]}", 4 * MIB), "bad_words"),
    (COMPLETION, many(b'{"prompt":"x","stop_token_ids":[', b"1", b"]}", 4 * MIB), "stop_token_ids"),
]


@pytest.mark.parametrize("case", range(len(HOSTILE)))
def test_a_large_body_is_refused_soon(server: RunningServer, case: int) -> None:
    path, body, param = HOSTILE[case]
    gaps: list[float] = []
    over = threading.Event()

    def watch() -> None:
        """How long others wait meanwhile."""
        while not over.is_set():
            began = time.monotonic()
            assert server.get("/version").status == 200
            gaps.append(time.monotonic() - began)

    watcher = threading.Thread(target=watch)
    watcher.start()
    answer = server.post(path, body)
    over.set()
    watcher.join(20)
    assert (answer.status, answer.error["param"]) == (400, param), answer.body
    # Parsed as it is, such a body holds everybody for up to 6 s; a busy machine takes its time too.
    assert max(gaps) < 3, gaps
    assert server.engine.submitted == []


def test_counts_are_of_values_not_of_text(server: RunningServer) -> None:
    text = "[{:,}]" * 100_000
    assert json_size(b'{"prompt": "%b"}' % text.encode()) == (2, 0)
    answer = server.post(COMPLETION, {"prompt": text, "truncate_prompt_tokens": 10})
    assert answer.status == 400
    assert answer.error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("past", [0, 1])
def test_the_bounds(server: RunningServer, past: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "MAX_INLINE_BODY_BYTES", 10)
    monkeypatch.setattr(limits, "MAX_JSON_ELEMENTS", 5)
    # The second comma is the body's own.
    prompt = [7] * (5 + past)
    answer = server.post(COMPLETION, {"prompt": prompt, "max_tokens": 1})
    assert answer.status == (400 if past else 200), answer.body
    monkeypatch.setattr(limits, "MAX_JSON_NODES", 4)
    body: dict[str, Any] = {"prompt": [[7]], "max_tokens": 1} if past else {"prompt": ["x"]}
    answer = server.post(COMPLETION, body)
    assert answer.status == (400 if past else 200), answer.body


@pytest.mark.parametrize("large", [False, True])
def test_a_large_body_is_parsed_on_a_worker(
    server: RunningServer, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []
    parse = completions.parse_completion

    def noted(body: Any) -> Any:
        threads.append(threading.current_thread())
        return parse(body)

    monkeypatch.setattr(completions, "parse_completion", noted)
    size = exchange.MAX_INLINE_BODY_BYTES if large else 10
    server.post(COMPLETION, {"prompt": "x" * size})
    assert (threads == [server.thread]) is not large


def test_a_detokenized_text_is_no_longer_than_the_context(server: RunningServer) -> None:
    most = server.engine.max_model_len
    assert server.post("/detokenize", {"tokens": [65] * most}).json == {"prompt": "A" * most}
    answer = server.post("/detokenize", {"tokens": [65] * (most + 1)})
    assert (answer.status, answer.error["param"]) == (400, "tokens")
