"""The text model of a multimodal checkpoint, loaded by itself, against transformers."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fidelity import logits_of, make_prompt
from test_kv_shape_families import CASES as GEMMAS

from octavo.models.text_part import text_part

TEXT: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "depth": 1,
    "num_heads": 2,
    "out_hidden_size": 64,
    "hidden_act": "silu",
}
# Each has its own place for the text model's tensors. The name, and the text's model_type.
CASES = [
    ("Gemma3", "gemma3_text"),
    ("Mistral3", "mistral"),
    ("Llava", "llama"),
    ("Qwen2_5_VL", "qwen2_5_vl_text"),
    ("Qwen3VL", "qwen3_vl_text"),
    ("Idefics3", "llama"),
    ("Llama4", "llama4_text"),
    ("Gemma4", "gemma4_text"),
]
# Of the text model and of the vision model, beyond TEXT and VISION.
MORE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Llama4": (
        {"intermediate_size_mlp": 80, "num_local_experts": 2},
        {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
    ),
    "Gemma4": (
        {
            "layer_types": ["sliding_attention", "full_attention"],
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 300,
        },
        {"num_key_value_heads": 2, "head_dim": 16},
    ),
}


@pytest.mark.parametrize(("name", "model_type"), CASES)
def test_the_text_model_is_loaded_by_itself(
    name: str,
    model_type: str,
    tmp_path: Path,
    driver: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    import transformers

    torch.manual_seed(0)
    more_text, more_vision = MORE.get(name, ({}, {}))
    text = {**TEXT, **more_text, "model_type": model_type}
    if name == "Qwen2_5_VL":
        text["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 3, 3],
        }
    config = getattr(transformers, f"{name}Config")(
        text_config=text,
        vision_config={**VISION, **more_vision},
        image_token_id=5,
        tie_word_embeddings=False,
    )
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    model.save_pretrained(tmp_path)
    token_ids = [token for token in make_prompt(60) if token > 10]
    with torch.inference_mode():
        # The whole of Llama 4 asks its text model for what that does not return.
        whole = model.language_model if name == "Llama4" else model
        expected = whole(input_ids=torch.tensor([token_ids])).logits[0]
    with caplog.at_level(logging.WARNING, logger="octavo.checkpoints"):
        found = driver(tmp_path).logits(token_ids)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    [record] = [r for r in caplog.records if "the text model alone is loaded" in r.message]
    assert "\n" not in record.message


def test_the_text_model_of_gemma_3n_is_loaded_by_itself(
    save_tiny: Callable[..., Any], driver: Callable[..., Any]
) -> None:
    """Its vision model is another library's: the names of its files are made here."""
    from safetensors.torch import load_file, save_file

    family, config = GEMMAS["Gemma 3n"]
    path, model = save_tiny(family, **config)
    file, config_file = path / "model.safetensors", path / "config.json"
    tensors = {
        name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in load_file(file).items()
    }
    tensors |= {f"model.{part}.weight": torch.ones(3) for part in ("vision_tower", "audio_tower")}
    save_file(tensors, file, metadata={"format": "pt"})
    text = json.loads(config_file.read_text())
    whole = {
        "architectures": ["Gemma3nForConditionalGeneration"],
        "text_config": {**text, "architectures": None, "model_type": "gemma3n_text"},
    }
    config_file.write_text(json.dumps(whole))
    token_ids = make_prompt(40)
    expected = logits_of(model, token_ids)
    torch.testing.assert_close(driver(path).logits(token_ids), expected, atol=1e-4, rtol=1e-4)


def test_a_checkpoint_of_a_trunk_loads(
    save_tiny: Callable[..., Any], driver: Callable[..., Any]
) -> None:
    """Bloom's releases leave out the prefix of their trunk."""
    from safetensors.torch import load_file, save_file

    path, _ = save_tiny("Bloom")
    want = driver(path).logits([5, 6, 7])
    file = path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    assert torch.equal(driver(path).logits([5, 6, 7]), want)
    assert json.loads((path / "config.json").read_text())["architectures"] == ["BloomForCausalLM"]


def test_ends_of_the_whole_and_of_the_part() -> None:
    """One may name the end of a turn that the other leaves out."""
    part = {"model_type": "llama", "eos_token_id": 1}
    for whole, ends in ((None, [1]), (106, [1, 106]), ([1, 106], [1, 106])):
        found = text_part({"eos_token_id": whole, "text_config": part})
        assert found is not None
        assert found["eos_token_id"] == ends
    found = text_part({"text_config": {"model_type": "llama"}})
    assert found is not None
    assert "eos_token_id" not in found
