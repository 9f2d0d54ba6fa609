"""The paged KV cache: the number of its blocks, and the tensors they live in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.errors import ModelLoadError
from octavo.kernels.kv_cache import bytes_per_row, make_cache
from octavo.models.config import ModelConfig

# A CPU's cache unless told otherwise, or one request of max_model_len needs more: 10,200 tokens of
# a 135M model in bfloat16. Pages are touched only when blocks are first used, but cached prefixes
# use them all in time, so this is a large part of a small model's process (its peak: bench/cpu.py).
DEFAULT_CPU_KV_BYTES = 224 << 20
# Of the memory that is free after loading, the part that a CPU engine may plan to use.
MAX_CPU_MEMORY_FRACTION = 0.5


@dataclass(frozen=True)
class KVCachePlan:
    """The resolved sizes, of the cache on one device."""

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

    def rows(self, dtype: torch.dtype) -> list[tuple[str, str]]:
        """Memory and tokens of the cache, as Runner.memory lists them."""
        name = str(dtype).removeprefix("torch.")
        return [
            ("KV cache", f"{_mib(self.nbytes, 1)}, {name}"),
            ("KV blocks", f"{self.num_blocks:,} of {self.block_size} tokens"),
            ("KV tokens", f"{self.num_tokens:,}"),
            ("context", f"{self.max_model_len:,} tokens"),
        ]


def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Keys and values of one token in all layers."""
    copies = 1 if config.latent is not None else 2
    rows = (shape.num_heads * bytes_per_row(shape.head_dim, dtype) for shape in config.cache_shapes)
    return copies * sum(rows)


def plan_kv_cache(
    parts: Sequence[ModelConfig],
    dtype: torch.dtype,
    *,
    block_size: int,
    max_num_seqs: int,
    max_model_len: int | None,
    kv_cache_memory_bytes: int | None,
    num_blocks: int | None = None,
    default_bytes: int,
    available_bytes: int,
) -> KVCachePlan:
    """Fit the cache into a device's memory.

    Args:
        parts: the shapes of the parts of the model that share the memory, in most cases one: the
            whole model.
        max_model_len: None is the model's own limit, -1 the longest that fits.
        kv_cache_memory_bytes: the user's choice; None takes ``default_bytes``, raised to the need
            of one request of max_model_len, but never more than ``available_bytes`` or than the
            need of max_num_seqs requests of max_model_len.
        num_blocks: so many, in place of what the bytes would give.

    Raises:
        ModelLoadError: a request of max_model_len would not fit; names a length that would.
    """
    # Where no layer keeps keys and values, blocks merely name tokens.
    per_block = sum(bytes_per_token(part, dtype) for part in parts) * block_size or 1
    limit = parts[0].max_context_len if max_model_len in (None, -1) else max_model_len
    assert limit is not None
    blocks_per_request = -(-limit // block_size)
    if num_blocks is not None:
        budget = num_blocks * per_block
    elif kv_cache_memory_bytes is not None:
        budget = kv_cache_memory_bytes
    else:
        wanted = default_bytes
        if max_model_len != -1:
            wanted = max(wanted, blocks_per_request * per_block)
        budget = min(wanted, available_bytes)
    if num_blocks is None:
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
    """(keys, values) of each layer that keeps them.

    Each is [num_blocks, num_kv_heads, block_size, head_dim], of the layer's heads.

    Of latent attention both are one tensor.
    """
    caches = []
    for layer in config.cache_shapes:
        shape = (plan.num_blocks, layer.num_heads, plan.block_size, layer.head_dim)
        keys = make_cache(shape, dtype, device)
        shared = config.latent is not None
        caches.append((keys, keys if shared else make_cache(shape, dtype, device)))
    return caches


def _mib(nbytes: int, digits: int = 0) -> str:
    return f"{nbytes / (1 << 20):,.{digits}f} MiB"
