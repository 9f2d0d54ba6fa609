"""StepTimes: histograms of the host's time in each phase of a step."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any, Final

PHASES: Final = ("schedule", "launch", "collect", "update")

# From a scheduler's microseconds to a CPU's prefill of many seconds.
BOUNDS_S: Final = tuple(
    digit * 10.0**exponent for exponent in range(-5, 2) for digit in (1.0, 2.5, 5.0)
)


class StepTimes:
    """One histogram per phase. Written by the engine's thread alone, read by any.

    ``schedule`` plans, ``launch`` starts the device (a CPU computes in it), ``collect`` waits for
    the tokens, ``update`` accounts for them.
    """

    def __init__(self) -> None:
        self._counts = {phase: [0] * (len(BOUNDS_S) + 1) for phase in PHASES}
        self._sums = dict.fromkeys(PHASES, 0.0)

    def observe(self, phase: str, seconds: float) -> None:
        """One phase of one step."""
        self._counts[phase][bisect_left(BOUNDS_S, seconds)] += 1
        self._sums[phase] += seconds

    def snapshot(self) -> dict[str, dict[str, Any]]:
        """By phase, in the shape of Metrics.snapshot's histograms."""
        found = {}
        for phase, counts in self._counts.items():
            total, buckets = 0, []
            for bound, count in zip((*BOUNDS_S, float("inf")), counts.copy(), strict=True):
                total += count
                buckets.append((bound, total))
            found[phase] = {"buckets": buckets, "sum": self._sums[phase], "count": total}
        return found
