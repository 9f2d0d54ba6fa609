"""SamplingParams: how one request's tokens are chosen and when they end."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


class InvalidParameterError(ValueError):
    """A request's value is out of range. ``param`` names the field, as OpenAI's errors do."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """Sampling and stopping of one request, with vLLM's names and meanings.

    ``temperature=0`` is greedy. ``top_k`` 0 or -1 is off. ``logprobs=k`` returns the chosen token's
    log probability and the k best; None returns none. ``seed`` makes a request's tokens a function
    of the request alone. ``max_tokens=None`` runs to the model's length limit.

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

        def check(ok: bool, param: str, must: str) -> None:
            if not ok:
                value: object = getattr(self, param)
                raise InvalidParameterError(f"{param} must be {must}, not {value!r}", param)

        for name in (
            "temperature",
            "top_p",
            "min_p",
            "presence_penalty",
            "frequency_penalty",
            "repetition_penalty",
        ):
            check(math.isfinite(getattr(self, name)), name, "a finite number")
        check(self.n >= 1, "n", "at least 1")
        check(0 <= self.temperature <= 2, "temperature", "between 0 and 2")
        check(0 < self.top_p <= 1, "top_p", "in (0, 1]")
        check(self.top_k >= -1, "top_k", "-1, 0 or positive")
        check(0 <= self.min_p <= 1, "min_p", "between 0 and 1")
        check(-2 <= self.presence_penalty <= 2, "presence_penalty", "between -2 and 2")
        check(-2 <= self.frequency_penalty <= 2, "frequency_penalty", "between -2 and 2")
        check(self.repetition_penalty > 0, "repetition_penalty", "positive")
        check(self.max_tokens is None or self.max_tokens >= 0, "max_tokens", "at least 0")
        check(self.min_tokens >= 0, "min_tokens", "at least 0")
        check(
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            "min_tokens",
            "at most max_tokens",
        )
        check(self.logprobs is None or self.logprobs >= 0, "logprobs", "at least 0")
        check(
            self.prompt_logprobs is None or self.prompt_logprobs >= 0,
            "prompt_logprobs",
            "at least 0",
        )
        check(all(self.stop), "stop", "non-empty strings")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, without randomness."""
        return self.temperature < GREEDY_EPSILON


# Below this a temperature divides logits into overflow; vLLM draws the same line.
GREEDY_EPSILON = 1e-5
