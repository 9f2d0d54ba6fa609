"""Docstrings begin with a noun phrase or a verb, and long files with their reason."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("python/octavo", "kernels", "bench", "rust_core")
QUESTION = re.compile(r"(What|Whether|How|Which|Where|When|Who|Why)\b")
# A line of Rust's documentation, the first of its paragraph or not: a line after a full stop may
# begin with such a word as well, and is better turned round too.
RUST_DOC = re.compile(r"^\s*//[/!] (?=(?:What|Whether|How|Which|Who|Why)\b)", re.MULTILINE)


def python_docstrings(source: str) -> Iterator[tuple[int, str]]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and (text := ast.get_docstring(node)):
            yield getattr(node, "lineno", 1), text


def questions(path: Path) -> Iterator[str]:
    source = path.read_text()
    where = path.relative_to(ROOT)
    if path.suffix == ".py":
        for line, text in python_docstrings(source):
            if QUESTION.match(text):
                yield f"{where}:{line}: {text.splitlines()[0]}"
        return
    for found in RUST_DOC.finditer(source):
        yield f"{where}:{source.count(chr(10), 0, found.start()) + 1}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_docstrings_are_no_questions(folder: str) -> None:
    suffixes = {".py", ".rs"}
    files = [path for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
    assert files
    assert [line for path in files for line in questions(path)] == []


def test_a_question_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.test_docstrings.ROOT", tmp_path)
    (tmp_path / "a.py").write_text('def answer() -> bool:\n    """Whether it is."""\n')
    (tmp_path / "a.rs").write_text("/// Its name.\n/// How it came to be.\nstruct A;\n")
    assert list(questions(tmp_path / "a.py")) == ["a.py:1: Whether it is."]
    assert list(questions(tmp_path / "a.rs")) == ["a.rs:2"]


# From here on a newcomer no longer sees a file whole (CONTRIBUTING, "One noun, one file").
LONG = 500
REASON = "Longer than other files"


def test_long_files_give_their_reason_at_the_head() -> None:
    production = [*ROOT.glob("kernels/**/*.py"), *ROOT.glob("rust_core/*/src/**/*.rs")]
    production += (ROOT / "python" / "octavo").rglob("*.py")
    sources = {path: path.read_text() for path in production}
    long = {path: text for path, text in sources.items() if text.count("\n") > LONG}
    assert long, "some are"
    silent = [
        str(path.relative_to(ROOT)) for path, text in long.items() if REASON not in text[:4000]
    ]
    assert silent == []
