"""Times products with 4- and 8-bit weights on a GPU: every kernel's tiles at a model's four shapes.

    PYTHONPATH=python python3 bench/gpu_products.py [--kinds bf16,fp8,w4,w4-zero] [--rows 1,16,64]
                                                    [--sweep] [--json FILE]

Each figure is the time of 32 products with as many weights in one CUDA graph, as a step of an 8B
Llama has them, with programmatic dependent launch; the error is of the first weight's product
against float32 of the same numbers. ``--sweep`` times every tile listed here, else only the planned
ones.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from octavo.kernels.gpu import w4
from octavo.kernels.gpu.dequantize_w4 import dequantize_w4
from octavo.kernels.gpu.gemv import gemv
from octavo.kernels.gpu.gemv_fp8 import GemvFp8Config, gemv_fp8
from octavo.kernels.gpu.gemv_streamed import gemv_streamed
from octavo.kernels.gpu.gemv_w4 import GemvW4Config, gemv_w4, threads_of_row
from octavo.kernels.gpu.launch import next_power_of_2, set_pdl
from octavo.kernels.gpu.limits import block_rows
from octavo.kernels.gpu.ops import compile_only
from octavo.kernels.gpu.quantize_fp8 import FP8, quantize_rows
from octavo.kernels.gpu.skinny_8bit import Skinny8BitConfig, skinny_8bit
from octavo.kernels.gpu.skinny_w4 import SkinnyW4Config, skinny_w4
from octavo.kernels.gpu.streamed import plan_streamed

SHAPES = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
}
LAYERS = 32
GROUP = 128
MAX_ERROR = 1e-2

# A candidate: its name, its tile, and the product of the i-th weight into y.
Candidate = tuple[str, Any, Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor]]


def fp8_gemv_tiles() -> Iterator[GemvFp8Config]:
    for n, words, warps in itertools.product((4, 8, 16, 32), (64, 128, 256), (4, 8, 16)):
        # Fewer words than threads: then a thread has the activations of its own words.
        if warps * 16 <= words <= warps * 32 and n * words >= 128 * warps:
            yield GemvFp8Config(n, words, warps)


# (weight rows, warps): up to two warps use the instructions of one warp, four those of four.
WARPS = [(16, 1), (32, 2), (64, 4), (128, 8)]


def skinny_w4_tiles(rows: int) -> Iterator[SkinnyW4Config]:
    width = block_rows(rows)
    for (n, warps), split, parts, stages in itertools.product(
        WARPS, (1, 2, 4, 8), (1, 2, 4), (2, 3, 4)
    ):
        shared = stages * (n * GROUP * 2 + 4 * GROUP * width * 2) // parts
        if (
            shared > SHARED
            or (n < 64 and rows > 16)
            or (n == 128 and rows <= 16)
            or (parts == 4 and rows <= 32)
            or (parts == 1 and rows >= 64)
        ):
            continue
        for first in (False, True) if rows > 16 else (False,):
            yield SkinnyW4Config(n, split, parts, warps, stages, first)


def gemv_w4_tiles(weight: w4.W4) -> Iterator[GemvW4Config]:
    warps = max(next_power_of_2(threads_of_row(weight)) // 32, 1)
    for n, steps, ahead in itertools.product((2, 4), (1, 2, 3, 4, 6, 7, 8), (False, True)):
        yield GemvW4Config(n, steps, warps, ahead)


def skinny_8bit_tiles(rows: int, nbytes: int) -> Iterator[Skinny8BitConfig]:
    width = block_rows(rows)
    for (n, warps), k, split, stages in itertools.product(
        WARPS, (128, 256), (1, 2, 4, 8), (3, 4, 5, 6)
    ):
        shared = stages * (n * k + k * width * nbytes)
        if shared < SHARED and not (n < 64 and (rows > 32 or nbytes == 1)) and k + stages < 262:
            yield Skinny8BitConfig(n, k, split, warps, stages)


SHARED = 220 << 10


def fits(tile: Any, n: int, k: int) -> bool:
    """True where the tiles and parts are neither too few nor too many for 132 multiprocessors."""
    if tile is None:  # the planned one
        return True
    programs = n // tile.block_n * tile.split_k
    least, most = (96, 132 * 8) if tile.block_n >= 64 else (250, 132 * 16)
    return least <= programs <= most and tile.split_k * 1024 <= k


class Bf16:
    """Weights as they were trained."""

    def __init__(self, n: int, k: int) -> None:
        self.weights = [torch.randn(n, k, device="cuda").bfloat16() for _ in range(LAYERS)]
        self.dense = self.weights[0].float()
        self.nbytes = self.weights[0].nbytes

    def candidates(self, rows: int, n: int, k: int, sweep: bool) -> Iterator[Candidate]:
        if rows == 1:
            yield "gemv", None, lambda x, i, y: gemv(x, self.weights[i], None, y)
            planned = plan_streamed(n, k, torch.device("cuda"))
            if planned is not None:
                yield (
                    "streamed",
                    planned,
                    lambda x, i, y: gemv_streamed(x, self.weights[i], None, y, config=planned),
                )
        yield "cublas", None, lambda x, i, y: F.linear(x, self.weights[i])


class Fp8:
    """8-bit floats with a scale a row."""

    def __init__(self, n: int, k: int) -> None:
        self.weights = [torch.randn(n, k, device="cuda").to(FP8) for _ in range(LAYERS)]
        self.scales = torch.rand(n, device="cuda") * 0.1 + 0.01
        self.dense = self.weights[0].float() * self.scales[:, None]
        self.nbytes = self.weights[0].nbytes

    def candidates(self, rows: int, n: int, k: int, sweep: bool) -> Iterator[Candidate]:
        w, s = self.weights, self.scales
        if rows == 1:
            for tile in fp8_gemv_tiles() if sweep else (None,):
                yield "gemv", tile, lambda x, i, y, t=tile: gemv_fp8(x, w[i], s, None, y, config=t)
        if rows <= 64:
            for tile in skinny_8bit_tiles(rows, 2) if sweep else (None,):
                if fits(tile, n, k):
                    yield (
                        "skinny 16",
                        tile,
                        lambda x, i, y, t=tile: skinny_8bit(x, None, w[i], s, None, y, config=t),
                    )
        for tile in skinny_8bit_tiles(rows, 1) if sweep and rows >= 8 else (None,):
            if fits(tile, n, k):
                yield (
                    "skinny 8",
                    tile,
                    lambda x, i, y, t=tile: skinny_8bit(
                        *self.rounded(x), w[i], s, None, y, config=t
                    ),
                )
        if rows >= 16:
            yield (
                "scaled_mm",
                None,
                lambda x, i, y: torch._scaled_mm(
                    self.rounded(x)[0],
                    w[i].t(),
                    self.rounded(x)[1][:, None],
                    s[None, :],
                    out_dtype=torch.bfloat16,
                    use_fast_accum=True,
                ),
            )

    def rounded(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x quantized, once for all products: what that takes is timed on its own."""
        if getattr(self, "of", None) is not x:
            self.of, self.x8 = x, quantize_rows(x)
        return self.x8


