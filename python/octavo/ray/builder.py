"""build_app: an application of Ray Serve from octavo's flags, and its deployments' options."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from ray import serve
from ray.serve import Application

from octavo.config import EngineConfig
from octavo.flags import resolve
from octavo.ray.ingress import Ingress
from octavo.ray.replica import Replica
from octavo.server.http.config import ServerConfig

# Requests of one replica, running and waiting. Beyond them they wait outside, where a new replica
# can take them.
MAX_ONGOING_REQUESTS: Final = 512
# The load of a replica that Ray keeps to by adding and removing them: enough for a full batch of a
# GPU, and few that wait.
TARGET_ONGOING_REQUESTS: Final = 192
# That wait outside all replicas; beyond them 503.
MAX_QUEUED_REQUESTS: Final = 4096
# A request of thousands of tokens ends in this time; Ray kills a replica that takes longer.
DRAIN_S: Final = 120.0
PREFIX_ROUTER: Final = (
    "ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router"
    ":PrefixCacheAffinityRouter"
)


def build_app(args: Mapping[str, Any]) -> Application:
    """An application: light ingresses in front of replicas of one model.

    Args:
        args: octavo's flags by name, of the engine and of the server (``model``,
            ``tensor_parallel_size``, ``api_key``, ...), and options of Ray's deployments:
            ``replica`` and ``ingress``, as ``serve.deployment`` takes them, and
            ``prefix_routing`` (true): requests with equal beginnings go to one replica.

    Raises:
        ValueError: an unknown name, or a value out of range.
    """
    flags = dict(args)
    replica_options = flags.pop("replica", {})
    ingress_options = flags.pop("ingress", {})
    prefix_routing = flags.pop("prefix_routing", True)
    engine_config, server_config = make_configs(flags)
    options = replica_defaults(engine_config, prefix_routing=prefix_routing) | replica_options
    if (
        options.get("num_replicas") not in (None, "auto")
        and "autoscaling_config" not in replica_options
    ):
        # A number that does not change.
        del options["autoscaling_config"]
    replicas = serve.deployment(Replica, name="octavo", **options).bind(
        engine_config, server_config
    )
    ingress = serve.deployment(
        Ingress, name="octavo-ingress", **(ingress_defaults() | ingress_options)
    )
    max_queued = int(options["max_queued_requests"])
    return ingress.bind(replicas, max_queued)


def make_configs(flags: Mapping[str, Any]) -> tuple[EngineConfig, ServerConfig]:
    """Both configs from flags by name; what a replica cannot have is switched off.

    Raises:
        ValueError: an unknown name, or a value out of range.
    """
    configs = (EngineConfig, ServerConfig)
    known = {field.name for config in configs for field in dataclasses.fields(config)}
    for name in flags:
        if name not in known:
            raise ValueError(f"{name} is neither a flag of octavo's nor an option of octavo.ray's")
    engine_config, server_config = resolve(dict(flags), configs, environ={})
    # Ray's proxy listens, and any Host header may come. A response that one replica keeps is not
    # there for the next.
    server_config = dataclasses.replace(server_config, host="0.0.0.0", response_store=False)
    return engine_config, server_config


def replica_defaults(config: EngineConfig, *, prefix_routing: bool = True) -> dict[str, Any]:
    """Options of a deployment of replicas, by Ray's names."""
    options: dict[str, Any] = {
        "ray_actor_options": actor_options(config),
        "max_ongoing_requests": MAX_ONGOING_REQUESTS,
        "max_queued_requests": MAX_QUEUED_REQUESTS,
        "autoscaling_config": {
            "min_replicas": 1,
            "max_replicas": 1,
            "target_ongoing_requests": TARGET_ONGOING_REQUESTS,
        },
        "graceful_shutdown_timeout_s": DRAIN_S,
        # Seconds between two looks at whether it is empty.
        "graceful_shutdown_wait_loop_s": 1.0,
        "health_check_period_s": 5.0,
        "health_check_timeout_s": 30.0,
    }
    if prefix_routing:
        from ray.serve.config import RequestRouterConfig

        batch = min(config.max_num_seqs or TARGET_ONGOING_REQUESTS, TARGET_ONGOING_REQUESTS)
        options["request_router_config"] = RequestRouterConfig(
            request_router_class=PREFIX_ROUTER,
            # Out of balance by half a replica's batch, the shorter queue is better than the cache.
            request_router_kwargs={"imbalanced_threshold": batch // 2},
        )
    return options


def actor_options(config: EngineConfig) -> dict[str, Any]:
    """The resources of one replica: all its GPUs in one actor, which is one process."""
    num_gpus = config.tensor_parallel_size * config.pipeline_parallel_size
    if config.device == "cpu":
        return {"num_cpus": config.threads or 1}
    return {"num_cpus": 1, "num_gpus": num_gpus}


def ingress_defaults() -> dict[str, Any]:
    """Options of the deployment of ingresses."""
    return {
        # Wherever there is room: an ingress waits more than it computes.
        "ray_actor_options": {"num_cpus": 0},
        "max_ongoing_requests": MAX_QUEUED_REQUESTS + MAX_ONGOING_REQUESTS,
        "graceful_shutdown_timeout_s": DRAIN_S,
    }
