"""How many blocks fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from octavo.errors import ModelLoadError
from octavo.models.registry import config_from_hf
from octavo.runner.host_memory import available_cpu_bytes
from octavo.runner.kv_cache import (
    KVCachePlan,
    allocate_kv_cache,
    bytes_per_token,
    plan_kv_cache,
)

MIB = 1 << 20
# 2 x 8 layers x 2 kv heads x 64 x 4 bytes: 8 KiB a token, 128 KiB a block.
CONFIG = config_from_hf(
    {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 100,
        "hidden_size": 256,
        "intermediate_size": 64,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    }
)


def plan(**changes: Any) -> KVCachePlan:
    arguments: dict[str, Any] = {
        "block_size": 16,
        "max_num_seqs": 4,
        "max_model_len": None,
        "kv_cache_memory_bytes": None,
        "default_bytes": 32 * MIB,
        "available_bytes": 1024 * MIB,
        **changes,
    }
    return plan_kv_cache([CONFIG], torch.float32, **arguments)


def test_the_default_holds_what_it_says() -> None:
    assert bytes_per_token(CONFIG, torch.float32) == 8192
    got = plan()
    assert (got.num_blocks, got.max_model_len, got.nbytes) == (256, 2048, 32 * MIB)


def test_parts_on_one_device_share_its_memory() -> None:
    halves = [CONFIG.replace(num_kv_heads=1)] * 2
    whole, split = (
        plan_kv_cache(
            parts,
            torch.float32,
            block_size=16,
            max_num_seqs=4,
            max_model_len=None,
            kv_cache_memory_bytes=None,
            default_bytes=32 * MIB,
            available_bytes=1024 * MIB,
        )
        for parts in ([CONFIG], halves)
    )
    assert split == whole


def test_no_more_than_all_requests_can_use() -> None:
    assert plan(max_model_len=100).num_blocks == 4 * 7


def test_the_default_grows_to_hold_one_request() -> None:
    assert plan(default_bytes=MIB).num_blocks == 128


def test_never_more_than_is_available() -> None:
    assert plan(default_bytes=900 * MIB, available_bytes=20 * MIB).num_blocks == 160
    with pytest.raises(ModelLoadError, match=r"2048 needs 16 MiB .* lower max_model_len to 1024"):
        plan(available_bytes=8 * MIB)


def test_the_users_bytes_win_and_must_hold_a_request() -> None:
    assert plan(kv_cache_memory_bytes=17 * MIB).num_blocks == 136
    with pytest.raises(ModelLoadError, match="-1 fits it"):
        plan(kv_cache_memory_bytes=2 * MIB)


def test_minus_one_fits_the_context_to_memory() -> None:
    assert plan(max_model_len=-1).max_model_len == 2048
    got = plan(max_model_len=-1, kv_cache_memory_bytes=2 * MIB + 5)
    assert (got.num_blocks, got.max_model_len) == (16, 256)
    with pytest.raises(ModelLoadError, match="raise kv_cache_memory_bytes"):
        plan(max_model_len=-1, kv_cache_memory_bytes=1000)


def test_each_layer_gets_its_tensors() -> None:
    caches = allocate_kv_cache(plan(max_model_len=32), CONFIG, torch.bfloat16, torch.device("cpu"))
    assert len(caches) == 8
    for k_cache, v_cache in caches:
        assert k_cache.shape == v_cache.shape == (8, 2, 16, 64)
        assert k_cache.dtype == torch.bfloat16


def test_a_byte_an_element_holds_nearly_twice_as_many_blocks() -> None:
    assert bytes_per_token(CONFIG, torch.int8) == 8 * 2 * 2 * (64 + 4)
    made = plan_kv_cache(
        [CONFIG], torch.float8_e4m3fn, block_size=16, max_num_seqs=256, max_model_len=32,
        kv_cache_memory_bytes=MIB, default_bytes=MIB, available_bytes=MIB,
    )  # fmt: skip
    assert made.num_blocks == MIB // (16 * 8 * 2 * 2 * 68)
    caches = allocate_kv_cache(made, CONFIG, torch.float8_e4m3fn, torch.device("cpu"))
    nbytes = sum(cache.untyped_storage().nbytes() for pair in caches for cache in pair)
    assert nbytes == made.nbytes
    assert ("KV cache", f"{made.nbytes / MIB:,.1f} MiB, float8_e4m3fn") in made.rows(
        torch.float8_e4m3fn
    )


def test_available_memory_is_a_sane_number() -> None:
    assert 16 * MIB < available_cpu_bytes() < 1 << 50
