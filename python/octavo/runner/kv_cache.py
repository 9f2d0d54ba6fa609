"""How many KV blocks there are, and the tensors they live in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.errors import ModelLoadError
from octavo.models.config import ModelConfig

# A CPU's cache unless told otherwise, or one request of max_model_len needs more: 10,200 tokens of
# a 135M model in bfloat16. Pages are touched only when blocks are first used, but cached prefixes
# use them all in time: a 135M model's process peaks at 743 MB, where it took 1.3 GB with 512 MiB.
DEFAULT_CPU_KV_BYTES = 224 << 20
# Of the memory that is free after loading, what a CPU engine may plan to use.
MAX_CPU_MEMORY_FRACTION = 0.5


@dataclass(frozen=True)
class KVCachePlan:
    """The resolved sizes."""

    num_blocks: int
    block_size: int
    max_model_len: int
    bytes_per_block: int

    @property
    def num_tokens(self) -> int:
        """Tokens all blocks hold together."""
        return self.num_blocks * self.block_size

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return self.num_blocks * self.bytes_per_block


def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Keys and values of one token in all layers."""
    return 2 * config.num_layers * config.kv_size * dtype.itemsize


def plan_kv_cache(
    config: ModelConfig,
    dtype: torch.dtype,
    *,
    block_size: int,
    max_num_seqs: int,
    max_model_len: int | None,
    kv_cache_memory_bytes: int | None,
    default_bytes: int,
    available_bytes: int,
) -> KVCachePlan:
    """Fit the cache into memory.

    ``max_model_len``: None is the model's own limit, -1 the longest that fits.
    ``kv_cache_memory_bytes``: what the user gave; else ``default_bytes``, raised to what one
    request of max_model_len needs, and never more than ``available_bytes`` or than max_num_seqs
    requests of max_model_len need.

    Raises:
        ModelLoadError: a request of max_model_len would not fit; names what would.
    """
    per_block = bytes_per_token(config, dtype) * block_size
    limit = config.max_context_len if max_model_len in (None, -1) else max_model_len
    assert limit is not None
    blocks_per_request = -(-limit // block_size)
    if kv_cache_memory_bytes is not None:
        budget = kv_cache_memory_bytes
    else:
        wanted = default_bytes
        if max_model_len != -1:
            wanted = max(wanted, blocks_per_request * per_block)
        budget = min(wanted, available_bytes)
    num_blocks = min(budget // per_block, max_num_seqs * blocks_per_request)
    if num_blocks < blocks_per_request and max_model_len == -1:
        limit = num_blocks * block_size
    if num_blocks < 1 or limit > num_blocks * block_size:
        raise ModelLoadError(
            f"max_model_len {limit} needs {_mib(blocks_per_request * per_block)} of KV cache and "
            f"there are {_mib(budget)}: raise kv_cache_memory_bytes, or lower max_model_len to "
            f"{max(0, num_blocks * block_size)} (-1 fits it)"
        )
    return KVCachePlan(num_blocks, block_size, limit, per_block)


def allocate_kv_cache(
    plan: KVCachePlan, config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """Each layer's (keys, values): [num_blocks, num_kv_heads, block_size, head_dim].

    On a CPU memory is left as the system gives it, so that unused blocks cost nothing.
    """
    shape = (plan.num_blocks, config.num_kv_heads, plan.block_size, config.head_dim)
    make = torch.empty if device.type == "cpu" else torch.zeros
    return [
        (make(shape, dtype=dtype, device=device), make(shape, dtype=dtype, device=device))
        for _ in range(config.num_layers)
    ]


def _mib(nbytes: int) -> str:
    return f"{nbytes / (1 << 20):,.0f} MiB"
