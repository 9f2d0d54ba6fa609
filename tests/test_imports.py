"""Imports point one way, and nothing in the package runs code or pickles from outside."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "python" / "octavo"

# Which parts of octavo a part may import: server -> engine -> {_core, runner} -> models ->
# {layers, checkpoints} -> kernels, with text beside the engine. The leaves import nothing but one
# another, and anyone but the kernels may use them.
LEAVES = {
    "beam_search",
    "_core",
    "config",
    "errors",
    "flag_help",
    "flag_words",
    "flags",
    "inputs",
    "late_interaction",
    "logprobs",
    "lora",
    "metric_names",
    "metrics_reader",
    "outputs",
    "pooler_config",
    "pooling",
    "pooling_params",
    "profiler_config",
    "task_prompts",
    "prompt_logprobs",
    "sampling_params",
    "structured_outputs",
    "text_form",
    "vllm_flags",
}
BELOW = {
    "kernels": {"_core"},
    "layers": {"kernels"},
    "checkpoints": {"kernels"},
    "models": {"checkpoints", "layers", "kernels"},
    "runner": {"models", "checkpoints", "layers", "kernels"},
    "engine": {"runner", "models", "checkpoints", "layers", "kernels"},
    "text": set(),
    "conversations": {"engine", "text"},
    "llm": {"conversations", "llm_pooling", "offline", "engine", "runner", "models"},
    "llm_pooling": {"offline", "engine", "pair_template"},
    "offline": {"engine", "runner"},
    "pair_template": {"text"},
    "server": {"engine", "runner", "models", "text", "pair_template"},
    "ray": {"server", "engine"},
    "bench": {"llm", "engine"},
}
# What stands above everything: entry points.
TOP = {"cli", "serve", "__main__", "__init__"}
# Where programs written for vLLM look for names.
TOP |= {"distributed", "exceptions", "utils", "v1"}
# What kernels may use besides the standard library.
KERNEL_LIBRARIES = {"torch", "triton", "numpy"}

FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal",
                     "shelve", "imp", "code"}  # fmt: skip
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_METHODS = {
    ("torch", "load"), ("torch", "compile"), ("yaml", "load"), ("yaml", "unsafe_load"),
    ("yaml", "full_load"), ("os", "system"), ("os", "popen"), ("jinja2", "Environment"),
}  # fmt: skip
# Only by a name that is written there: the system's own libraries.
LIBRARY_LOADERS = {("ctypes", "CDLL"), ("ctypes", "PyDLL")}


def _sources() -> list[Path]:
    found = sorted(p for p in PACKAGE.rglob("*.py") if "kernels" not in p.parts)
    # The symlink python/octavo/kernels may or may not be followed by rglob: list its target.
    return [*found, *sorted((ROOT / "kernels").rglob("*.py"))]


def _module(path: Path) -> str:
    """Dotted name below ``octavo``: ``models.llama``, ``kernels.gpu.norm``, ``cli``."""
    base = ROOT if path.is_relative_to(ROOT / "kernels") else PACKAGE
    parts = path.relative_to(base).with_suffix("").parts
    if parts[-1] == "__init__" and len(parts) > 1:
        parts = parts[:-1]
    return ".".join(parts)


def _imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import, those inside functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = f"octavo.{module}".split(".")
                keep = len(parents) - node.level + is_package
                base = ".".join([*parents[:keep], *([base] if base else [])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def _parsed() -> Iterator[tuple[Path, str, ast.Module]]:
    for path in _sources():
        yield path, _module(path), ast.parse(path.read_text(), str(path))


def _all_imports() -> list[tuple[str, str, str]]:
    """(where, importing module, imported name) of the whole package."""
    return [
        (f"{path.relative_to(ROOT)}:{line}", module, name)
        for path, module, tree in _parsed()
        for line, name in _imports(tree, module, path.name == "__init__.py")
    ]


def _may_import(module: str, target: str) -> bool:
    """Whether octavo's ``module`` may import octavo's ``target`` (both below ``octavo.``)."""
    part, wanted = module.split(".")[0], target.split(".")[0]
    if part in TOP or part == wanted:
        return True
    if part in LEAVES:
        return wanted in LEAVES
    allowed = BELOW.get(part)
    assert allowed is not None, f"octavo.{part} has no place in the order of imports: give it one"
    if wanted in allowed or any(f"{target}.".startswith(f"{name}.") for name in allowed):
        return True
    return part != "kernels" and (wanted in LEAVES or wanted == "__version__")


def test_imports_point_one_way() -> None:
    wrong = [
        f"{where}: octavo.{module} imports {name}"
        for where, module, name in _all_imports()
        if name.startswith("octavo.") and not _may_import(module, name.removeprefix("octavo."))
    ]
    assert not wrong, "\n".join(wrong)


def test_nobody_but_the_command_line_imports_the_package_itself() -> None:
    """``from octavo import LLM`` inside the package hides which part is meant."""
    names = {"octavo.LLM", "octavo.AsyncEngine", "octavo.SamplingParams", "octavo.EngineConfig"}
    wrong = [f"{where} imports {name}" for where, _, name in _all_imports() if name in names]
    assert not wrong, "\n".join(wrong)


def test_kernels_use_tensors_alone() -> None:
    wrong = [
        f"{where} imports {name}"
        for where, module, name in _all_imports()
        if module.split(".")[0] == "kernels"
        and (library := name.split(".")[0]) not in KERNEL_LIBRARIES | {"octavo"}
        and library not in sys.stdlib_module_names
    ]
    assert not wrong, "\n".join(wrong)


def test_pyo3_is_named_in_the_binding_alone() -> None:
    """``cargo test`` and the Rust benches need no Python because of this."""
    crates = ROOT / "rust_core"
    named = [p for p in crates.rglob("*.rs") if re.search(r"\bpyo3\b", p.read_text())]
    named += [p for p in crates.rglob("Cargo.toml") if "pyo3" in p.read_text()]
    assert named
    assert {p.relative_to(crates).parts[0] for p in named} == {"python"}
    assert tomllib.loads((ROOT / "Cargo.toml").read_text())["workspace"]["default-members"] == [
        "rust_core/formats",
        "rust_core/core",
        "rust_core/cpu",
    ]


def _use_paths(tree: str) -> Iterator[str]:
    """Every path of a ``use`` declaration: ``a::{b, c::{d, self}}`` is a::b, a::c::d, a::c::self."""
    head, brace, inner = tree.partition("{")
    if not brace:
        yield tree.partition(" as ")[0]
        return
    depth, start = 0, 0
    inner = inner.rpartition("}")[0] + ","
    for at, char in enumerate(inner):
        depth += (char == "{") - (char == "}")
        if char == "," and depth == 0:
            if item := inner[start:at].strip():
                yield from (head + path for path in _use_paths(item))
            start = at + 1


def _crate_graph(source: Path) -> dict[str, set[str]]:
    """Which modules each module of a crate needs, by their paths (``linear::amx``; "" is lib.rs).

    A ``mod`` declaration is no need, and inline tests are left out. A file that adds to the type of
    its folder (``impl Scheduler`` beside scheduler/mod.rs) is one with the folder's mod.rs.
    """
    files: dict[str, str] = {}
    for path in sorted(source.rglob("*.rs")):
        parts = path.relative_to(source).with_suffix("").parts
        parts = parts[:-1] if parts[-1] in {"mod", "lib"} else parts
        text = re.sub(r"//.*", "", path.read_text())
        text = re.sub(r"^#\[cfg\(test\)\]\nmod \w+ \{\n.*?^\}$", "", text, flags=re.M | re.S)
        files["::".join(parts)] = text
    node = {module: module for module in files}
    needs: dict[str, set[str]] = {module: set() for module in files}
    for module, text in files.items():
        here = module.split("::") if module else []
        use = re.compile(r"\buse\s+([^;]+);")
        paths = [path for tree in use.findall(text) for path in _use_paths(tree)]
        # In code; a folder's own modules need neither ``use`` nor ``self``.
        paths += re.findall(r"(?<![:\w])\w+(?:::\w+)+", use.sub("", text))
        for path in paths:
            steps = path.split("::")
            base = [] if steps[0] == "crate" else here
            while steps and steps[0] in {"crate", "self", "super"}:
                base = base[:-1] if steps[0] == "super" else base
                steps = steps[1:]
            target = [*base, *steps]
            while "::".join(target) not in files:
                target.pop()
            if len(target) < len(base) or target == here:
                continue
            wanted = "::".join(target)
            needs[module].add(wanted)
            if target == here[:-1] and re.search(rf"^impl {steps[-1]}\b(?! for)", text, re.M):
                node[module] = wanted
    graph: dict[str, set[str]] = {node[module]: set() for module in files}
    for module, wanted_by in needs.items():
        graph[node[module]] |= {node[wanted] for wanted in wanted_by} - {node[module]}
    return graph


def _rooms(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same for a crate's top-level files and folders."""
    rooms: dict[str, set[str]] = {}
    for module, wanted in graph.items():
        room = module.partition("::")[0]
        rooms.setdefault(room, set()).update({w.partition("::")[0] for w in wanted} - {room})
    return rooms


