"""Claude Code and Codex themselves, over scripted turns: a tool called, its result sent back.

Each is skipped where it is not installed: the first is in the package claude-agent-sdk, the second in
openai-codex-cli-bin, or either on the PATH.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
from harness import StartServer
from scripted_engine import ScriptedEngine, call

pytestmark = pytest.mark.system

ANSWER = "<think>\nDone.\n</think>\n\nThe file says forty-two."
# A program waits so long for the model at most.
TIMEOUT_S = 120


def program(name: str, package: str, path: str) -> str:
    """Where a program is: in a package's folder, or on the PATH."""
    spec = importlib.util.find_spec(package)
    for folder in spec.submodule_search_locations or [] if spec else []:
        if (found := Path(folder) / path).exists():
            return str(found)
    on_path = shutil.which(name)
    if on_path is None:
        pytest.skip(f"{name} is not installed")
    return on_path


def run(command: list[str], folder: Path, env: Mapping[str, str]) -> str:
    """What a program prints, at home in an empty folder."""
    home = folder / "home"
    home.mkdir()
    (folder / "work").mkdir()
    done = subprocess.run(
        command,
        cwd=folder / "work",
        env={"PATH": os.environ["PATH"], "HOME": str(home), **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_claude_code_calls_a_tool(start_server: StartServer, tmp_path: Path) -> None:
    claude = program("claude", "claude_agent_sdk", "_bundled/claude")
    arguments = json.dumps({"command": "echo 42 | tee out.txt", "description": "Write"})
    engine = ScriptedEngine([call("Bash", arguments), ANSWER])
    server = start_server(engine, api_key=("key",))
    command = [claude, "-p", "Write 42 to out.txt.", "--model", "claude-octavo"]
    env = {
        "ANTHROPIC_BASE_URL": server.url,
        "ANTHROPIC_AUTH_TOKEN": "key",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }
    printed = run([*command, "--allowedTools", "Bash"], tmp_path, env)
    assert "forty-two" in printed
    assert (tmp_path / "work" / "out.txt").read_text() == "42\n"
    assert "<tool_response>" in engine.prompts[-1]


def test_codex_calls_a_tool(start_server: StartServer, tmp_path: Path) -> None:
    codex = program("codex", "codex_cli_bin", "bin/codex")
    arguments = json.dumps({"cmd": "echo 42 | tee out.txt"})
    engine = ScriptedEngine([call("exec_command", arguments), ANSWER])
    server = start_server(engine, api_key=("key",))
    provider = f'{{name="octavo",base_url="{server.url}/v1",env_key="KEY",wire_api="responses"}}'
    command = [codex, "exec", "--skip-git-repo-check"]
    command += ["-m", engine.served_model_names[0]]
    command += ["-c", 'model_provider="octavo"', "-c", f"model_providers.octavo={provider}"]
    command += ["--dangerously-bypass-approvals-and-sandbox", "Write 42 to out.txt."]
    printed = run(command, tmp_path, {"KEY": "key"})
    assert "forty-two" in printed
    assert (tmp_path / "work" / "out.txt").read_text() == "42\n"
    assert "<tool_response>" in engine.prompts[-1]
