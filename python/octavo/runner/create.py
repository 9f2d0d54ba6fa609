"""make_runner: the runner that a configuration and a model ask for."""

from __future__ import annotations

import logging
from typing import Final

from octavo.config import EngineConfig
from octavo.errors import ModelLoadError
from octavo.models.pooling_model import is_pooling_model
from octavo.models.registry import ARCHITECTURES, CausalLM
from octavo.models.source import ModelSource
from octavo.runner.eager import EagerRunner
from octavo.runner.loading import LoadedModel, load, load_pooling
from octavo.runner.pooling import PoolingRunner
from octavo.runner.runner import Runner

logger = logging.getLogger("octavo.runner")


def make_runner(config: EngineConfig, source: ModelSource) -> Runner:
    """Load a model and choose its runner.

    CUDA graphs where Triton's kernels run; op by op on a CPU, with the reference ops, and for a
    foreign module that reads values on the host in the middle of a step, which cannot be captured.
    A pooling model has a runner of its own.

    Raises:
        ModelLoadError: the model does not fit, cannot be read, or is for another task than asked.
    """
    if is_pooling_model(source):
        runner = PoolingRunner(load_pooling(config, source))
        assert runner.pooling is not None, "it pools"
        _check_task(config, source, runner.pooling.task)
        return runner
    _check_task(config, source, "generate")
    loaded = load(config, source)
    on_gpu = loaded.device.type == "cuda" and config.attention_backend != "reference"
    if on_gpu and _can_be_captured(loaded):
        # Imported here: Triton is not needed, and may be missing, on a CPU.
        from octavo.runner.graphs import GraphRunner

        return GraphRunner(loaded)
    return EagerRunner(loaded)


def _can_be_captured(loaded: LoadedModel[CausalLM]) -> bool:
    if loaded.shape.architecture in ARCHITECTURES:
        return True
    from octavo.models.fallback import TransformersModel

    assert isinstance(loaded.model, TransformersModel)
    if loaded.model.wait is None:
        return True
    logger.info(
        "%s: without CUDA graphs, since its module has the host wait: %s",
        loaded.shape.architecture,
        loaded.model.wait,
    )
    return False


# A field of EngineConfig and its value -> the models' tasks that satisfy it.
_SATISFIED_BY: Final = {
    ("runner", "generate"): {"generate"},
    ("runner", "pooling"): {"embed", "token_embed", "classify", "score", "token_classify"},
    ("convert", "embed"): {"embed", "token_embed"},
    ("convert", "classify"): {"classify", "score", "token_classify"},
    ("task", "generate"): {"generate"},
    ("task", "embed"): {"embed"},
    ("task", "classify"): {"classify", "score"},
    # Vectors of two texts have a score, too.
    ("task", "score"): {"score", "embed", "token_embed"},
}


def _check_task(config: EngineConfig, source: ModelSource, task: str) -> None:
    """Refuse a model that is for something else than the configuration says."""
    for (name, value), tasks in _SATISFIED_BY.items():
        if getattr(config, name) == value and task not in tasks:
            raise ModelLoadError(
                f"{source.path}: {name} is {value!r}, but this model is made to {task}, and octavo "
                "converts none"
            )
