"""Signs of tool-call formats: words in a chat template that give one away.

The formats themselves, and vLLM's names for them, are a table of the core (``ChannelFormat``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

# DeepSeek's tokens have a wide bar and a block where others have a bar and a space.
_BAR: Final = "\uff5c"
_DEEPSEEK_CALLS: Final = f"<{_BAR}tool\u2581calls\u2581begin{_BAR}>"

# Words, all of which must be there -> the format. The first that fits counts: one whose words are
# part of another's comes after it.
SIGNS: Final[Sequence[tuple[tuple[str, ...], str]]] = (
    (("<|channel|>", "<|message|>"), "openai"),
    (("<|tool_calls_section_begin|>",), "kimi_k2"),
    ((f"{_BAR}DSML{_BAR}", "function_calls"), "deepseek_v32"),
    ((f"{_BAR}DSML{_BAR}",), "deepseek_v4"),
    ((_DEEPSEEK_CALLS, "```json"), "deepseek_v3"),
    ((_DEEPSEEK_CALLS,), "deepseek_v31"),
    (("<minimax:tool_call>",), "minimax_m2"),
    (("]<]minimax[>[",), "minimax_m3"),
    (("<seed:tool_call>",), "seed_oss"),
    (("<steptml:invoke",), "step3"),
    (("<cofl:tool_call",), "cohere_command4"),
    (("<|START_ACTION|>",), "cohere_command3"),
    (("<|tool_call>call:",), "gemma4"),
    (("<start_function_call>",), "functiongemma"),
    (("<|tools_prefix|>",), "apertus"),
    (("<|tool_call:start|>",), "solar_open2"),
    (("<longcat_tool_call>",), "longcat"),
    (("function call<|role_sep|>",), "gigachat3"),
    (("<|content_invoke_tool_json|>",), "inkling"),
    (("<tool_sep>",), "hy_v3"),
    (("<arg_key>",), "glm45"),
    (("<function=", "<parameter="), "qwen3_coder"),
    (('<function name="', "<param "), "minicpm5"),
    (("<TOOLCALL>",), "nemotron"),
    (("<|action_start|>",), "internlm"),
    (("<function_calls>",), "olmo3"),
    (("<tool_calls>",), "jamba"),
    (("<|tool_call_start|>",), "lfm2"),
    (("<|tool_list_start|>",), "lfm2"),
    (("List of tools: [",), "lfm2"),
    (("functools",), "phi4_mini_json"),
    (("<tool_call>",), "hermes"),
    (("[TOOL_CALLS]", "[ARGS]"), "mistral"),
    (("[TOOL_CALLS]",), "mistral_array"),
    (("<|tool_call|>",), "granite"),
    (("<|python_start|>",), "llama4_pythonic"),
    (("<|python_tag|>",), "llama3_json"),
    (('"parameters"', '"name"'), "llama3_json"),
)

# Formats that take bare text for a call: they would also take the inner part of others, and are
# tried last, in this order.
BARE: Final = ("llama3_json", "pythonic", "llama4_pythonic", "xlam")

# Formats whose parser reads another's calls too, what their own calls hold, and the other: the
# grammar of calls writes one form only.
NARROWER: Final = {
    "glm45": ("\n<arg_key>", "glm47"),
    "jamba": ("[", "minimax"),
}

# One of vLLM's names -> forms of one family, of which the model's template tells.
FAMILIES: Final = {
    "deepseek_v32": ("deepseek_v32", "deepseek_v4"),
    "glm45": ("glm45", "glm47"),
    "granite": ("granite", "hermes"),
    "mistral": ("mistral_array", "mistral"),
}
