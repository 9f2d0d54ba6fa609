"""Every field of the generation routes does what it says: in the engine's hands or in the prompt.

What a sampling field then does to tokens is tested beside the samplers, in runner/; what it does to
text, beside the core's streams.
"""

from __future__ import annotations

from typing import Any

import pytest
from fake_engine import BOS, IM_START, SPECIAL, FakeEngine
from harness import RunningServer, StartServer

from octavo.sampling_params import SamplingParams
from octavo.server.openai import protocol

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "hi"}]

# Field -> a value as sent, and as SamplingParams must have it. None is the default.
SAMPLING: dict[str, tuple[Any, Any]] = {
    "n": (2, 2),
    "temperature": (0.25, 0.25),
    "top_p": (0.5, 0.5),
    "top_k": (7, 7),
    "min_p": (0.125, 0.125),
    "presence_penalty": (-1.5, -1.5),
    "frequency_penalty": (1.5, 1.5),
    "repetition_penalty": (1.25, 1.25),
    "seed": (-5, -5),
    "max_tokens": (9.0, 9),
    "min_tokens": (3, 3),
    "stop": ("x", ("x",)),
    "stop_token_ids": ([7, 9], (7, 9)),
    "include_stop_str_in_output": (True, True),
    "ignore_eos": (True, True),
    "skip_special_tokens": (False, False),
    "spaces_between_special_tokens": (False, False),
    "stream_interval": (4, 4),
    "logit_bias": ({"17": -2}, {17: -2.0}),
    "allowed_token_ids": ([5, 6], (5, 6)),
    "bad_words": (["no"], ("no",)),
}

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}"
    "{% for d in documents or [] %}<{{ d.title }}>{% endfor %}"
    "{% if reasoning_effort %}effort={{ reasoning_effort }};{% endif %}"
    "{% if mood %}mood={{ mood }};{% endif %}{% if add_generation_prompt %}[assistant:{% endif %}"
)


def post(server: RunningServer, path: str, **fields: Any) -> dict[str, Any]:
    start: dict[str, Any] = {"messages": MESSAGES} if path == CHAT else {"prompt": "hi"}
    answer = server.post(path, {**start, **fields})
    assert answer.status == 200, answer.body
    return dict(answer.json)


def params(server: RunningServer) -> SamplingParams:
    """What the engine was last asked for."""
    found = server.engine.submitted[-1][1]
    assert isinstance(found, SamplingParams)
    return found


def prompt(server: RunningServer) -> str:
    """The last prompt, special tokens written out."""
    return str(server.engine.tokenizer.decode(server.engine.submitted[-1][0], False))


@pytest.fixture
def templated(start_server: StartServer) -> RunningServer:
    engine = FakeEngine()
    engine.chat_template = TEMPLATE
    return start_server(engine)


def test_no_sampling_field_is_forgotten() -> None:
    assert set(SAMPLING) == set(protocol.SAMPLING_FIELDS)
    # "SamplingParams has every field": but for what other fields of the request stand for, and what
    # only Python's callers have a use for.
    others = {"logprobs", "prompt_logprobs", "truncate_prompt_tokens", "structured_outputs"}
    others |= {"output_kind", "detokenize", "flat_logprobs", "extra_args", "logprob_token_ids"}
    assert set(SAMPLING) | others == set(SamplingParams.__dataclass_fields__)


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_sampling_fields_reach_the_engine(start_server: StartServer, path: str) -> None:
    server = start_server()
    plain = SamplingParams()
    for name, (sent, received) in SAMPLING.items():
        post(server, path, **{"max_tokens": 20, name: sent})
        got = params(server)
        assert getattr(got, name) == received, name
        assert received != getattr(plain, name), f"{name}: the default shows nothing"
        # And nothing but this.
        for other in set(SAMPLING) - {name, "max_tokens"}:
            assert getattr(got, other) == getattr(plain, other), (name, other)


