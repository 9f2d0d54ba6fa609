"""octavo on Ray Serve: replicas that Ray places, scales, watches and routes to.

``build_app`` makes an application of its own; ``OctavoServer`` is a ``server_cls`` of Ray Serve
LLM's ``LLMConfig``. Both need the extra ``octavo[ray]``; docs/deploy.md shows them at work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from octavo.ray.builder import build_app
    from octavo.ray.llm_server import OctavoServer

__all__ = ["OctavoServer", "build_app"]


def __getattr__(name: str) -> Any:
    # Late: whoever wants the one need not have what the other needs.
    if name == "build_app":
        from octavo.ray.builder import build_app

        return build_app
    if name == "OctavoServer":
        from octavo.ray.llm_server import OctavoServer

        return OctavoServer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
