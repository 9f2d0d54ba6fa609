"""Every family on a GPU in bfloat16 and float16: no further from float32 than transformers is.

Tiny random models of the head sizes real ones have, saved by transformers in float32. What is
compared are the log probabilities of the whole vocabulary, over prompts (in chunks) and over greedy
answers (in CUDA graphs).
"""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.checkpoints.dummy_tokenizer import dummy_tokenizer_json
from octavo.llm import LLM
from octavo.models.registry import ARCHITECTURES
from octavo.sampling_params import SamplingParams

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

transformers = pytest.importorskip("transformers")

VOCAB = 300
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# How much further than transformers' own, in that type, the mean error of a log probability may be:
# a part of it, for sums are taken in another order, and this, where both are nearly nothing.
MAX_RATIO, SLACK = 1.2, {"bfloat16": 1e-3, "float16": 2e-4}

# Of these one expert is chosen, for itself: where two are level, rounding decides, in transformers
# as here, and all of the row is another. The median row tells what the mean of such rows does not.
ONE_EXPERT = {"Llama 4"}

HEADS_OF_80: dict[str, Any] = {"head_dim": 80, "num_key_value_heads": 1}
HEADS_OF_96: dict[str, Any] = {"head_dim": 96, "num_key_value_heads": 4}
HEADS_OF_128: dict[str, Any] = {"head_dim": 128, "num_key_value_heads": 2}
HEADS_OF_256: dict[str, Any] = {"head_dim": 256, "num_key_value_heads": 1}
BIASES = {"attention_bias": True, "mlp_bias": True}
TIED = {"tie_word_embeddings": True}
LOCAL, GLOBAL = "sliding_attention", "full_attention"
LINEAR, CONV = "linear_attention", "conv"
DELTA: dict[str, Any] = {
    "layer_types": [LINEAR, GLOBAL],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 64,
    "moe_intermediate_size": 96,
    "shared_expert_intermediate_size": 160,
}
MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_state": 128, "mamba_n_groups": 1}
PER_LAYER = {"hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": VOCAB}
# The last two layers read the two before them; two stages are cut after the first.
SHARED: dict[str, Any] = {
    "num_hidden_layers": 5,
    "layer_types": [LOCAL, LOCAL, GLOBAL, LOCAL, GLOBAL],
    "num_kv_shared_layers": 2,
    "sliding_window": 24,
}


def rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, **parameters}}


