"""ServerState: the server's phase, its models, and the work under way."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Literal

from octavo.errors import (
    DrainingError,
    EngineDeadError,
    LoadingError,
    ModelNotFoundError,
    StalledError,
)
from octavo.server.http.api_keys import ApiKeys
from octavo.server.work.response_store import ResponseStore
from octavo.server.work.served_model import ServedModel
from octavo.server.work.tracing import Tracing
from octavo.text.chat_format import check_parser_name
from octavo.text.chat_template import ChatTemplate, load_chat_template

if TYPE_CHECKING:
    from octavo.engine.engine import AsyncEngine
    from octavo.server.http.config import ServerConfig
    from octavo.server.work.generation import Generation

Phase = Literal["loading", "ready", "draining", "dead"]


class ServerState:
    """One per server, touched on the event loop only.

    Raises:
        ValueError: ``--chat-template`` is not a template, a parser's name is none, the file of keys
            cannot be used, or OpenTelemetry is wanted and not installed.
    """

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.phase: Phase = "loading"
        self.created_s = int(time.time())
        # What runs now, for /load, for draining, and to be told of the engine's death.
        self.generations: set[Generation] = set()
        # Reason -> requests turned away.
        self.rejections: Counter[str] = Counter()
        self.api_keys = ApiKeys(config)
        endpoint = config.otlp_traces_endpoint
        self.tracing = None if endpoint is None else Tracing(endpoint)
        # Of /v1/responses.
        self.responses = ResponseStore()
        # A bad flag is found before the model is loaded, not by the first chat.
        self._template_source = (
            None if config.chat_template is None else load_chat_template(config.chat_template)
        )
        if self._template_source is not None:
            ChatTemplate(self._template_source, {})
        check_parser_name("tool_call_parser", config.tool_call_parser)
        check_parser_name("reasoning_parser", config.reasoning_parser)
        # By every name it is served under, and the one of requests without a name.
        self._models: dict[str, ServedModel] = {}
        self._default: ServedModel | None = None

    def set_engine(self, engine: AsyncEngine) -> None:
        """Serve a loaded and started engine.

        Raises:
            ValueError: the model's chat template is not a template.
        """
        model = ServedModel(engine, self.config, self._template_source)
        self._models = dict.fromkeys(model.names, model)
        self._default = model
        if self.phase == "loading":
            self.phase = "ready"

    def models(self) -> dict[str, ServedModel]:
        """The models, by every name they are served under.

        Raises:
            LoadingError, EngineDeadError: there is none, or no longer.
        """
        if not self._models:
            raise LoadingError
        for model in set(self._models.values()):
            self._check_alive(model)
        return self._models

    def model(self, name: str | None = None, *, takes_any: bool = False) -> ServedModel:
        """The model of a name, for questions; without a name the first.

        ``takes_any``: a name that is not served is the first's too, where the flags allow it.

        Raises:
            LoadingError, EngineDeadError: there is none, or no longer.
            ModelNotFoundError: no served model has the name.
        """
        if self._default is None:
            raise LoadingError
        model = self._default if name is None else self._models.get(name)
        if model is None and name is not None:
            # Ollama's clients write the tag of what has none.
            model = self._models.get(name.removesuffix(":latest"))
        if takes_any and self.config.messages_any_model:
            model = model or self._default
        if model is None:
            raise ModelNotFoundError(name or "")
        self._check_alive(model)
        return model

    def model_for_work(self, name: str | None, *, takes_any: bool = False) -> ServedModel:
        """The model of a name, for new requests; see ``model``.

        Raises:
            LoadingError, EngineDeadError, ModelNotFoundError: as ``model``.
            DrainingError: the server takes no new work.
        """
        model = self.model(name, takes_any=takes_any)
        self._check_open()
        return model

    def _check_alive(self, model: ServedModel) -> None:
        if self.phase == "dead" or not model.engine.is_alive:
            raise EngineDeadError

    def check_health(self) -> None:
        """Raises LoadingError, EngineDeadError or StalledError if the server is not well."""
        if not all(model.engine.is_healthy for model in self.models().values()):
            raise StalledError

    def check_ready(self) -> None:
        """Raises what ``check_health`` raises, or DrainingError."""
        self.check_health()
        self._check_open()

    def _check_open(self) -> None:
        if self.phase == "draining":
            raise DrainingError
