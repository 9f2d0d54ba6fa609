"""Imports point one way, and nothing in the package runs code or pickles from outside."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
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
    "flag_words",
    "flags",
    "outputs",
    "pooling",
    "prompt_logprobs",
    "sampling_params",
}
BELOW = {
    "kernels": {"_core"},
    "layers": {"kernels"},
    "checkpoints": {"kernels"},
    "models": {"checkpoints", "layers", "kernels"},
    "runner": {"models", "checkpoints", "layers", "kernels"},
    "engine": {"runner", "models", "checkpoints", "layers", "kernels"},
    "text": set(),
    "llm": {"engine", "runner", "models", "text"},
    "server": {"engine", "runner", "models", "text"},
    "bench": {"llm", "engine"},
}
# What stands above everything: entry points.
TOP = {"cli", "serve", "__main__", "__init__"}
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
    source = ROOT / "rust_core" / "src"
    named = [p for p in source.rglob("*.rs") if re.search(r"\bpyo3::", p.read_text())]
    assert named
    binding = [p for p in named if p.relative_to(source).parts[0] in {"python.rs", "python"}]
    assert named == binding


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
    assert list(_unsafe(ast.parse(source), "models.loader"))


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
    assert not list(_unsafe(ast.parse(source), "models.loader"))


@pytest.mark.parametrize(
    ("module", "target", "allowed"),
    [
        ("kernels.gpu.norm", "layers.norm", False),
        ("layers.linear", "models.llama", False),
        ("models.llama", "runner.model_runner", False),
        ("runner.sampler", "engine.engine", False),
        ("engine.engine_loop", "server.http.app", False),
        ("engine.engine_loop", "_core.EngineCore", True),
        ("kernels.reference", "config.EngineConfig", False),
        ("config", "models.registry", False),
        ("models.loader", "_core.GgufFile", True),
        ("server.http.app", "engine.engine.AsyncEngine", True),
        ("llm", "text.chat_template.ChatTemplate", True),
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