HALF = rope(partial_rotary_factor=0.5)
LATENT = {
    "kv_lora_rank": 64,
    "q_lora_rank": 48,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 48,
    "v_head_dim": 64,
    "num_key_value_heads": 4,
}
GROUPED = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_group": 3,
    "topk_group": 2,
    "first_k_dense_replace": 1,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt-oss": (
        "GptOss",
        {
            "head_dim": 64,
            "num_key_value_heads": 2,
            "num_hidden_layers": 4,
            "sliding_window": 24,
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
        },
    ),
    "Bloom": ("Bloom", {}),
    "MPT": ("Mpt", {}),
    "GPT-Neo": (
        "GPTNeo",
        {
            "attention_types": [[["global", "local"], 1]],
            "window_size": 24,
            "initializer_range": 0.05,
        },
    ),
    "DeepSeek V3": ("DeepseekV3", {**LATENT, **GROUPED}),
    "DeepSeek V2": ("DeepseekV2", {**LATENT, **GROUPED, "topk_method": "group_limited_greedy"}),
    "GLM-4.7-Flash": ("Glm4MoeLite", {**LATENT, **GROUPED}),
    "GLM-4.5": ("Glm4Moe", {**GROUPED, "use_qk_norm": True, **HALF}),
    "GLM-4": ("Glm4", {**HEADS_OF_128, **HALF}),
    "GLM-4-9B": ("Glm", {**HEADS_OF_128, **HALF}),
    "Cohere 2": ("Cohere2", {"num_hidden_layers": 4, "sliding_window": 24, "logit_scale": 1.0}),
    "OLMo 3": ("Olmo3", {"num_hidden_layers": 4, "sliding_window": 24}),
    "Ministral 3": (
        "Ministral3",
        {
            **HEADS_OF_128,
            **rope(
                rope_type="yarn",
                factor=4.0,
                original_max_position_embeddings=64,
                llama_4_scaling_beta=0.1,
            ),
        },
    ),
    # All experts: a choice between near ones would be float16's to make.
    "MiniMax-M2": ("MiniMaxM2", {**HALF, "num_local_experts": 3, "num_experts_per_tok": 3}),
    "Ernie 4.5": ("Ernie4_5", {**HEADS_OF_128, "use_bias": True}),
    "Ernie 4.5 MoE": (
        "Ernie4_5_Moe",
        {"moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 64, "moe_layer_start_index": 1},
    ),
    "Hunyuan": ("HunYuanDenseV1", HEADS_OF_128),
    "Hunyuan MoE": ("HunYuanMoEV1", {**HEADS_OF_128, "num_experts": 5, "moe_topk": 2}),
    "Qwen2-MoE": (
        "Qwen2Moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
        },
    ),
    "OLMoE": ("Olmoe", {"num_experts": 6, "num_experts_per_tok": 2}),
    "Granite MoE": (
        "GraniteMoe",
        {"num_local_experts": 6, "num_experts_per_tok": 2, "attention_multiplier": 0.1},
    ),
    "Llama": ("Llama", {**HEADS_OF_128, "tie_word_embeddings": False}),
    "Llama, biases, tied, one KV head": ("Llama", {**HEADS_OF_80, **BIASES, **TIED}),
    "Llama, rope llama3": (
        "Llama",
        rope(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "Mistral, window": ("Mistral", {**HEADS_OF_96, "sliding_window": 24}),
    "Qwen2, rope yarn": (
        "Qwen2",
        rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=64),
    ),
    "Qwen3": ("Qwen3", {**HEADS_OF_128, **TIED}),
    "SmolLM3": ("SmolLM3", {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0]}),
    "Phi-3": ("Phi3", {"hidden_size": 384, "num_key_value_heads": 4}),
    "Phi-4-mini, partial longrope": (
        "Phi3",
        {
            "hidden_size": 512,
            **TIED,
            "original_max_position_embeddings": 200,
            "max_position_embeddings": 400,
            **rope(
                rope_type="longrope",
                partial_rotary_factor=0.75,
                short_factor=[1.0 + 0.02 * i for i in range(48)],
                long_factor=[1.0 + 0.3 * i for i in range(48)],
            ),
        },
    ),
    "Gemma": ("Gemma", {**HEADS_OF_256, **TIED}),
    "Gemma 2": (
        "Gemma2",
        {
            **HEADS_OF_256,
            "num_hidden_layers": 4,
            "sliding_window": 24,
            "query_pre_attn_scalar": 200,
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 9.0,
        },
    ),
    "Gemma 3": (
        "Gemma3Text",
        {
            **HEADS_OF_256,
            "num_hidden_layers": 4,
            "layer_types": [LOCAL, GLOBAL, LOCAL, GLOBAL],
            "sliding_window": 24,
            "query_pre_attn_scalar": 200,
            "rope_parameters": {
                LOCAL: {"rope_type": "default", "rope_theta": 1000.0},
                GLOBAL: {"rope_type": "linear", "factor": 4.0, "rope_theta": 50000.0},
            },
        },
    ),
    "Phi-2": (
        "Phi",
        {"hidden_size": 320, "num_key_value_heads": 4, **rope(partial_rotary_factor=0.4)},
    ),
    "Falcon 7B": ("Falcon", {"hidden_size": 256}),
    "Falcon 40B": (
        "Falcon",
        {"hidden_size": 512, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
    ),
    "StableLM": ("StableLm", {"hidden_size": 320, "num_key_value_heads": 4}),
    "StableLM 2 12B": (
        "StableLm",
        {"hidden_size": 640, "qk_layernorm": True, "use_parallel_residual": True},
    ),
    "OLMo 2": ("Olmo2", {"num_key_value_heads": 4}),
    "Granite": (
        "Granite",
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.1,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.0,
            **TIED,
        },
    ),
    "LFM2": ("Lfm2", {"num_hidden_layers": 4, "layer_types": [CONV, GLOBAL] * 2}),
    "LFM2-MoE": (
        "Lfm2Moe",
        {
            "num_hidden_layers": 4,
            "layer_types": [CONV, GLOBAL] * 2,
            "num_dense_layers": 1,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
        },
    ),
    "LFM3": (
        "Lfm3",
        {
            **HEADS_OF_128,
            "num_hidden_layers": 4,
            "layer_types": [CONV, LOCAL, GLOBAL, CONV],
            "sliding_window": 24,
        },
    ),
    "Qwen3-Next": (
        "Qwen3Next",
        {**HEADS_OF_256, **DELTA, "num_experts": 6, "num_experts_per_tok": 3},
    ),
    "Qwen3.5": ("Qwen3_5Text", {**HEADS_OF_256, **DELTA, **TIED}),
    "Qwen3.5-MoE": (
        "Qwen3_5MoeText",
        {**HEADS_OF_128, **DELTA, "num_experts": 6, "num_experts_per_tok": 3},
    ),
    "OLMo-Hybrid": (
        "OlmoHybrid",
        {**DELTA, "linear_num_value_heads": 2, "linear_key_head_dim": 64},
    ),
    "Gemma 3n": (
        "Gemma3nText",
        {
            **HEADS_OF_128,
            **PER_LAYER,
            **SHARED,
            "laurel_rank": 32,
            "activation_sparsity_pattern": [0.9, 0.0, 0.0, 0.9, 0.0],
        },
    ),
    "Gemma 4": (
        "Gemma4Text",
        {
            **HEADS_OF_128,
            **PER_LAYER,
            **SHARED,
            "global_head_dim": 256,
        },
    ),
    "Gemma 4, unified": (
        "Gemma4UnifiedText",
        {
            **HEADS_OF_128,
            "layer_types": [LOCAL, GLOBAL],
            "global_head_dim": 256,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "sliding_window": 24,
        },
    ),
    "Llama 4": (
        "Llama4Text",
        {
            **HEADS_OF_128,
            "num_hidden_layers": 4,
            "no_rope_layers": [1, 0, 1, 0],
            "attention_chunk_size": 32,
            "floor_scale": 16,
            "moe_layers": [1, 2],
            "num_local_experts": 5,
            "intermediate_size_mlp": 384,
        },
    ),
    "MiMo-V2-Flash": (
        "MiMoV2Flash",
        {
            "head_dim": 192,
            "v_head_dim": 128,
            "num_key_value_heads": 2,
            "layer_types": [GLOBAL, LOCAL],
            "mlp_layer_types": ["dense", "sparse"],
            "sliding_window": 24,
            "n_routed_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,
        },
    ),
    "MiniMax": (
        "MiniMax",
        {**HEADS_OF_128, "layer_types": [GLOBAL, LINEAR], "num_local_experts": 5},
    ),
    "Kimi-Linear": (
        "KimiLinear",
        {
            **LATENT,
            "layer_types": [LINEAR, GLOBAL],
            "mlp_layer_types": ["dense", "sparse"],
            "q_lora_rank": None,
            "linear_num_heads": 4,
            "linear_head_dim": 128,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,
        },
    ),
    "Mamba": ("Mamba", {}),
    "FalconMamba": ("FalconMamba", {}),
    "Jamba": (
        "Jamba",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 5},
    ),
    # One group: of several, transformers up to 5.18 at least norms all as one.
    "Mamba-2": ("Mamba2", {"num_heads": 8, "head_dim": 64, "state_size": 128, "n_groups": 1}),
    "Bamba": ("Bamba", {**MAMBA, "num_hidden_layers": 4, "attn_layer_indices": [1, 3]}),
    "Granite 4": (
        "GraniteMoeHybrid",
        {
            **MAMBA,
            "layer_types": [LINEAR, GLOBAL],
            "num_local_experts": 5,
            "attention_multiplier": 0.1,
            "residual_multiplier": 0.4,
        },
    ),
    "Falcon-H1": (
        "FalconH1",
        {**MAMBA, "mamba_d_ssm": 512, "key_multiplier": 0.6, "ssm_out_multiplier": 0.8},
    ),
    "Nemotron-H": (
        "NemotronH",
        {
            "layers_block_type": [LINEAR, "mlp", GLOBAL, "mlp"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 64,
        },
    ),
    "Mixtral": (
        "Mixtral",
        {**HEADS_OF_128, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "Qwen3-MoE": (
        "Qwen3Moe",
        {
            **HEADS_OF_128,
            "num_hidden_layers": 4,
            "mlp_only_layers": [0, 2],
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 96,
            "norm_topk_prob": True,
        },
    ),
}
# Some of those that run through transformers' own module.
FOREIGN: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": ("GPT2LMHead", {"n_embd": 256, "n_head": 4, "n_layer": 2, "num_key_value_heads": 4}),
    "GPT-NeoX": ("GPTNeoX", {"num_attention_heads": 4}),
    "OPT": ("OPT", {"ffn_dim": 512, "word_embed_proj_dim": 256}),
    "Cohere": ("Cohere", {}),
    "StarCoder2": ("Starcoder2", {}),
}


def prompt(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(3, VOCAB), k=length)


def save(family: str, config: dict[str, Any], folder: Path) -> Any:
    """A random model of large enough numbers that a fault is seen; its class."""
    defaults: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 256,
        "intermediate_size": 320,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 1.8 / config.get("hidden_size", 256) ** 0.5,
    }
    torch.manual_seed(0)
    base = family.removesuffix("LMHead")
    if not hasattr(transformers, f"{base}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {base}Config")
    config_class = getattr(transformers, f"{base}Config")
    end = "Model" if family.endswith("LMHead") else "ForCausalLM"
    model_class = getattr(transformers, family.removesuffix("Text") + end)
    settings = config_class(**defaults | config)
    model = model_class(settings)
    with torch.no_grad():  # transformers starts biases at 0 and norms at 1: they must matter
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
            elif parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(dummy_tokenizer_json(VOCAB))
    return model_class


