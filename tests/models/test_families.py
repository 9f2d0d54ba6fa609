"""Every family against transformers, in float32: tiny random models of odd sizes.

A case's layers, heads and switches are chosen so that each branch of the family's file runs: two
layers of each kind, windows shorter than the prompt, heads of 40, 80 and 96, one and three KV
heads, tied and untied embeddings, biases on and off.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from octavo.models.registry import ARCHITECTURES

# What HF calls a family, and the config that differs from ``save_tiny``'s.
HEADS_OF_40: dict[str, Any] = {"head_dim": 40, "num_key_value_heads": 1}
HEADS_OF_80: dict[str, Any] = {
    "hidden_size": 96,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 80,
}
HEADS_OF_96: dict[str, Any] = {"head_dim": 96, "num_key_value_heads": 2}
BIASES = {"attention_bias": True, "mlp_bias": True}
TIED = {"tie_word_embeddings": True}
UNTIED = {"tie_word_embeddings": False}


def rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, **parameters}}


LLAMA3 = rope(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
YARN = rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
LINEAR = rope(rope_type="linear", factor=3.0)
# Within the trained length, where it is the plain embedding.
DYNAMIC = rope(rope_type="dynamic", factor=2.0)


def longrope(pairs: int) -> dict[str, Any]:
    """Trained at 200, stretched to 400."""
    return {
        "max_position_embeddings": 400,
        "original_max_position_embeddings": 200,
        **rope(
            rope_type="longrope",
            short_factor=[1.0 + 0.02 * i for i in range(pairs)],
            long_factor=[1.0 + 0.3 * i for i in range(pairs)],
        ),
    }


LOCAL = "sliding_attention"
GLOBAL = "full_attention"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {**HEADS_OF_80, **UNTIED}),
    "Llama, one KV head, biases, tied": ("Llama", {**HEADS_OF_40, **BIASES, **TIED}),
    "Llama, rope llama3": ("Llama", {**HEADS_OF_96, **LLAMA3}),
    "Llama, rope yarn": ("Llama", {**HEADS_OF_40, **YARN}),
    "Llama, rope linear": ("Llama", {**HEADS_OF_40, **LINEAR}),
    "Llama, rope dynamic": ("Llama", {**HEADS_OF_40, **DYNAMIC}),
    "Mistral, window": ("Mistral", {**HEADS_OF_40, "sliding_window": 24}),
    "Mistral, no window": ("Mistral", {**HEADS_OF_80, "sliding_window": None, **TIED}),
    "Qwen2": ("Qwen2", {**TIED, "num_key_value_heads": 1}),
    "Qwen2, windows in later layers": (
        "Qwen2",
        {
            "num_hidden_layers": 4,
            "use_sliding_window": True,
            "sliding_window": 24,
            "max_window_layers": 2,
        },
    ),
    "Qwen2, rope yarn": (
        "Qwen2",
        {"hidden_size": 120, "num_attention_heads": 3, **YARN, "num_key_value_heads": 3},
    ),
    "Qwen3": ("Qwen3", {**HEADS_OF_80, **TIED}),
    "Qwen3, biases": ("Qwen3", {**HEADS_OF_96, **UNTIED, "attention_bias": True}),
    "SmolLM3": (
        "SmolLM3",
        {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0], **TIED, "num_key_value_heads": 1},
    ),
    "SmolLM3, windows without rope": (
        "SmolLM3",
        {
            "num_hidden_layers": 4,
            "no_rope_layer_interval": 2,
            "use_sliding_window": True,
            "sliding_window": 24,
            **UNTIED,
            **BIASES,
        },
    ),
    "Phi-3": ("Phi3", {"hidden_size": 120, "num_attention_heads": 3, "num_key_value_heads": 3}),
    "Phi-3, window": ("Phi3", {"sliding_window": 24, "num_key_value_heads": 1}),
    "Phi-3.5, longrope": ("Phi3", {"num_key_value_heads": 1, **longrope(8)}),
    "Phi-4-mini, partial longrope": (
        "Phi3",
        {
            "hidden_size": 160,
            **TIED,
            **longrope(15),
            "rope_parameters": {
                **longrope(15)["rope_parameters"],
                "partial_rotary_factor": 0.75,
            },
        },
    ),
    "Gemma": ("Gemma", {**HEADS_OF_40, **TIED}),
    "Gemma 2": (
        "Gemma2",
        {
            **HEADS_OF_80,
            **TIED,
            "num_hidden_layers": 4,
            "sliding_window": 24,
            "query_pre_attn_scalar": 33,
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 9.0,
        },
    ),
    "Gemma 3": (
        "Gemma3Text",
        {
            **HEADS_OF_40,
            "num_hidden_layers": 4,
            "layer_types": [LOCAL, GLOBAL, LOCAL, GLOBAL],
            "sliding_window": 24,
            "query_pre_attn_scalar": 50,
            "rope_parameters": {
                LOCAL: {"rope_type": "default", "rope_theta": 1000.0},
                GLOBAL: {"rope_type": "linear", "factor": 4.0, "rope_theta": 50000.0},
            },
        },
    ),
    "Phi-2": (
        "Phi",
        {"hidden_size": 160, "num_key_value_heads": 4, **rope(partial_rotary_factor=0.4)},
    ),
    "Phi-2, grouped": ("Phi", {"num_key_value_heads": 1, **rope(partial_rotary_factor=0.5)}),
    "OLMo 2": ("Olmo2", {"hidden_size": 120, "num_attention_heads": 3, "num_key_value_heads": 1}),
    "OLMo 2, biases, tied": ("Olmo2", {"attention_bias": True, **TIED}),
    "Granite": (
        "Granite",
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.0,
            **TIED,
            **BIASES,
        },
    ),
    "Mixtral": (
        "Mixtral",
        {**HEADS_OF_40, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 24},
    ),
    "Qwen3-MoE": (
        "Qwen3Moe",
        {
            **HEADS_OF_80,
            "num_hidden_layers": 4,
            "mlp_only_layers": [0, 2],
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "norm_topk_prob": True,
        },
    ),
    "Qwen3-MoE, weights as they are": (
        "Qwen3Moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "decoder_sparse_step": 2,
            "num_hidden_layers": 4,
            **TIED,
        },
    ),
}


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(3, 300), k=length)


def logits_of(model: Any, token_ids: Sequence[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([list(token_ids)])).logits[0]
        return logits


def assert_greedy(model: Any, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
    """That transformers, given the same beginning, picks each of these tokens itself."""
    assert len(output_ids) == 64
    logits = logits_of(model, [*prompt_ids, *output_ids])[len(prompt_ids) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(output_ids)[:, None])[:, 0]
    lost = logits.amax(1) - chosen
    # A tie in float32 may fall either way; anything else is a fault.
    assert float(lost.max()) < 1e-4, f"token {int(lost.argmax())}: {float(lost.max())} lost"


@pytest.mark.parametrize("name", CASES)
def test_a_family_is_what_transformers_computes(
    name: str, save_tiny: Callable[..., Any], driver: Callable[..., Any], backend: str
) -> None:
    """One engine whose cache is too small and whose steps are short: prompts come in chunks, share
    prefixes, run in batches of mixed lengths, and are preempted."""
    family, config = CASES[name]
    path, model = save_tiny(family, **{"num_hidden_layers": 2, **config})
    probe = driver(path, attention_backend=backend)
    token_ids = prompt(77)
    torch.testing.assert_close(
        probe.logits(token_ids), logits_of(model, token_ids), atol=1e-4, rtol=1e-4
    )
    if backend == "reference":  # one request at a time and no more: it is slow
        return
    config_ = probe.source.model_config
    per_token = 2 * config_.num_layers * config_.kv_size * 4
    engine = driver(
        path,
        attention_backend=backend,
        max_num_batched_tokens=32,
        max_num_seqs=5,
        max_model_len=200,
        # 20 blocks of 16 tokens, for three prompts and answers of some 100 to 160.
        kv_cache_memory_bytes=20 * 16 * per_token,
    )
    shared = prompt(48, seed=1)
    prompts = [shared + prompt(43, seed=2), prompt(1, seed=3), prompt(33, seed=4)]
    outputs = engine.generate(prompts)
    assert any(0 < decodes < reqs for decodes, reqs in engine.batch_sizes)
    prompts.append(shared + prompt(20, seed=5))
    outputs += engine.generate(prompts[3:])
    assert outputs[3].num_cached_tokens == 48
    prompts += [prompt(90, seed) for seed in (6, 7, 8)]
    outputs += engine.generate(prompts[4:])
    assert engine.core.stats()["num_preemptions"] > 0
    assert len({token for output in outputs for token in output.token_ids}) > 5
    for prompt_ids, output in zip(prompts, outputs, strict=True):
        assert_greedy(model, prompt_ids, output.token_ids)


def test_every_family_is_proven() -> None:
    names = {f"{family.removesuffix('Text')}ForCausalLM" for family, _ in CASES.values()}
    assert names == set(ARCHITECTURES)


def test_longrope_beyond_its_training_turns_by_the_long_factors(
    save_tiny: Callable[..., Any], driver: Callable[..., Any]
) -> None:
    path, model = save_tiny("Phi3", **longrope(8))
    assert driver(path).runner.max_model_len == 200
    engine = driver(path, max_model_len=400)
    token_ids = prompt(250)
    torch.testing.assert_close(
        engine.logits(token_ids), logits_of(model, token_ids), atol=1e-4, rtol=1e-4
    )
    [output] = engine.generate([token_ids])
    assert_greedy(model, token_ids, output.token_ids)
