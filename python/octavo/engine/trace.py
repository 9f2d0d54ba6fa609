"""StepTrace: what the host and the device did in each step, as a file Perfetto can show.

It wraps the verbs of one EngineLoop while it is attached; an engine that is not traced runs no line
of this.
"""

from __future__ import annotations

import itertools
import json
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from octavo.engine.engine_loop import EngineLoop

_HOST, _DEVICE = 1, 2


class _TracedCore:
    """An EngineCore whose schedule() and update() are timed."""

    def __init__(self, core: Any, trace: StepTrace) -> None:
        self._core = core
        self.schedule = trace.timed("schedule", core.schedule)
        self.update = trace.timed("update", core.update)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)


class StepTrace:
    """Host phases (schedule, launch, collect, update) and device time of an engine's steps.

    The engine must be idle when this is made; ``detach`` leaves it as it was.
    """

    def __init__(self, loop: EngineLoop) -> None:
        self._loop = loop
        self._events: list[dict[str, Any]] = []
        self._gpu_steps: list[tuple[int, Any, Any]] = []
        self._start_ns = time.perf_counter_ns()
        self._base: Any = None
        self._core, self._runner = loop.core, loop.runner
        if hasattr(self._runner, "times_steps"):
            import torch

            self._runner.times_steps = True
            torch.cuda.synchronize()
            self._base = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._base.record()
            torch.cuda.synchronize()
            self._start_ns = time.perf_counter_ns()
        loop.core = _TracedCore(self._core, self)  # type: ignore[assignment]
        runner: Any = self._runner
        runner.launch = self.timed("launch", runner.launch)
        collect = self.timed("collect", runner.collect)

        def collect_and_keep(in_flight: Any) -> Any:
            sampled = collect(in_flight)
            if getattr(in_flight, "started", None) is not None:
                self._gpu_steps.append((in_flight.step_id, in_flight.started, in_flight.ended))
            return sampled

        runner.collect = collect_and_keep

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, leaving an event behind each time."""

        def traced(*args: Any) -> Any:
            start_ns = time.perf_counter_ns()
            result = call(*args)
            self._add(_HOST, name, start_ns, time.perf_counter_ns(), {})
            return result

        return traced

    def detach(self) -> None:
        """Stop tracing."""
        self._loop.core = self._core
        runner: Any = self._runner
        del runner.launch, runner.collect
        if hasattr(runner, "times_steps"):
            runner.times_steps = False
        for step_id, started, ended in self._gpu_steps:
            start_ms = self._base.elapsed_time(started)
            end_ns = self._start_ns + round((start_ms + started.elapsed_time(ended)) * 1e6)
            start_ns = self._start_ns + round(start_ms * 1e6)
            self._add(_DEVICE, "step", start_ns, end_ns, {"step_id": step_id})
        self._gpu_steps.clear()

    def write(self, file: Path) -> None:
        """Chrome's trace format: open it in Perfetto or chrome://tracing."""
        names = {_HOST: "host", _DEVICE: "device"}
        head = [
            {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}}
            for pid, name in names.items()
        ]
        file.write_text(json.dumps({"traceEvents": head + self._events, "displayTimeUnit": "ns"}))

    def summary_us(self) -> dict[str, float]:
        """Medians, in microseconds: each phase, and the device's step and gap between steps."""
        found: dict[str, list[float]] = {}
        for event in self._events:
            name = "device_step" if event["pid"] == _DEVICE else event["name"]
            found.setdefault(name, []).append(event["dur"])
        steps = [event for event in self._events if event["pid"] == _DEVICE]
        gaps = [b["ts"] - a["ts"] - a["dur"] for a, b in itertools.pairwise(steps)]
        if gaps:
            found["device_gap"] = gaps
        return {name: statistics.median(values) for name, values in found.items()}

    def _add(self, pid: int, name: str, start_ns: int, end_ns: int, args: dict[str, Any]) -> None:
        self._events.append(
            {
                "ph": "X",
                "name": name,
                "pid": pid,
                "tid": threading.get_native_id() if pid == _HOST else 0,
                "ts": (start_ns - self._start_ns) / 1e3,
                "dur": (end_ns - start_ns) / 1e3,
                "args": args,
            }
        )