STRINGS: dict[str, tuple[Any, Any]] = {
    "n": ("2", 2),
    "temperature": ("0.25", 0.25),
    "top_p": (".5", 0.5),
    "top_k": (" 7 ", 7),
    "min_p": ("125e-3", 0.125),
    "presence_penalty": ("-1.5", -1.5),
    "frequency_penalty": ("+1.5", 1.5),
    "repetition_penalty": ("2", 2.0),
    "seed": ("-9223372036854775808", -(2**63)),
    "max_tokens": ("4", 4),
    "min_tokens": ("3.0", 3),
    "stop_token_ids": (["7", 9.0], (7, 9)),
    "stream_interval": ("4", 4),
    "logit_bias": ({"17": "-2"}, {17: -2.0}),
    "allowed_token_ids": (["5", 6], (5, 6)),
}


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_numbers_may_be_strings(start_server: StartServer, path: str) -> None:
    server = start_server()
    for name, (sent, received) in STRINGS.items():
        post(server, path, **{"max_tokens": 20, name: sent})
        got = getattr(params(server), name)
        assert (got, type(got)) == (received, type(received)), name
    numbers = {name for name, (sent, _) in SAMPLING.items() if type(sent) in (int, float)}
    assert numbers <= set(STRINGS)
    post(server, COMPLETION, prompt="abcdef", truncate_prompt_tokens="3")
    assert prompt(server) == "def"


@pytest.mark.parametrize(
    ("sent", "received"),
    [("true", True), ("False", False), ("YES", True), ("off", False), ("0", False), (1, True)],
)
def test_truth_values_may_be_words(start_server: StartServer, sent: Any, received: bool) -> None:
    server = start_server()
    for name in ("ignore_eos", "skip_special_tokens"):
        post(server, COMPLETION, **{name: sent})
        assert getattr(params(server), name) is received
    answer = server.post(COMPLETION, {"prompt": "hi", "stream": sent})
    assert answer.body.endswith(b"data: [DONE]\n\n") is received
    options = {"stream": True, "stream_options": {"include_usage": sent}}
    answer = server.post(COMPLETION, {"prompt": "hi", **options})
    assert (b'"usage":{' in answer.body) is received


@pytest.mark.parametrize("sent", ["tRUE", "", "2", 2, 0.5, [], {}, "maybe"])
def test_no_other_word_is_a_truth_value(start_server: StartServer, sent: Any) -> None:
    answer = start_server().post(COMPLETION, {"prompt": "hi", "stream": sent})
    assert answer.status == 400
    assert answer.error["param"] == "stream"


def test_logprobs_reach_the_engine(start_server: StartServer) -> None:
    server = start_server()
    post(server, CHAT, logprobs=True)
    assert (params(server).logprobs, params(server).prompt_logprobs) == (0, None)
    post(server, CHAT, logprobs=True, top_logprobs=3, prompt_logprobs=2)
    assert (params(server).logprobs, params(server).prompt_logprobs) == (3, 2)
    post(server, COMPLETION, logprobs=2)
    assert (params(server).logprobs, params(server).prompt_logprobs) == (2, None)
    post(server, COMPLETION, logprobs=2, echo=True)
    assert (params(server).logprobs, params(server).prompt_logprobs) == (2, 2)


def test_named_tokens_reach_the_engine(start_server: StartServer) -> None:
    server = start_server()
    post(server, CHAT, logprobs=True, top_logprobs=2, logprob_token_ids=[5, 6])
    assert params(server).logprob_token_ids == (5, 6)
    post(server, COMPLETION, logprobs=0, logprob_token_ids=["7"])
    assert params(server).logprob_token_ids == (7,)
    post(server, CHAT, logprob_token_ids=[])
    assert params(server).logprob_token_ids == ()


def test_the_newer_name_of_max_tokens_wins(start_server: StartServer) -> None:
    server = start_server()
    post(server, CHAT, max_tokens=5, max_completion_tokens=6)
    assert params(server).max_tokens == 6


def test_max_tokens_absent(start_server: StartServer) -> None:
    server = start_server()
    post(server, CHAT)
    assert params(server).max_tokens is None
    post(server, COMPLETION)
    assert params(server).max_tokens == 16


def test_template_fields_show_in_the_prompt(templated: RunningServer) -> None:
    start = "<s>[user:hi]"
    post(templated, CHAT)
    assert prompt(templated) == start + "[assistant:"
    post(templated, CHAT, add_generation_prompt=False)
    assert prompt(templated) == start
    post(templated, CHAT, chat_template_kwargs={"mood": "calm"})
    assert prompt(templated) == start + "mood=calm;[assistant:"
    post(templated, CHAT, documents=[{"title": "A"}, {"title": "B"}])
    assert prompt(templated) == start + "<A><B>[assistant:"
    post(templated, CHAT, reasoning_effort="low")
    assert prompt(templated) == start + "effort=low;[assistant:"
    # What the caller writes into the template's own variables wins over the field.
    post(templated, CHAT, reasoning_effort="low", chat_template_kwargs={"reasoning_effort": "mine"})
    assert prompt(templated) == start + "effort=mine;[assistant:"