# All of this over several shards: as tests/runner/test_graphs.py.
MESH = os.environ.get("OCTAVO_TEST_MESH")
STAGES = int(os.environ.get("OCTAVO_TEST_STAGES", "1"))


def fits(config: dict[str, Any]) -> bool:
    """Heads that two shards can have."""
    return bool(config.get("num_attention_heads", 4) % 2 == 0)


NAMES = [*CASES, *FOREIGN]
if MESH is not None:
    NAMES = [name for name, (_, config) in CASES.items() if STAGES > 1 or fits(config)]


@dataclass
class Scored:
    """One sequence, prompt and answer, and float64 [T - 1, V]: of what follows each token."""

    token_ids: list[int]
    logprobs: torch.Tensor


def octavos(folder: Path, dtype: str, **options: Any) -> list[Scored]:
    """Prompts of several lengths in one batch, in chunks, and 24 greedy tokens each."""
    llm = LLM(
        str(folder),
        device="cuda",
        dtype=dtype,
        max_model_len=200,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        max_logprobs=VOCAB,
        kv_cache_memory_bytes=64 << 20,
        **({"mesh": MESH, "pipeline_parallel_size": STAGES} | options),
    )
    prompts = [prompt(length, length) for length in (1, 17, 64, 90, 130, 150)]
    params = SamplingParams(
        temperature=0, max_tokens=24, ignore_eos=True, logprobs=VOCAB, prompt_logprobs=VOCAB
    )
    asked = [{"prompt_token_ids": ids} for ids in prompts]
    found = []
    for output in llm.generate(asked, params, use_tqdm=False):
        sample = output.outputs[0]
        steps = [*(output.prompt_logprobs or [])[1:], *(sample.logprobs or [])]
        rows = torch.full((len(steps), VOCAB), torch.nan, dtype=torch.float64)
        for row, step in zip(rows, steps, strict=True):
            assert step is not None
            row[list(step)] = torch.tensor([e.logprob for e in step.values()], dtype=torch.float64)
        assert not rows.isnan().any()
        found.append(Scored([*output.prompt_token_ids, *sample.token_ids], rows))
    return found


