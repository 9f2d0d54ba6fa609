"""Usage: tokens counted and time taken, gathered from the samples' deltas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from octavo.engine.engine import AsyncEngine
    from octavo.server.work.news import News


def usage_object(
    num_prompt_tokens: int, num_cached: int, num_output: int, num_reasoning: int | None = None
) -> dict[str, Any]:
    """OpenAI's ``usage``. ``num_reasoning`` None: the answer was not looked at for reasoning."""
    usage: dict[str, Any] = {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_output,
        "total_tokens": num_prompt_tokens + num_output,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }
    if num_reasoning is not None:
        usage["completion_tokens_details"] = {"reasoning_tokens": num_reasoning}
    return usage


def num_written(engine: AsyncEngine, news: News) -> int:
    """The number of a prompt's tokens that its request has added to the prefix cache."""
    size = engine.prefix_block_size
    if size is None:
        return 0
    return max(news.num_prompt_tokens // size * size - news.num_cached_tokens, 0)


def timings_object(delta: News) -> dict[str, float | None]:
    """Times of one finished sample in the engine.

    ``tokens_per_second`` is of the decode phase, null where there was none (a single token).
    """
    decode_s = delta.decode_s
    num_decoded = delta.num_output_tokens - 1
    return {
        "queue_ms": _ms(delta.queue_s),
        "prefill_ms": _ms(delta.prefill_s),
        "decode_ms": _ms(decode_s),
        "tokens_per_second": (
            round(num_decoded / decode_s, 2) if decode_s and num_decoded > 0 else None
        ),
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)


class Usage:
    """The tally of one HTTP request: each prompt counts once, each sample's output counts.

    ``counts_reasoning``: whether answers are looked at for reasoning.
    """

    def __init__(self, n: int, *, counts_reasoning: bool = False) -> None:
        self.n = n
        self._counts_reasoning = counts_reasoning
        self._num_reasoning_tokens: dict[int, int] = {}
        self._num_prompt_tokens: dict[int, int] = {}
        self._num_cached_tokens: dict[int, int] = {}
        self._num_output_tokens: dict[int, int] = {}

    def add(self, index: int, delta: News) -> None:
        """Take the counts of choice ``index``; later ones replace earlier ones."""
        prompt = index // self.n
        self._num_prompt_tokens[prompt] = delta.num_prompt_tokens
        # A prompt's second sample finds the first one's blocks: that is not the client's cache.
        if index % self.n == 0:
            self._num_cached_tokens[prompt] = delta.num_cached_tokens
        self._num_output_tokens[index] = delta.num_output_tokens
        if self._counts_reasoning:
            self._num_reasoning_tokens[index] = delta.num_reasoning_tokens

    def to_object(self) -> dict[str, Any]:
        """OpenAI's ``usage``."""
        return usage_object(
            sum(self._num_prompt_tokens.values()),
            sum(self._num_cached_tokens.values()),
            sum(self._num_output_tokens.values()),
            sum(self._num_reasoning_tokens.values()) if self._counts_reasoning else None,
        )


def slowest_timings(deltas: Sequence[News]) -> dict[str, float | None]:
    """The timings of the sample that the answer waited for."""
    return timings_object(deltas[0] if len(deltas) == 1 else max(deltas, key=_total_s))


def _total_s(delta: News) -> float:
    return (delta.queue_s or 0.0) + (delta.prefill_s or 0.0) + (delta.decode_s or 0.0)
