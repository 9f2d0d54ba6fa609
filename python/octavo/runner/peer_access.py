"""check_access: refuses GPUs of a mesh that cannot reach each other's memory."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from octavo.errors import ModelLoadError


def check_access(devices: Sequence[torch.device]) -> None:
    """Refuse devices that cannot reach each other's memory.

    Raises:
        ModelLoadError: two of them cannot.
    """
    if all(device.type == "cpu" for device in devices):
        return
    if "expandable_segments:True" in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""):
        raise ModelLoadError(
            "PYTORCH_CUDA_ALLOC_CONF: expandable_segments hides a GPU's memory from the others"
        )
    for a in devices:
        for b in devices:
            if a != b and not torch.cuda.can_device_access_peer(a, b):
                raise ModelLoadError(f"{a} cannot reach the memory of {b}: no shards on these two")
