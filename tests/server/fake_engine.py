"""FakeEngine: AsyncEngine's interface over a made-up model, in pure Python.

What it says is a function of the prompt, the seed and the sample's number: words of several
scripts, so that characters are split over tokens. How it says it, in how many deltas, is random:
two streams of one request never have the same chunks.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson

from octavo._core import ChannelParser, Channels
from octavo.config import EngineConfig
from octavo.engine.step_times import StepTimes
from octavo.errors import (
    EngineDeadError,
    InvalidParameterError,
    QueueFullError,
    RequestTooLongError,
)
from octavo.prompt_logprobs import PromptLogprobs
from octavo.sampling_params import SamplingParams

VOCAB_SIZE = 260
BOS, EOS, IM_START, IM_END = 256, 257, 258, 259
SPECIAL = {BOS: "<s>", EOS: "</s>", IM_START: "<|im_start|>", IM_END: "<|im_end|>"}
WORDS = [
    "The",
    " capital",
    " of",
    " naïve",
    " 東京",
    " 🦊🔥",
    ".\n",
    ' "quoted"',
    "\\",
    "\t",
    "END",
]

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class ByteTokenizer:
    """One token per UTF-8 byte, and a few special ones."""

    vocab_size = VOCAB_SIZE

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = [BOS] if add_special_tokens else []
        while text:
            for token_id, special in SPECIAL.items():
                if text.startswith(special):
                    ids.append(token_id)
                    text = text[len(special) :]
                    break
            else:
                ids += text[0].encode()
                text = text[1:]
        return ids

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = True
    ) -> list[list[int]]:
        return [self.encode(text, add_special_tokens) for text in texts]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        parts = b"".join(
            b"" if t in SPECIAL and skip_special_tokens else self.token_bytes(t) for t in token_ids
        )
        return parts.decode("utf-8", "replace")

    def token_to_id(self, token: str) -> int | None:
        return next((i for i, text in SPECIAL.items() if text == token), None)

    def id_to_token(self, token_id: int) -> str | None:
        return self.token_bytes(token_id).decode("latin-1")

    def added_tokens(self) -> list[tuple[int, tuple[Any, ...]]]:
        return [(i, (text, True, False, False, False, False)) for i, text in SPECIAL.items()]

    def token_bytes(self, token_id: int) -> bytes:
        return SPECIAL[token_id].encode() if token_id in SPECIAL else bytes([token_id])


@dataclass
class FakeTemplate:
    """In place of _core.SseTemplate, whose parts only the core can read."""

    before: bytes
    after: bytes
    first: bytes = b""
    reasoning: tuple[bytes, ...] | None = None

    def render(self, delta: FakeDelta, is_first: bool) -> bytes:
        """The frames of a delta but for its end's, which holds the last text.

        Of a delta in pieces, those up to the first call; the others stay.
        """
        frames = self.first if is_first else b""
        if delta.finish_reason is not None:
            return frames
        if delta.pieces is None:
            return frames + (self._frame("text", delta.text) if delta.text else b"")
        plain = list(itertools.takewhile(lambda p: p[0] in ("text", "reasoning"), delta.pieces))
        delta.pieces = delta.pieces[len(plain) :]
        return frames + b"".join(self._frame(kind, text) for kind, _, text in plain)

    def _frame(self, kind: str, text: str) -> bytes:
        written = orjson.dumps(text)[1:-1]
        if kind == "text":
            return self.before + written + self.after
        return b"" if self.reasoning is None else written.join(self.reasoning)


@dataclass
class FakeDelta:
    request_id: int
    text: str
    token_ids: list[int]
    num_prompt_tokens: int
    num_output_tokens: int
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: list[list[tuple[int, float, int]]] | None = None
    sse: bytes | None = None
    num_cached_tokens: int = 3
    cumulative_logprob: float | None = None
    queue_s: float | None = 0.001
    prefill_s: float | None = 0.002
    decode_s: float | None = 0.01
    extra: PromptLogprobs | None = None
    pieces: list[tuple[str, int, str]] | None = None
    num_reasoning_tokens: int = 0


@dataclass
class Script:
    """All that one sample will say: token by token, and the text that is left of it."""

    token_ids: list[int]
    text: str
    finish_reason: str
    stop_reason: str | int | None
    # The text that may be shown after each token.
    shown: list[str] = field(default_factory=list)


def write_script(
    prompt: Sequence[int],
    params: SamplingParams,
    index: int,
    room: int,
    said: str | None = None,
) -> Script:
    """Decide what a sample says: a plain reference of stopping and holding back.

    ``said``: in place of random words.
    """
    seed = params.seed if params.seed is not None else 0
    rng = random.Random(zlib.crc32(repr((list(prompt), seed, index)).encode()))
    max_tokens = min(room, params.max_tokens if params.max_tokens is not None else room)
    words = (said or "".join(rng.choices(WORDS, k=rng.randint(3, 12)))).encode()
    ids = [*words, EOS]
    if params.ignore_eos or params.min_tokens >= len(ids):
        ids = list(itertools.islice(itertools.cycle(words), max_tokens))
    finish, stop_reason = "stop", None
    if len(ids) > max_tokens:
        ids, finish = ids[:max_tokens], "length"
    elif ids[-1] != EOS:
        finish = "length"
    for position, token_id in enumerate(ids):
        if token_id in params.stop_token_ids:
            ids, finish, stop_reason = ids[: position + 1], "stop", token_id
            break
    tokenizer = ByteTokenizer()
    visible = ids[:-1] if stop_reason is not None else ids
    text = tokenizer.decode(visible)
    hits = [(text.find(stop), stop) for stop in params.stop if stop in text]
    if hits:
        at, hit = min(hits)
        finish, stop_reason = "stop", hit
        text = text[: at + len(hit)] if params.include_stop_str_in_output else text[:at]
        while len(ids) > 1 and hit in tokenizer.decode(ids[:-1]):
            ids = ids[:-1]
    if not ids:
        return Script([], "", "length", None)
    hold = max((len(stop) for stop in params.stop), default=1) - 1
    shown = []
    for count in range(1, len(ids) + 1):
        whole = b"".join(bytes([i]) for i in ids[:count] if i < 256).decode("utf-8", "ignore")
        safe = whole[: max(0, len(whole) - hold)]
        shown.append(safe if text.startswith(safe) else text)
    shown[-1] = text
    return Script(ids, text, finish, stop_reason, shown)


class FakeMetrics:
    """Gauges that follow the engine, one counter, one histogram."""

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine

    def snapshot(self) -> dict[str, Any]:
        engine = self._engine
        histogram = {"buckets": [(0.0005, 1), (0.001, 2), (0.01, 5)], "sum": 0.05, "count": 6}
        return {
            "num_requests_running": len(engine.running),
            "num_requests_waiting": 0,
            "kv_cache_usage_perc": 0.25 if engine.running else 0.0,
            "prompt_tokens": 10,
            "generation_tokens": engine.num_tokens,
            "request_success": dict(engine.finished),
            "time_to_first_token_seconds": histogram,
            "inter_token_latency_seconds": histogram,
        }


class FakeEngine:
    """See the module. Knobs: ``delay_s`` per delta, ``hold`` (say nothing), ``fail_after``."""

    def __init__(self, config: EngineConfig | None = None, max_model_len: int = 512) -> None:
        self.config = config or EngineConfig()
        self.model_config = SimpleNamespace(
            vocab_size=VOCAB_SIZE, architecture="LlamaForCausalLM", hidden_size=64
        )
        self.source = SimpleNamespace(kind="safetensors", model_config=self.model_config)
        self.tokenizer = ByteTokenizer()
        self.chat_template: str | None = CHAT_TEMPLATE
        self.tool_template: str | None = None
        self.response_template: Any = None
        # Texts that no grammar may hold.
        self.no_grammars: tuple[str, ...] = ()
        # What every sample says, where it is set.
        self.said: str | None = None
        self.generation_defaults: dict[str, Any] = {}
        self.prefix_block_size: int | None = 16
        self.num_kv_tokens = 4096
        self.special_tokens = {"bos_token": "<s>", "eos_token": "</s>"}
        self.eos_token_ids = (EOS,)
        self.max_model_len = max_model_len
        self.pooling = None
        self.served_model_names = self.config.served_model_name or ("fake/model", "alias")
        self.metrics = FakeMetrics(self)
        self.step_times = StepTimes()
        self.step_times.observe("launch", 0.01)
        self.memory_table = [("weights", "1 byte"), ("KV cache", "2 bytes")]
        self.max_unfinished = 10_000
        self.delay_s = 0.0
        self.hold = False
        self.fail_after: int | None = None
        self.is_healthy = True
        self.submitted: list[tuple[list[int], SamplingParams, dict[str, Any]]] = []
        self.running: dict[int, asyncio.Task[None]] = {}
        self.sinks: dict[int, Callable[[Any], None]] = {}
        self.aborted: list[int] = []
        self.finished: dict[str, int] = {}
        self.num_tokens = 0
        self._next_id = itertools.count()
        self._chunks = random.Random()
        self._dead: asyncio.Event | None = None

    async def start(self) -> None:
        self._dead = asyncio.Event()

    async def stop(self, timeout_s: float = 0.0) -> None:
        deadline = time.monotonic() + timeout_s
        while self.running and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        self.abort(list(self.running))
        await asyncio.sleep(0)

    @property
    def is_alive(self) -> bool:
        return self._dead is not None and not self._dead.is_set()

    async def wait_dead(self) -> None:
        assert self._dead is not None
        await self._dead.wait()

    def die(self) -> None:
        assert self._dead is not None
        self._dead.set()
        for request_id, sink in list(self.sinks.items()):
            self.running.pop(request_id).cancel()
            sink(EngineDeadError())
        self.sinks.clear()

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens)

    async def compile(self, params: SamplingParams) -> None:
        wanted = params.structured_outputs
        if wanted is not None and any(one in wanted.text for one in self.no_grammars):
            raise InvalidParameterError("cannot be used", wanted.param)

    def submit(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        sink: Callable[[Any], None],
        *,
        delivery: str = "final",
        sse: Sequence[FakeTemplate] | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        num_first: None = None,
        channels: Channels | None = None,
        **constraints: Any,
    ) -> list[int]:
        if not self.is_alive:
            raise EngineDeadError
        if len(self.running) + params.n > self.max_unfinished:
            raise QueueFullError(f"{self.max_unfinished} requests are running or waiting already")
        prompt = list(prompt_token_ids)
        if not prompt:
            raise InvalidParameterError("the decoder prompt cannot be empty", "prompt")
        room = self.max_model_len - len(prompt)
        if room < (params.max_tokens != 0):
            raise RequestTooLongError(len(prompt), self.max_model_len)
        if not 0 <= min(prompt) <= max(prompt) < VOCAB_SIZE:
            raise InvalidParameterError("the prompt is out of vocabulary", "prompt")
        options = {
            "delivery": delivery,
            "priority": priority,
            "cache_salt": cache_salt,
            "channels": channels,
            **constraints,
        }
        self.submitted.append((prompt, params, options))
        num_logprobs = params.prompt_logprobs
        scores = None if num_logprobs is None else _scores(prompt, num_logprobs)
        ids = []
        for index in range(params.n):
            request_id = next(self._next_id)
            ids.append(request_id)
            self.sinks[request_id] = sink
            script = write_script(prompt, params, index, room, self.said)
            template = sse[index] if sse is not None else None
            parser = None if channels is None else ChannelParser(channels)
            work = self._run(
                request_id, script, len(prompt), params, delivery, template, scores, parser
            )
            self.running[request_id] = asyncio.get_running_loop().create_task(work)
        return ids

    def write_through(self, request_ids: Iterable[int], writer: object) -> None:
        """Not here: all news takes the long way. The core's streams have tests of their own."""

    def abort(self, request_ids: Iterable[int]) -> None:
        for request_id in request_ids:
            if (task := self.running.pop(request_id, None)) is not None:
                task.cancel()
                self.aborted.append(request_id)
                self._emit(FakeDelta(request_id, "", [], 0, 0, "abort"))

    def _emit(self, delta: FakeDelta) -> None:
        sink = self.sinks[delta.request_id]
        if delta.finish_reason is not None:
            del self.sinks[delta.request_id]
            self.running.pop(delta.request_id, None)
            count = self.finished.get(delta.finish_reason, 0)
            self.finished[delta.finish_reason] = count + 1
        sink(delta)

    async def _run(
        self,
        request_id: int,
        script: Script,
        num_prompt: int,
        params: SamplingParams,
        delivery: str,
        template: FakeTemplate | None,
        scores: PromptLogprobs | None,
        parser: ChannelParser | None,
    ) -> None:
        while self.hold:
            await asyncio.sleep(0.01)
        sent_tokens, sent_text, is_first = 0, "", True
        num_reasoning = 0
        total = len(script.token_ids)
        if not total:
            logprobs = None if params.logprobs is None else []
            delta = FakeDelta(request_id, "", [], num_prompt, 0, "length", logprobs=logprobs)
            delta.sse = None if template is None else template.render(delta, True)
            delta.extra = scores
            self._emit(delta)
        while sent_tokens < total:
            await asyncio.sleep(self.delay_s)
            step = total if delivery == "final" else self._chunks.randint(1, 7)
            count = min(total, sent_tokens + step)
            over = count == total
            failed = self.fail_after is not None and count > self.fail_after
            delta = FakeDelta(
                request_id,
                script.shown[count - 1][len(sent_text) :],
                script.token_ids[sent_tokens:count],
                num_prompt,
                count,
                "error" if failed else script.finish_reason if over else None,
                script.stop_reason if over else None,
            )
            if parser is not None:
                delta.pieces = parser.push(delta.text) + (parser.finish() if over else [])
                delta.text = "".join(text for kind, _, text in delta.pieces if kind == "text")
                # One token a byte.
                thoughts = (text for kind, _, text in delta.pieces if kind == "reasoning")
                num_reasoning += sum(len(text.encode()) for text in thoughts)
                delta.num_reasoning_tokens = num_reasoning
            if params.logprobs is not None:
                delta.logprobs = [fake_logprobs(t, params.logprobs) for t in delta.token_ids]
            self.num_tokens += count - sent_tokens
            sent_tokens, sent_text = count, script.shown[count - 1]
            if template is not None:
                delta.sse = template.render(delta, is_first)
            if is_first:
                delta.extra = scores
            is_first = False
            self._emit(delta)
            if failed:
                return


def _scores(prompt: list[int], num_logprobs: int) -> PromptLogprobs:
    """As if the model had generated the prompt itself."""
    rows = [fake_logprobs(token, num_logprobs) for token in prompt[1:]]
    shape = len(rows), 1 + num_logprobs
    ids = np.array([[entry[0] for entry in row] for row in rows], np.int32).reshape(shape)
    values = np.array([[entry[1] for entry in row] for row in rows], np.float32).reshape(shape)
    return PromptLogprobs(ids, values, np.array([row[0][2] for row in rows], np.int32))


def fake_logprobs(token_id: int, num_top: int) -> list[tuple[int, float, int]]:
    """The chosen token first, then the best ones: neighbours of it."""
    best = [((token_id + i) % VOCAB_SIZE, -0.25 * (i + 1), i + 1) for i in range(num_top)]
    return [(token_id, -0.25, 1), *best]
