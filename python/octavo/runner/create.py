"""Which runner a configuration gets."""

from __future__ import annotations

from octavo.config import EngineConfig
from octavo.models.pooling_model import is_pooling_model
from octavo.models.registry import ARCHITECTURES
from octavo.models.source import ModelSource
from octavo.runner.eager import EagerRunner, resolve_device
from octavo.runner.pooling import PoolingRunner


def make_runner(config: EngineConfig, source: ModelSource) -> EagerRunner | PoolingRunner:
    """CUDA graphs where Triton's kernels run, the plain runner on a CPU or with the reference ops.

    A model that gives vectors gets a runner of its own. One of no family here gets the plain runner
    too: what a foreign module reads on the host in the middle of a step cannot be captured.

    Raises:
        ModelLoadError: the model does not fit or cannot be read.
    """
    if is_pooling_model(source):
        return PoolingRunner(config, source)
    own = source.model_config.architecture in ARCHITECTURES
    if own and resolve_device(config).type == "cuda" and config.attention_backend != "reference":
        # Imported here: Triton is not needed, and may be missing, on a CPU.
        from octavo.runner.graphs import GraphRunner

        return GraphRunner(config, source)
    return EagerRunner(config, source)
