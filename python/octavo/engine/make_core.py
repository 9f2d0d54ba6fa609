"""make_core: the scheduler of a runner's steps, as a configuration asks for it."""

from __future__ import annotations

from octavo._core import EngineCore, Tokenizer
from octavo.config import EngineConfig
from octavo.runner.runner import Runner


def keeps_prefixes(config: EngineConfig, runner: Runner) -> bool:
    """True if blocks are found again; without keys and values from earlier steps none are."""
    return config.enable_prefix_caching and runner.keeps_kv


def make_core(config: EngineConfig, runner: Runner, tokenizer: Tokenizer | None) -> EngineCore:
    """The scheduler of a runner's steps, with what surrounds it."""
    return EngineCore(
        num_blocks=runner.num_blocks,
        block_size=runner.block_size,
        max_num_seqs=runner.max_num_seqs,
        max_num_batched_tokens=runner.max_num_batched_tokens,
        max_model_len=runner.max_model_len,
        enable_prefix_caching=keeps_prefixes(config, runner),
        # Without keys and values from earlier steps, a prompt is computed in one.
        enable_chunked_prefill=config.enable_chunked_prefill and runner.keeps_kv,
        long_prefill_token_threshold=config.long_prefill_token_threshold,
        long_prefill_token_threshold_adaptive=config.long_prefill_token_threshold_adaptive,
        max_step_ms=config.max_step_ms,
        padded_prompts=runner.padded_prompts,
        policy=config.scheduling_policy,
        num_stages=runner.num_stages,
        stream_interval=config.stream_interval,
        tokenizer=tokenizer,
        num_state_checkpoints=runner.num_state_checkpoints,
        state_checkpoint_interval=config.state_checkpoint_interval,
        prefix_sharing=runner.prefix_sharing,
    )
