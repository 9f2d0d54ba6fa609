"""Signs of reasoning formats: words in a chat template that give one away.

The formats themselves, and vLLM's names for them, are a table of the core (``ChannelFormat``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

# What stands between <think> and </think>, whoever opens it.
THINK: Final = "think"

# Words, all of which must be there -> the format. The first that fits counts.
SIGNS: Final[Sequence[tuple[tuple[str, ...], str]]] = (
    (("<|channel|>", "analysis"), "openai"),
    (("[THINK]",), "mistral"),
    (("<|START_THINKING|>",), "cohere_command3"),
    (("<seed:think>",), "seed_oss"),
    (("<mm:think>",), "minimax_m3"),
    (("<|inner_prefix|>",), "apertus"),
    (("<|think:start|>",), "solar_open2"),
    (("<|content_thinking|>",), "inkling"),
    (("\u25c1think\u25b7",), "kimi_vl"),
    (("<|channel>", "thought"), "gemma4"),
    (("Here is my thought process",), "granite"),
    (("</think>", "<answer>"), "hunyuan_a13b"),
    (("</think>", "<response>"), "ernie45"),
    (("</think>",), THINK),
)

# What may follow <think>'s end, and be part of the format.
FRAMES: Final = {"<answer>": "hunyuan_a13b", "<response>": "ernie45"}
