"""The GPU's tests, dealt out to processes and GPUs: most of their time goes to compiling kernels.

    python bench/gpu_tests.py [--out DIR] [--limit SECONDS] [--processes N] [PATH ...]

Needs pytest-timeout. Tests that the limit leaves out are listed; the exit status is that of all.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDERS = ("tests/runner", "tests/engine", "tests/kernels", "tests/models")
# Takes all of the memory; it comes last, alone.
ALONE = "tests/runner/test_gpu_memory.py"
OUTCOME = re.compile(r"^(tests/.+?) (PASSED|FAILED|ERROR|SKIPPED) +\[", re.MULTILINE)


def pytest(*arguments: str) -> list[str]:
    options = ["-p", "no:cacheprovider", "-m", "gpu", "--tb=short", "--timeout", "100"]
    return [sys.executable, "-m", "pytest", *options, *arguments]


def collect(paths: list[str]) -> list[str]:
    """The tests' ids, of those that can share a GPU."""
    listed = subprocess.run(
        pytest("-q", "--collect-only", *paths), capture_output=True, text=True, check=False
    )
    ids = [
        line for line in listed.stdout.splitlines() if line.startswith("tests/") and "::" in line
    ]
    if not ids:
        sys.exit(listed.stdout + listed.stderr)
    return [name for name in ids if not name.startswith(ALONE)]


def start(names: list[str], log: Path, gpu: int, limit: float) -> subprocess.Popen[bytes]:
    # One process's threads must not take the cores of all.
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu), "OMP_NUM_THREADS": "2"}
    # An interrupted pytest still prints the failures that it has seen.
    with log.open("wb") as file:
        return subprocess.Popen(
            ["timeout", "--signal=INT", "--kill-after=10", str(limit), *pytest("-v", *names)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=env,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="a folder for the logs; default: a new one")
    parser.add_argument("--limit", type=float, default=400.0, help="seconds")
    parser.add_argument("--processes", type=int, help="default: the cores, at most 14 for each GPU")
    parser.add_argument("paths", nargs="*", default=FOLDERS)
    args = parser.parse_args()
    out = args.out or Path(tempfile.mkdtemp())
    out.mkdir(parents=True, exist_ok=True)
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    num_gpus = listed.stdout.count("GPU ")
    count = args.processes or min(14 * num_gpus, os.cpu_count() or 1)
    ids = collect(list(args.paths))
    logs = [out / f"{number}.log" for number in range(count)]
    running = [
        start(share, log, number % num_gpus, args.limit)
        for number, log in enumerate(logs)
        if (share := ids[number::count])
    ]
    for process in running:
        process.wait()
    if Path(ALONE).exists():
        logs.append(out / "alone.log")
        start([ALONE], logs[-1], 0, 60).wait()
    text = "".join(log.read_text(errors="replace") for log in logs if log.exists())
    found: dict[str, list[str]] = {}
    for name, outcome in OUTCOME.findall(text):
        found.setdefault(outcome, []).append(name)
    reached = {name for names in found.values() for name in names}
    for outcome in ("FAILED", "ERROR"):
        for name in found.get(outcome, []):
            print(outcome, name)
    for name in ids:
        if name not in reached:
            print("not reached", name)
    counts = ", ".join(f"{len(names)} {outcome.lower()}" for outcome, names in found.items())
    missed = len(set(ids) - reached)
    print(f"{len(ids)} tests: {counts}, {missed} not reached; logs in {out}")
    return int(bool(found.get("FAILED") or found.get("ERROR") or missed or "PASSED" not in found))


if __name__ == "__main__":
    sys.exit(main())
