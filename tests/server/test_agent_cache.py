"""Agents' conversations find their prefix in the cache, and a prompt that does not is told apart."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import harness
import pytest
from agent_bodies import claude_code_turns, codex_turns
from agent_streams import MESSAGES, RESPONSES, events
from fake_engine import ByteTokenizer
from harness import RunningServer, StartServer
from scripted_engine import QWEN3, ScriptedEngine

from octavo.server.work.agent_markers import without_markers
from octavo.server.work.prompt_history import MAX_PROMPTS, PromptHistory

pytestmark = pytest.mark.system

NUM_TURNS = 12
# Bytes are tokens here: 20k of them at the end.
CHARS = {"system_chars": 5000, "result_chars": 550}
BODIES = {MESSAGES: claude_code_turns, RESPONSES: codex_turns}


def usage_of(path: str, body: bytes) -> tuple[int, int]:
    """(prompt tokens, those of them that were cached) of a stream."""
    found = events(body)
    if path == MESSAGES:
        usage = found[-2][1]["usage"]
        cached = usage["cache_read_input_tokens"]
        written = usage["cache_creation_input_tokens"]
        return usage["input_tokens"] + written + cached, cached
    usage = found[-1][1]["response"]["usage"]
    return usage["input_tokens"], usage["input_tokens_details"]["cached_tokens"]


def long_server(folder: Path, monkeypatch: pytest.MonkeyPatch, **flags: Any) -> RunningServer:
    """A server of random weights with room for an agent's conversation, and Qwen3's template."""
    monkeypatch.setitem(harness.TINY_MODEL, "max_position_embeddings", 32768)
    folder.mkdir()
    template = folder / "qwen3.jinja"
    template.write_text(QWEN3.source)
    return harness.tiny_server(folder, chat_template=str(template), **flags)


@pytest.mark.parametrize("path", BODIES)
def test_a_replayed_conversation_is_not_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    shares = {}
    for normalizes in (True, False):
        server = long_server(
            tmp_path / str(normalizes), monkeypatch, normalize_agent_markers=normalizes
        )
        try:
            sent = computed = num_prompt = 0
            for body in BODIES[path](NUM_TURNS, **CHARS):
                # What a client sends back is written down: what this model says does not matter.
                if path == MESSAGES:
                    body |= {"max_tokens": 1, "thinking": {"type": "adaptive"}}
                else:
                    body |= {"max_output_tokens": 1, "model": server.engine.served_model_names[0]}
                answer = server.post(path, body)
                assert answer.status == 200, answer.body
                num_prompt, num_cached = usage_of(path, answer.body)
                sent += num_prompt
                computed += num_prompt - num_cached
            counts = server.lifecycle.state.model().prompt_history.counts
        finally:
            server.stop()
        assert 18_000 < num_prompt < 32_000
        # Every token of the last prompt has to be computed once.
        shares[normalizes] = (computed - num_prompt) / sent
        if normalizes:
            assert counts == {"new": 1, "extended": NUM_TURNS - 1}
    assert shares[True] < 0.03
    if path == MESSAGES:
        assert shares[False] > 0.3


@pytest.mark.parametrize("path", BODIES)
def test_forty_tools_are_taken_and_answered(start_server: StartServer, path: str) -> None:
    server = start_server(ScriptedEngine([QWEN3.says]))
    for body in BODIES[path](3, **CHARS):
        answer = server.post(path + "?beta=true", body)
        assert answer.status == 200, answer.body
        last = events(answer.body)[-1][0]
        assert last == ("message_stop" if path == MESSAGES else "response.completed")
    prompt = server.engine.prompts[-1]
    assert "x-anthropic-billing-header" not in prompt
    assert prompt.count("<total_tokens>") == (path == MESSAGES)
    if path == RESPONSES:
        assert "web_search, image_generation" in answer.headers["warning"]
        assert '"name": "mcp__git.log"' in prompt
        assert '"name": "apply_patch"' in prompt


# ------------------------------------------------------------------------------- markers


def system(*texts: str) -> dict[str, Any]:
    return {"role": "system", "content": [{"type": "text", "text": text} for text in texts]}


USER = {"role": "user", "content": [{"type": "text", "text": "hi"}]}


def test_markers_leave_the_system_text() -> None:
    header = "x-anthropic-billing-header: cc_version=2.1; cc_entrypoint=cli; cch=1a2b3;"
    text = (
        "You are.\n<total_tokens>9 tokens left</total_tokens>\n"
        "Current time: 2026-11-29 21:40:07 UTC\nToday's date: 2026-11-29\n"
        "<total_tokens>8 tokens left</total_tokens>"
    )
    clean = without_markers([system(header, text), USER])
    assert clean[0] == system("You are.\nToday's date: 2026-11-29")
    assert [part["text"] for part in clean[1]["content"]] == [
        "hi",
        "Current time: 2026-11-29 21:40:07 UTC\n<total_tokens>8 tokens left</total_tokens>",
    ]
    assert without_markers([system(header), USER]) == [USER]
    # In one text with the rest.
    clean = without_markers([{"role": "system", "content": f"{header}\nYou are."}, USER])
    assert clean == [system("You are."), USER]


def test_what_moves_goes_behind_the_last_result() -> None:
    result = {"role": "tool", "tool_call_id": "t", "content": "noon"}
    answer = {"role": "assistant", "content": "It"}
    counter = "<total_tokens>8 tokens left</total_tokens>"
    clean = without_markers([system(f"S{counter}"), USER, answer, result])
    assert clean[1:3] == [USER, answer]
    assert clean[3]["content"] == f"noon\n{counter}"
    # Before an answer that is begun.
    clean = without_markers([system(f"S{counter}"), USER, answer])
    assert clean[1]["content"][1]["text"] == counter
    assert clean[2] == answer


@pytest.mark.parametrize(
    "text",
    [
        "The current time is of no matter.",
        "Today's date: 2026-11-29",
        "Meetings are at 12:30 today.",
        "x-anthropic-billing is a header",
        "<total_tokens> counts",
    ],
)
def test_other_texts_stay(text: str) -> None:
    assert without_markers([system(text), USER]) == [system(text), USER]


def test_long_texts_take_no_long_time() -> None:
    began = time.monotonic()
    for text in (" " * 10**6, "\n" * 10**6, "current time " * 10**5, "<total_tokens>" * 10**5):
        without_markers([system(text), USER])
    assert time.monotonic() - began < 5


def test_a_user_s_markers_stay() -> None:
    text = "<total_tokens>8 tokens left</total_tokens>"
    message = {"role": "user", "content": [{"type": "text", "text": text}]}
    assert without_markers([system("S"), message]) == [system("S"), message]


# --------------------------------------------------------------------------- divergences


def history(**options: Any) -> PromptHistory:
    options = {"shows_text": False, **options}
    return PromptHistory(ByteTokenizer(), **options)  # type: ignore[arg-type]


def ids(text: str) -> list[int]:
    return list(text.encode())


def test_outcomes() -> None:
    seen = history()
    prompt = "system " * 50 + "question one"
    assert seen.add(ids(prompt), "a").outcome == "new"
    assert seen.add(ids(prompt + " answer, question two"), "b").outcome == "extended"
    other = prompt.replace("question one", "question ?") + "x" * 200
    found = seen.add(ids(other), "c")
    assert (found.outcome, found.position) == ("extended", len("system " * 50 + "question "))
    late = "system " * 3 + "changed " + "system " * 46 + "question one"
    found = seen.add(ids(late), "d")
    assert (found.outcome, found.position) == ("diverged", 21)
    assert found.new == "changed system syste"
    assert found.earlier.startswith("system ")
    assert seen.add(ids("something else entirely, of another agent"), "e").outcome == "new"
    assert seen.counts == {"new": 2, "extended": 2, "diverged": 1}


def test_the_longest_earlier_prompt_is_the_one() -> None:
    seen = history()
    for number in range(3):
        seen.add(ids("common beginning " + "abc"[: number + 1] + "!" * 400), "a")
    found = seen.add(ids("common beginning ab?" + "?" * 400), "b")
    assert found.position == len("common beginning ab")


def test_history_is_bounded() -> None:
    seen = history()
    for number in range(3 * MAX_PROMPTS):
        seen.add(ids(f"{number:020d}" * 20), "a")
    assert len(seen._prompts) == MAX_PROMPTS
    assert seen._num_tokens == sum(map(len, seen._prompts)) == MAX_PROMPTS * 400


@pytest.mark.parametrize("shows_text", [False, True])
def test_a_divergence_is_logged(
    start_server: StartServer, caplog: pytest.LogCaptureFixture, shows_text: bool
) -> None:
    server = start_server(ScriptedEngine(["Hi."]), enable_log_requests=shows_text)
    body = {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "x" * 300}]}
    with caplog.at_level(logging.DEBUG, "octavo.server"):
        for secret in ("alpha beta gamma delta epsilon", "alpha beta GAMMA delta epsilon"):
            assert server.post(MESSAGES, {**body, "system": secret}).status == 200
    [record] = [r.getMessage() for r in caplog.records if "leaves an earlier one" in r.getMessage()]
    # A special token is one, and longer as text.
    before = server.engine.prompts[0].partition("gamma")[0]
    position = len(server.engine.tokenizer.encode(before, False))
    assert f"at token {position}" in record
    assert ("'GAMMA delta epsilon" in record) is shows_text
    assert ("in place of 'gamma delta epsilon" in record) is shows_text
    metrics = server.get("/metrics").body.decode()
    line = 'octavo:agent_prompts_total{engine="0",model_name="fake/model",outcome="diverged"} 1.0'
    assert line in metrics
