"""Every flag of vLLM's ``serve`` has an answer, and docs/flags.md lists them all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from octavo import vllm_flags
from octavo.config import EngineConfig
from octavo.flag_help import default_of, effect, short_help
from octavo.flags import Flag, flags_of
from octavo.server.http.config import ServerConfig

ROOT = Path(__file__).resolve().parents[2]
DOC = ROOT / "docs" / "flags.md"
# Names of `vllm serve --help`, 0.33.
NAMES = (ROOT / "tests" / "data" / "vllm_flags.txt").read_text().split()
FLAGS: list[Flag] = [flag for config in (EngineConfig, ServerConfig) for flag in flags_of(config)]
OWN = {name: flag for flag in FLAGS for name in (flag.name, *flag.aliases)}

HEAD = """# The command line, flag by flag

`octavo serve [MODEL] [flags]`. Written by `OCTAVO_WRITE_DOCS=1 pytest tests/cli/test_flags_doc.py`.

A value comes from the first of: the command line, `OCTAVO_<FLAG>`, the file of `--config` (YAML whose
keys are the long flags), the default. Names may have underscores; a switch is turned off by `--no-FLAG`
or `--FLAG false`; objects are JSON, or have their keys behind dots (`--hf-overrides.a.b 1`); lists are
words or JSON; numbers may be `8k` (8000), `8K` (8192) or `2GiB`. Of vLLM's variables `VLLM_API_KEY` is
read; any other `VLLM_*` that is set is named in a warning.

`octavo serve --help` shows the common ones; `--help=all`, `--help=GROUP` and `--help=FLAG` the rest.

"""


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def own_row(flag: Flag) -> str:
    names = ", ".join(f"`{option}`" for option in flag.options)
    values = " / ".join(flag.choices)
    what = flag.help + default_of(flag) + (f" ({values})" if values else "")
    return f"| {names} | {cell(what)} |"


def answer(name: str) -> str:
    flag = OWN.get(name.replace("-", "_"))
    if name == "config":
        return "honoured"
    if flag is None:
        return effect(vllm_flags.ROWS[name.replace("-", "_")])
    if flag.name != name.replace("-", "_"):
        return f"honoured, as `{flag.option}`"
    words = [f"`{word}` changes nothing: {why}" for word, (_, why) in flag.vllm_words.items()]
    return (
        "; ".join(["honoured", *words])
        if len(words) < 4
        else f"honoured; vLLM's values: {why_of(flag)}"
    )


def why_of(flag: Flag) -> str:
    return next(iter(flag.vllm_words.values()))[1]


def document() -> str:
    parts = [HEAD]
    groups: dict[str, list[Flag]] = {}
    for flag in FLAGS:
        groups.setdefault(flag.group, []).append(flag)
    for group, members in groups.items():
        parts.append(
            f"## {group[0].upper()}{group[1:]}\n\n| flag | meaning [default] |\n|---|---|\n"
        )
        parts.append("\n".join(map(own_row, members)) + "\n\n")
    parts.append("## vLLM's flags, each of `vllm serve --help` (0.33)\n\n")
    parts.append("| flag | here |\n|---|---|\n")
    parts.append("\n".join(f"| `--{name}` | {cell(answer(name))} |" for name in NAMES) + "\n\n")
    parts.append("## Flags of older versions\n\n| flag | here |\n|---|---|\n")
    older = sorted(set(vllm_flags.ROWS) - {name.replace("-", "_") for name in NAMES})
    parts.append(
        "\n".join(
            f"| `{vllm_flags.ROWS[name].option}` | {cell(effect(vllm_flags.ROWS[name]))} |"
            for name in older
        )
    )
    return "".join(parts) + "\n"


@pytest.mark.parametrize("name", NAMES)
def test_every_flag_of_vllm_has_an_answer(name: str) -> None:
    assert answer(name)


def test_no_row_stands_in_for_a_flag_that_octavo_has() -> None:
    assert not set(vllm_flags.ROWS) & set(OWN)


def test_no_spelling_is_two_flags() -> None:
    spellings = [option for flag in FLAGS for option in flag.options]
    spellings += [one for row in vllm_flags.ROWS.values() for one in (row.option, *row.shorts)]
    assert len(spellings) == len(set(spellings))


def test_the_document_is_that_of_the_tables() -> None:
    written = document()
    if os.environ.get("OCTAVO_WRITE_DOCS"):
        DOC.write_text(written)
    assert DOC.read_text() == written, "run this test with OCTAVO_WRITE_DOCS=1"


def test_the_short_help_fits_a_screen() -> None:
    text = short_help(FLAGS)
    lines = text.splitlines()
    assert len(lines) < 56  # and a head of four
    assert max(map(len, lines)) <= 120
    for flag in FLAGS:
        assert flag.option in text
