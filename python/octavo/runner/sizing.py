"""StepSizes: the limits of every step, and the KV cache that fits a loaded model's device."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from octavo._core import Staging
from octavo.config import EngineConfig
from octavo.errors import ModelLoadError
from octavo.kernels.shared_prefixes import MAX_GROUPS
from octavo.models.config import ModelConfig
from octavo.models.registry import CausalLM
from octavo.runner.host_memory import available_cpu_bytes
from octavo.runner.kv_cache import (
    DEFAULT_CPU_KV_BYTES,
    MAX_CPU_MEMORY_FRACTION,
    KVCachePlan,
    bytes_per_token,
    plan_kv_cache,
)
from octavo.runner.loading import LoadedModel
from octavo.runner.state_cache import (
    CHECKPOINTS_FRACTION,
    DEFAULT_CPU_CHECKPOINT_BYTES,
    StatePlan,
    bytes_per_state,
    plan_states,
)

# Requests and tokens of the largest step, unless told otherwise: more on a GPU, whose steps of few
# tokens take as long as those of many, than on a CPU, where activations should stay in its caches.
_CPU_NUM_SEQS, _GPU_NUM_SEQS = 64, 256
_CPU_TOKENS, _GPU_TOKENS = 2048, 8192


@dataclass(frozen=True, slots=True)
class StepSizes:
    """The limits that the scheduler keeps to."""

    num_blocks: int  # of the KV cache
    block_size: int  # tokens a block
    max_num_seqs: int  # requests a step
    max_num_batched_tokens: int  # tokens a step
    max_model_len: int  # tokens a request
    states: StatePlan | None = None

    @property
    def max_blocks_per_seq(self) -> int:
        """Blocks of the longest request: the width of a block table."""
        return -(-self.max_model_len // self.block_size)

    @property
    def plan_len(self) -> int:
        """int32 elements of the largest plan."""
        return Staging.required_len(
            self.max_num_batched_tokens,
            self.max_num_seqs,
            self.max_model_len,
            self.block_size,
            self.states is not None,
            MAX_GROUPS,
        )

    def rows(self) -> list[tuple[str, str]]:
        """The largest step, as Runner.memory lists it."""
        states = [] if self.states is None else self.states.rows()
        return [
            *states,
            ("requests in a step", f"{self.max_num_seqs:,}"),
            ("tokens in a step", f"{self.max_num_batched_tokens:,}"),
        ]


def max_num_seqs(loaded: LoadedModel[CausalLM]) -> int:
    """Requests of the largest step."""
    default = _CPU_NUM_SEQS if loaded.device.type == "cpu" else _GPU_NUM_SEQS
    return loaded.config.max_num_seqs or default


def max_num_batched_tokens(loaded: LoadedModel[CausalLM], max_model_len: int) -> int:
    """Tokens of the largest step: without chunks it must hold the longest prompt.

    Raises:
        ModelLoadError: the setting is less than that.
    """
    config = loaded.config
    if config.enable_chunked_prefill:
        return _asked_tokens(loaded)
    tokens = config.max_num_batched_tokens or max(_asked_tokens(loaded), max_model_len)
    if tokens < max_model_len:
        raise ModelLoadError(
            f"max_num_batched_tokens {tokens} must be at least max_model_len "
            f"{max_model_len} without chunked prefill"
        )
    return tokens


def max_step_tokens(loaded: LoadedModel[CausalLM]) -> int:
    """Tokens that no step exceeds, before the KV cache has fixed max_model_len."""
    config, tokens = loaded.config, _asked_tokens(loaded)
    if config.enable_chunked_prefill:
        return tokens
    return max(tokens, config.max_model_len or 0, loaded.shape.max_context_len)


def _asked_tokens(loaded: LoadedModel[CausalLM]) -> int:
    default = _CPU_TOKENS if loaded.device.type == "cpu" else _GPU_TOKENS
    return loaded.config.max_num_batched_tokens or default


def available_bytes(config: EngineConfig, device: torch.device) -> int:
    """The part of a device's free memory that a KV cache may take."""
    if device.type == "cpu":
        return int(available_cpu_bytes() * MAX_CPU_MEMORY_FRACTION)
    free, _total = torch.cuda.mem_get_info(device)
    return int(free * config.gpu_memory_utilization)


def fit_cache(loaded: LoadedModel[CausalLM], available_bytes: int) -> tuple[KVCachePlan, StepSizes]:
    """Plan the KV cache in ``available_bytes`` of each device, and with it the largest step.

    Raises:
        ModelLoadError: one request of max_model_len does not fit.
    """
    config = loaded.config
    # Of the device that holds the most of a token: stages may differ in layers.
    on_device: dict[torch.device, list[ModelConfig]] = {}
    for part in loaded.parts:
        on_device.setdefault(part.device, []).append(part.model.config)
    parts = max(
        on_device.values(),
        key=lambda configs: sum(bytes_per_token(config, loaded.kv_dtype) for config in configs),
    )
    states = _fit_states(loaded, available_bytes)
    if states is not None:
        available_bytes = max(0, available_bytes - states.nbytes)
    plan = plan_kv_cache(
        parts,
        loaded.kv_dtype,
        block_size=config.block_size,
        max_num_seqs=max_num_seqs(loaded),
        max_model_len=config.max_model_len,
        kv_cache_memory_bytes=config.kv_cache_memory_bytes,
        num_blocks=config.num_gpu_blocks_override,
        default_bytes=DEFAULT_CPU_KV_BYTES if loaded.device.type == "cpu" else available_bytes,
        available_bytes=available_bytes,
    )
    sizes = StepSizes(
        num_blocks=plan.num_blocks,
        block_size=plan.block_size,
        max_num_seqs=max_num_seqs(loaded),
        max_num_batched_tokens=max_num_batched_tokens(loaded, plan.max_model_len),
        max_model_len=plan.max_model_len,
        states=states,
    )
    return plan, sizes


def _fit_states(loaded: LoadedModel[CausalLM], available_bytes: int) -> StatePlan | None:
    """The rows of states, where layers have any."""
    config = loaded.config
    if not config.enable_prefix_caching:
        checkpoint_bytes = 0
    elif loaded.device.type == "cpu":
        checkpoint_bytes = min(DEFAULT_CPU_CHECKPOINT_BYTES, available_bytes)
    else:
        checkpoint_bytes = int(CHECKPOINTS_FRACTION * available_bytes)
    on_device: Counter[torch.device] = Counter()
    for part in loaded.parts:
        on_device[part.device] += bytes_per_state(part.model.config, loaded.dtypes.activations)
    return plan_states(
        max(on_device.values()),
        max_num_seqs=max_num_seqs(loaded),
        num_checkpoints=config.num_state_checkpoints,
        checkpoint_bytes=checkpoint_bytes,
    )
