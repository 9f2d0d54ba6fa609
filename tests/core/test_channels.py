"""Channels through their binding: formats, parsers, and the engine's deltas, streams and stop strings.

What the parser makes of every family's text is tested in rust_core/core/tests/channels.rs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest

from octavo._core import (
    ChannelFormat,
    ChannelParser,
    Channels,
    Delta,
    EngineCore,
    SseTemplate,
    SseWriter,
    Staging,
    Tokenizer,
    reasoning_aliases,
    reasoning_formats,
    tool_call_aliases,
    tool_call_formats,
)

LIMITS: dict[str, Any] = {
    "max_num_batched_tokens": 64,
    "max_num_seqs": 4,
    "max_model_len": 512,
    "block_size": 16,
}
EOS = 2
TOOLS = [("f", '{"properties": {"s": {"type": "string"}, "n": {"type": "integer"}}}')]
CALL = '<tool_call>\n{"name": "f", "arguments": {"s": "é \\"x\\""}}\n</tool_call>'
Piece = tuple[str, int, str]


@pytest.fixture(scope="module")
def tokenizer(smollm2: Tokenizer) -> Tokenizer:
    """Markers of calls are special tokens of it; those of reasoning are spelled in pieces."""
    added = [(text, True, False, False, False, False) for text in ("<tool_call>", "</tool_call>")]
    return smollm2.changed(added, None)


def channels(**options: Any) -> Channels:
    return Channels(ChannelFormat("hermes", "think"), tools=TOOLS, **options)


def fold(pieces: Iterable[Piece]) -> list[Piece]:
    """Pieces with neighbours of one kind joined."""
    folded: list[Piece] = []
    for kind, call, text in pieces:
        is_part = kind in ("text", "reasoning", "arguments")
        if is_part and folded and folded[-1][:2] == (kind, call):
            folded[-1] = (kind, call, folded[-1][2] + text)
        else:
            folded.append((kind, call, text))
    return folded


class Driver:
    """Runs an EngineCore whose model says what it is told to, token by token."""

    def __init__(self, tokenizer: Tokenizer, text: str) -> None:
        self.tokenizer = tokenizer
        self.script = [*tokenizer.encode(text, False), EOS]
        self.core = EngineCore(num_blocks=64, tokenizer=tokenizer, **LIMITS)
        self.staging = Staging(np.zeros(Staging.required_len(**LIMITS), np.int32))

    def add(self, **options: Any) -> None:
        options = {"max_tokens": 200, "eos_token_ids": [EOS], "channels": channels(), **options}
        self.core.add_request([1], [5, 6], **options)

    def step(self) -> None:
        batch = self.core.schedule(self.staging)
        assert batch is not None
        self.core.update(batch.step_id, np.array([self.script.pop(0)], np.int32))
        self.core.check_integrity()

    def run(
        self, steps_per_drain: int = 1, writers: dict[int, SseWriter] | None = None
    ) -> list[Delta]:
        deltas: list[Delta] = []
        while self.core.has_work():
            for _ in range(steps_per_drain):
                if self.core.has_work():
                    self.step()
            deltas += self.core.outbox.drain(writers)
        return deltas


def pieces_of(deltas: Sequence[Delta]) -> list[Piece]:
    return fold(piece for delta in deltas for piece in delta.pieces or ())


def test_formats_and_their_names() -> None:
    names = tool_call_formats()
    assert names == sorted(set(names))
    assert {"hermes", "qwen3_coder", "openai"} <= set(names)
    for aliases, known, kind in (
        (tool_call_aliases(), names, "tool_calls"),
        (reasoning_aliases(), reasoning_formats(), "reasoning"),
    ):
        for alias, name in aliases:
            assert name in known
            assert alias not in known
            assert getattr(ChannelFormat(**{kind: alias}), kind) == name
    with pytest.raises(ValueError, match=r"known are .*hermes"):
        ChannelFormat("no such")
    with pytest.raises(ValueError, match="unknown key"):
        ChannelFormat(overrides='{"x": 1}')


def test_a_format_tells_its_markers() -> None:
    format = ChannelFormat("deepseek_v3", "deepseek_r1")
    assert format.reasoning_markers == ("<think>", "</think>")
    assert {
        "<think>",
        "<\uff5ctool\u2581call\u2581begin\uff5c>",
        "<\uff5ctool\u2581sep\uff5c>",
    } <= set(format.markers)
    assert ChannelFormat().reasoning_markers is None
    assert ChannelFormat().markers == []
    assert (ChannelFormat().tool_calls, ChannelFormat().reasoning) == (None, None)


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_a_parser_takes_text_in_any_pieces(size: int) -> None:
    text = f"<think>\nhm\n</think>\n\nSo:\n{CALL}\n{CALL}"
    parser = ChannelParser(channels())
    pieces: list[Piece] = []
    for start in range(0, len(text), size):
        pieces += parser.push(text[start : start + size])
    pieces += parser.finish()
    call = ("arguments", '{"s": "é \\"x\\""}')
    assert fold(pieces) == [
        ("reasoning", 0, "hm"),
        ("text", 0, "So:"),
        *[
            (kind, number, text)
            for number in (0, 1)
            for kind, text in (("name", "f"), call, ("end", ""))
        ],
    ]


def test_channels_that_are_not_asked_for_stay_text() -> None:
    text = f"<think>a</think>{CALL}"
    for options in ({"parse_tool_calls": False}, {"parse_reasoning": False}):
        parser = ChannelParser(channels(**options))
        kinds = {kind for kind, _, _ in parser.push(text) + parser.finish()}
        assert kinds == (
            {"reasoning", "text"}
            if "parse_tool_calls" in options
            else {"text", "name", "arguments", "end"}
        )
    parser = ChannelParser(channels(in_reasoning=True))
    assert fold(parser.push("a</think>b") + parser.finish()) == [
        ("reasoning", 0, "a"),
        ("text", 0, "b"),
    ]


@pytest.mark.parametrize("name", tool_call_formats())
def test_every_format_has_a_grammar(name: str) -> None:
    format = ChannelFormat(name)
    for at_least_one in (True, False):
        for at_most_one in (True, False):
            grammar = format.grammar(TOOLS, at_least_one=at_least_one, at_most_one=at_most_one)
            assert "\nstart: " in grammar
            assert "%json" in grammar
            assert re.search(r"\bf\b", grammar)
    marker = next((m for m in format.markers if m.startswith("<")), None)
    if marker is not None:
        grammar = format.grammar(
            TOOLS, at_least_one=True, at_most_one=True, special_tokens=[(marker, 77)]
        )
        assert marker not in grammar or "<[77]>" in grammar
    with pytest.raises(ValueError, match="no tools"):
        format.grammar([], at_least_one=True, at_most_one=True)
    with pytest.raises(ValueError, match="no JSON"):
        format.grammar([("f", "{")], at_least_one=True, at_most_one=True)
    with pytest.raises(ValueError, match="no tool calls"):
        ChannelFormat(reasoning="think").grammar(TOOLS, at_least_one=True, at_most_one=True)


def test_only_strict_tools_follow_their_schemas() -> None:
    grammar = ChannelFormat("hermes").grammar(
        [*TOOLS, ("g", '{"properties": {"zz": {}}}')],
        at_least_one=True,
        at_most_one=False,
        strict=["f"],
    )
    assert '"n"' in grammar
    assert '"zz"' not in grammar


@pytest.mark.parametrize("delivery", ["delta", "final"])
@pytest.mark.parametrize("steps_per_drain", [1, 7])
@pytest.mark.parametrize("stop", [(), ("no such text",)])
def test_deltas_hold_the_pieces(
    tokenizer: Tokenizer, delivery: str, steps_per_drain: int, stop: tuple[str, ...]
) -> None:
    driver = Driver(tokenizer, f"<think>hm</think>\n\nSo: 東京\n{CALL}")
    num_thought = len(tokenizer.encode("hm", False))
    driver.add(delivery=delivery, stop=stop)
    deltas = driver.run(steps_per_drain)
    assert pieces_of(deltas) == [
        ("reasoning", 0, "hm"),
        ("text", 0, "So: 東京"),
        ("name", 0, "f"),
        ("arguments", 0, '{"s": "é \\"x\\""}'),
        ("end", 0, ""),
    ]
    assert "".join(delta.text for delta in deltas) == "So: 東京"
    assert deltas[-1].finish_reason == "stop"
    assert deltas[-1].num_reasoning_tokens == num_thought
    assert all(delta.num_reasoning_tokens <= num_thought for delta in deltas)


def test_a_request_without_channels_has_no_pieces(tokenizer: Tokenizer) -> None:
    driver = Driver(tokenizer, f"<think>hm</think> {CALL}")
    driver.add(delivery="delta", channels=None)
    deltas = driver.run()
    assert all(delta.pieces is None for delta in deltas)
    assert {delta.num_reasoning_tokens for delta in deltas} == {0}
    # Special tokens leave no text here.
    assert "<tool_call>" not in "".join(delta.text for delta in deltas)


def test_other_special_tokens_leave_no_text(tokenizer: Tokenizer) -> None:
    driver = Driver(tokenizer, f"a<|im_start|>b{CALL}")
    driver.add(delivery="delta")
    assert pieces_of(driver.run())[:2] == [("text", 0, "ab"), ("name", 0, "f")]
    driver = Driver(tokenizer, "a<|im_start|>b")
    driver.add(delivery="delta", skip_special_tokens=False)
    assert pieces_of(driver.run()) == [("text", 0, "a<|im_start|>b")]


def test_ready_frames_of_text_and_reasoning(tokenizer: Tokenizer) -> None:
    driver = Driver(tokenizer, f'<think>h"m</think>\n\nSo:\n{CALL}\nThat.\n')
    template = SseTemplate(b"<t:", b">", first=b"[first]", reasoning=(b"<r:", b">"))
    driver.add(delivery="sse", sse=[template])
    deltas = driver.run()
    frames = b"".join(delta.sse or b"" for delta in deltas).decode()
    assert frames.startswith("[first]<r:h")
    written = re.findall("<(.):([^<>]*)>", frames)
    assert "".join(text for kind, text in written if kind == "r") == 'h\\"m'
    # Calls are the front end's to write, and what a sample ends with.
    left = pieces_of(deltas)
    assert [kind for kind, _, _ in left] == ["name", "arguments", "end", "text"]
    text = "".join(text for kind, text in written if kind == "t").replace("\\n", "\n")
    assert text + left[-1][2] == "So:\nThat.\n"
    assert "".join(delta.text for delta in deltas) == "So:\nThat.\n"


def test_reasoning_without_a_frame_is_left_out(tokenizer: Tokenizer) -> None:
    driver = Driver(tokenizer, "<think>hm hm</think> So")
    driver.add(delivery="sse", sse=[SseTemplate(b"<", b">")])
    deltas = driver.run()
    frames = b"".join(delta.sse or b"" for delta in deltas)
    assert b"hm" not in frames
    assert deltas[-1].num_reasoning_tokens > 0


def test_from_a_call_on_the_front_end_writes(tokenizer: Tokenizer) -> None:
    """All in one delta: what comes before the call is ready, the rest is not, in order."""
    driver = Driver(tokenizer, f"<think>hm</think>So:{CALL}\nThat.{CALL}")
    driver.add(delivery="sse", sse=[SseTemplate(b"<t:", b">", reasoning=(b"<r:", b">"))])
    while len(driver.script) > 2:
        driver.step()
    [delta] = driver.core.outbox.drain()
    assert delta.sse == b"<r:hm><t:So:>"
    kinds = [kind for kind, _, _ in delta.pieces or ()]
    assert kinds[:4] == ["name", "arguments", "end", "text"]
    assert delta.text == "So:\nThat."


def test_a_writer_takes_no_calls(tokenizer: Tokenizer) -> None:
    driver = Driver(tokenizer, f"So it is.{CALL}")
    driver.add(delivery="sse", sse=[SseTemplate(b"<t:", b">")])
    written: list[bytes] = []
    writer = SseWriter(written.append)
    writer.is_armed = True
    deltas = driver.run(writers={1: writer})
    assert b"So" in b"".join(written)
    assert b"f" not in b"".join(written).replace(b"\r\n", b"")
    assert [kind for kind, _, _ in pieces_of(deltas)] == ["name", "arguments", "end"]


def test_stop_strings_are_looked_for_in_text_alone(tokenizer: Tokenizer) -> None:
    text = f"<think>a stop b</think> c {CALL.replace('x', 'stop')} d stop e"
    for include, expected in ((False, " d "), (True, " d stop")):
        driver = Driver(tokenizer, text)
        driver.add(delivery="delta", stop=["stop"], include_stop_str_in_output=include)
        deltas = driver.run()
        pieces = pieces_of(deltas)
        assert pieces[0] == ("reasoning", 0, "a stop b")
        assert json.loads(pieces[3][2]) == {"s": 'é "stop"'}
        assert pieces[-1] == ("text", 0, expected)
        assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", "stop")


def test_a_stop_string_does_not_reach_over_a_call(tokenizer: Tokenizer) -> None:
    driver = Driver(tokenizer, f"a st{CALL}op b")
    driver.add(delivery="delta", stop=["stop"])
    deltas = driver.run()
    assert deltas[-1].stop_reason is None
    assert [text for kind, _, text in pieces_of(deltas) if kind == "text"] == ["a st", "op b"]


def test_min_tokens_let_a_stop_string_pass(tokenizer: Tokenizer) -> None:
    driver = Driver(tokenizer, "stop a stop b")
    driver.add(delivery="delta", stop=["stop"], min_tokens=3)
    deltas = driver.run()
    assert pieces_of(deltas) == [("text", 0, "stop a ")]
    assert deltas[-1].stop_reason == "stop"


def test_a_cut_off_call_has_no_end(tokenizer: Tokenizer) -> None:
    driver = Driver(tokenizer, CALL)
    driver.add(delivery="final", max_tokens=len(driver.script) - 6)
    [delta] = driver.run()
    assert delta.finish_reason == "length"
    kinds = [kind for kind, _, _ in delta.pieces or ()]
    assert kinds == ["name", "arguments"]


def test_channels_need_a_tokenizer() -> None:
    core = EngineCore(num_blocks=64, **LIMITS)
    with pytest.raises(ValueError, match="tokenizer"):
        core.add_request([1], [5], max_tokens=2, channels=channels())
