"""GenerationRequest and Conversation: a request for text, whatever API it came by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from octavo.sampling_params import SamplingParams
from octavo.server.http import limits

if TYPE_CHECKING:
    from octavo.engine.engine import AsyncEngine
    from octavo.server.http.config import ServerConfig


@dataclass(slots=True, kw_only=True)
class GenerationRequest:
    """A checked request for ``n`` samples of each of its prompts.

    Args:
        sampling: SamplingParams' fields, as far as the request sets them.
        model: the name it asks for; None: the server's first.
        request_id: the client's own id, which becomes part of the answer's.
        num_logprobs: alternatives a token, by the field that asks for them: the operator may allow
            fewer than the field does.
    """

    # None: what fits into the context.
    default_max_tokens: ClassVar[int | None] = None
    # Whether a name that is not served stands for the one that is, if the operator lets it.
    takes_any_model: ClassVar[bool] = False

    sampling: dict[str, Any]
    model: str | None = None
    stream: bool = False
    priority: int = 0
    cache_salt: str | None = None
    request_id: str | None = None
    num_logprobs: dict[str, int] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """Samples per prompt."""
        return int(self.sampling.get("n", 1))

    def configure(self, config: ServerConfig) -> None:
        """Take over the operator's choices for what the request leaves open."""

    def check(self, engine: AsyncEngine) -> None:
        """Check against the limits of the model's operator.

        Raises:
            InvalidParameterError: naming the field.
        """
        vocab_size = engine.model_config.vocab_size
        for name, count in self.num_logprobs.items():
            limits.check_logprobs(name, count, engine.config.max_logprobs, vocab_size)
        if limits.ALL_LOGPROBS in self.num_logprobs.values():
            self.ask_for_all(vocab_size)

    def ask_for_all(self, vocab_size: int) -> None:
        """Put the number of all tokens where the request asks for the logprobs of all."""
        for name in ("logprobs", "prompt_logprobs"):
            if self.sampling.get(name) == limits.ALL_LOGPROBS:
                self.sampling[name] = vocab_size

    def sampling_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """The request's own values over the model's defaults over OpenAI's.

        Raises:
            InvalidParameterError: a value is out of range.
        """
        own = {"max_tokens": self.default_max_tokens, **defaults, **self.sampling}
        return SamplingParams(**own)


@dataclass(slots=True, kw_only=True)
class Conversation:
    """Messages on their way into a chat template, and what the template is given beside them.

    Args:
        messages: each with ``role`` and ``content``, text or None.
        add_generation_prompt: open the assistant's turn after the last message.
        continue_final_message: end the prompt inside the last message.
        chat_template: a template that came with the request.
        chat_template_kwargs: further variables of the template.
        documents: for a template that uses them; any other refuses them.
        tools: as the template gets them. ``num_tool_chars``: about how long they are in the prompt.
        reasoning_effort: for a template that uses it; "none" switches reasoning off where the
            template has a switch; any other goes without.
        add_special_tokens: beside those that the template writes.
    """

    messages: list[dict[str, Any]]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    documents: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] = field(default_factory=list)
    num_tool_chars: int = 0
    reasoning_effort: str | None = None
    add_special_tokens: bool = False
