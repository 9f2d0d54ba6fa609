"""cleanup_dist_env_and_memory: what programs written for vLLM call between two LLMs."""

from __future__ import annotations

import gc


def cleanup_dist_env_and_memory(shutdown_ray: bool = False) -> None:
    """Free the memory of engines that are no longer referenced.

    There is no distributed environment to end. ``shutdown_ray`` makes no difference.
    """
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
