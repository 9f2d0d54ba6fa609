"""Report: one benchmark's outcome, on the terminal, as JSON and as a Markdown table."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from octavo.bench import environment
from octavo.bench.summary import Figures, format_figure, medians, spreads_json, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags every benchmark has for its outcome."""
    group = parser.add_argument_group("outcome")
    group.add_argument("--repeat", type=int, default=1, help="runs; the medians are reported")
    group.add_argument("--json", metavar="FILE", help="write everything measured as JSON")
    group.add_argument("--markdown", metavar="FILE", help="append a table, as in bench/results")
    group.add_argument("--title", help="the table's heading")


@dataclass(kw_only=True)
class Report:
    """The command, the machine, and the figures of every run."""

    title: str
    # The settings that tell this run from the next one.
    settings: Mapping[str, Any]
    runs: Sequence[Figures]
    # Beside every speed: evidence that the answers were right.
    check: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=environment.describe)

    def text(self) -> str:
        """The medians for a terminal."""
        return table(medians(self.runs))

    def as_json(self) -> dict[str, Any]:
        """Everything, medians included."""
        return {
            "title": self.title,
            "settings": dict(self.settings),
            "environment": dict(self.environment),
            "medians": spreads_json(medians(self.runs)),
            "runs": list(self.runs),
            "check": self.check,
            **self.details,
        }

    def markdown(self) -> str:
        """A section: where and how, then one row per figure."""
        env = self.environment
        versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
        lines = [
            f"## {self.title}",
            "",
            f"- machine: {env['machine']}",
            f"- versions: {versions}",
            f"- commit: {env['commit']}, {env['date']}",
            f"- command: `{env['command']}`",
        ]
        if self.check is not None:
            lines.append(f"- check: {self.check}")
        runs = f"median of {len(self.runs)}" if len(self.runs) > 1 else "one run"
        lines += ["", f"| figure | {runs} | lowest | highest |", "|---|---|---|---|"]
        for name, spread in medians(self.runs).items():
            cells = map(format_figure, (spread.median, spread.low, spread.high))
            lines.append(f"| {name} | {' | '.join(cells)} |")
        return "\n".join([*lines, "", ""])

    def write(self, args: argparse.Namespace) -> None:
        """Print, and write the files that the flags of ``add_arguments`` name."""
        print(self.text())
        if self.check is not None:
            print(f"check: {self.check}")
        if args.json:
            Path(args.json).write_bytes(orjson.dumps(self.as_json(), option=orjson.OPT_INDENT_2))
        if args.markdown:
            path = Path(args.markdown)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(self.markdown())