@pytest.mark.parametrize("crate", ["formats", "core", "cpu", "python"])
def test_no_circle_in_a_crate(crate: str) -> None:
    graph = _crate_graph(ROOT / "rust_core" / crate / "src")
    assert sum(len(wanted) for wanted in graph.values()) >= len(graph) - 1, "imports were not found"
    for each in (graph, _rooms(graph)):
        TopologicalSorter(each).prepare()  # CycleError names the circle


@pytest.mark.parametrize(
    ("files", "circle"),
    [
        ({"a.rs": "use crate::b::{C, d::{self, E}};", "b.rs": "fn f() { crate::a::g() }"}, True),
        ({"a/mod.rs": "mod b;\nfn f() { b::g() }", "a/b.rs": "use super::f;"}, True),
        ({"a/b.rs": "use crate::c::X;", "a/d.rs": "", "c.rs": "use crate::a::d;"}, True),
        ({"a/mod.rs": "mod b;\nuse self::b::B;", "a/b.rs": "use super::A;\nimpl A {}"}, False),
        (
            {"a.rs": "use crate::b;", "b.rs": "#[cfg(test)]\nmod tests {\n    use crate::a;\n}"},
            False,
        ),
    ],
)
def test_the_check_sees_circles(tmp_path: Path, files: dict[str, str], circle: bool) -> None:
    for name, text in {"lib.rs": "", "a/mod.rs": "", **files}.items():
        if name == "a/mod.rs" and "a.rs" in files:
            continue
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text + "\n")
    graph = _crate_graph(tmp_path)
    found = False
    for each in (graph, _rooms(graph)):
        try:
            TopologicalSorter(each).prepare()
        except CycleError:
            found = True
    assert found is circle


