"""A served model whose layers keep a state: the second turn of a chat begins within the first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import harness
import pytest
from harness import RunningServer, tiny_server

pytestmark = pytest.mark.system

MODELS: dict[str, dict[str, Any]] = {
    "LFM2": {
        "architectures": ["Lfm2ForCausalLM"],
        "layer_types": ["conv", "full_attention"],
        "block_auto_adjust_ff_dim": False,
    },
    "Qwen3.5, its text half": {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "text_config": {
            "model_type": "qwen3_5_text",
            "layer_types": ["linear_attention", "full_attention"],
            "head_dim": 16,
            "linear_num_key_heads": 1,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 8,
        },
    },
    "Mamba-2": {
        "architectures": ["Mamba2ForCausalLM"],
        "num_heads": 2,
        "head_dim": 16,
        "state_size": 8,
        "n_groups": 1,
    },
    "Falcon-H1": {
        "architectures": ["FalconH1ForCausalLM"],
        "mamba_d_ssm": 32,
        "mamba_n_heads": 2,
        "mamba_d_state": 8,
    },
}


def chat(server: RunningServer, messages: list[dict[str, str]]) -> tuple[str, int]:
    """The answer, and how many of its prompt's tokens were found."""
    body = {"messages": messages, "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    model = server.get("/v1/models").json["data"][0]["id"]
    answer = server.post("/v1/chat/completions", {"model": model, **body})
    assert answer.status == 200, answer.body
    usage = answer.json["usage"]
    assert usage["completion_tokens"] == 40
    found = usage["prompt_tokens_details"]["cached_tokens"]
    return answer.json["choices"][0]["message"]["content"], found


@pytest.mark.parametrize("name", MODELS)
def test_a_second_turn_begins_from_a_saved_state(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = {**harness.TINY_MODEL, "num_hidden_layers": 2, "max_position_embeddings": 1024}
    model = MODELS[name]
    if "text_config" in model:
        model = {**model, "text_config": common | model["text_config"]}
    monkeypatch.setattr(harness, "TINY_MODEL", common | model)
    server = tiny_server(tmp_path)
    try:
        messages = [{"role": "user", "content": "the quick brown fox " * 8}]
        first, found = chat(server, messages)
        assert found == 0
        again, found = chat(server, messages)
        # All but the last whole blocks of 168 bytes and the template's.
        assert again == first
        assert found >= 144
        messages += [
            {"role": "assistant", "content": first},
            {"role": "user", "content": "and then?"},
        ]
        _, found = chat(server, messages)
        assert found >= 144
    finally:
        server.stop()
