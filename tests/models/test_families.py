"""Every family against transformers, at every level of the CPU: tiny random models of odd sizes.

A case's layers, heads and switches are chosen so that each branch of the family's file runs: two
layers of each kind, windows shorter than the prompt, heads of 40, 80 and 96, one and three KV
heads, tied and untied embeddings, biases on and off.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from attention_cases import ATTENTION_CASES
from fidelity import assert_greedy, logits_of, make_prompt, prove_greedy, tiny_config
from test_hybrid_families import CASES as HYBRIDS
from test_kv_shape_families import CASES as GEMMAS

from levels import OTHER_LEVELS, run_at_level
from octavo.errors import ModelLoadError
from octavo.models.registry import ARCHITECTURES, config_from_hf

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


def heads(num_heads: int, head_dim: int, num_kv_heads: int) -> dict[str, Any]:
    """For families whose heads are equal parts of the hidden size."""
    return {
        "hidden_size": num_heads * head_dim,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
    }


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


LLAMA_4: dict[str, Any] = {
    "num_hidden_layers": 4,
    "no_rope_layers": [1, 0, 1, 0],
    "moe_layers": [1, 2],
    "num_local_experts": 5,
    "intermediate_size_mlp": 88,
    "attention_chunk_size": 32,
    # So that queries grow within the prompt.
    "floor_scale": 16,
    "attn_scale": 0.5,
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
    "Llama 4": ("Llama4Text", {**LLAMA_4, **HEADS_OF_80, **UNTIED}),
    "Llama 4, two experts, biases, tied": (
        "Llama4Text",
        {
            **LLAMA_4,
            **HEADS_OF_40,
            **TIED,
            "num_experts_per_tok": 2,
            "attention_bias": True,
            "use_qk_norm": False,
        },
    ),
    "Llama 4, one chunk, queries as they are": (
        "Llama4Text",
        {
            **LLAMA_4,
            **HEADS_OF_96,
            **LLAMA3,
            "attention_chunk_size": 256,
            "attn_temperature_tuning": False,
            "moe_layers": [0, 1, 2, 3],
        },
    ),
    "Mistral, window": ("Mistral", {**HEADS_OF_40, "sliding_window": 24}),
    "Mistral, no window": ("Mistral", {**HEADS_OF_80, "sliding_window": None, **TIED}),
    "Mistral, heads of 96": ("Mistral", {**HEADS_OF_96, "sliding_window": 24}),
    "Qwen2": ("Qwen2", {**TIED, **heads(2, 96, 1)}),
    "Qwen2, windows in later layers": (
        "Qwen2",
        {
            **heads(2, 80, 1),
            "num_hidden_layers": 4,
            "use_sliding_window": True,
            "sliding_window": 24,
            "max_window_layers": 2,
        },
    ),
    "Qwen2, rope yarn": ("Qwen2", {**heads(3, 40, 3), **YARN}),
    "Qwen3": ("Qwen3", {**HEADS_OF_80, **TIED}),
    "Qwen3, biases": ("Qwen3", {**HEADS_OF_96, **UNTIED, "attention_bias": True}),
    "SmolLM3": (
        "SmolLM3",
        {**HEADS_OF_40, **TIED, "num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0]},
    ),
    "SmolLM3, windows without rope": (
        "SmolLM3",
        {
            **HEADS_OF_80,
            "num_hidden_layers": 4,
            "no_rope_layer_interval": 2,
            "use_sliding_window": True,
            "sliding_window": 24,
            **UNTIED,
            **BIASES,
        },
    ),
    "SmolLM3, heads of 96": (
        "SmolLM3",
        {**HEADS_OF_96, "num_hidden_layers": 4, "no_rope_layers": [0, 0, 1, 1], "mlp_bias": True},
    ),
    "Phi-3": ("Phi3", heads(3, 40, 3)),
    "Phi-3, window": ("Phi3", {**heads(2, 96, 1), "sliding_window": 24}),
    "Phi-3.5, longrope": ("Phi3", {**heads(2, 80, 1), **longrope(40)}),
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
    "Gemma, three KV heads, biases, untied": (
        "Gemma",
        {**HEADS_OF_80, **UNTIED, "attention_bias": True},
    ),
    "Gemma, heads of 96": ("Gemma", {**HEADS_OF_96, **UNTIED, "num_key_value_heads": 1}),
    "Gemma 2, heads of 96": (
        "Gemma2",
        {**HEADS_OF_96, **TIED, "num_hidden_layers": 4, "sliding_window": 24},
    ),
    "Gemma 2, no softcaps, one KV head, untied": (
        "Gemma2",
        {
            **HEADS_OF_40,
            **UNTIED,
            "num_hidden_layers": 4,
            "sliding_window": 24,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "attention_bias": True,
        },
    ),
    "Gemma 3, three KV heads, untied": (
        "Gemma3Text",
        {**HEADS_OF_80, **UNTIED, "num_hidden_layers": 12, "sliding_window": 24},
    ),
    "Gemma 3, heads of 96, biases": (
        "Gemma3Text",
        {
            **HEADS_OF_96,
            "attention_bias": True,
            "num_hidden_layers": 4,
            "layer_types": [LOCAL, LOCAL, GLOBAL, GLOBAL],
            "sliding_window": 24,
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
    "Phi-2, grouped": ("Phi", {**heads(2, 80, 1), **rope(partial_rotary_factor=0.5)}),
    "Falcon 7B, one KV head": ("Falcon", {"hidden_size": 160}),
    "Falcon 40B, two norms": (
        "Falcon",
        {
            "hidden_size": 240,
            "num_attention_heads": 6,
            "new_decoder_architecture": True,
            "num_kv_heads": 3,
            "bias": True,
            **UNTIED,
        },
    ),
    "Falcon 11B, one norm": (
        "Falcon",
        {
            "hidden_size": 320,
            "new_decoder_architecture": True,
            "num_ln_in_parallel_attn": 1,
            "num_kv_heads": 2,
            "ffn_hidden_size": 100,
            **LINEAR,
        },
    ),
    "Falcon, one after the other": (
        "Falcon",
        {
            "hidden_size": 96,
            "num_attention_heads": 1,
            "multi_query": False,
            "parallel_attn": False,
            "bias": True,
        },
    ),
    "Falcon, a KV head for each": ("Falcon", {"multi_query": False, "bias": True}),
    "Falcon, ALiBi": (
        "Falcon",
        {
            "hidden_size": 240,
            "num_attention_heads": 6,
            "alibi": True,
            "multi_query": False,
            "parallel_attn": False,
            "bias": True,
        },
    ),
    "StableLM": ("StableLm", {"hidden_size": 160, "num_key_value_heads": 4}),
    "StableLM, biases, tied": (
        "StableLm",
        {**heads(2, 96, 1), "use_qkv_bias": True, **TIED},
    ),
    "StableLM 2 12B, head norms": (
        "StableLm",
        {
            **heads(3, 80, 3),
            "qk_layernorm": True,
            "use_parallel_residual": True,
            **rope(partial_rotary_factor=0.5),
        },
    ),
    "OLMo 2": ("Olmo2", heads(3, 40, 1)),
    "OLMo 2, biases": ("Olmo2", {**heads(2, 80, 1), "attention_bias": True, **UNTIED}),
    "Granite": (
        "Granite",
        {
            **heads(2, 40, 1),
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.0,
            **TIED,
            **BIASES,
        },
    ),
    "Granite, three KV heads, untied": (
        "Granite",
        {
            **heads(3, 80, 3),
            "attention_multiplier": 0.1,
            **UNTIED,
            **YARN,
        },
    ),
    # Its scores are not divided by the head's size unless told to: heads of 96 would amplify noise.
    "Granite, heads of 96": (
        "Granite",
        {**heads(2, 96, 1), "attention_multiplier": 0.1, "mlp_bias": True},
    ),
    "OLMo 2, heads of 96, tied": ("Olmo2", {**heads(3, 96, 3), **LLAMA3, **TIED}),
    "Phi-2, tied": ("Phi", {**TIED, **heads(3, 96, 3), **rope(partial_rotary_factor=1.0)}),
    "Qwen3, one KV head, window in later layers": (
        "Qwen3",
        {
            **HEADS_OF_40,
            "num_hidden_layers": 4,
            "use_sliding_window": True,
            "sliding_window": 24,
            "max_window_layers": 2,
        },
    ),
    "Mixtral": (
        "Mixtral",
        {**HEADS_OF_40, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 24},
    ),
    "Mixtral, no window, three KV heads, tied": (
        "Mixtral",
        {
            **HEADS_OF_80,
            **TIED,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "sliding_window": None,
        },
    ),
    "Mixtral, heads of 96": ("Mixtral", {**HEADS_OF_96, "num_local_experts": 3}),
    "Qwen3-MoE, one KV head, biases": (
        "Qwen3Moe",
        {
            **HEADS_OF_40,
            "attention_bias": True,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "use_sliding_window": True,
            "sliding_window": 24,
        },
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
            **HEADS_OF_96,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "decoder_sparse_step": 2,
            "num_hidden_layers": 4,
            **TIED,
        },
    ),
    **ATTENTION_CASES,
}


def quick_or_slow() -> Iterator[Any]:
    """All cases; of those that came later, a family's first is quick."""
    seen: set[str] = set()
    for name, (family, _) in CASES.items():
        is_slow = name in ATTENTION_CASES and family in seen
        seen.add(family)
        yield pytest.param(name, marks=[pytest.mark.slow] if is_slow else [])