def test_the_operator_has_words_for_efforts(start_server: StartServer) -> None:
    engine = FakeEngine()
    engine.chat_template = TEMPLATE
    server = start_server(engine, reasoning_effort_map={"medium": "low", "xhigh": "max"})
    for asked, told in (("medium", "low"), ("xhigh", "max"), ("high", "high")):
        post(server, CHAT, reasoning_effort=asked)
        assert f"effort={told};" in prompt(server)


def test_a_final_message_is_continued(templated: RunningServer) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "Well"}]
    post(templated, CHAT, messages=messages, continue_final_message=True)
    assert prompt(templated) == "<s>[user:hi][assistant:Well"


def test_special_tokens_are_added_on_demand(templated: RunningServer) -> None:
    post(templated, COMPLETION)
    assert prompt(templated) == "<s>hi"
    post(templated, COMPLETION, add_special_tokens=False)
    assert prompt(templated) == "hi"
    post(templated, CHAT, add_special_tokens=True)
    assert prompt(templated) == "<s><s>[user:hi][assistant:"


def test_prompts_are_cut_from_the_left(start_server: StartServer) -> None:
    server = start_server()
    post(server, COMPLETION, prompt="abcdef", truncate_prompt_tokens=3)
    assert prompt(server) == "def"
    post(server, COMPLETION, prompt=[97, 98, 99], truncate_prompt_tokens=2)
    assert prompt(server) == "bc"
    post(server, CHAT, truncate_prompt_tokens=4)
    assert prompt(server) == "ant\n"
    # -1: what fits, with room for one token.
    post(server, COMPLETION, prompt="x" * 1000, truncate_prompt_tokens=-1)
    assert prompt(server) == "x" * (server.engine.max_model_len - 1)


def test_prompts_may_be_cut_from_the_right(start_server: StartServer) -> None:
    server = start_server()
    for side, kept in (("right", "abc"), ("left", "def"), (None, "def")):
        ids = list(b"abcdef")
        post(server, COMPLETION, prompt=ids, truncate_prompt_tokens=3, truncation_side=side)
        assert prompt(server) == kept
    post(server, COMPLETION, prompt="abcdef", truncate_prompt_tokens=3, truncation_side="right")
    assert prompt(server) == "<s>ab"
    post(server, COMPLETION, prompt="abcdef", truncation_side="right")
    assert prompt(server) == "<s>abcdef"
    post(server, CHAT, truncate_prompt_tokens=2, truncation_side="right")
    assert len(server.engine.submitted[-1][0]) == 2
    answer = server.post(COMPLETION, {"prompt": "abc", "truncation_side": "middle"})
    assert (answer.status, answer.error["param"]) == (400, "truncation_side")


def test_ids_of_the_client_s_own_are_the_prompt(start_server: StartServer) -> None:
    server = start_server()
    ids = [BOS, 97, IM_START]
    answer = post(server, COMPLETION, prompt=[ids, [98]], return_token_ids=True)
    assert [given for given, *_ in server.engine.submitted] == [ids, [98]]
    assert [choice["prompt_token_ids"] for choice in answer["choices"]] == [ids, [98]]
    answer = post(
        server, COMPLETION, prompt=ids, echo=True, max_tokens=1, skip_special_tokens=False
    )
    assert answer["choices"][0]["text"].startswith(SPECIAL[BOS] + "a" + SPECIAL[IM_START])


@pytest.mark.parametrize(
    "bad", [[True], [1.5], [-1], [2**31], [2**70], [1, "x"], [[1], []], [None]]
)
def test_what_is_no_token_id_is_refused(start_server: StartServer, bad: Any) -> None:
    answer = start_server().post(COMPLETION, {"prompt": bad})
    assert (answer.status, answer.error["param"]) == (400, "prompt")


def test_names_and_ids_come_back(start_server: StartServer) -> None:
    server = start_server()
    answer = post(server, COMPLETION, request_id="mine", model="alias")
    assert (answer["id"], answer["model"]) == ("cmpl-mine", "alias")
    tokens = post(server, COMPLETION, logprobs=1, return_tokens_as_token_ids=True)
    logprobs = tokens["choices"][0]["logprobs"]["tokens"]
    assert logprobs
    assert all(token.startswith("token_id:") for token in logprobs)
