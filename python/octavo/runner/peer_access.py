"""open_access: the memory of each GPU of a mesh, open to the kernels and copies of the others."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from octavo.errors import ModelLoadError


def open_access(devices: Sequence[torch.device]) -> None:
    """Let every device reach the memory of all others.

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
            if a == b:
                continue
            if not torch.cuda.can_device_access_peer(a, b):
                raise ModelLoadError(f"{a} cannot reach the memory of {b}: no shards on these two")
            # torch opens it at the first copy between them.
            torch.zeros(1, device=a).to(b)