@pytest.mark.parametrize("name", list(quick_or_slow()))
def test_a_family_is_what_transformers_computes(
    name: str,
    save_tiny: Callable[..., Any],
    driver: Callable[..., Any],
    backend: str,
) -> None:
    family, config = CASES[name]
    path, model = save_tiny(family, **{"num_hidden_layers": 2, **config})
    probe = driver(path, attention_backend=backend)
    token_ids = make_prompt(77)
    torch.testing.assert_close(
        probe.logits(token_ids), logits_of(model, token_ids), atol=1e-4, rtol=1e-4
    )
    if backend == "reference":  # one request at a time and no more: it is slow
        return
    prove_greedy(driver, path, model, attention_backend=backend)


# A minute and a half each; most people's machines are of the level that CI tries.
@pytest.mark.slow
@pytest.mark.parametrize(
    "level",
    [
        pytest.param(level, marks=[] if level == "avx2" else [pytest.mark.nightly])
        for level in OTHER_LEVELS
    ],
)
def test_every_family_at_level(level: str) -> None:
    run = run_at_level(__file__, level, "-k", "native")
    assert run.returncode == 0, run.stdout[-3000:]


def test_every_family_is_proven() -> None:
    cases = [*CASES.values(), *GEMMAS.values(), *HYBRIDS.values()]
    names = {f"{family.removesuffix('Text')}ForCausalLM" for family, _ in cases}
    assert names == set(ARCHITECTURES)


