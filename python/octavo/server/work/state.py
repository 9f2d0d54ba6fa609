"""ServerState: what the server knows of itself: its engine, its phase, what is under way."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, Final, Literal

from octavo.errors import (
    BadRequestError,
    DrainingError,
    EngineDeadError,
    LoadingError,
    ModelNotFoundError,
    StalledError,
    UnsupportedParameterError,
)
from octavo.server.config import ServerConfig
from octavo.text.chat_template import ChatTemplate, load_chat_template

if TYPE_CHECKING:
    from octavo.engine.engine import AsyncEngine
    from octavo.pooling import PoolingInfo, PoolingTask
    from octavo.server.work.generation import Generation
    from octavo.server.work.token_texts import TokenTexts

Phase = Literal["loading", "ready", "draining", "dead"]

# Templates that requests bring: compiling one takes milliseconds, a client sends few.
MAX_REQUEST_TEMPLATES = 16

# Where models that generate no text can be asked.
_POOLING_ROUTES: Final[dict[PoolingTask, str]] = {
    "embed": "/v1/embeddings, /v1/score or /v1/rerank",
    "score": "/v1/score or /v1/rerank, or /classify for single texts",
    "classify": "/classify",
}


class ServerState:
    """One per server, touched on the event loop only.

    Raises:
        ValueError: ``--chat-template`` is not a template.
    """

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.phase: Phase = "loading"
        self.created_s = int(time.time())
        # What runs now, for /load, for draining, and to be told of the engine's death.
        self.generations: set[Generation] = set()
        # Reason -> requests turned away.
        self.rejections: Counter[str] = Counter()
        # A bad flag is found before the model is loaded, not by the first chat.
        self._template_source = (
            None if config.chat_template is None else load_chat_template(config.chat_template)
        )
        if self._template_source is not None:
            ChatTemplate(self._template_source, {})
        self._engine: AsyncEngine | None = None
        self._template: ChatTemplate | None = None
        self._token_texts: TokenTexts | None = None
        self._request_templates: OrderedDict[str, ChatTemplate] = OrderedDict()

    def set_engine(self, engine: AsyncEngine) -> None:
        """The engine is loaded and started: serve.

        Raises:
            ValueError: the model's chat template is not a template.
        """
        from octavo.server.work.token_texts import TokenTexts

        source = self._template_source or engine.chat_template
        if source is not None:
            self._template = ChatTemplate(source, engine.special_tokens)
        self._token_texts = TokenTexts(engine.tokenizer)
        self._engine = engine
        if self.phase == "loading":
            self.phase = "ready"

    @property
    def engine(self) -> AsyncEngine:
        """The engine, for questions.

        Raises:
            LoadingError, EngineDeadError: there is none, or no longer.
        """
        if self._engine is None:
            raise LoadingError
        if self.phase == "dead" or not self._engine.is_alive:
            raise EngineDeadError
        return self._engine

    def engine_for_work(self) -> AsyncEngine:
        """The engine, for new requests for text.

        Raises:
            LoadingError, EngineDeadError, DrainingError: it takes none now.
            BadRequestError: its model generates no text.
        """
        engine = self._engine_unless_draining()
        if engine.pooling is not None:
            routes = _POOLING_ROUTES[engine.pooling.task]
            raise BadRequestError(f"this model generates no text: use {routes}", "model")
        return engine

    def engine_for_pooling(self, *tasks: str) -> tuple[AsyncEngine, PoolingInfo]:
        """The engine and its model's ways, for new requests for vectors or scores.

        ``tasks``: those of models that can answer.

        Raises:
            LoadingError, EngineDeadError, DrainingError: it takes none now.
            BadRequestError: its model is for something else.
        """
        engine = self._engine_unless_draining()
        info = engine.pooling
        if info is None:
            raise BadRequestError(
                "this model generates text: use /v1/chat/completions or /v1/completions, or serve "
                "a model for embeddings, scores or classes",
                "model",
            )
        if info.task not in tasks:
            what = {"embed": "embeds", "score": "scores pairs of", "classify": "classifies"}
            routes = _POOLING_ROUTES[info.task]
            raise BadRequestError(f"this model {what[info.task]} texts: use {routes}", "model")
        return engine, info

    def _engine_unless_draining(self) -> AsyncEngine:
        engine = self.engine
        if self.phase == "draining":
            raise DrainingError
        return engine

    def check_health(self) -> None:
        """Raises LoadingError, EngineDeadError or StalledError if the server is not well."""
        if not self.engine.is_healthy:
            raise StalledError

    def check_ready(self) -> None:
        """Raises what ``check_health`` raises, or DrainingError."""
        self.check_health()
        self._engine_unless_draining()

    @property
    def token_texts(self) -> TokenTexts:
        """Texts of single tokens, for logprobs."""
        assert self._token_texts is not None, "after set_engine"
        return self._token_texts

    def model_name(self, requested: str | None) -> str:
        """The name to answer under.

        Raises:
            ModelNotFoundError: no served model has the requested name.
        """
        names = self.engine.served_model_names
        if requested is None:
            return names[0]
        if requested not in names:
            raise ModelNotFoundError(requested)
        return requested

    def template(self, requested: str | None = None) -> ChatTemplate:
        """The server's chat template, or the one a request brings.

        Raises:
            BadRequestError: there is none, or the request's is not a template.
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

    def _request_template(self, source: str) -> ChatTemplate:
        if not self.config.trust_request_chat_template:
            raise UnsupportedParameterError(
                "chat_template in a request needs a server with --trust-request-chat-template",
                "chat_template",
            )
        template = self._request_templates.pop(source, None)
        if template is None:
            try:
                template = ChatTemplate(source, self.engine.special_tokens, untrusted=True)
            except ValueError as error:
                raise BadRequestError(str(error), "chat_template") from None
        self._request_templates[source] = template
        if len(self._request_templates) > MAX_REQUEST_TEMPLATES:
            self._request_templates.popitem(last=False)
        return template