class W4:
    """4 bits and groups of 128."""

    def __init__(self, n: int, k: int, *, zero: bool) -> None:
        q = torch.randint(0, 16, (n, k), device="cuda", dtype=torch.uint8)
        scale = (torch.rand(n, k // GROUP, device="cuda") * 0.01 + 0.005).to(torch.float16)
        zeros = torch.randint(0, 16, scale.shape, device="cuda", dtype=torch.uint8)
        first = w4.pack(q, scale, zeros if zero else None, GROUP)
        self.weights = [first]
        for _ in range(LAYERS - 1):
            words = torch.randint(
                -(2**31), 2**31 - 1, first.words.shape, device="cuda", dtype=torch.int32
            )
            of_zeros = None if first.zeros is None else first.zeros.clone()
            self.weights.append(w4.W4(words, first.scales.clone(), of_zeros, GROUP, (n, k)))
        self.dense = w4.unpack(first)
        self.nbytes = first.nbytes

    def candidates(self, rows: int, n: int, k: int, sweep: bool) -> Iterator[Candidate]:
        w = self.weights
        if rows == 1:
            for of_row in gemv_w4_tiles(w[0]) if sweep else (None,):
                # Neither too few warps nor too many for the multiprocessors' registers.
                warps = 1000
                if of_row is not None:
                    warps = n // of_row.block_n // of_row.steps * of_row.num_warps
                if 132 * 7 <= warps <= 132 * 24:
                    yield (
                        "gemv",
                        of_row,
                        lambda x, i, y, t=of_row: gemv_w4(x, w[i], None, y, config=t),
                    )
        for tile in skinny_w4_tiles(rows) if sweep else (None,):
            if fits(tile, n, k):
                yield "skinny", tile, lambda x, i, y, t=tile: skinny_w4(x, w[i], None, y, config=t)
        if rows >= 64:
            yield "dequantized", None, lambda x, i, y: F.linear(x, dequantize_w4(w[i], x.dtype))


KINDS: dict[str, Callable[[int, int], Any]] = {
    "bf16": Bf16,
    "fp8": Fp8,
    "w4": lambda n, k: W4(n, k, zero=False),
    "w4-zero": lambda n, k: W4(n, k, zero=True),
}


def graph_ms(launch: Callable[[], Any]) -> float:
    """Median time of one replay, in ms."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        launch()  # the stream's counters of split products exist before a capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            launch()
        times = []
        for _ in range(6):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(begin.elapsed_time(end))
    return statistics.median(times[1:])


def measure(
    kind: str,
    rows: int,
    name: str,
    n: int,
    k: int,
    weight: Any,
    sweep: bool,
    kernels: list[str],
) -> list[dict[str, Any]]:
    x = torch.randn(rows, k, device="cuda").bfloat16()
    if kind == "fp8":
        weight.rounded(x)
    y = torch.empty(rows, n, device="cuda", dtype=torch.bfloat16)
    want = x.float() @ weight.dense.T
    found = []
    usable = [c for c in weight.candidates(rows, n, k, sweep) if not kernels or c[0] in kernels]
    try:
        with compile_only():
            for _, _, product in usable:
                try:
                    product(x, 0, y)
                except Exception:
                    continue
    except Exception as error:
        print(f"compiling {kind} {rows} {name}: {str(error)[:200]}", flush=True)
    for kernel, tile, product in usable:
        try:
            out = product(x, 0, y.fill_(float("nan")))
            error = float((out.float() - want).norm() / want.norm())
            ms = graph_ms(lambda product=product: [product(x, i, y) for i in range(LAYERS)])
        except Exception as failure:
            print(f"FAIL {kind} {kernel} {rows} {name} {tile}: {str(failure)[:150]}", flush=True)
            continue
        rate = LAYERS * weight.nbytes / ms / 1e9
        found.append(
            {
                "kind": kind,
                "kernel": kernel,
                "rows": rows,
                "shape": name,
                "ms": ms,
                "TB/s": rate,
                "error": error,
                "tile": list(tile) if tile else "planned",
            }
        )
    return sorted(found, key=lambda row: row["ms"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--rows", default="1,4,8,16,32,64,128,256")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--kernels", default="", help="only these, as the table names them")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--best", type=int, default=3)
    parser.add_argument("--json")
    args = parser.parse_args()
    set_pdl(True)
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    results: list[dict[str, Any]] = []
    for kind, name in itertools.product(args.kinds.split(","), args.shapes.split(",")):
        n, k = SHAPES[name]
        weight = KINDS[kind](n, k)
        for rows in map(int, args.rows.split(",")):
            kernels = args.kernels.split(",") if args.kernels else []
            found = measure(kind, rows, name, n, k, weight, args.sweep, kernels)
            results += found
            for kernel in dict.fromkeys(row["kernel"] for row in found):
                for row in [row for row in found if row["kernel"] == kernel][: args.best]:
                    bad = (
                        ""
                        if row["error"]
                        < (0.05 if kernel in ("skinny 8", "scaled_mm") else MAX_ERROR)
                        else "BAD "
                    )
                    print(
                        f"{bad}{kind:8s}{kernel:12s}{rows:4d} {name:8s}{row['ms']:7.3f} ms "
                        f"{row['TB/s']:5.2f} TB/s err {row['error']:.1e} {row['tile']}",
                        flush=True,
                    )
            if args.json:
                with open(args.json, "w") as stream:
                    json.dump(results, stream)
        del weight
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