# What a transformers config calls a switch whose both values are to be tried.
SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias", "bias", "use_qkv_bias")


@pytest.mark.parametrize("family", sorted({family for family, _ in CASES.values()}))
def test_the_cases_of_a_family_are_of_all_sizes(family: str) -> None:
    """Every head size and number of KV heads, switches on and off, two layers of each kind."""
    seen: dict[str, set[Any]] = defaultdict(set)
    for values in (values for name, values in CASES.values() if name == family):
        config = tiny_config(family, **{"num_hidden_layers": 2, **values})
        architecture = f"{family.removesuffix('Text')}ForCausalLM"
        shape = config_from_hf({**config.to_dict(), "architectures": [architecture]})
        seen["head_dim"].add(shape.head_dim)
        seen["num_kv_heads"].add(shape.num_kv_heads)
        for name in SWITCHES:
            if hasattr(config, name):
                seen[name].add(getattr(config, name))
        for layers in (shape.sliding_windows, shape.rope_layers):
            assert all(count >= 2 for count in Counter(layers).values())
        assert all(window in (0, 24) for window in shape.sliding_windows)  # of 77 tokens
    assert seen.pop("head_dim") >= {40, 80, 96}
    # Latent attention has one cached head.
    assert seen.pop("num_kv_heads") >= ({1} if shape.latent else {1, 3})
    assert set(map(frozenset, seen.values())) == {frozenset({False, True})}, seen


def test_longrope_beyond_its_training_turns_by_the_long_factors(
    save_tiny: Callable[..., Any], driver: Callable[..., Any]
) -> None:
    path, model = save_tiny("Phi3", **longrope(8))
    assert driver(path).runner.max_model_len == 200
    engine = driver(path, max_model_len=400)
    token_ids = make_prompt(250)
    torch.testing.assert_close(
        engine.logits(token_ids), logits_of(model, token_ids), atol=1e-4, rtol=1e-4
    )
    [output] = engine.generate([token_ids])
    assert_greedy(model, token_ids, output.token_ids)


def test_dynamic_rope_turns_by_the_length_that_was_asked_for(
    save_tiny: Callable[..., Any], driver: Callable[..., Any]
) -> None:
    path, model = save_tiny("Llama", **HEADS_OF_40, **DYNAMIC, max_position_embeddings=100)
    assert driver(path).runner.max_model_len == 100
    token_ids = make_prompt(150)
    # transformers takes the base from the longest text it has seen, this one.
    torch.testing.assert_close(
        driver(path, max_model_len=150).logits(token_ids),
        logits_of(model, token_ids),
        atol=1e-4,
        rtol=1e-4,
    )
    with pytest.raises(ModelLoadError, match="max_model_len 201 is beyond the model's own 200"):
        driver(path, max_model_len=201)


def test_a_quantized_falcon_keeps_its_rows_in_order(
    save_tiny: Callable[..., Any], driver: Callable[..., Any]
) -> None:
    config = {"hidden_size": 256, "new_decoder_architecture": True, "num_kv_heads": 2}
    path, model = save_tiny("Falcon", **config)
    token_ids = make_prompt(40)
    found = driver(path, quantization="w8").logits(token_ids)
    expected = logits_of(model, token_ids)
    assert float((found - expected).norm() / expected.norm()) < 0.05


def test_chunks_of_attention_are_whole_blocks(
    save_tiny: Callable[..., Any], driver: Callable[..., Any]
) -> None:
    path, _model = save_tiny("Llama4Text", **{**LLAMA_4, "attention_chunk_size": 24})
    with pytest.raises(ModelLoadError, match="24 is not a multiple of block_size 16"):
        driver(path)
