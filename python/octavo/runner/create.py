"""make_runner: the runner that a configuration and a model ask for."""

from __future__ import annotations

from octavo.config import EngineConfig
from octavo.models.pooling_model import is_pooling_model
from octavo.models.registry import ARCHITECTURES
from octavo.models.source import ModelSource
from octavo.runner.eager import EagerRunner
from octavo.runner.loading import load, load_pooling
from octavo.runner.pooling import PoolingRunner
from octavo.runner.runner import Runner


def make_runner(config: EngineConfig, source: ModelSource) -> Runner:
    """Load a model and choose its runner.

    CUDA graphs where Triton's kernels run; op by op on a CPU, with the reference ops, and for a
    model without a native implementation: a foreign module may read values on the host in the
    middle of a step, which cannot be captured. A pooling model has a runner of its own.

    Raises:
        ModelLoadError: the model does not fit or cannot be read.
    """
    if is_pooling_model(source):
        return PoolingRunner(load_pooling(config, source))
    loaded = load(config, source)
    native = source.model_config.architecture in ARCHITECTURES
    if native and loaded.device.type == "cuda" and config.attention_backend != "reference":
        # Imported here: Triton is not needed, and may be missing, on a CPU.
        from octavo.runner.graphs import GraphRunner

        return GraphRunner(loaded)
    return EagerRunner(loaded)
