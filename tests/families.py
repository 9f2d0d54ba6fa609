"""Families of models: the template of each in tests/data/templates, and answers in its format."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parent / "data" / "templates"

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "clock",
            "description": "The time.",
            "parameters": {
                "type": "object",
                "properties": {"zone": {"type": "string"}, "digits": {"type": "integer"}},
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {}}},
]

ZONE = 'Zürich "HB" \\ 東京\n<b>'
# What every answer below calls, unless it says otherwise.
CALLS: list[tuple[str, dict[str, Any]]] = [
    ("clock", {"zone": ZONE, "digits": 2}),
    ("clock", {"zone": "Oslo"}),
]


@dataclass(frozen=True)
class Family:
    """One family.

    Args:
        template: a file of tests/data/templates.
        tools, reasoning: names of the formats.
        says: an answer.
        content, thought, calls: what is in it.
        opened: whether the prompt opens the reasoning.
        toggle: the variable that switches reasoning.
    """

    template: str
    tools: str | None
    reasoning: str | None
    says: str
    content: str = ""
    thought: str | None = None
    calls: tuple[tuple[str, dict[str, Any]], ...] = tuple(CALLS)
    opened: bool = False
    toggle: str | None = None

    @property
    def source(self) -> str:
        """The template's text."""
        return (TEMPLATES / f"{self.template}.jinja").read_text(encoding="utf-8")


def _objects(name: str, arguments: str, opened: str, between: str, closed: str) -> str:
    """Calls as JSON objects of two keys."""
    parts = (json.dumps({name: f, arguments: a}, ensure_ascii=False) for f, a in CALLS)
    return opened + between.join(parts) + closed


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _tagged(call: str, argument: str, end: str, between: str = "") -> str:
    """Calls with a tag for each argument."""
    return between.join(
        call.format(f)
        + "".join(argument.format(key, _text(value)) for key, value in a.items())
        + end
        for f, a in CALLS
    )


def _literals(calls: list[tuple[str, dict[str, Any]]] = CALLS) -> str:
    """Calls in Python."""
    return ", ".join(f"{f}({', '.join(f'{k}={v!r}' for k, v in a.items())})" for f, a in calls)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


HERMES = _objects(
    "name",
    "arguments",
    "<tool_call>\n",
    "\n</tool_call>\n<tool_call>\n",
    "\n</tool_call>",
)
_ARRAY = _objects("name", "arguments", "[", ", ", "]")
_BAR, _BLOCK = "\uff5c", "\u2581"


def _deepseek(text: str) -> str:
    """DeepSeek's tokens, written with plain bars and blanks between angle brackets."""
    return text.replace("<|", f"<{_BAR}").replace("</|", f"</{_BAR}").replace("|", _BAR)


def _v3() -> str:
    calls = "\n".join(
        f"<|tool~call~begin|>function<|tool~sep|>{f}\n```json\n{_json(a)}\n```<|tool~call~end|>"
        for f, a in CALLS
    )
    return _deepseek(f"<|tool~calls~begin|>{calls}<|tool~calls~end|>").replace("~", _BLOCK)


def _v31() -> str:
    calls = "".join(
        f"<|tool~call~begin|>{f}<|tool~sep|>{_json(a)}<|tool~call~end|>" for f, a in CALLS
    )
    return _deepseek(f"<|tool~calls~begin|>{calls}<|tool~calls~end|>").replace("~", _BLOCK)


def _dsml() -> str:
    calls = "\n".join(
        f'<|DSML|invoke name="{f}">\n'
        + "".join(
            f'<|DSML|parameter name="{key}" string="{str(isinstance(value, str)).lower()}">'
            f"{_text(value)}</|DSML|parameter>\n"
            for key, value in a.items()
        )
        + "</|DSML|invoke>"
        for f, a in CALLS
    )
    return _deepseek(f"\n\n<|DSML|function_calls>\n{calls}\n</|DSML|function_calls>")


def _gemma(value: Any) -> str:
    return f'<|"|>{value}<|"|>' if isinstance(value, str) else json.dumps(value)


