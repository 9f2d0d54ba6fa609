"""resolve_device and shard_devices: where a model goes, by its configuration and this machine."""

from __future__ import annotations

import torch

from octavo.config import EngineConfig
from octavo.errors import ModelLoadError


def resolve_device(config: EngineConfig) -> torch.device:
    """The device that ``--device`` means here.

    Raises:
        ModelLoadError: a GPU is asked for and there is none.
    """
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ModelLoadError("device cuda: there is no GPU that torch can use")
    return torch.device(config.device)


def shard_devices(config: EngineConfig) -> list[torch.device]:
    """Each shard's device, stage by stage: those of ``--mesh``, else as many as there are to be.

    Raises:
        ModelLoadError: they are not there, not of one kind, or another number is asked for.
    """
    size, names = config.tensor_parallel_size * config.pipeline_parallel_size, config.mesh
    asked = f"{config.tensor_parallel_size} x {config.pipeline_parallel_size}"
    if names is None:
        device = resolve_device(config)
        if size == 1:
            return [device]
        if device.type == "cpu":
            raise ModelLoadError(
                f"{asked} shards: a CPU is one device, and one shard uses its cores all; "
                f"--mesh {','.join(['cpu'] * size)} splits a model on it all the same"
            )
        count = torch.cuda.device_count()
        if count < size:
            raise ModelLoadError(
                f"{asked} shards: this machine has {count} GPUs, and tensor_parallel_size times "
                "pipeline_parallel_size may be no more"
            )
        devices = [torch.device("cuda", index) for index in range(size)]
    else:
        try:
            devices = [torch.device(name.strip()) for name in names.split(",")]
        except RuntimeError as error:
            raise ModelLoadError(f"mesh {names!r}: {str(error).splitlines()[0]}") from None
        # Without tensor_parallel_size, what the stages leave.
        is_whole = len(devices) % config.pipeline_parallel_size == 0
        if size != len(devices) and not (config.tensor_parallel_size == 1 and is_whole):
            raise ModelLoadError(f"mesh {names!r} has {len(devices)} devices for {asked} shards")
    if len({device.type for device in devices}) > 1:
        raise ModelLoadError(f"mesh {names!r}: its devices must be of one kind")
    for device in devices:
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ModelLoadError(
                f"mesh {names!r}: this machine has {torch.cuda.device_count()} GPUs"
            )
    if len(devices) > 1 and devices[0].type == "cuda":
        _check_gpu_mesh(config)
    return devices


def _check_gpu_mesh(config: EngineConfig) -> None:
    """Raises ModelLoadError where shards on GPUs do not have what is asked for."""
    if config.attention_backend == "reference":
        raise ModelLoadError("attention_backend reference: shards on GPUs run Triton's kernels")
