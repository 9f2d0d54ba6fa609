"""StepTrace: the host's and the device's time in each step, as a file for Perfetto.

While it is attached, one EngineLoop steps through a core and a runner that time the calls to its
own; an engine that is not traced runs no line of this.
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
    from octavo.runner.runner import Runner, StreamClock

_HOST, _DEVICE = 1, 2


class _TracedCore:
    """An EngineCore whose schedule() and update() are timed."""

    def __init__(self, core: Any, trace: StepTrace) -> None:
        self._core = core
        self.schedule = trace.timed("schedule", core.schedule)
        self.update = trace.timed("update", core.update)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)


class _TracedRunner:
    """A Runner whose launch() and collect() are timed."""

    def __init__(self, runner: Runner, trace: StepTrace, clock: StreamClock | None) -> None:
        self._runner = runner
        launch = trace.timed("launch", runner.launch)
        self.launch = launch if clock is None else trace.marked(launch, clock)
        self.collect = trace.timed("collect", runner.collect)
        # Every step reads these: found here, they cost it no more than without a trace.
        self.next_staging, self.max_in_flight = runner.next_staging, runner.max_in_flight

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)


class StepTrace:
    """Host phases (schedule, launch, collect, update) and device time of an engine's steps.

    A ``step`` holds its phases, and ``collect`` the ``wait`` for a device's tokens. Marks on the
    device lie outside of ``launch``, and the trace's own time is counted apart, so that ``host_us``
    is the host's work as it is without a trace.

    The engine must be idle when this is made; ``detach`` leaves it as it was.
    """

    def __init__(self, loop: EngineLoop) -> None:
        self._loop = loop
        self._events: list[dict[str, Any]] = []
        self._gpu_steps: list[tuple[int, int, int]] = []  # step id, marks before and after it
        # Within the step that runs: waiting for the device, and the trace's own time.
        self._waited_ns = self._own_ns = 0
        self._host_us: list[float] = []
        self._core, self._runner = loop.core, loop.runner
        self._clock = self._runner.observe(self._observe)
        self._start_ns = time.perf_counter_ns()
        loop.core = _TracedCore(self._core, self)  # type: ignore[assignment]
        loop.runner = _TracedRunner(self._runner, self, self._clock)
        loop.step = self._whole(loop.step)  # type: ignore[method-assign]

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, recording an event each time."""

        def traced(*args: Any) -> Any:
            start_ns = time.perf_counter_ns()
            result = call(*args)
            end_ns = time.perf_counter_ns()
            self._add(_HOST, name, start_ns, end_ns, {})
            self._own_ns += time.perf_counter_ns() - end_ns
            return result

        return traced

    def marked(self, launch: Callable[..., Any], clock: StreamClock) -> Callable[..., Any]:
        """``launch`` between two marks on the device."""

        def marked(*args: Any) -> Any:
            start_ns = time.perf_counter_ns()
            before = clock.mark()
            self._own_ns += time.perf_counter_ns() - start_ns
            in_flight = launch(*args)
            start_ns = time.perf_counter_ns()
            self._gpu_steps.append((in_flight.step_id, before, clock.mark()))
            self._own_ns += time.perf_counter_ns() - start_ns
            return in_flight

        return marked

    def _observe(self, name: str, start_ns: int, end_ns: int) -> None:
        """The runner has waited for the device."""
        began_ns = time.perf_counter_ns()
        self._waited_ns += end_ns - start_ns
        self._add(_HOST, name, start_ns, end_ns, {})
        self._own_ns += time.perf_counter_ns() - began_ns

    def _whole(self, step: Callable[[], bool]) -> Callable[[], bool]:
        def whole() -> bool:
            self._waited_ns = self._own_ns = 0
            start_ns = time.perf_counter_ns()
            did = step()
            end_ns = time.perf_counter_ns()
            if did:
                self._host_us.append((end_ns - start_ns - self._waited_ns - self._own_ns) / 1e3)
                self._add(_HOST, "step", start_ns, end_ns, {"host_us": self._host_us[-1]})
            return did

        return whole

    def detach(self) -> None:
        """Stop tracing."""
        loop: Any = self._loop
        loop.core, loop.runner = self._core, self._runner
        del loop.step
        self._runner.observe(None)
        if self._clock is not None:
            at_ns = [self._start_ns + ns for ns in self._clock.times_ns()]
            for step_id, before, after in self._gpu_steps:
                self._add(_DEVICE, "step", at_ns[before], at_ns[after], {"step_id": step_id})
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
        """Medians, in microseconds: each phase, the host's work on a step, waiting left out, and
        the device's step and gap between steps; of the gaps also the largest."""
        found: dict[str, list[float]] = {"host": self._host_us} if self._host_us else {}
        for event in self._events:
            name = "device_step" if event["pid"] == _DEVICE else event["name"]
            found.setdefault(name, []).append(event["dur"])
        steps = [event for event in self._events if event["pid"] == _DEVICE]
        gaps = [b["ts"] - a["ts"] - a["dur"] for a, b in itertools.pairwise(steps)]
        if gaps:
            found["device_gap"] = gaps
        medians = {name: statistics.median(values) for name, values in found.items()}
        return medians | ({"device_gap_max": max(gaps)} if gaps else {})

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
