"""The openai package as a client: what it parses is what OpenAI's own server would send."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
from fake_engine import EOS
from harness import RunningServer, StartServer

pytestmark = pytest.mark.system

MESSAGES: Any = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"}]},
]


def client(server: RunningServer, **kwargs: Any) -> openai.OpenAI:
    kwargs.setdefault("api_key", "none")
    return openai.OpenAI(base_url=server.url + "/v1", max_retries=0, **kwargs)


def test_chat(server: RunningServer) -> None:
    answer = client(server).chat.completions.create(model="fake/model", messages=MESSAGES)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "fake/model"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(server.engine.submitted[0][0])
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    timings = answer.model_extra["timings"]  # type: ignore[index]
    assert set(timings) == {"queue_ms", "prefill_ms", "decode_ms", "tokens_per_second"}
    assert timings["tokens_per_second"] > 0


def test_the_rendered_prompt_reaches_the_engine(server: RunningServer) -> None:
    client(server).chat.completions.create(model="alias", messages=MESSAGES)
    text = server.engine.tokenizer.decode(server.engine.submitted[0][0], False)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_chat_stream(server: RunningServer) -> None:
    chunks = list(
        client(server).chat.completions.create(
            model="fake/model",
            messages=MESSAGES,
            stream=True,
            n=2,
            stream_options={"include_usage": True},
        )
    )
    assert {c.object for c in chunks} == {"chat.completion.chunk"}
    assert len({(c.id, c.created, c.model) for c in chunks}) == 1
    for index in (0, 1):
        own = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
        assert own[0].delta.role == "assistant"
        assert own[0].delta.content == ""
        assert [choice.finish_reason for choice in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == server.engine.num_tokens
    assert all(c.usage is None for c in chunks[:-1])


def test_async_streams_side_by_side(server: RunningServer) -> None:
    async def one(seed: int) -> str:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none") as async_client:
            stream = await async_client.chat.completions.create(
                model="fake/model", messages=MESSAGES, stream=True, seed=seed
            )
            return "".join([c.choices[0].delta.content or "" async for c in stream])

    async def all_of_them() -> list[str]:
        return list(await asyncio.gather(*(one(seed % 4) for seed in range(16))))

    texts = asyncio.run(all_of_them())
    assert len(set(texts)) == 4
    assert texts[:4] * 4 == texts


def test_completion(server: RunningServer) -> None:
    answer = client(server).completions.create(
        model="fake/model", prompt=["one", "two"], n=2, echo=True, max_tokens=8
    )
    assert answer.object == "text_completion"
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text[:3] for choice in answer.choices] == ["one", "one", "two", "two"]
    assert answer.usage is not None
    # One <s> each; a prompt counts once, whatever n is.
    assert answer.usage.prompt_tokens == 8
    assert answer.usage.completion_tokens == server.engine.num_tokens
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 6


@pytest.mark.parametrize("prompt", ["ab", ["ab"], [256, 97, 98], [[256, 97, 98]]])
def test_every_kind_of_prompt(server: RunningServer, prompt: Any) -> None:
    client(server).completions.create(model="fake/model", prompt=prompt)
    assert server.engine.submitted[0][0] == [256, 97, 98]
    assert server.engine.submitted[0][1].max_tokens == 16


def test_chat_logprobs(server: RunningServer) -> None:
    answer = client(server).chat.completions.create(
        model="fake/model",
        messages=MESSAGES,
        logprobs=True,
        top_logprobs=2,
        max_completion_tokens=4,
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert answer.usage is not None
    assert len(logprobs.content) == answer.usage.completion_tokens == 4
    for entry in logprobs.content:
        assert len(entry.top_logprobs) == 2
        assert entry.top_logprobs[0].token == entry.token
        assert entry.logprob == -0.25
        assert entry.bytes is not None
    spoken = bytes(byte for entry in logprobs.content for byte in entry.bytes or [])
    assert spoken.decode("utf-8", "replace") == answer.choices[0].message.content


def test_completion_logprobs(server: RunningServer) -> None:
    answer = client(server).completions.create(
        model="fake/model", prompt="x", logprobs=3, max_tokens=40, seed=5
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    text = answer.choices[0].text
    tokens, offsets = logprobs.tokens, logprobs.text_offset
    assert tokens
    assert offsets
    assert logprobs.token_logprobs
    assert logprobs.top_logprobs
    assert len(tokens) == len(offsets) == len(logprobs.token_logprobs)
    for token, offset in zip(tokens, offsets, strict=True):
        if token.isascii() and token not in ("</s>", "<s>"):
            assert text[offset] == token
    assert all(1 <= len(top) <= 3 for top in logprobs.top_logprobs)


def test_token_ids(server: RunningServer) -> None:
    extra = {"return_token_ids": True}
    answer = client(server).completions.create(model="fake/model", prompt="x", extra_body=extra)
    choice: Any = answer.choices[0]
    assert choice.prompt_token_ids == [256, 120]
    assert server.engine.tokenizer.decode(choice.token_ids) == choice.text
    chunks: Any = client(server).chat.completions.create(
        model="fake/model", messages=MESSAGES, stream=True, extra_body=extra
    )
    received = list(chunks)
    assert received[0].prompt_token_ids == server.engine.submitted[-1][0]
    ids = [i for c in received[1:] for i in c.choices[0].token_ids]
    assert ids[-1] == EOS


def test_tokens_as_token_ids(server: RunningServer) -> None:
    answer = client(server).completions.create(
        model="fake/model",
        prompt="x",
        logprobs=1,
        extra_body={"return_tokens_as_token_ids": True, "return_token_ids": True},
    )
    choice: Any = answer.choices[0]
    assert choice.logprobs.tokens == [f"token_id:{i}" for i in choice.token_ids]


def test_stop_reason(server: RunningServer) -> None:
    whole = client(server).completions.create(
        model="fake/model", prompt="s", max_tokens=200, seed=3
    )
    stop = whole.choices[0].text[4:6]
    cut: Any = client(server).completions.create(
        model="fake/model", prompt="s", max_tokens=200, seed=3, stop=[stop, "never"]
    )
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].stop_reason == stop
    assert cut.choices[0].text == whole.choices[0].text.partition(stop)[0]


def test_models(server: RunningServer) -> None:
    models = client(server).models
    assert [model.id for model in models.list()] == ["fake/model", "alias"]
    model: Any = models.retrieve("fake/model")
    assert model.max_model_len == 512
    with pytest.raises(openai.NotFoundError):
        models.retrieve("gpt-4")


def test_raw_responses(server: RunningServer) -> None:
    openai_client = client(server)
    raw = openai_client.completions.with_raw_response.create(
        model="fake/model", prompt="x", extra_headers={"X-Request-Id": "mine"}
    )
    assert raw.status_code == 200
    assert raw.request_id == raw.headers["x-request-id"] == "mine"
    assert raw.headers["content-type"] == "application/json"
    assert int(raw.headers["content-length"]) == len(raw.content)
    assert raw.parse().choices[0].text == json.loads(raw.content)["choices"][0]["text"]
    with openai_client.chat.completions.with_streaming_response.create(
        model="fake/model", messages=[{"role": "user", "content": "x"}], stream=True
    ) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    with pytest.raises(openai.NotFoundError) as caught:
        openai_client.models.with_raw_response.retrieve("gpt-4")
    assert caught.value.response.headers["x-request-id"]


def test_errors_are_the_package_s_own_classes(start_server: StartServer) -> None:
    server = start_server(api_key=("right",))
    with pytest.raises(openai.AuthenticationError) as caught:
        client(server, api_key="wrong").models.list()
    assert caught.value.code == "invalid_api_key"
    good = client(server, api_key="right")
    with pytest.raises(openai.BadRequestError) as bad:
        good.completions.create(model="fake/model", prompt="x", temperature=3)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        good.completions.create(model="gpt-4", prompt="x")
    server.engine.max_unfinished = 0
    with pytest.raises(openai.InternalServerError) as full:
        good.completions.create(model="fake/model", prompt="x")
    assert full.value.status_code == 503
    assert full.value.response.headers["retry-after"] == "1"


def test_an_error_inside_a_stream(server: RunningServer) -> None:
    server.engine.fail_after = 8
    with pytest.raises(openai.APIError, match="failed on this request"):
        for _ in client(server).completions.create(
            model="fake/model", prompt="x", stream=True, max_tokens=30
        ):
            pass
    server.engine.fail_after = None
    assert client(server).completions.create(model="fake/model", prompt="x").choices[0].text
