"""Offline: an engine in this process, which its callers' threads step by turns."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from tqdm import tqdm

from octavo.engine.engine_loop import EngineLoop
from octavo.engine.llm_engine import LLMEngine
from octavo.engine.prompts import Prompt, is_token_id

if TYPE_CHECKING:
    from octavo._core import Delta
    from octavo.config import EngineConfig
    from octavo.runner.request_state import RequestState

T = TypeVar("T")

# Whether a progress bar is shown, or what makes it.
UseTqdm = bool | Callable[..., Any]


class Offline:
    """The base of LLM: one call at a time has the engine, and leaves it empty.

    ``llm_engine``: the same engine for programs that step by themselves.

    Raises:
        ValueError, OSError: the model cannot be loaded.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self._engine = EngineLoop(config)
        self._engine.finish_warm_up()
        self.llm_engine = LLMEngine(self._engine)
        self._pid = os.getpid()
        # Held by the call that steps the engine, on the thread ``_owner``.
        self._lock = threading.Lock()
        self._owner: int | None = None
        # True while the engine is known to be empty.
        self._is_clean = True

    def _run_to_end(
        self,
        requests: Sequence[Sequence[RequestState]],
        take: Callable[[Delta], bool],
        use_tqdm: UseTqdm,
    ) -> None:
        """Queue requests and step until all have ended.

        Args:
            take: gets each sample's one Delta; returns whether its request has ended.

        Raises:
            RuntimeError: the model failed on one of them.
        """
        engine = self._engine
        for samples in requests:
            engine.submit(samples)
        num_unfinished = sum(map(len, requests))
        with progress_bar(use_tqdm, len(requests), "requests") as progress:
            while num_unfinished:
                engine.step()
                for delta in engine.core.outbox.drain():
                    if delta.finish_reason == "error":
                        why = delta.stop_reason or "see the log"
                        raise RuntimeError(f"request {delta.request_id} failed: {why}")
                    num_unfinished -= 1
                    if take(delta):
                        progress.update()

    def _alone(self, work: Callable[[], T]) -> T:
        """Run ``work`` while no other call does, on an engine that is empty before and after.

        Raises:
            RuntimeError: in a forked child, from within another call on the same thread, or while
                requests of ``llm_engine`` are unfinished.
        """
        if os.getpid() != self._pid:
            raise RuntimeError("an LLM does not work in a forked child: make one there")
        if self._owner == threading.get_ident():
            raise RuntimeError("this LLM is at work on this thread already")
        if self.llm_engine.has_unfinished_requests():
            raise RuntimeError("llm_engine has unfinished requests: step() until they end")
        with self._lock:
            # An interrupt may come here too: the next call cleans up what this one cannot.
            try:
                self._owner = threading.get_ident()
                if not self._is_clean:
                    self._engine.abandon()
                self._is_clean = False
                result = work()
                self._is_clean = True
                return result
            finally:
                self._owner = None
                if not self._is_clean:
                    self._engine.abandon()
                    self._is_clean = True


def progress_bar(use_tqdm: UseTqdm, total: int, desc: str) -> Any:
    """A progress bar, which may be hidden."""
    if callable(use_tqdm):
        return use_tqdm(total=total, desc=desc)
    return tqdm(total=total, desc=desc, disable=not use_tqdm)


def as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as a list of them; an empty list is none."""
    single = isinstance(prompts, str | Mapping) or (
        len(prompts) > 0 and all(is_token_id(p) for p in prompts)
    )
    return [prompts] if single else list(prompts)  # type: ignore[arg-type,list-item]