def transformers_logprobs(
    model_class: Any, folder: Path, dtype: torch.dtype, sequences: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    """float64 [T - 1, V] of each sequence, on its own."""
    model = model_class.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", local_files_only=True
    )
    model = model.cuda().eval()
    with torch.inference_mode():
        return [
            model(torch.tensor([list(ids)], device="cuda"), use_cache=False)
            .logits[0, :-1]
            .double()
            .log_softmax(-1)
            .cpu()
            for ids in sequences
        ]


@pytest.fixture(autouse=torch.cuda.is_available())
def _free_memory() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_family_is_as_exact_as_transformers(name: str, dtype: str, tmp_path: Path) -> None:
    family, config = (CASES | FOREIGN)[name]
    model_class = save(family, config, tmp_path)
    found = octavos(tmp_path, dtype)
    sequences = [scored.token_ids for scored in found]
    exact = transformers_logprobs(model_class, tmp_path, torch.float32, sequences)
    rounded = transformers_logprobs(model_class, tmp_path, DTYPES[dtype], sequences)

    def error(logprobs: Sequence[torch.Tensor]) -> float:
        rows = torch.cat([(a - b).abs().mean(1) for a, b in zip(logprobs, exact, strict=True)])
        return float(rows.median() if name in ONE_EXPERT else rows.mean())

    ours, theirs = error([scored.logprobs for scored in found]), error(rounded)
    assert ours <= MAX_RATIO * theirs + SLACK[dtype], (ours, theirs)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("name", NAMES)
def test_a_family_in_float32_is_what_transformers_computes(name: str, tmp_path: Path) -> None:
    family, config = (CASES | FOREIGN)[name]
    model_class = save(family, config, tmp_path)
    found = octavos(tmp_path, "float32")
    sequences = [scored.token_ids for scored in found]
    exact = transformers_logprobs(model_class, tmp_path, torch.float32, sequences)
    for scored, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(scored.logprobs, expected, atol=2e-4, rtol=1e-4)


def test_every_family_is_proven() -> None:
    names = {f"{family.removesuffix('Text')}ForCausalLM" for family, _ in CASES.values()}
    assert names == set(ARCHITECTURES)
