"""Tool calls and reasoning through the real core: its pieces, its ready frames, its counts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import pytest
from harness import RunningServer, StartServer
from test_core_streams import start_core_server, tokenizer  # noqa: F401 (fixtures)
from test_tools import ask, check_content, joined, plain, stream, without_ids

from families import FAMILIES, TOOLS, Family
from octavo._core import Tokenizer
from octavo.engine import engine_loop

pytestmark = pytest.mark.system


@pytest.fixture
def start_family(
    start_core_server: StartServer,  # noqa: F811
    tokenizer: Tokenizer,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> Any:
    """``start_family(family, **flags)``: a server whose model gives the family's answer."""
    model = sys.modules["hash_model"]
    source = model.FakeSource(model_config=model.FakeModelConfig(tokenizer.vocab_size))
    monkeypatch.setattr(engine_loop, "resolve_model", lambda config: source)

    def start(family: Family, **flags: Any) -> RunningServer:
        script = [*tokenizer.encode(family.says, False), model.EOS]
        begun: list[int] = []

        def next_token(context: Sequence[int]) -> int:
            # Every prompt of a test is the same.
            if not begun:
                begun.append(len(context))
            return script[len(context) - begun[0]]

        monkeypatch.setattr(model, "next_token", next_token)
        return start_core_server(chat_template=family.source, max_model_len=2048, **flags)

    return start


@pytest.mark.parametrize("interval", [1, 3, 100])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.template)
def test_the_cores_stream_says_what_its_whole_answer_says(
    start_family: Any, family: Family, interval: int
) -> None:
    server = start_family(family, stream_interval=interval)
    answer = ask(server)
    whole = plain(answer)
    check_content(family, whole)
    *chunks, last = stream(server, stream_options={"include_usage": True})
    streamed = joined(chunks)
    check_content(family, streamed)
    assert without_ids(streamed) == without_ids(whole)
    assert (
        last["usage"]["completion_tokens_details"] == (answer["usage"]["completion_tokens_details"])
    )
    num_thoughts = last["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert (num_thoughts > 0) is bool(family.thought)


@pytest.mark.parametrize("shows", [True, False])
def test_reasoning_leaves_the_core_as_ready_frames(start_family: Any, shows: bool) -> None:
    family = next(family for family in FAMILIES if family.thought and not family.calls)
    server = start_family(family)
    frames = [c["choices"][0]["delta"] for c in stream(server, include_reasoning=shows)]
    thoughts = [delta for delta in frames if "reasoning" in delta]
    assert bool(thoughts) is shows
    if shows:
        assert "".join(one["reasoning"] for one in thoughts).strip() == family.thought
        assert all(one["reasoning"] == one["reasoning_content"] for one in thoughts)


# Families whose answers here keep to the order of their tools' schemas, beside other text.
CANONICAL = ("hermes", "qwen3", "qwen3_coder", "deepseek_v31", "kimi_k2", "glm45", "nemotron")
STRICT = [{**tool, "function": {**tool["function"], "strict": True}} for tool in TOOLS]


@pytest.mark.parametrize("tools", [TOOLS, STRICT], ids=["named", "strict"])
@pytest.mark.parametrize("template", CANONICAL)
def test_a_call_is_bound_from_its_marker_to_its_end(
    start_family: Any, template: str, tools: list[Any]
) -> None:
    """What the model says without masks is what each mask allows; before a call, and with no tools,
    no mask is made."""
    family = next(family for family in FAMILIES if family.template == template)
    server = start_family(family)
    engine = server.engine._engine_loop
    plain_steps, masked_steps = [], []
    launch = engine.runner.launch

    def counted(batch: Any, *arguments: Any) -> Any:
        (masked_steps if batch.num_constrained else plain_steps).append(batch.step_id)
        return launch(batch, *arguments)

    engine.runner.launch = counted
    check_content(family, plain(ask(server, tools=tools)))
    assert len(masked_steps) > 10
    assert min(plain_steps) < min(masked_steps)
    masked_steps.clear()
    ask(server, tools=tools, tool_choice="none")
    assert not masked_steps
