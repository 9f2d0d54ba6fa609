"""README.md's tree and docs/files.md, which lists every program with its own first words.

``OCTAVO_WRITE_DOCS=1`` writes the list.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
FILES = ROOT / "docs" / "files.md"
# A newcomer reads it in five minutes, and PyPI shows it whole.
MAX_README_LINES = 140
# A line of the list should not wrap.
MAX_CHARS = 90
HEAD = """# Every program, one line each

Written by `OCTAVO_WRITE_DOCS=1 pytest tests/test_readme.py` from the first words of each file.

"""
FOLDERS = ("rust_core", "python", "kernels", "bench", "tests")


def sources() -> list[Path]:
    """Every tracked program, relative to the root, folder by folder."""
    patterns = [f"{folder}/**/*.{kind}" for folder in FOLDERS for kind in ("rs", "py", "pyi")]
    command = ["git", "ls-files", "--", *(f":(glob){pattern}" for pattern in patterns)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    paths = [Path(line) for line in done.stdout.splitlines()]
    return sorted(paths, key=lambda path: (FOLDERS.index(path.parts[0]), path.parent, path.name))


def first_sentence(path: Path) -> str:
    """What a file says of itself at its head."""
    text = (ROOT / path).read_text()
    if path.suffix == ".rs":
        head = "\n".join(re.findall(r"^//! ?(.*)$", text, re.MULTILINE))
    else:
        head = ast.get_docstring(ast.parse(text)) or ""
    paragraph = " ".join(head.partition("\n\n")[0].replace("``", "`").split())
    sentence = re.split(r"\. (?=[A-Z`])", paragraph)[0].removesuffix(".")
    while len(sentence) > MAX_CHARS:
        shorter = re.sub(r"[,;:][^,;:]*$", "", sentence)
        if shorter == sentence:
            break
        sentence = shorter
    return sentence


def tree() -> str:
    """One line a file under its folder's name."""
    lines = []
    for folder, paths in groupby(sources(), key=lambda path: path.parent):
        named = list(paths)
        width = max(len(path.name) for path in named)
        lines.append(f"{folder}/")
        lines += [f"  {path.name:<{width}}  {first_sentence(path)}" for path in named]
    return "```\n" + "\n".join(lines) + "\n```\n"


def test_every_file_says_what_it_is() -> None:
    silent = [str(path) for path in sources() if not first_sentence(path)]
    assert not silent


def test_the_list_is_that_of_the_files() -> None:
    listed = HEAD + tree()
    if os.environ.get("OCTAVO_WRITE_DOCS"):
        FILES.write_text(listed)
    assert FILES.read_text() == listed, "run this test with OCTAVO_WRITE_DOCS=1"


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) < MAX_README_LINES


def test_what_the_readmes_tree_names_is_there() -> None:
    """Paths are relative to the last line that begins at the margin, or to the root."""
    _, _, rest = README.read_text().partition("## The tree")
    block = rest.split("```")[1]
    folder, named = ROOT, []
    for line in block.splitlines():
        names = re.match(r"( *)((?:[\w.*-]+/?)+(?:  (?:[\w.*-]+/?)+)*)", line)
        if names is None or (names[1] and len(names[1]) > 2):
            continue  # the rest of a line above
        paths = names[2].split("  ")
        if not names[1]:
            folder = ROOT / paths[0] if paths[0].endswith("/") else ROOT
            paths = paths if folder == ROOT else paths[:1]
        base = folder if names[1] else ROOT
        named += [base / path for path in paths]
    assert len(named) > 30
    missing = [str(path.relative_to(ROOT)) for path in named if not path.exists()]
    assert not missing
