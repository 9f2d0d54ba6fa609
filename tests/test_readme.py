"""README.md's tree: every source file with its own first words, as they are now.

``OCTAVO_WRITE_DOCS=1`` writes it.
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
# A line of the tree should not wrap.
MAX_CHARS = 90
BEGIN, END = "<!-- files: begin -->\n", "<!-- files: end -->\n"
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


def test_the_tree_is_that_of_the_files() -> None:
    before, _, rest = README.read_text().partition(BEGIN)
    found, end, after = rest.partition(END)
    assert end, "README.md has no place for the tree"
    if os.environ.get("OCTAVO_WRITE_DOCS"):
        README.write_text(f"{before}{BEGIN}{tree()}{END}{after}")
    else:
        assert found == tree(), "run this test with OCTAVO_WRITE_DOCS=1"
