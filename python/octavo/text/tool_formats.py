"""Names of tool-call formats, and the words in a template or a vocabulary that give one away.

A format's canonical name is the core's; it is vLLM's name of the parser wherever vLLM has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

# No parsing at all.
NONE: Final = "none"
AUTO: Final = "auto"

# vLLM's other names -> the format that reads the same.
ALIASES: Final = {
    "deepseek_v4": "deepseek_v32",
    "glm47": "glm45",
    "granite4": "hermes",
    "hf": AUTO,
    "llama4_json": "llama3_json",
    "llama": "llama3_json",
    "llama3": "llama3_json",
    "mimo": "qwen3_coder",
    "openai_gptoss": "openai",
    "gptoss": "openai",
    "harmony": "openai",
    "qwen3_xml": "qwen3_coder",
    "qwen3": "qwen3_coder",
    "qwen25": "hermes",
    "qwen": "hermes",
    "qwen3_5": "qwen3_coder",
    "step3p5": "qwen3_coder",
    "nemotron_v3": "qwen3_coder",
    "longcat": "hermes",
    "olmo3": "pythonic",
    "minicpm5": "qwen3_coder",
    "phi4": "phi4_mini_json",
    "internlm2": "internlm",
    "cohere": "cohere_command3",
    "command_r7b": "cohere_command3",
    "kimi_k2_engine": "kimi_k2",
}

# vLLM's names without a format of their own here: the template decides.
WITHOUT_FORMAT: Final = frozenset(
    {
        "apertus",
        "cohere_command4",
        "ernie45",
        "functiongemma",
        "gigachat3",
        "granite-20b-fc",
        "hunyuan_a13b",
        "hy_v3",
        "inkling",
        "internlm",
        "jamba",
        "kimi_k3",
        "lfm2",
        "minimax",
        "minimax_m3",
        "poolside_v1",
        "seed_oss",
        "solar_open2",
        "step3",
        "xlam",
    }
)

# Words of a template, all of which must be there -> the format. The first that fits counts: names
# that another's words are part of come before it.
SIGNS: Final[Sequence[tuple[tuple[str, ...], str]]] = (
    (("<|channel|>", "<|message|>"), "openai"),
    (("<|tool_calls_section_begin|>",), "kimi_k2"),
    (("｜DSML｜",), "deepseek_v32"),
    (("<｜tool▁calls▁begin｜>", "```json"), "deepseek_v3"),
    (("<｜tool▁calls▁begin｜>",), "deepseek_v31"),
    (("<minimax:tool_call>",), "minimax_m2"),
    (("<seed:tool_call>",), "seed_oss"),
    (("<|START_ACTION|>",), "cohere_command3"),
    (("<|tool_call>call:",), "gemma4"),
    (("<arg_key>",), "glm45"),
    (("<function=", "<parameter="), "qwen3_coder"),
    (("<TOOLCALL>",), "nemotron"),
    (("<|action_start|>",), "internlm"),
    (("<tool_calls>",), "jamba"),
    (("<|tool_call_start|>",), "lfm2"),
    (("functools",), "phi4_mini_json"),
    (("<tool_call>",), "hermes"),
    (("[TOOL_CALLS]",), "mistral"),
    (("<|tool_call|>",), "granite"),
    (("<|python_start|>",), "llama4_pythonic"),
    (("<|python_tag|>",), "llama3_json"),
    (('"parameters"', '"name"'), "llama3_json"),
)

# Formats that read bare text: they would take other formats' inner part for a call.
BARE: Final = frozenset({"llama3_json", "pythonic", "llama4_pythonic"})


def sign_of(text: str, known: Sequence[str]) -> str | None:
    """The format that a template's (or a vocabulary's) text shows signs of, among ``known``."""
    for words, name in SIGNS:
        if name in known and all(word in text for word in words):
            return name
    return None
