"""Names of reasoning formats, and the words in a template or a vocabulary that give one away.

A format's canonical name is the core's; it is vLLM's name of the parser wherever vLLM has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from octavo.text.tool_formats import AUTO

# Reads what stands between <think> and </think>, whoever opens it.
THINK: Final = "deepseek_r1"

# vLLM's other names -> the format that reads the same. Whether a prompt has opened the reasoning
# is seen in the prompt, which is what most of these names differ in.
ALIASES: Final = {
    "deepseek_v3": THINK,
    "deepseek_v31": THINK,
    "deepseek_v32": THINK,
    "deepseek_v4": THINK,
    "ernie45": THINK,
    "exaone4": THINK,
    "gigachat3": THINK,
    "glm45": THINK,
    "glm47": THINK,
    "gptoss": "openai_gptoss",
    "harmony": "openai_gptoss",
    "openai": "openai_gptoss",
    "hf": AUTO,
    "holo2": THINK,
    "hunyuan_a13b": THINK,
    "hy_v3": THINK,
    "intern_s1": THINK,
    "kimi_k2": THINK,
    "mimo": THINK,
    "minimax_m2": THINK,
    "minimax_m2_append_think": THINK,
    "nemotron_v3": THINK,
    "nemotron": THINK,
    "olmo3": THINK,
    "poolside_v1": THINK,
    "qwen3": THINK,
    "qwen3_5": THINK,
    "solar_open2": THINK,
    "step3": THINK,
    "step3p5": THINK,
    "think": THINK,
}

# vLLM's names without a format of their own here: the template decides.
WITHOUT_FORMAT: Final = frozenset({"cohere_command4", "inkling", "kimi_k3", "identity"})

# Words of a template, all of which must be there -> the format.
SIGNS: Final[Sequence[tuple[tuple[str, ...], str]]] = (
    (("<|channel|>", "analysis"), "openai_gptoss"),
    (("[THINK]",), "mistral"),
    (("<|START_THINKING|>",), "cohere_command3"),
    (("<seed:think>",), "seed_oss"),
    (("<mm:think>",), "minimax_m3"),
    (("◁think▷",), "kimi_vl"),
    (("<|channel>thought",), "gemma4"),
    (("<|channel>", "thought"), "gemma4"),
    (("Here is my thought process",), "granite"),
    (("</think>",), THINK),
)


def sign_of(text: str, known: Sequence[str]) -> str | None:
    """The format that a template's (or a vocabulary's) text shows signs of, among ``known``."""
    for words, name in SIGNS:
        if name in known and all(word in text for word in words):
            return name
    return None
