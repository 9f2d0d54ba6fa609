"""RequestState: one sample of a request, from its submission to its end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from octavo.sampling_params import SamplingParams

if TYPE_CHECKING:
    from octavo._core import Channels, Grammar, SseTemplate, Tokenizer
    from octavo.runner.prompt_rows import PromptRows
    from octavo.structured_outputs import ReasoningTokens, Trigger

# How a sample's output leaves: as the bytes of server-sent events, as text and ids when they come,
# or whole, at the end.
Delivery = Literal["sse", "delta", "final"]


@dataclass(slots=True, kw_only=True, eq=False)
class RequestState:
    """One sample: what it asks for, and what the sampler has to remember of it.

    Checked where it is made; nothing downstream validates again. It belongs to its maker until it
    is queued, and to the engine's thread from then on. It outlives preemption; slots do not.

    Args:
        request_id: unique; those of one request's samples are consecutive.
        prompt_token_ids: shared by the samples.
        max_tokens: resolved: it fits the context.
        arrival_s: ``time.monotonic()`` when the request came.
        seed: None: the sampler draws one at the first admission.
        eos_token_ids: banned by min_tokens, beside ``params.stop_token_ids``.
        bad_words_token_ids: see ``encode_bad_words``; the sampler bans those of one token.
        prompt_rows: gathers prompt log probabilities where ``params`` asks for them; shared by the
            samples.
        grammar: what the output follows.
        reasoning: the tokens around reasoning, which comes before that.
        num_first: of a pair of texts, the tokens that belong to the first; None is no pair.
        channels: what tells text, reasoning and tool calls apart.
        output_token_ids: the sampler's, kept only where penalties need them.
    """

    request_id: int
    params: SamplingParams
    prompt_token_ids: Sequence[int]
    max_tokens: int
    arrival_s: float
    delivery: Delivery = "final"
    sse: SseTemplate | None = None
    priority: int = 0
    cache_salt: str | None = None
    seed: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    prompt_rows: PromptRows | None = None
    grammar: Grammar | None = None
    reasoning: ReasoningTokens | None = None
    num_first: int | None = None
    channels: Channels | None = None
    output_token_ids: list[int] = field(default_factory=list)

    @property
    def num_prompt_tokens(self) -> int:
        """The prompt's length."""
        return len(self.prompt_token_ids)

    @property
    def trigger(self) -> Trigger | None:
        """The texts from which on its grammar holds; None: from the start."""
        wanted = self.params.structured_outputs
        return None if wanted is None else wanted.trigger

    @property
    def may_force(self) -> bool:
        """True if tokens that its grammar decides alone need not pass the sampler.

        Nothing that the sampler does depends on them then, and nothing else could forbid them.
        """
        p = self.params
        return not (
            p.num_logprobs is not None
            or self.has_penalties
            or self.bad_words_token_ids
            or p.allowed_token_ids
            or -math.inf in p.logit_bias.values()
        )

    @property
    def banned_token_ids(self) -> list[int]:
        """Bad words of one token, which may never come."""
        return [word[0] for word in self.bad_words_token_ids if len(word) == 1]

    @property
    def has_penalties(self) -> bool:
        """True if logits depend on the tokens before them."""
        return self.params.has_penalties


def encode_bad_words(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Token sequences that spell each word at a text's start and after a space."""
    sequences: dict[tuple[int, ...], None] = {}
    for word in words:
        for text in (word, " " + word.lstrip()):
            if ids := tuple(tokenizer.encode(text, False)):
                sequences[ids] = None
    return tuple(sequences)
