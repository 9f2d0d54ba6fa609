"""ServedModel: one model that requests can name, with all that answering for it takes."""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from octavo.errors import BadRequestError, UnsupportedParameterError
from octavo.pair_template import PairTemplate
from octavo.server.work.prompt_history import PromptHistory
from octavo.server.work.token_texts import TokenTexts
from octavo.text.chat_format import ChatFormat, find_chat_format
from octavo.text.chat_template import ChatTemplate
from octavo.text.template_process import RequestTemplate, TemplateProcess

if TYPE_CHECKING:
    from octavo.engine.engine import AsyncEngine
    from octavo.pooling import PoolingInfo, PoolingTask
    from octavo.server.http.config import ServerConfig
    from octavo.server.work.request import Conversation
    from octavo.text.tools import ToolUse

# Routes for models that generate no text.
_POOLING_ROUTES: Final[dict[PoolingTask, str]] = {
    "embed": "/v1/embeddings, /v1/score or /v1/rerank",
    "token_embed": "/pooling, /v1/score or /v1/rerank",
    "score": "/v1/score or /v1/rerank, or /classify for single texts",
    "classify": "/classify",
    "token_classify": "/pooling",
}
_POOLING_VERBS: Final[dict[PoolingTask, str]] = {
    "embed": "embeds",
    "token_embed": "embeds the tokens of",
    "score": "scores pairs of",
    "classify": "classifies",
    "token_classify": "classifies the tokens of",
}


class ServedModel:
    """An engine, its chat template and its tokens' texts.

    Args:
        engine: loaded.
        config: the operator's word on templates, tools and reasoning.
        template_source: in place of the model's own chat template.

    Raises:
        ValueError: the chat template is not a template.
    """

    def __init__(
        self, engine: AsyncEngine, config: ServerConfig, template_source: str | None = None
    ) -> None:
        self.engine = engine
        self.config = config
        self.chat_template_kwargs: dict[str, Any] = config.default_chat_template_kwargs or {}
        # Texts of single tokens, for logprobs.
        self.token_texts = TokenTexts(engine.tokenizer)
        source = self.template_source = template_source or engine.chat_template
        self._template = None if source is None else ChatTemplate(source, engine.special_tokens)
        # The operator's template is for all conversations.
        own = engine.tool_template if template_source is None else None
        self._tool_template = (
            self._template if own is None else ChatTemplate(own, engine.special_tokens)
        )
        # The model's own is for conversations: rerankers have it from the models they were made of.
        self.pair_template: PairTemplate | None = None
        if template_source is not None and engine.pooling and engine.pooling.task == "score":
            self.pair_template = PairTemplate(template_source, engine.special_tokens)
        self._template_process = TemplateProcess()
        self.prompt_history = PromptHistory(engine.tokenizer, shows_text=config.enable_log_requests)
        # Answers to requests with tools: called, none, cut.
        self.tool_call_counts: Counter[str] = Counter()

    def effort_of(self, conversation: Conversation) -> str | None:
        """The effort of reasoning that a request allows, in the operator's word for it."""
        effort = conversation.reasoning_effort
        return effort and (self.config.reasoning_effort_map or {}).get(effort, effort)

    @property
    def has_template(self) -> bool:
        """True where conversations can be rendered."""
        return self._template is not None

    @cached_property
    def chat_format(self) -> ChatFormat:
        """The model's format of tool calls and reasoning."""
        return find_chat_format(
            self._tool_template,
            response_template=self.engine.response_template,
            tool_call_parser=self.config.tool_call_parser,
            reasoning_parser=self.config.reasoning_parser,
        )

    @cached_property
    def takes_late_system(self) -> bool:
        """True if the template writes a system's message that is not the first."""
        template = self._tool_template
        if template is None:
            return False
        late = "octavo late system text"
        roles = (("user", "a"), ("assistant", "b"), ("system", late), ("user", "c"))
        try:
            text = template.render([{"role": role, "content": text} for role, text in roles])
        except BadRequestError:
            return False
        return late in text

    @cached_property
    def special_markers(self) -> list[tuple[str, int]]:
        """Markers of the chat format that are one special token each, and their ids."""
        return self.chat_format.special_tokens(self.engine.tokenizer)

    def count_calls(self, use: ToolUse, num_calls: int, num_whole: int) -> None:
        """Count the outcome of an answer that may have called tools."""
        if use.tools and use.mode != "none":
            status = "none" if not num_calls else "called" if num_whole == num_calls else "cut"
            self.tool_call_counts[status] += 1

    @property
    def names(self) -> tuple[str, ...]:
        """The names it is served under; an answer to a request without a name has the first."""
        return self.engine.served_model_names

    def check_generates(self) -> None:
        """Raises BadRequestError for a model that generates no text."""
        pooling = self.engine.pooling
        if pooling is not None:
            routes = _POOLING_ROUTES[pooling.task]
            raise BadRequestError(f"this model generates no text: use {routes}", "model")

    def pooling(self, *tasks: PoolingTask) -> PoolingInfo:
        """The pooling of a model for one of ``tasks``.

        Raises:
            BadRequestError: the model is for something else.
        """
        info = self.engine.pooling
        if info is None:
            raise BadRequestError(
                "this model generates text: use /v1/chat/completions or /v1/completions, or serve "
                "a model for embeddings, scores or classes",
                "model",
            )
        if info.task not in tasks:
            verb, routes = _POOLING_VERBS[info.task], _POOLING_ROUTES[info.task]
            raise BadRequestError(f"this model {verb} texts: use {routes}", "model")
        return info

    def template(
        self, requested: str | None = None, *, has_tools: bool = False
    ) -> ChatTemplate | RequestTemplate:
        """The model's chat template, or the one a request brings.

        Args:
            requested: the request's.
            has_tools: whether the conversation does; some models have a template for these.

        Raises:
            BadRequestError: there is none.
            UnsupportedParameterError: templates in requests are not allowed here.
        """
        if requested is not None:
            return self._request_template(requested)
        if self._template is None:
            raise BadRequestError(
                "this model has no chat template: use /v1/completions, or start the server with "
                "--chat-template",
                "messages",
            )
        return self._tool_template or self._template if has_tools else self._template

    def _request_template(self, source: str) -> RequestTemplate:
        if not self.config.trust_request_chat_template:
            raise UnsupportedParameterError(
                "chat_template in a request needs a server with --trust-request-chat-template",
                "chat_template",
            )
        return RequestTemplate(source, self.engine.special_tokens, self._template_process)
