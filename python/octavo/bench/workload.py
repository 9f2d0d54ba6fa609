"""Workload: which requests a benchmark sends, a function of the seed and the request's number."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import orjson

# A prompt of common words: chat cannot be sent as token ids, and one word is about one token.
_WORDS = (
    *("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world"),
    *("school", "state", "family", "student", "group", "country", "problem", "hand", "part"),
    *("place", "case", "week", "company", "system", "program", "question", "work", "night"),
    *("point", "home", "water", "room", "mother", "area", "money", "story", "fact", "month"),
)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Random requests of a given shape, reproducible across processes.

    Lengths are in tokens, uniform within ``len_spread`` (a fraction) around the mean. Every prompt
    is different, so that a prefix cache helps only where ``shared_prefix_len`` asks for it.

    Raises:
        ValueError: from construction, when no request could be made of it.
    """

    endpoint: Literal["completions", "chat"] = "completions"
    model: str | None = None
    num_requests: int = 100
    input_len: int = 512
    output_len: int = 128
    len_spread: float = 0.0
    shared_prefix_len: int = 0
    # Special tokens sit at the ends of a vocabulary: 32,000 is inside every common one, and the
    # first hundred ids are left out.
    min_token_id: int = 100
    vocab_size: int = 32_000
    temperature: float = 0.0
    ignore_eos: bool = True
    seed: int = 0
    extra_body: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.num_requests < 1 or self.input_len < 1 or self.output_len < 1:
            raise ValueError("num_requests, input_len and output_len must be at least 1")
        if not 0 <= self.len_spread < 1:
            raise ValueError("len_spread must be in [0, 1)")
        if not 0 <= self.min_token_id < self.vocab_size:
            raise ValueError("min_token_id must be below vocab_size")

    def _rng(self, index: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, index))

    def _length(self, rng: np.random.Generator, mean: int) -> int:
        low = max(1, round(mean * (1 - self.len_spread)))
        high = max(low, round(mean * (1 + self.len_spread)))
        return int(rng.integers(low, high + 1))

    def lengths(self, index: int) -> tuple[int, int]:
        """(prompt tokens, output tokens) of request ``index``."""
        rng = self._rng(index)
        return self._length(rng, self.input_len), self._length(rng, self.output_len)

    def prompt_token_ids(self, index: int) -> list[int]:
        """The prompt of request ``index``, exactly as long as ``lengths`` says."""
        rng = self._rng(index)
        input_len = self._length(rng, self.input_len)
        self._length(rng, self.output_len)
        # One seed sequence of its own, so that no request equals the shared prefix by accident.
        shared = np.random.default_rng((self.seed, 2**32)).integers(
            self.min_token_id, self.vocab_size, min(self.shared_prefix_len, input_len)
        )
        own = rng.integers(self.min_token_id, self.vocab_size, input_len - len(shared))
        ids: list[int] = np.concatenate([shared, own]).tolist()
        return ids

    def body(self, index: int, output_len: int | None = None) -> bytes:
        """The JSON of request ``index``; ``output_len`` overrides its own."""
        wanted = self.lengths(index)[1] if output_len is None else output_len
        fields: dict[str, Any] = {
            "max_tokens": wanted,
            "temperature": self.temperature,
            "ignore_eos": self.ignore_eos,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.model is not None:
            fields["model"] = self.model
        if self.endpoint == "chat":
            ids = self.prompt_token_ids(index)
            text = " ".join(_WORDS[i % len(_WORDS)] for i in ids)
            fields["messages"] = [{"role": "user", "content": text}]
        else:
            fields["prompt"] = self.prompt_token_ids(index)
        return orjson.dumps(fields | self.extra_body)

    def arrivals_s(self, request_rate: float) -> list[float]:
        """Poisson arrivals: seconds from the start, one per request, ascending."""
        rng = np.random.default_rng((self.seed, 2**32 + 1))
        gaps = rng.exponential(1 / request_rate, self.num_requests)
        gaps[0] = 0.0
        times: list[float] = np.cumsum(gaps).tolist()
        return times
