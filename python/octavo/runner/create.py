"""Which runner a configuration gets."""

from __future__ import annotations

from octavo.config import EngineConfig
from octavo.models.source import ModelSource
from octavo.runner.model_runner import ModelRunner, resolve_device


def make_runner(config: EngineConfig, source: ModelSource) -> ModelRunner:
    """CUDA graphs where Triton's kernels run, the plain runner on a CPU or with the reference ops.

    Raises:
        ModelLoadError: the model does not fit or cannot be read.
    """
    if resolve_device(config).type == "cuda" and config.attention_backend != "reference":
        # Imported here: Triton is not needed, and may be missing, on a CPU.
        from octavo.runner.gpu_runner import GpuRunner

        return GpuRunner(config, source)
    return ModelRunner(config, source)
