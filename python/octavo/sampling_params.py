"""SamplingParams: how one request's tokens are chosen and when they end."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from octavo.errors import InvalidParameterError


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """Sampling and stopping of one request, with vLLM's names and meanings.

    ``temperature=0`` is greedy. ``top_k`` 0 or -1 is off. ``logprobs=k`` returns the chosen token's
    log probability and the k best, -1 those of the whole vocabulary; None returns none. ``seed``
    makes a request's tokens a function of the request alone; -1 is None, a random one.
    ``max_tokens=None`` runs to the model's length limit. A stream's chunk leaves after
    ``stream_interval`` tokens, None is the engine's. ``spaces_between_special_tokens`` makes no
    difference where a tokenizer writes none; elsewhere false is refused.

    Raises:
        InvalidParameterError: from construction, naming the field.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    stream_interval: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # Callers from elsewhere write one stop string as it is, whatever the type says.
        stop: object = self.stop
        if isinstance(stop, str):
            object.__setattr__(self, "stop", (stop,))
        for name in ("stop", "stop_token_ids", "allowed_token_ids", "bad_words"):
            value = getattr(self, name)
            if type(value) is not tuple:
                object.__setattr__(self, name, tuple(value or ()))
        if self.seed == -1:
            object.__setattr__(self, "seed", None)
        # Written out: one of them per request, and a loop over a table takes five times as long.
        # Comparisons in these forms are false for NaN.
        if not self.n >= 1:
            raise self._refusal("n", "at least 1")
        if not 0 <= self.temperature <= 2:
            raise self._refusal("temperature", "between 0 and 2")
        if not 0 < self.top_p <= 1:
            raise self._refusal("top_p", "in (0, 1]")
        if not self.top_k >= -1:
            raise self._refusal("top_k", "-1, 0 or positive")
        if not 0 <= self.min_p <= 1:
            raise self._refusal("min_p", "between 0 and 1")
        if not -2 <= self.presence_penalty <= 2:
            raise self._refusal("presence_penalty", "between -2 and 2")
        if not -2 <= self.frequency_penalty <= 2:
            raise self._refusal("frequency_penalty", "between -2 and 2")
        if not 0 < self.repetition_penalty < math.inf:
            raise self._refusal("repetition_penalty", "positive and finite")
        if not self.min_tokens >= 0:
            raise self._refusal("min_tokens", "at least 0")
        if self.max_tokens is not None:
            if not self.max_tokens >= 0:
                raise self._refusal("max_tokens", "at least 0")
            if not self.min_tokens <= self.max_tokens:
                raise self._refusal("min_tokens", "at most max_tokens")
        if not (self.stream_interval is None or self.stream_interval >= 1):
            raise self._refusal("stream_interval", "at least 1")
        if not (self.logprobs is None or self.logprobs >= -1):
            raise self._refusal("logprobs", "-1, 0 or positive")
        if not (self.prompt_logprobs is None or self.prompt_logprobs >= -1):
            raise self._refusal("prompt_logprobs", "-1, 0 or positive")
        if not all(self.stop):
            raise self._refusal("stop", "non-empty strings")

    def _refusal(self, param: str, must: str) -> InvalidParameterError:
        value: object = getattr(self, param)
        return InvalidParameterError(f"{param} must be {must}, not {value!r}", param)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, without randomness."""
        return self.temperature < GREEDY_EPSILON


# Below this a temperature divides logits into overflow; vLLM draws the same line.
GREEDY_EPSILON = 1e-5