def _dotted(node: ast.expr) -> tuple[str, str] | None:
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return node.value.id, node.attr
    return None


def _unsafe(tree: ast.Module, module: str) -> Iterator[tuple[int, str]]:
    """(line, what) of everything that could run code which a file or a request brings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
            for name in names:
                if name and name.split(".")[0] in FORBIDDEN_MODULES:
                    yield node.lineno, f"import of {name}"
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if (node.module, alias.name) in FORBIDDEN_METHODS | LIBRARY_LOADERS:
                    yield node.lineno, f"import of {node.module}.{alias.name}"
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
            yield node.lineno, f"call of {node.func.id}"
        dotted = _dotted(node.func)
        if dotted in FORBIDDEN_METHODS:
            yield node.lineno, f"call of {'.'.join(dotted)}"
        if dotted in LIBRARY_LOADERS and not isinstance(node.args[0], ast.Constant):
            yield node.lineno, f"call of {'.'.join(dotted)} with a name made at run time"
        for keyword in node.keywords:
            refused = isinstance(keyword.value, ast.Constant) and not keyword.value.value
            if keyword.arg in {"trust_remote_code", "allow_pickle", "shell"} and not refused:
                yield node.lineno, f"{keyword.arg}= that is not False"


def test_no_pickle_eval_or_remote_code() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {what}"
        for path, module, tree in _parsed()
        for line, what in _unsafe(tree, module)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from torch import load",
        "import torch\ntorch.load('x')",
        "eval('1')",
        "exec(body)",
        "yaml.load(text)",
        "f(trust_remote_code=config.trust)",
        "np.load(p, allow_pickle=True)",
        "ctypes.PyDLL(path)",
        "from ctypes import CDLL",
    ],
)
def test_the_check_sees(source: str) -> None:
    assert list(_unsafe(ast.parse(source), "runner.loading"))


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "re.compile('x')",
        "f(trust_remote_code=False)",
        "ctypes.CDLL(None, use_errno=True)",
        "ctypes.PyDLL('libcuda.so.1')",
    ],
)
def test_the_check_lets_pass(source: str) -> None:
    assert not list(_unsafe(ast.parse(source), "runner.loading"))


@pytest.mark.parametrize(
    ("module", "target", "allowed"),
    [
        ("kernels.gpu.norm", "layers.norm", False),
        ("layers.linear", "models.llama", False),
        ("models.llama", "runner.eager", False),
        ("runner.sampler", "engine.engine", False),
        ("engine.engine_loop", "server.http.app", False),
        ("engine.engine_loop", "_core.EngineCore", True),
        ("kernels.reference", "config.EngineConfig", False),
        ("config", "models.registry", False),
        ("runner.loading", "_core.GgufFile", True),
        ("server.http.app", "engine.engine.AsyncEngine", True),
        ("conversations", "text.chat_template.ChatTemplate", True),
        ("llm", "server.http.app", False),
        ("checkpoints.weights", "models.llama", False),
    ],
)
def test_the_order(module: str, target: str, allowed: bool) -> None:
    assert _may_import(module, target) is allowed


def test_the_command_line_does_not_wait_for_torch() -> None:
    """``octavo --help`` and every load process import the package; torch takes seconds."""
    code = (
        "import sys, octavo, octavo.bench, octavo.bench.worker, octavo.config; "
        "print([m for m in ('torch', 'transformers', 'triton') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def import_arrows() -> dict[str, set[str]]:
    """Module -> the modules that it imports, for types and inside functions too."""
    arrows: dict[str, set[str]] = {_module(path): set() for path in _sources()}
    for _, module, name in _all_imports():
        if not name.startswith("octavo"):
            # A library may have a name that is one of ours: ray.
            continue
        target = name.removeprefix("octavo.")
        while target and target not in arrows:
            target = target.rpartition(".")[0]
        if target and target != module:
            arrows[module].add(target)
    return arrows


def folder_arrows(arrows: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same between folders; a package's ``__init__`` belongs to its own folder.

    Files of the package's root, leaves and entry points, are each a room of their own.
    """
    packages = {_module(path) for path in _sources() if path.name == "__init__.py"}

    def folder(module: str) -> str:
        return module if module in packages else module.rpartition(".")[0] or module

    between: dict[str, set[str]] = {}
    for module, targets in arrows.items():
        own = folder(module)
        between.setdefault(own, set()).update({folder(target) for target in targets} - {own})
    return between


def test_folders_are_seen_in_their_modules() -> None:
    arrows = {"server.routes": {"server.http.app"}, "server.http.app": {"server"}}
    assert folder_arrows(arrows) == {"server": {"server.http"}, "server.http": {"server"}}


def test_no_imports_run_in_circles() -> None:
    arrows = import_arrows()
    assert sum(map(len, arrows.values())) > 50, "imports were not found"
    for each in (arrows, folder_arrows(arrows)):
        TopologicalSorter(each).prepare()  # CycleError names the circle