FAMILIES = [
    Family("chatml", "hermes", None, "Let me see.\n" + HERMES, "Let me see."),
    Family("hermes", "hermes", None, HERMES),
    Family(
        "qwen3",
        "hermes",
        "think",
        "<think>\nA thought.\n\nTwo.\n</think>\n\nLook:\n" + HERMES,
        "Look:",
        "A thought.\n\nTwo.",
        toggle="enable_thinking",
    ),
    # A call ends the reasoning, where the model forgets to.
    Family(
        "qwen3",
        "hermes",
        "think",
        "<think>\nA thought.\n" + HERMES,
        "",
        "A thought.",
        toggle="enable_thinking",
    ),
    Family(
        "qwen3_thinking",
        "hermes",
        "think",
        "A thought.\n</think>\n\nThe answer.",
        "The answer.",
        "A thought.",
        (),
        opened=True,
    ),
    Family(
        "qwen3_coder",
        "qwen3_coder",
        None,
        _tagged(
            "<tool_call>\n<function={}>\n",
            "<parameter={}>\n{}\n</parameter>\n",
            "</function>\n</tool_call>",
            "\n",
        ),
    ),
    Family(
        "llama3",
        "llama3_json",
        None,
        _objects("name", "parameters", "", "; ", ""),
    ),
    Family("pythonic", "pythonic", None, f"[{_literals()}]"),
    Family("mistral_v3", "mistral_array", None, "[TOOL_CALLS]" + _ARRAY),
    Family(
        "mistral_v11",
        "mistral",
        "mistral",
        "[THINK]Hm.[/THINK]" + "".join(f"[TOOL_CALLS]{f}[ARGS]{_json(a)}" for f, a in CALLS),
        "",
        "Hm.",
    ),
    Family("granite", "granite", "granite", "<|tool_call|>" + _ARRAY, toggle="thinking"),
    Family("phi4_mini", "phi4_mini_json", None, "functools" + _ARRAY),
    Family("deepseek_v3", "deepseek_v3", "think", _v3()),
    Family("deepseek_v31", "deepseek_v31", "think", _v31(), toggle="thinking"),
    Family(
        "deepseek_v32",
        "deepseek_v32",
        "think",
        "<think>Hm.</think>Now." + _dsml(),
        "Now.",
        "Hm.",
        toggle="thinking",
    ),
    Family(
        "glm45",
        "glm45",
        "think",
        "\n<think>Hm.</think>\n"
        + _tagged(
            "<tool_call>{}\n",
            "<arg_key>{}</arg_key>\n<arg_value>{}</arg_value>\n",
            "</tool_call>",
            "\n",
        ),
        "",
        "Hm.",
        toggle="enable_thinking",
    ),
    Family(
        "kimi_k2",
        "kimi_k2",
        "think",
        "Sure.<|tool_calls_section_begin|>"
        + "".join(
            f"<|tool_call_begin|>functions.{f}:{i}<|tool_call_argument_begin|>{_json(a)}"
            "<|tool_call_end|>"
            for i, (f, a) in enumerate(CALLS)
        )
        + "<|tool_calls_section_end|>",
        "Sure.",
    ),
    Family(
        "minimax_m2",
        "minimax_m2",
        "think",
        "Hm.\n</think>\n\n<minimax:tool_call>\n"
        + _tagged('<invoke name="{}">\n', '<parameter name="{}">{}</parameter>\n', "</invoke>\n")
        + "</minimax:tool_call>",
        "",
        "Hm.",
        opened=True,
    ),
    Family(
        "cohere_command3",
        "cohere_command3",
        "cohere_command3",
        "<|START_THINKING|>Hm.<|END_THINKING|><|START_ACTION|>[\n"
        + ",\n".join(
            "    " + _json({"tool_call_id": str(i), "tool_name": f, "parameters": a})
            for i, (f, a) in enumerate(CALLS)
        )
        + "\n]<|END_ACTION|>",
        "",
        "Hm.",
    ),
    Family(
        "cohere_command3",
        "cohere_command3",
        "cohere_command3",
        "<|START_THINKING|>Hm.<|END_THINKING|><|START_RESPONSE|>An answer.<|END_RESPONSE|>",
        "An answer.",
        "Hm.",
        (),
    ),
    Family(
        "gemma4",
        "gemma4",
        "gemma4",
        "".join(
            f"<|tool_call>call:{f}{{{','.join(f'{k}:{_gemma(v)}' for k, v in a.items())}}}"
            "<tool_call|>"
            for f, a in CALLS
        ),
        toggle="enable_thinking",
    ),
    Family(
        "gpt_oss",
        "openai",
        "openai",
        "<|channel|>analysis<|message|>Hm.<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.clock <|constrain|>json<|message|>"
        + _json(CALLS[0][1])
        + "<|call|>",
        "",
        "Hm.",
        tuple(CALLS[:1]),
    ),
    Family(
        "seed_oss",
        "seed_oss",
        "seed_oss",
        "<seed:think>Hm.</seed:think>"
        + _tagged(
            "<seed:tool_call>\n<function={}>\n",
            "<parameter={}>{}</parameter>\n",
            "</function>\n</seed:tool_call>",
            "\n",
        ),
        "",
        "Hm.",
    ),
    Family(
        "lfm2", "lfm2", None, f"<|tool_call_start|>[{_literals()}]<|tool_call_end|>Done.", "Done."
    ),
    Family(
        "nemotron",
        "nemotron",
        "think",
        f"Hm.\n</think>\n\n<TOOLCALL>{_ARRAY}</TOOLCALL>",
        "",
        "Hm.",
        opened=True,
        toggle="enable_thinking",
    ),
    Family(
        "internlm",
        "internlm",
        None,
        "<|action_start|><|plugin|>\n"
        + _json({"name": "clock", "parameters": CALLS[0][1]})
        + "<|action_end|>",
        calls=tuple(CALLS[:1]),
    ),
    Family("jamba", "jamba", None, f"<tool_calls>{_ARRAY}</tool_calls>"),
    Family(
        "exaone",
        "hermes",
        "think",
        HERMES.replace("<tool_call>\n", "<tool_call>").replace("\n</tool_call>", "</tool_call>"),
        toggle="enable_thinking",
    ),
    # Text that is no call stays text, near-markers and broken calls too.
    Family("hermes", "hermes", None, "a <tool> b <tool_ca c", "a <tool> b <tool_ca c", calls=()),
    Family("hermes", "hermes", None, "No tools here.", "No tools here.", calls=()),
]
