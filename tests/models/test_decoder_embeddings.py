"""Decoders that embed: the last token's state, against transformers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo import LLM, ModelRegistry
from octavo.errors import ModelLoadError
from octavo.models.registry import TRUNKS
from tiny_encoders import save_tokenizer, write_modules

LENGTHS = (5, 1, 40, 16, 17, 33, 100)
# Gemma 3 has a test of its own: it is no trunk of a decoder, but of an encoder.
FAMILIES = [name.removesuffix("Model") for name in TRUNKS if "Gemma" not in name]


def prompts() -> list[list[int]]:
    return [random.Random(n).choices(range(4, 300), k=n) for n in LENGTHS]


def last_states(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        hidden = [model.model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in prompts()]
    return torch.stack(hidden)


def embed(path: Path, **config: Any) -> torch.Tensor:
    llm = LLM(str(path), threads=1, **config)
    outputs = llm.embed(prompts(), use_tqdm=False)
    return torch.tensor([output.outputs.embedding for output in outputs])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trunk_is_what_transformers_computes(
    family: str, save_tiny: Callable[..., tuple[Path, Any]], backend: str
) -> None:
    """Saved without its output head: names without prefix, the architecture XModel."""
    path, model = save_tiny(family, tie_word_embeddings=False)
    model.model.save_pretrained(path)
    save_tokenizer(path)
    architecture = json.loads((path / "config.json").read_text())["architectures"][0]
    assert architecture == f"{family}Model"
    assert architecture in ModelRegistry.get_supported_archs()
    # Steps of 64 tokens, and one text that is longer.
    found = embed(path, attention_backend=backend, max_num_batched_tokens=64, max_model_len=128)
    torch.testing.assert_close(found, last_states(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("is_bare", [False, True])
def test_qwen3_embeddings_layout(is_bare: bool, save_tiny: Callable[..., tuple[Path, Any]]) -> None:
    """Qwen3ForCausalLM with modules.json, whose tensors may be named as the trunk's."""
    path, model = save_tiny("Qwen3", head_dim=40, num_key_value_heads=1)
    save_tokenizer(path)
    write_modules(path, {"pooling_mode_lasttoken": True}, ("Normalize", "2_Normalize"))
    if is_bare:
        file = path / "model.safetensors"
        save_file({k.removeprefix("model."): v for k, v in load_file(file).items()}, file)
    expected = torch.nn.functional.normalize(last_states(model), dim=-1)
    torch.testing.assert_close(embed(path), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="generates no text: use embed"):
        LLM(str(path), threads=1).generate([[5]])


def test_a_window_shorter_than_the_text(save_tiny: Callable[..., tuple[Path, Any]]) -> None:
    path, model = save_tiny("Mistral", sliding_window=8)
    save_tokenizer(path)
    write_modules(path, {"pooling_mode_lasttoken": True})
    torch.testing.assert_close(embed(path), last_states(model), atol=1e-4, rtol=1e-4)


def test_attention_in_both_directions(save_tiny: Callable[..., tuple[Path, Any]]) -> None:
    path, model = save_tiny("Qwen3", head_dim=40, tie_word_embeddings=False)
    save_tokenizer(path)
    write_modules(path, {"pooling_mode_mean_tokens": True})
    expected = []
    for ids in prompts():
        with torch.inference_mode():
            # A mask of four dimensions is added as it is.
            mask = torch.zeros(1, 1, len(ids), len(ids))
            states = model.model(torch.tensor([ids]), attention_mask=mask).last_hidden_state
        expected.append(states[0].mean(0))
    found = embed(path, hf_overrides={"is_causal": False})
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("window", [8, 24])
def test_embedding_gemma(
    window: int, save_tiny: Callable[..., tuple[Path, Any]], backend: str
) -> None:
    """Gemma 3 in both directions, half of a window to each side."""
    types = ["sliding_attention", "full_attention"] * 2
    path, model = save_tiny(
        "Gemma3Text",
        head_dim=40,
        num_hidden_layers=4,
        layer_types=types,
        sliding_window=window,
        use_bidirectional_attention=True,
    )
    model.model.save_pretrained(path)
    save_tokenizer(path)
    write_modules(path, {"pooling_mode_mean_tokens": True})
    with torch.inference_mode():
        states = [model.model(torch.tensor([ids])).last_hidden_state[0] for ids in prompts()]
    expected = torch.stack([state.mean(0) for state in states])
    found = embed(path, attention_backend=backend)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_family_of_another_build_is_refused_in_both_directions(
    save_tiny: Callable[..., tuple[Path, Any]],
) -> None:
    path, _model = save_tiny("Phi")
    save_tokenizer(path)
    write_modules(path, {"pooling_mode_mean_tokens": True})
    with pytest.raises(ModelLoadError, match="PhiForCausalLM in both directions"):
        LLM(str(path), hf_overrides={"is_causal": False})
