"""Times tiles of the kernel of one row on a GPU, and writes the table that tiles are chosen from.

    PYTHONPATH=python python3 bench/gpu_tiles.py [--models 8B,1B] [--write]

Each figure is of as many weights as a model has layers, multiplied in turn in one CUDA graph with
programmatic dependent launch, with the norm, the gate or the residual that a step has there; an
error is against float32 of the same numbers. Beside them "others": the kernel without such tiles,
with a norm and a gate of their own.

``--write`` puts the tiles of this machine's kind of chip into kernels/gpu/tiles.py; lines of other
chips and of shapes that were not timed stay as they are.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F

from gpu_products import graph_ms
from octavo.kernels.gpu import tiles
from octavo.kernels.gpu.gemv_streamed import gemv_streamed
from octavo.kernels.gpu.launch import next_power_of_2, set_pdl
from octavo.kernels.gpu.linear import GpuWeight
from octavo.kernels.gpu.ops import compile_only
from octavo.kernels.gpu.streamed import StreamConfig, fit
from octavo.kernels.weights import Norm

linear_module = importlib.import_module("octavo.kernels.gpu.linear")

# (rows, columns, what a step has there); 8B/2: what each of two GPUs has of Llama 3.1 8B.
MODELS = {
    "8B": [
        (6144, 4096, "norm"),
        (4096, 4096, "residual"),
        (28672, 4096, "norm gate"),
        (4096, 14336, "residual"),
        (128256, 4096, ""),
    ],
    "8B/2": [
        (3072, 4096, ""),
        (4096, 2048, ""),
        (14336, 4096, "gate"),
        (4096, 7168, ""),
        (64128, 4096, ""),
    ],
    "1B": [
        (3072, 2048, "norm"),
        (2048, 2048, "residual"),
        (16384, 2048, "norm gate"),
        (2048, 8192, "residual"),
        (128256, 2048, ""),
    ],
}
LAYERS = 32
# Of all weights of a shape: output heads are fewer than layers.
MAX_BYTES = 8 << 30
MAX_ERROR = 5e-3
ANNOTATION = "TILES: dict[str, dict[tuple[int, int], tuple[int, int, int, int]]]"
# (programs a multiprocessor, warps, kilobytes of an iteration, kilobytes on their way to a
# multiprocessor): those that leave room let the next product's programs in before these end.
SHAPES = [
    *itertools.product((1,), (8,), (16, 32), (96, 110, 200)),
    *itertools.product((2,), (4, 8), (8, 16), (96, 144, 200)),
    *itertools.product((4,), (4,), (8,), (96, 200)),
]


def tiles_of(n: int, row_bytes: int) -> list[StreamConfig]:
    found = set()
    for programs, warps, step, ahead in SHAPES:
        block = next_power_of_2(max((step << 10) // row_bytes, 1))
        stages = (ahead << 10) // (programs * block * row_bytes) + 1
        tile = StreamConfig(block, programs, warps, stages)
        found.add(fit(tile, row_bytes, n, torch.device("cuda")))
    return sorted(found)


class Case:
    """Weights of one shape and what a step has around their product."""

    def __init__(self, n: int, k: int, form: str, count: int) -> None:
        self.n, self.k = n, k
        self.weights = [
            (torch.randn(n, k, device="cuda") * k**-0.5).bfloat16() for _ in range(count)
        ]
        self.x = torch.randn(1, k, device="cuda").bfloat16()
        self.norm = Norm(torch.rand(k, device="cuda").bfloat16() + 0.5, 1e-5)
        self.gate = "silu" if "gate" in form else ""
        self.width = n // 2 if self.gate else n
        self.form: dict[str, Any] = {"gate": self.gate, "norm": None, "residual": None}
        if "norm" in form:
            self.form["norm"] = self.norm
        if "residual" in form:
            self.form["residual"] = torch.randn(1, n, device="cuda").bfloat16()

    def expected(self) -> torch.Tensor:
        """Of the first weight."""
        x, dense = self.x.float(), self.weights[0].float()
        if self.form["norm"] is not None:
            x = x * torch.rsqrt((x * x).mean() + self.norm.eps) * self.norm.weight.float()
        y = x @ dense.T
        if self.gate:
            y = F.silu(y[:, : self.width]) * y[:, self.width :]
        return y if self.form["residual"] is None else y + self.form["residual"].float()

    def product(self, i: int, tile: StreamConfig | None) -> torch.Tensor:
        """Of the i-th weight, by the other kernels if there is no tile."""
        weight = self.weights[i]
        if tile is None:
            with patch.object(linear_module, "plan_row", lambda weight: None):
                return GpuWeight(weight).linear(self.x, **self.form)
        y = torch.empty(1, self.width, device="cuda", dtype=torch.bfloat16)
        return gemv_streamed(self.x, weight, None, y, config=tile, **self.form)


def graph_us(run: Callable[[], Any]) -> float:
    """Median time of one replay."""
    return 1e3 * graph_ms(run)


def best_tile(case: Case, best: int) -> StreamConfig:
    """Times all tiles of a shape and prints the best ones."""
    want, rows, count = case.expected(), [], len(case.weights)
    for tile in (None, *tiles_of(case.n, 2 * next_power_of_2(case.k))):
        before = None if case.form["residual"] is None else case.form["residual"].clone()
        try:
            out = case.product(0, tile).float()
            error = float((out - want).norm() / want.norm())
            us = graph_us(lambda tile=tile: [case.product(i, tile) for i in range(count)]) / count
        except Exception as failure:
            print(f"FAIL {case.n} {case.k} {tile}: {str(failure)[:150]}", flush=True)
            continue
        finally:
            if before is not None:  # the others add to it in place
                case.form["residual"].copy_(before)
        rows.append((us, error, tile))
    rows.sort(key=lambda row: row[0])
    others = [row for row in rows if row[2] is None]
    for us, error, tile in (*others, *[row for row in rows if row[2]][:best]):
        print(
            f"{'' if error < MAX_ERROR else 'BAD '}{case.n:6d} x {case.k:5d}"
            f"{us:9.2f} us {case.weights[0].nbytes / us / 1e6:5.2f} TB/s err {error:.1e} "
            f"{tuple(tile) if tile else 'others'}",
            flush=True,
        )
    return next(tile for _, error, tile in rows if tile and error < MAX_ERROR)


def write_table(found: dict[tuple[int, int], StreamConfig]) -> None:
    """The module with the table, with what was found in place of what it had."""
    path = Path(tiles.__file__)
    head = path.read_text().partition("\nTILES")[0]
    chips = {chip: dict(table) for chip, table in tiles.TILES.items()}
    mine = chips.setdefault(torch.cuda.get_device_name(), {})
    mine.update({shape: (*tile,) for shape, tile in found.items()})
    lines = [head, f"{ANNOTATION} = {{"]
    for chip, table in chips.items():
        lines.append(f'    "{chip}": {{')
        lines += [f"        {shape}: {tile}," for shape, tile in table.items()]
        lines.append("    },")
    path.write_text("\n".join([*lines, "}\n"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--shape", type=int, help="only the so many-th of each model")
    parser.add_argument("--best", type=int, default=3, help="tiles to print of each shape")
    parser.add_argument("--compile", action="store_true", help="compile all kernels and end")
    parser.add_argument("--write", action="store_true", help="write the table")
    args = parser.parse_args()
    set_pdl(True)
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    found: dict[tuple[int, int], StreamConfig] = {}
    for model in args.models.split(","):
        shapes = MODELS[model] if args.shape is None else [MODELS[model][args.shape]]
        for n, k, form in shapes:
            count = 1 if args.compile else min(LAYERS, MAX_BYTES // (2 * n * k))
            case = Case(n, k, form, count)
            with compile_only():
                for tile in (None, *tiles_of(n, 2 * next_power_of_2(k))):
                    case.product(0, tile)
            if not args.compile:
                found[n, k] = best_tile(case, args.best)
            del case
            torch.cuda.empty_cache()
    if args.write:
        write_table(found)


if __name__ == "__main__":
    main()
