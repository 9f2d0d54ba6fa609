"""ServedModel: one model that requests can name, with all that answering for it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from octavo.errors import BadRequestError, UnsupportedParameterError
from octavo.server.work.token_texts import TokenTexts
from octavo.text.chat_template import ChatTemplate
from octavo.text.template_process import RequestTemplate, TemplateProcess

if TYPE_CHECKING:
    from octavo.engine.engine import AsyncEngine
    from octavo.pooling import PoolingInfo, PoolingTask

# Routes for models that generate no text.
_POOLING_ROUTES: Final[dict[PoolingTask, str]] = {
    "embed": "/v1/embeddings, /v1/score or /v1/rerank",
    "score": "/v1/score or /v1/rerank, or /classify for single texts",
    "classify": "/classify",
}
_POOLING_VERBS: Final[dict[PoolingTask, str]] = {
    "embed": "embeds",
    "score": "scores pairs of",
    "classify": "classifies",
}


class ServedModel:
    """An engine, its chat template and its tokens' texts.

    Args:
        engine: loaded.
        template_source: in place of the model's own chat template.
        trusts_request_templates: whether a request may bring a template.

    Raises:
        ValueError: the chat template is not a template.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        template_source: str | None = None,
        *,
        trusts_request_templates: bool = False,
    ) -> None:
        self.engine = engine
        # Texts of single tokens, for logprobs.
        self.token_texts = TokenTexts(engine.tokenizer)
        source = template_source or engine.chat_template
        self._template = None if source is None else ChatTemplate(source, engine.special_tokens)
        self._trusts_request_templates = trusts_request_templates
        self._template_process = TemplateProcess()

    @property
    def has_template(self) -> bool:
        """True where the model, or the operator, has a chat template."""
        return self._template is not None

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

    def template(self, requested: str | None = None) -> ChatTemplate | RequestTemplate:
        """The model's chat template, or the one a request brings.

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
        return self._template

    def _request_template(self, source: str) -> RequestTemplate:
        if not self._trusts_request_templates:
            raise UnsupportedParameterError(
                "chat_template in a request needs a server with --trust-request-chat-template",
                "chat_template",
            )
        return RequestTemplate(source, self.engine.special_tokens, self._template_process)
