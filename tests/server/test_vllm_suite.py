"""vLLM's own tests of responses and messages, where OCTAVO_VLLM_TESTS names its repository.

They ask what Qwen3 knows. Here a script knows it, behind the real core: the prompt that the model
reads, grammars, calls, reasoning, the prefix cache and the counts are octavo's.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from harness import RunningServer, StartServer
from scripted_engine import QWEN3, call
from test_core_streams import hash_model, tokenizer  # noqa: F401 (a fixture)

from octavo._core import Tokenizer
from octavo.config import EngineConfig
from octavo.engine import engine_loop
from octavo.engine.engine import AsyncEngine

pytestmark = [pytest.mark.system, pytest.mark.slow]

FOLDER = os.environ.get("OCTAVO_VLLM_TESTS")
FILES = {
    "responses": ("openai/responses", ("simple", "basic", "stateful", "structured_output")),
    "anthropic": ("anthropic", ("messages",)),
}
NAMES = ("Qwen/Qwen3-8B", "Qwen/Qwen3-1.7B")
# What fails, and why it stays so: docs/agents.md.
DIFFERENT = {
    "responses": {"test_background", "test_background_error", "test_background_cancel"},
    "anthropic": {"test_anthropic_streaming"},
}
THOUGHT = call("", "").partition("<tool_call>")[0]


def knows(prompt: str) -> str:
    """What a model that follows its prompt says to it."""
    asks = prompt.rpartition("<|im_start|>user\n")[2]
    if '"name": "get_current_weather"' in prompt:
        return call("get_current_weather", '{"location": "New York"}').removeprefix(THOUGHT)
    answer = "A cat sat by the sea, and looked at the waves until it was night."
    for words, known in ANSWERS.items():
        if words in asks:
            answer = known
    if "name again" in asks:
        # What it was told in earlier turns, if it was.
        answer = re.findall(r"name is (\w+)", prompt)[-1]
    return answer + (" QED." if "QED" in prompt else "")


ANSWERS = {
    "13 * 24": "It is 312.",
    "Multiply the result by 2": "30.",
    "science fair": json.dumps(
        {"event_name": "science fair", "date": "Friday", "participants": ["Alice", "Bob"]}
    ),
    "John Smith": json.dumps(
        {
            "name": "John Smith",
            "email": "john@example.com",
            "plan_interest": "Enterprise",
            "demo_requested": True,
        }
    ),
    "Moby Dick": "Call me Ishmael. " * 20,
}


@pytest.fixture
def server(
    start_server: StartServer,
    tokenizer: Tokenizer,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> RunningServer:
    """The real core, whose model says what ``knows`` returns."""
    model = hash_model()
    opening = tokenizer.encode("<|im_start|>assistant\n", False)

    def next_token(context: Sequence[int]) -> int:
        ids = list(context)
        ends = range(len(ids) - len(opening), -1, -1)
        begin = next(at for at in ends if ids[at : at + len(opening)] == opening) + len(opening)
        said = knows(tokenizer.decode(ids[:begin], False))
        closed = tokenizer.encode("<think>\n\n</think>\n\n", False)
        if ids[begin : begin + len(closed)] == closed:
            begin += len(closed)
        elif not said.startswith("{"):
            # No token of this vocabulary ends a thought: what follows a schema does so from the start.
            said = THOUGHT + said
        script = [*tokenizer.encode(said, False), model.EOS]
        return script[len(ids) - begin]

    class Runner(model.FakeRunner):  # type: ignore[name-defined, misc]
        def launch(self, *arguments: Any) -> Any:
            sampled = super().launch(*arguments)
            ids = np.repeat(sampled.token_ids[:, None], 21, axis=1)
            return sampled._replace(
                logprob_ids=ids,
                logprobs=np.zeros(ids.shape, np.float32),
                ranks=np.ones(len(ids), np.int32),
            )

    source = model.FakeSource(model_config=model.FakeModelConfig(tokenizer.vocab_size))
    monkeypatch.setattr(model, "next_token", next_token)
    monkeypatch.setattr(engine_loop, "resolve_model", lambda config: source)
    monkeypatch.setattr(engine_loop, "load_tokenizer", lambda source, config: tokenizer)
    monkeypatch.setattr(engine_loop, "make_runner", lambda config, source: Runner(config, 1024, 1))
    config = EngineConfig(
        max_num_seqs=16,
        max_model_len=4096,
        max_num_batched_tokens=1024,
        served_model_name=NAMES,
    )
    template = QWEN3.source
    return start_server(AsyncEngine(config), chat_template=template)


@pytest.mark.skipif(FOLDER is None, reason="OCTAVO_VLLM_TESTS is not set")
@pytest.mark.parametrize("part", FILES)
def test_vllms_own_tests(server: RunningServer, tmp_path: Path, part: str) -> None:
    for module in ("openai", "anthropic", "pytest_asyncio"):
        pytest.importorskip(module)
    place, names = FILES[part]
    source = Path(str(FOLDER)) / "tests" / "entrypoints" / place
    package = tmp_path / "tests" / part
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    shutil.copy(Path(__file__).with_name("vllm_utils.py"), package.parent / "utils.py")
    for name in ("conftest.py", *(f"test_{name}.py" for name in names)):
        if (source / name).exists():
            shutil.copy(source / name, package)
    (tmp_path / "pytest.ini").write_text("[pytest]\nasyncio_mode = strict\n")
    report = tmp_path / "report.xml"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OCTAVO_SUITE_URL": server.url,
    }
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", "tests"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    cases = ElementTree.parse(report).iter("testcase")
    failed = {case.attrib["name"].partition("[")[0] for case in cases if len(case)}
    assert failed == DIFFERENT[part], done.stdout
