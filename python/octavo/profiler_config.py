"""ProfilerConfig: where ``LLM.stop_profile`` writes, under vLLM's name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(slots=True)
class ProfilerConfig:
    """Settings of ``LLM.start_profile`` and ``stop_profile``.

    Args:
        profiler: makes no difference: there is one, ``LLM.trace``.
        torch_profiler_dir: the folder of the files; "" is ``octavo-profile`` here.
        delay_iterations, max_iterations: only 0: a profile has each step between the two calls.

    Raises:
        ValueError: another number of iterations.
    """

    profiler: str | None = None
    torch_profiler_dir: str = ""
    delay_iterations: int = 0
    max_iterations: int = 0

    def __post_init__(self) -> None:
        for name in ("delay_iterations", "max_iterations"):
            if getattr(self, name):
                raise ValueError(
                    f"profiler_config.{name} must be 0: a profile has each step from "
                    "start_profile to stop_profile"
                )

    @classmethod
    def of(cls, given: ProfilerConfig | Mapping[str, Any] | None) -> ProfilerConfig:
        """From an object of this class or a mapping; settings of other profilers are left out."""
        if isinstance(given, ProfilerConfig):
            return given
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in (given or {}).items() if name in names})
