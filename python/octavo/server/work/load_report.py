"""load_report: the load of an engine in a header of an answer, for balancers that send by it.

ORCA's native form (Open Request Cost Aggregation, of the xDS API), with vLLM's two metrics. A
client, or a proxy in front of it, asks by ``endpoint-load-metrics-format: TEXT`` or ``JSON``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import orjson

from octavo.server.http.exchange import header

if TYPE_CHECKING:
    from octavo.engine.engine import AsyncEngine
    from octavo.server.http.exchange import Exchange

_ASKED: Final = b"endpoint-load-metrics-format"
_REPORT: Final = b"endpoint-load-metrics"
_METRICS: Final = ("kv_cache_usage_perc", "num_requests_waiting")


def add_load_report(exchange: Exchange, engine: AsyncEngine) -> None:
    """Add the header that the request asks for; a form that is not known gets none."""
    form = header(exchange.scope, _ASKED)
    if form is None or form.upper() not in (b"TEXT", b"JSON"):
        return
    snapshot = engine.metrics.snapshot()
    named: dict[str, Any] = {name: float(snapshot[name]) for name in _METRICS}
    if form.upper() == b"JSON":
        report = b"JSON " + orjson.dumps({"named_metrics": named})
    else:
        listed = (f"named_metrics.{name}={value}" for name, value in named.items())
        report = b"TEXT " + ", ".join(listed).encode()
    exchange.add_header(_REPORT, report)
