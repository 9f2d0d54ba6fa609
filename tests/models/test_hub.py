"""A model of the hub, downloaded from a hub of our own: what is asked for, shown, kept and left."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from octavo.checkpoints.dummy_tokenizer import dummy_tokenizer_json

COMMIT = "1" * 40


class Hub(http.server.ThreadingHTTPServer):
    """Revision v2 of someone/model, the files of a folder; ``downloaded``: their names."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {file.name: file.read_bytes() for file in folder.iterdir()}
        self.downloaded: list[str] = []


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        files, path = self.server.files, self.path.partition("?")[0]
        data, etag = b"", "none"
        match path.strip("/").split("/"):
            case ["api", "models", "someone", "model", "revision", "v2"]:
                names = [{"rfilename": name} for name in files]
                data = json.dumps(
                    {"id": "someone/model", "sha": COMMIT, "siblings": names}
                ).encode()
            case ["api", "models", "someone", "model", "tree", commit] if commit == COMMIT:
                entries = [
                    {"type": "file", "path": name, "size": len(data), "oid": tag(data)}
                    for name, data in files.items()
                ]
                data = json.dumps(entries).encode()
            case ["someone", "model", "resolve", commit, name] if commit == COMMIT:
                data, etag = files[name], tag(files[name])
                if self.command == "GET":
                    self.server.downloaded.append(name)
            case _:
                self.send_response(404)
                self.send_header("X-Error-Code", "RevisionNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json")
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def tag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub(save_tiny: Callable[..., Any]) -> Iterator[Hub]:
    path, _model = save_tiny("Llama")
    (path / "tokenizer.json").write_text(dummy_tokenizer_json(300))
    (path / "pytorch_model.bin").write_bytes(b"a pickle")
    (path / "modeling.py").write_text("raise SystemExit")
    server = Hub(path)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def start(hub: Hub, folder: Path, revision: str, *more: str, model: str = "someone/model") -> str:
    """A server of the hub's model until it is ready or gives up; what it printed."""
    url = f"http://127.0.0.1:{hub.server_port}"
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    flags = ["--revision", revision, "--download-dir", str(folder), "--port", "0", *more]
    process = subprocess.Popen(
        [sys.executable, "-m", "octavo.serve", model, *flags],
        env=env | {"HF_ENDPOINT": url, "HF_HOME": str(folder / "home")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    lines: list[str] = []
    try:
        while (line := process.stdout.readline()) and not line.startswith("ready in"):
            lines.append(line)
        return "".join([*lines, line])
    finally:
        process.terminate()
        process.wait(30)
        process.stdout.close()


@pytest.mark.timeout(180)
def test_a_model_of_the_hub_is_served(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "downloads"
    printed = start(hub, folder, "v2")
    assert re.search(r"^ready in ", printed, re.M), printed
    assert "100%|" in printed  # the progress bar
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(hub.downloaded)
    assert not {"pytorch_model.bin", "modeling.py"} & set(hub.downloaded)
    snapshot = folder / "models--someone--model" / "snapshots" / COMMIT
    assert (snapshot / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    # What is there is not downloaded again.
    hub.downloaded.clear()
    assert re.search(r"^ready in ", start(hub, folder, "v2"), re.M)
    assert hub.downloaded == []


@pytest.mark.timeout(180)
def test_a_revision_that_is_not_there(hub: Hub, tmp_path: Path) -> None:
    printed = start(hub, tmp_path / "downloads", "v3")
    [line] = printed.strip().splitlines()
    assert "someone/model: cannot be downloaded: " in line
    assert "Revision Not Found" in line
    assert hub.downloaded == []


@pytest.mark.timeout(180)
def test_a_tokenizer_of_the_hub(hub: Hub, save_tiny: Callable[..., Any], tmp_path: Path) -> None:
    """Of a model on disk, at a revision of its own; nothing but the tokenizer is fetched."""
    path = tmp_path / "local"
    path.mkdir()
    for name in ("config.json", "model.safetensors"):
        (path / name).write_bytes(hub.files[name])
    flags = ("--tokenizer", "someone/model", "--tokenizer-revision")
    printed = start(hub, tmp_path / "downloads", "v9", *flags, "v2", model=str(path))
    assert re.search(r"^ready in ", printed, re.M), printed
    assert hub.downloaded == ["tokenizer.json"]
    printed = start(hub, tmp_path / "others", "v2", *flags, "v3", model=str(path))
    assert "Revision Not Found" in printed
