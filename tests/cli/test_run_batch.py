"""``octavo run-batch``: every line gets its answer, whatever the others are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from octavo.cli import main as cli
from octavo.server.batch_file import BatchLineError, parse_line

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
MESSAGES = [{"role": "user", "content": "x"}]


def line(custom_id: str, url: str, **body: Any) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


@pytest.fixture
def run(tmp_path: Path) -> Any:
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")

    def run(lines: Sequence[str | bytes], *flags: str) -> list[dict[str, Any]]:
        source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        data = [one if isinstance(one, bytes) else one.encode() for one in lines]
        source.write_bytes(b"\n".join(data) + b"\n")
        words = ["run-batch", "-i", str(source), "-o", str(target), "--model", str(tmp_path)]
        words += ["--load-format", "dummy", "--dtype", "float32", "--threads", "1"]
        words += ["--served-model-name", "tiny", "--chat-template", str(template), *flags]
        assert cli.main(words) == 0
        return [json.loads(text) for text in target.read_text().splitlines()]

    return run


def test_every_line_is_answered(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    chat, completion = "/v1/chat/completions", "/v1/completions"
    greedy = {"max_tokens": 5, "temperature": 0, "ignore_eos": True}
    found = run(
        [
            line("chat", chat, messages=MESSAGES, model="tiny", **greedy),
            line("twin", completion, prompt="x", **greedy, return_token_ids=True),
            "",
            line("many", completion, prompt=["a", "b"], n=2, **greedy),
            line("bad", completion, prompt="x", top_p=7),
            line("stranger", completion, prompt="x", model="other"),
            line("stream", chat, messages=MESSAGES, stream=True),
            line("where", "/v1/files", input="x"),
            "{not json",
            json.dumps({"custom_id": "bare"}),
        ]
    )
    assert len(found) == 9
    results = {entry["custom_id"]: entry for entry in found}
    assert len({entry["id"] for entry in found}) == 9

    def status(custom_id: str) -> int:
        assert results[custom_id]["error"] is None
        return int(results[custom_id]["response"]["status_code"])

    assert status("chat") == status("twin") == status("many") == 200
    body = results["chat"]["response"]["body"]
    assert body["object"] == "chat.completion"
    assert body["usage"]["completion_tokens"] == 5
    assert results["chat"]["response"]["request_id"] in body["id"]
    twin = results["twin"]["response"]["body"]["choices"][0]
    assert len(twin["token_ids"]) == 5
    assert len(results["many"]["response"]["body"]["choices"]) == 4
    assert status("bad") == 400
    assert results["bad"]["response"]["body"]["error"]["param"] == "top_p"
    assert status("stranger") == 404
    for custom_id, code in (
        ("stream", "invalid_request"),
        ("where", "invalid_url"),
        (None, "invalid_json_line"),
        ("bare", "invalid_url"),
    ):
        assert results[custom_id]["response"] is None
        assert results[custom_id]["error"]["code"] == code
    assert "3 answered, 6 failed" in capsys.readouterr().err


def test_a_line_that_is_no_text_costs_its_own_answer(run: Any) -> None:
    url = "/v1/completions"
    good = line("good", url, prompt="x", max_tokens=1).encode()
    deep = b'{"custom_id": "deep", "url": "%b", "body": {"prompt": %b%b}}' % (
        url.encode(), b"[" * 900, b"]" * 900
    )  # fmt: skip
    found = run([good, b"\xff\xfe", b'{"custom_id": "\xff"}', deep, good])
    codes = [entry["error"] and entry["error"]["code"] for entry in found]
    assert sorted(code or "" for code in codes) == [
        "", "", "invalid_json_line", "invalid_json_line", "invalid_request"
    ]  # fmt: skip
    statuses = [entry["response"]["status_code"] for entry in found if entry["response"]]
    assert statuses == [200, 200]


def test_the_input_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(line("a", "/v1/completions", prompt="x"))
    words = ["run-batch", "-i", str(path), "-o", str(tmp_path / "." / "in.jsonl")]
    assert cli.main([*words, "--model", str(tmp_path)]) == 1
    assert "--output-file" in capsys.readouterr().err
    assert path.read_text()


def test_a_batch_larger_than_the_queue(run: Any) -> None:
    url = "/v1/completions"
    lines = [line(str(i), url, prompt=f"{i}", max_tokens=20, ignore_eos=True) for i in range(60)]
    lines += [line(f"huge-{i}", url, prompt="x", n=100) for i in range(2)]
    found = run(lines, "--max-num-queued-reqs", "4", "--max-num-seqs", "2", "--concurrency", "16")
    statuses = {entry["custom_id"]: entry["response"]["status_code"] for entry in found}
    # What no queue of this size can hold runs when there is nothing else.
    assert statuses == {str(i): 200 for i in range(60)} | {"huge-0": 200, "huge-1": 200}


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("[]", "missing_required_parameter"),
        ('{"custom_id": 5}', "missing_required_parameter"),
        ('{"custom_id": "a", "method": "GET", "url": "/v1/completions"}', "invalid_method"),
        ('{"custom_id": "a", "url": "/v1/completions", "body": []}', "invalid_request"),
    ],
)
def test_lines_that_are_no_requests(text: str, code: str) -> None:
    with pytest.raises(BatchLineError) as failure:
        parse_line(text.encode())
    assert failure.value.code == code


def test_files_and_flags_that_will_not_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run-batch", "-o", str(tmp_path / "out"), "-i"]
    assert cli.main([*words, str(tmp_path / "missing")]) == 1
    assert "No such file" in capsys.readouterr().err
    (tmp_path / "in").write_text("")
    assert cli.main([*words, str(tmp_path / "in"), "--concurrency", "0"]) == 1
    assert "--concurrency" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*words, str(tmp_path / "in"), "--max-modle-len", "5"])
    assert "did you mean --max-model-len" in capsys.readouterr().err
