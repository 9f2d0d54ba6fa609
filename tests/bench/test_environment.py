"""What a results file says of the machine, and what it must not say."""

from __future__ import annotations

from octavo.bench import environment


def test_secrets_are_blanked() -> None:
    argv = ["/some/where/bin/octavo", "bench", "--api-key", "sk-1", "--api-key=sk-2", "--seed", "1"]
    line = environment.command_line(argv)
    assert "sk-" not in line
    assert line.startswith("octavo bench --api-key")
    assert line.endswith("--seed 1")


def test_describe_names_what_figures_depend_on() -> None:
    found = environment.describe()
    assert "cores" in found["machine"]
    assert "python" in found["versions"]
    assert found["command"]
