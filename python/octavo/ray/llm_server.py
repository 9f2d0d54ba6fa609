"""OctavoServer: octavo as a ``server_cls`` of Ray Serve LLM's ``LLMConfig``.

``engine_kwargs`` are flags of octavo's, which has vLLM's names for them. Requests come as Ray's
models of OpenAI's interface, checked by Ray; octavo checks them once more, by its own tables.
"""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, Final

import orjson

from octavo.ray.app_call import begin_call
from octavo.ray.builder import actor_options, make_configs
from octavo.ray.replica import Replica
from octavo.ray.request import RoutedRequest

if TYPE_CHECKING:
    from ray.serve.llm import LLMConfig

# Of vLLM's processes, of which octavo has one.
_IGNORED: Final = frozenset({"distributed_executor_backend", "disable_log_stats"})
# What Ray adds to a request for its own use.
_OF_RAY: Final = frozenset({"request_id"})


def flags_of(config: LLMConfig) -> dict[str, Any]:
    """octavo's flags from Ray's config.

    Raises:
        ValueError: the weights are to come from a mirror, or an adapter is wanted.
    """
    loading = config.model_loading_config
    source = loading.model_source or loading.model_id
    if not isinstance(source, str):
        raise ValueError("model_source must be a folder, a .gguf file or a hub id")
    if config.lora_config is not None:
        raise ValueError("lora_config: octavo has no adapters on Ray yet")
    flags = {name: value for name, value in config.engine_kwargs.items() if name not in _IGNORED}
    return {"model": source, "served_model_name": (loading.model_id,), **flags}


class OctavoServer:
    """One replica, in the protocol of Ray's ``LLMServer``."""

    # Ray awaits it.
    async def __init__(self, llm_config: LLMConfig) -> None:  # type: ignore[misc]
        self._config = llm_config
        engine_config, server_config = make_configs(flags_of(llm_config))
        self._replica = await _replica(engine_config, server_config)

    @classmethod
    def get_deployment_options(cls, llm_config: LLMConfig) -> dict[str, Any]:
        """Options of the deployment: Ray's of the config, and the resources of one actor."""
        options: dict[str, Any] = copy.deepcopy(llm_config.deployment_config)
        engine_config, _ = make_configs(flags_of(llm_config))
        asked = options.get("ray_actor_options", {})
        options["ray_actor_options"] = actor_options(engine_config) | asked
        if llm_config.accelerator_type is not None:
            options["ray_actor_options"].setdefault("accelerator_type", llm_config.accelerator_type)
        if llm_config.runtime_env:
            options["ray_actor_options"].setdefault("runtime_env", llm_config.runtime_env)
        return options

    async def start(self) -> None:
        """Nothing: the constructor has started it."""

    def check_health(self) -> None:
        """Raises what is wrong; Ray then makes a new replica of this one."""
        self._replica.check_health()

    async def llm_config(self) -> LLMConfig:
        """Ray's config."""
        return self._config

    async def __serve_build_asgi_app__(self) -> Any:
        """octavo's own application, for Ray's direct streaming."""
        return self._replica.app

    def record_autoscaling_stats(self) -> dict[str, float]:
        """See ``Replica``."""
        return self._replica.record_autoscaling_stats()

    async def chat(self, request: Any, raw_request_info: Any = None) -> AsyncIterator[Any]:
        """A chat: parts of a stream of events as text, or the whole answer."""
        return self._answer("/v1/chat/completions", request, raw_request_info, "ChatCompletion")

    async def completions(self, request: Any, raw_request_info: Any = None) -> AsyncIterator[Any]:
        """A completion, as ``chat``."""
        return self._answer("/v1/completions", request, raw_request_info, "Completion")

    async def embeddings(self, request: Any, raw_request_info: Any = None) -> AsyncIterator[Any]:
        """Vectors of texts."""
        return self._answer("/v1/embeddings", request, raw_request_info, "Embedding")

    async def score(self, request: Any, raw_request_info: Any = None) -> AsyncIterator[Any]:
        """Scores of pairs of texts."""
        return self._answer("/v1/score", request, raw_request_info, "Score")

    async def tokenize(self, request: Any, raw_request_info: Any = None) -> AsyncIterator[Any]:
        """Token ids of a text or a conversation."""
        return self._answer("/tokenize", request, raw_request_info, "Tokenize")

    async def detokenize(self, request: Any, raw_request_info: Any = None) -> AsyncIterator[Any]:
        """The text of token ids."""
        return self._answer("/detokenize", request, raw_request_info, "Detokenize")

    async def _answer(
        self, path: str, request: Any, raw_request_info: Any, kind: str
    ) -> AsyncIterator[Any]:
        routed = _routed(path, request, raw_request_info)
        (status, headers), parts = await begin_call(self._replica.app, routed)
        if dict(headers).get(b"content-type", b"").startswith(b"text/event-stream"):
            async for part in parts:
                # Frames are whole in each part: octavo writes none in pieces.
                yield part.decode()
            return
        body = orjson.loads(b"".join([part async for part in parts]))
        if status == 200:
            yield _model(f"{kind}Response")(**body)
            return
        error = {**body["error"], "code": status}
        yield _model("ErrorResponse")(error=_model("ErrorInfo")(**error))


async def _replica(*configs: Any) -> Replica:
    replica = Replica.__new__(Replica)
    await Replica.__init__(replica, *configs)
    return replica


def _routed(path: str, request: Any, raw_request_info: Any) -> RoutedRequest:
    fields = request.model_dump(mode="json", exclude_unset=True, exclude=set(_OF_RAY))
    given = raw_request_info.headers if raw_request_info is not None else {}
    # Of the client's headers those that mean something for the answer.
    kept = ("authorization", "x-api-key", "x-request-id", "traceparent", "tracestate")
    headers = [
        (name.lower().encode(), value.encode("latin-1"))
        for name, value in given.items()
        if name.lower() in kept
    ]
    headers.append((b"content-type", b"application/json"))
    return RoutedRequest("POST", path, b"", headers, orjson.dumps(fields))


def _model(name: str) -> Callable[..., Any]:
    """One of Ray's models of OpenAI's interface."""
    # Not at the head: it needs an engine of Ray's own, vLLM or SGLang, to be installed.
    from ray.llm._internal.serve.core.configs import openai_api_models

    found: Callable[..., Any] = getattr(openai_api_models, name)
    return found
