"""log_stats: a line of throughput every ten seconds, while there is any."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from octavo.engine.engine import AsyncEngine

logger = logging.getLogger("octavo.stats")

INTERVAL_S: Final = 10.0


async def log_stats(engine: AsyncEngine) -> None:
    """Log until cancelled. An idle server is silent."""
    before = engine.metrics.snapshot()
    began = time.monotonic()
    while True:
        await asyncio.sleep(INTERVAL_S)
        now = engine.metrics.snapshot()
        ended = time.monotonic()
        prompt = now["prompt_tokens"] - before["prompt_tokens"]
        output = now["generation_tokens"] - before["generation_tokens"]
        running = now["num_requests_running"]
        waiting = now["num_requests_waiting"]
        if prompt or output or running or waiting:
            seconds = ended - began
            fields = {
                "prompt_tokens_per_s": round(prompt / seconds, 1),
                "generation_tokens_per_s": round(output / seconds, 1),
                "num_running": running,
                "num_waiting": waiting,
                "kv_cache_percent": round(100 * now["kv_cache_usage_perc"], 1),
            }
            logger.info(
                "prompt %.1f tok/s, generation %.1f tok/s, %d running, %d waiting, KV cache %.1f%%",
                *fields.values(),
                extra={"fields": fields},
            )
        before, began = now, ended
