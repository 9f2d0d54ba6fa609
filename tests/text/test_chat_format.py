"""chat_format.py: formats are found from templates, by what they write and by what they say."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from families import FAMILIES, TEMPLATES, Family
from octavo._core import reasoning_formats, tool_call_formats
from octavo.text import reasoning_formats as reasoning_signs
from octavo.text import tool_formats as tool_signs
from octavo.text.answer_parts import answer_parts
from octavo.text.chat_format import check_parser_name, find_chat_format
from octavo.text.chat_template import ChatTemplate
from octavo.text.tools import parse_tool_use, parse_tools

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
ONE_EACH = list({family.template: family for family in FAMILIES}.values())


def template_of(family: Family) -> ChatTemplate:
    return ChatTemplate(family.source, SPECIAL)


def test_every_template_has_a_family() -> None:
    named = {family.template for family in FAMILIES} | {"own_tags"}
    assert named == {file.stem for file in TEMPLATES.glob("*.jinja")}


@pytest.mark.parametrize("family", ONE_EACH, ids=lambda family: family.template)
def test_a_familys_format_is_found(family: Family) -> None:
    template = template_of(family)
    began = time.perf_counter()
    found = find_chat_format(template)
    assert time.perf_counter() - began < 1.0
    assert found.tool_calls == family.tools or family.template == "qwen3_thinking"
    assert (found.core and found.core.reasoning) == family.reasoning
    assert found.toggle == family.toggle
    prompt = template.render([{"role": "user", "content": "Hello"}])
    assert found.is_reasoning(prompt) is family.opened


def test_markers_of_a_models_own_are_found() -> None:
    source = (TEMPLATES / "own_tags.jinja").read_text()
    found = find_chat_format(ChatTemplate(source, SPECIAL))
    assert found.reasoning_markers == ("<ponder>", "</ponder>")


STYLES = {
    "objects": (
        """{{- '<do>{"fn": "' + f.name + '", "args": ' + f.arguments | tojson + '}</do>' }}""",
        '<do>{"fn": "clock", "args": {"zone": "Oslo"}}</do>',
    ),
    "values": (
        "{{- '<run:' + f.name + '>' + f.arguments | tojson + '</run>' }}",
        '<run:clock>{"zone": "Oslo"}</run>',
    ),
    "tags": (
        "{{- '<use=' + f.name + '>' }}{%- for k, v in f.arguments | items %}"
        "{{- '<arg=' + k + '>' + v + '</arg>' }}{%- endfor %}{{- '</use>' }}",
        "<use=clock><arg=zone>Oslo</arg></use>",
    ),
}


@pytest.mark.parametrize("style", STYLES)
def test_calls_between_markers_of_a_models_own_are_found(style: str) -> None:
    writes, said = STYLES[style]
    source = (
        "{{ tools | tojson }}{% for m in messages %}{{- '<' + m.role + '>' + (m.content or '') }}"
        "{%- for c in m.tool_calls or [] %}{%- set f = c.function %}" + writes + "{%- endfor %}"
        "{{- '</' + m.role + '>' }}{%- endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    found = find_chat_format(ChatTemplate(source, SPECIAL))
    assert found.tool_calls == "custom", found.summary
    schema = {"type": "object", "properties": {"zone": {"type": "string"}}}
    function = {"name": "clock", "parameters": schema}
    use = parse_tool_use(parse_tools("tools", [{"type": "function", "function": function}]))
    channels = found.channels("<assistant>", use)
    assert channels is not None
    parts = answer_parts(f"Look: {said} and {said}", channels)
    assert [(name, json.loads(arguments)) for name, arguments in parts.calls] == [
        ("clock", {"zone": "Oslo"})
    ] * 2
    assert found.core is not None
    assert "clock" in found.core.grammar(use.signatures, at_least_one=True, at_most_one=True)


def test_markers_of_every_turn_are_not_a_calls() -> None:
    source = (
        "{{ tools | tojson }}{% for m in messages %}{{- '<msg>' + (m.content or '') }}"
        '{%- for c in m.tool_calls or [] %}{{- \'{"fn": "\' + c.function.name + \'", "args": \' '
        "+ c.function.arguments | tojson + '}' }}{%- endfor %}{{- '</msg>' }}{%- endfor %}"
    )
    assert find_chat_format(ChatTemplate(source, SPECIAL)).tool_calls is None


@pytest.mark.parametrize("flag", ["tool_call_parser", "reasoning_parser"])
def test_a_parsers_name_is_checked(flag: str) -> None:
    for name in (None, "auto", "none", "hf"):
        check_parser_name(flag, name)
    for name in ("muse", "step5"):
        check_parser_name(flag, name)
    known = tool_call_formats() if flag == "tool_call_parser" else reasoning_formats()
    for name in known:
        check_parser_name(flag, name)
    with pytest.raises(ValueError, match="must be auto, none, one of") as caught:
        check_parser_name(flag, "nonesuch")
    assert str(caught.value).startswith("--" + flag.replace("_", "-"))
    assert all(name in str(caught.value) for name in known)


# vLLM's names of its parsers; of some it has several.
VLLM_TOOLS = [
    "apertus",
    "cohere_command3",
    "cohere_command4",
    "deepseek_v3",
    "deepseek_v31",
    "deepseek_v32",
    "deepseek_v4",
    "ernie45",
    "functiongemma",
    "gemma4",
    "gigachat3",
    "glm45",
    "glm47",
    "granite",
    "granite-20b-fc",
    "granite4",
    "hermes",
    "hunyuan_a13b",
    "hy_v3",
    "inkling",
    "internlm",
    "jamba",
    "kimi_k2",
    "kimi_k3",
    "lfm2",
    "llama3_json",
    "llama4_json",
    "llama4_pythonic",
    "longcat",
    "mimo",
    "minicpm5",
    "minimax",
    "minimax_m2",
    "minimax_m3",
    "mistral",
    "olmo3",
    "openai",
    "phi4_mini_json",
    "poolside_v1",
    "pythonic",
    "qwen3_coder",
    "qwen3_xml",
    "seed_oss",
    "solar_open2",
    "step3",
    "step3p5",
    "xlam",
]
VLLM_REASONING = [
    "cohere_command3",
    "cohere_command4",
    "deepseek_r1",
    "deepseek_v3",
    "deepseek_v4",
    "ernie45",
    "gemma4",
    "glm45",
    "glm47",
    "granite",
    "holo2",
    "hunyuan_a13b",
    "hy_v3",
    "inkling",
    "kimi_k2",
    "kimi_k3",
    "mimo",
    "minimax_m2",
    "minimax_m2_append_think",
    "minimax_m3",
    "mistral",
    "nemotron_v3",
    "olmo3",
    "openai_gptoss",
    "poolside_v1",
    "qwen3",
    "seed_oss",
    "solar_open2",
    "step3",
    "step3p5",
]


@pytest.mark.parametrize("name", VLLM_TOOLS)
def test_vllms_tool_call_parsers_are_known(name: str) -> None:
    check_parser_name("tool_call_parser", name)


@pytest.mark.parametrize("name", VLLM_REASONING)
def test_vllms_reasoning_parsers_are_known(name: str) -> None:
    check_parser_name("reasoning_parser", name)


def test_signs_are_of_formats_that_there_are() -> None:
    assert {name for _, name in tool_signs.SIGNS} <= set(tool_call_formats())
    assert {name for _, name in reasoning_signs.SIGNS} <= set(reasoning_formats())
    assert set(tool_signs.BARE) <= set(tool_call_formats())


def test_a_flag_wins_and_names_a_family() -> None:
    hermes = ChatTemplate((TEMPLATES / "hermes.jinja").read_text(), SPECIAL)
    found = find_chat_format(hermes, tool_call_parser="qwen3_xml", reasoning_parser="qwen3")
    assert found.tool_calls == "qwen3_coder"
    assert found.reasoning_markers == ("<think>", "</think>")
    assert "(flag)" in found.summary
    array = ChatTemplate((TEMPLATES / "mistral_v3.jinja").read_text(), SPECIAL)
    assert find_chat_format(array, tool_call_parser="mistral").tool_calls == "mistral_array"
    none = find_chat_format(hermes, tool_call_parser="none", reasoning_parser="none")
    assert none.core is None
    assert none.channels("", parse_tool_use(parse_tools("tools", []))) is None


def test_without_a_template_flags_decide() -> None:
    assert find_chat_format(None).core is None
    assert find_chat_format(None, tool_call_parser="hermes").tool_calls == "hermes"


RESPONSE_TEMPLATE = {
    "version": 1,
    "start_anchor": "<a>",
    "fields": {
        "thinking": {"open": ["<think>", "<thought>"], "close": "</think>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"<\|tool_call>call:(?P<name>\w+)",
            "close": "<tool_call|>",
            "content": "json",
        },
        "content": {"close": "</a>"},
    },
}


def test_a_checkpoints_declaration_comes_first() -> None:
    hermes = ChatTemplate((TEMPLATES / "hermes.jinja").read_text(), SPECIAL)
    found = find_chat_format(hermes, response_template=RESPONSE_TEMPLATE)
    assert found.tool_calls == "gemma4"
    assert found.reasoning_markers == ("<think>", "</think>")
    assert found.summary.count("response_template") == 2


@pytest.mark.parametrize(
    "declared", [{}, {"fields": []}, {"fields": {"tool_calls": 3, "thinking": {"open": ["a"]}}}, 7]
)
def test_a_declaration_that_is_none_is_passed_over(declared: Any) -> None:
    hermes = ChatTemplate((TEMPLATES / "hermes.jinja").read_text(), SPECIAL)
    assert find_chat_format(hermes, response_template=declared).tool_calls == "hermes"


@pytest.mark.parametrize(
    "source", ["", "{{ raise_exception('no') }}", "{{ messages[7].content }}{{ tools }}"]
)
def test_a_template_that_refuses_everything_has_no_format(source: str) -> None:
    found = find_chat_format(ChatTemplate(source, {}))
    assert found.reasoning_markers is None


# ------------------------------------------------------------------------------------- docs

DOCS = Path(__file__).parents[2] / "docs" / "tools.md"


def table() -> str:
    rows = []
    for family in ONE_EACH:
        found = find_chat_format(template_of(family))
        calls, _, reasoning = found.summary.removeprefix("tool calls ").partition("; reasoning ")
        rows.append(f"| {family.template} | {calls} | {reasoning} |")
    return "\n".join(["| template | tool calls | reasoning |", "|---|---|---|", *rows])


def documented() -> str:
    text = DOCS.read_text(encoding="utf-8")
    tools = ", ".join(f"`{name}`" for name in tool_call_formats())
    reasoning = ", ".join(f"`{name}`" for name in reasoning_formats())
    written = {"found": table(), "tools": f"Tool calls: {tools}.\n\nReasoning: {reasoning}."}
    for name, content in written.items():
        begin, end = f"<!-- {name}: written by a test -->", f"<!-- end of {name} -->"
        assert begin in text, name
        head, _, rest = text.partition(begin)
        text = f"{head}{begin}\n\n{content}\n\n{end}{rest.partition(end)[2]}"
    return text


def test_the_docs_say_what_is_found() -> None:
    wanted = documented()
    if os.environ.get("OCTAVO_WRITE_DOCS"):
        DOCS.write_text(wanted, encoding="utf-8")
    assert DOCS.read_text(encoding="utf-8") == wanted, "run this test with OCTAVO_WRITE_DOCS=1"


# ------------------------------------------------------- real templates, where there are some

# A file's name, as in llama.cpp's folder of templates -> (tool calls, reasoning).
REAL: dict[str, tuple[str | None, str | None]] = {
    "Apertus-8B-Instruct": ("apertus", "apertus"),
    "Apriel-1.6-15b-Thinker-fixed": ("jamba", None),
    "Bielik-11B-v3.0-Instruct": ("hermes", "think"),
    "ByteDance-Seed-OSS": ("seed_oss", "seed_oss"),
    "Cohere2MoE": ("cohere_command3", "cohere_command3"),
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": ("cohere_command3", "cohere_command3"),
    "GLM-4.6": ("glm45", "think"),
    "GLM-4.7-Flash": ("glm47", "think"),
    "GigaChat3-10B-A1.8B": ("gigachat3", None),
    "GigaChat3.1-10B-A1.8B": ("custom", None),
    "HuggingFaceTB-SmolLM3-3B": ("hermes", "think"),
    "Kimi-K2-Instruct": ("kimi_k2", None),
    "Kimi-K2-Thinking": ("kimi_k2", "think"),
    "LFM2-8B-A1B": ("lfm2", None),
    "LFM2.5-8B-A1B": ("lfm2", "think"),
    "LFM2.5-Instruct": ("lfm2", "think"),
    "MiMo-VL": ("hermes", None),
    "MiniMax-M1": ("minimax", None),
    "MiniMax-M2": ("minimax_m2", "think"),
    "MiniMax-M3": ("minimax_m3", "minimax_m3"),
    "Mistral-Small-3.2-24B-Instruct-2506": ("mistral", None),
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": ("qwen3_coder", "think"),
    "NVIDIA-Nemotron-Nano-v2": ("nemotron", "think"),
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": ("hermes", None),
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": ("hermes", None),
    "Qwen-QwQ-32B": ("hermes", "think"),
    "Qwen-Qwen2.5-7B-Instruct": ("hermes", None),
    "Qwen-Qwen3-0.6B": ("hermes", "think"),
    "Qwen3-Coder": ("qwen3_coder", None),
    "Qwen3.5-4B": ("qwen3_coder", "think"),
    "Spark2.5": ("glm47", "think"),
    "StepFun3.5-Flash": ("qwen3_coder", "think"),
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": ("deepseek_v3", "think"),
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": ("deepseek_v3", "think"),
    "deepseek-ai-DeepSeek-V3.1": ("deepseek_v31", "think"),
    "deepseek-ai-DeepSeek-V3.2": ("deepseek_v32", "think"),
    "deepseek-ai-DeepSeek-V4-Flash-0731": ("deepseek_v4", "think"),
    "deepseek-ai-DeepSeek-V4": ("deepseek_v4", "think"),
    "google-gemma-4-31B-it-interleaved": ("gemma4", "gemma4"),
    "google-gemma-4-31B-it": ("gemma4", "gemma4"),
    "ibm-granite-granite-3.3-2B-Instruct": ("granite", "ernie45"),
    "ibm-granite-granite-4.0": ("hermes", None),
    "ibm-granite-granite-4.1": ("hermes", None),
    "inclusionai-ling-3.0-flash": ("glm45", "think"),
    "llama-cpp-deepseek-r1": ("deepseek_v3", "think"),
    "meetkai-functionary-medium-v3.1": ("custom", None),
    "meetkai-functionary-medium-v3.2": ("functionary_v3", None),
    "meta-llama-Llama-3.1-8B-Instruct": ("llama3_json", None),
    "meta-llama-Llama-3.2-3B-Instruct": ("llama3_json", None),
    "meta-llama-Llama-3.3-70B-Instruct": ("llama3_json", None),
    "mistralai-Ministral-3-14B-Reasoning-2512": ("mistral", "mistral"),
    "mistralai-Mistral-Nemo-Instruct-2407": ("mistral_array", None),
    "moonshotai-Kimi-K2": ("kimi_k2", None),
    "openai-gpt-oss-120b": ("openai", "openai"),
    "openbmb-MiniCPM5-1B": ("minicpm5", "think"),
    "poolside-Laguna-S-2.1": ("glm47", "think"),
    "poolside-Laguna-XS-2.1": ("glm45", "think"),
    "poolside-Laguna-XS.2": ("glm45", "think"),
    "tencent-Hy3": ("custom", "think"),
    "unsloth-Apriel-1.5": ("jamba", None),
    "unsloth-mistral-Devstral-Small-2507": ("mistral", None),
}
_FOLDER = os.environ.get("OCTAVO_CHAT_TEMPLATES")


@pytest.mark.skipif(_FOLDER is None, reason="OCTAVO_CHAT_TEMPLATES names no folder of templates")
def test_real_templates_are_told_apart() -> None:
    assert _FOLDER is not None
    wrong, num_right = {}, 0
    for file in sorted(Path(_FOLDER).glob("*.jinja")):
        if file.stem not in REAL:
            continue
        found = find_chat_format(ChatTemplate(file.read_text(encoding="utf-8"), SPECIAL))
        names = found.tool_calls, found.core and found.core.reasoning
        if names == REAL[file.stem]:
            num_right += 1
        else:
            wrong[file.stem] = names
    assert not wrong
    assert num_right >= 40
