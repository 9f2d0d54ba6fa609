"""LLM.chat with tools and reasoning, on SmolLM2: the answers' parts beside their whole text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from families import FAMILIES, TOOLS
from octavo.errors import InvalidParameterError
from octavo.llm import LLM
from octavo.sampling_params import SamplingParams
from octavo.structured_outputs import StructuredOutputsParams

MESSAGES = [{"role": "user", "content": "What time is it?"}]
QWEN3 = next(family for family in FAMILIES if family.template == "qwen3")
CALL = '<tool_call>\n{"name": "clock", "arguments": {"zone": "Oslo"}}\n</tool_call>'


@pytest.fixture(scope="module")
def llm(smollm2_path: Path) -> LLM:
    return LLM(str(smollm2_path), threads=1, max_model_len=1024, max_num_seqs=2)


def says(text: str) -> SamplingParams:
    """Parameters under which a model says just this."""
    only = StructuredOutputsParams(choice=(text,))
    return SamplingParams(temperature=0, max_tokens=200, structured_outputs=only)


def test_calls_are_found_in_the_whole_text(llm: LLM) -> None:
    text = f"Let me see.\n{CALL}\n{CALL}"
    [output] = llm.chat(MESSAGES, says(text), tools=TOOLS, use_tqdm=False)
    assert output.prompt is not None
    assert '"clock"' in output.prompt
    [sample] = output.outputs
    assert sample.text == text
    assert sample.content is not None
    assert sample.content.strip() == "Let me see."
    assert [(call.name, json.loads(call.arguments)) for call in sample.tool_calls] == [
        ("clock", {"zone": "Oslo"})
    ] * 2
    assert len({call.id for call in sample.tool_calls}) == 2


# Qwen3's form of calls, between markers that are tokens of SmolLM2's.
MARKED = QWEN3.source.replace("<tool_call>", "<jupyter_code>").replace(
    "</tool_call>", "<jupyter_output>"
)


@pytest.mark.parametrize("strict", [False, True])
def test_a_call_is_of_a_tool_that_there_is(llm: LLM, strict: bool) -> None:
    """A model that is pushed into a call, and knows of none, is bound from the marker on."""
    marker = llm.get_tokenizer().convert_tokens_to_ids("<jupyter_code>")
    schema = {"type": "object", "properties": {"zone": {"enum": ["Oslo"]}}, "required": ["zone"]}
    tool = {"name": "clock", "strict": strict, "parameters": schema}
    params = SamplingParams(temperature=0, max_tokens=60, logit_bias={marker: 100.0})
    fields: dict[str, Any] = {"use_tqdm": False, "chat_template": MARKED}
    tools = [{"type": "function", "function": tool}]
    [output] = llm.chat(MESSAGES, params, tools=tools, **fields)
    calls = output.outputs[0].tool_calls
    assert {call.name for call in calls} == {"clock"}
    if strict:
        assert json.loads(calls[0].arguments) == {"zone": "Oslo"}
    # What a request asks for itself has the last word.
    [output] = llm.chat(MESSAGES, says("noon"), tools=tools, **fields)
    assert output.outputs[0].text == "noon"


def test_conversations_may_wait(llm: LLM) -> None:
    [ready] = llm.chat(MESSAGES, says(CALL), False, tools=TOOLS)
    ids = llm.enqueue_chat([MESSAGES, MESSAGES], says(CALL), False, None, 1, tools=TOOLS)
    ids += llm.enqueue("The sea is", SamplingParams(max_tokens=2))
    outputs = llm.wait_for_completion(use_tqdm=False)
    assert [output.request_id for output in outputs] == ids
    for output in outputs[:2]:
        assert output.prompt == ready.prompt
        [call], [other] = output.outputs[0].tool_calls, ready.outputs[0].tool_calls
        assert (call.name, call.arguments) == (other.name, other.arguments)
    assert outputs[2].outputs[0].tool_calls == []
    assert llm.wait_for_completion(use_tqdm=False) == []


def test_without_tools_an_answer_is_text(llm: LLM) -> None:
    [output] = llm.chat(MESSAGES, says(CALL), use_tqdm=False)
    [sample] = output.outputs
    assert (sample.text, sample.content, sample.tool_calls) == (CALL, None, [])


def test_reasoning_is_found_in_the_whole_text(llm: LLM) -> None:
    def ask(text: str, **fields: Any) -> Any:
        [output] = llm.chat(
            MESSAGES, says(text), use_tqdm=False, chat_template=QWEN3.source, **fields
        )
        return output.outputs[0]

    sample = ask("<think>\nHm.\n</think>\n\nNoon.")
    assert (sample.reasoning.strip(), sample.content.strip()) == ("Hm.", "Noon.")
    assert sample.text == "<think>\nHm.\n</think>\n\nNoon."
    # The prompt has closed it.
    sample = ask("Noon.", chat_template_kwargs={"enable_thinking": False})
    assert (sample.reasoning, sample.content) == (None, "Noon.")
    continued = [*MESSAGES, {"role": "assistant", "content": "<think>\nOne"}]
    [output] = llm.chat(
        continued,
        says(" two.</think>Noon."),
        use_tqdm=False,
        chat_template=QWEN3.source,
        continue_final_message=True,
    )
    assert output.prompt is not None
    assert output.prompt.endswith("<think>\nOne")
    assert (output.outputs[0].reasoning or "").strip() == "two."


def test_a_bad_tool_is_named(llm: LLM) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        llm.chat(MESSAGES, tools=[{"type": "function"}])
    assert caught.value.param == "tools[0].function"
