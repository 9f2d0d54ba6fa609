"""Products of quantized weights on this machine's cores: each format beside GGUF's of its width.

    python bench/formats_cpu.py --threads 2 --json formats.json

A weight of every format is made of the same random numbers, in as many copies as no cache holds,
and multiplied with 1, 4, 16 and 64 rows. Every round takes the formats in turn, so that whatever
else runs on the machine meets them all; the table has medians of the rounds: the time of one
product, and the bytes of a weight over the time of one row. The last column is the error of the
product against float32's, ‖out - ref‖ / ‖ref‖.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from octavo.kernels.cpu import ops as cpu
from octavo.kernels.cpu.linear import CpuWeight
from octavo.kernels.weights import Planes, Stored, quantize

ROWS = (1, 4, 16, 64)
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def grouped(
    weight: Tensor, size: int, levels: Callable[[Tensor], tuple[str, dict[str, Tensor]]]
) -> Planes:
    """A weight [N, K] in groups of ``size``; levels: of values of a largest magnitude of 1."""
    n, k = weight.shape
    groups = weight.view(n, k // size, size)
    scale = groups.abs().amax(2)
    name, planes = levels((groups / scale[:, :, None]).view(n, k))
    divisor = float(planes.pop("divisor"))
    return Planes(name, planes | {"scale": scale / divisor}, (n, k))


def integers(bits: int) -> Callable[[Tensor], tuple[str, dict[str, Tensor]]]:
    top = 2 ** (bits - 1) - 1

    def levels(values: Tensor) -> tuple[str, dict[str, Tensor]]:
        q = (values * top).round().to(torch.int8)
        return f"INT{bits}", {"q": q, "divisor": torch.tensor(top)}

    return levels


def fp8(values: Tensor) -> tuple[str, dict[str, Tensor]]:
    q = (values * 448).to(torch.float8_e4m3fn)
    return "FP8", {"q": q, "divisor": torch.tensor(448)}


def by_codes(name: str, codes: Tensor) -> Callable[[Tensor], tuple[str, dict[str, Tensor]]]:
    def levels(values: Tensor) -> tuple[str, dict[str, Tensor]]:
        top = codes.max()
        order = codes.argsort(stable=True)
        middles = (codes[order][1:] + codes[order][:-1]) / 2
        q = order[torch.bucketize(values * top, middles)].to(torch.uint8)
        return name, {"q": q, "codes": codes, "divisor": top}

    return levels


def nf4_codes() -> Tensor:
    """Quantiles of the normal distribution, as the kernels know them."""
    from octavo.kernels.cpu.blocks import NF4

    return torch.tensor(NF4)


def makers() -> dict[str, Callable[[Tensor], Stored]]:
    """A name -> a float weight in that format."""
    nf4 = nf4_codes()
    return {
        "BF16": lambda w: w.bfloat16(),
        "Q4_0": lambda w: quantize(w, "Q4_0"),
        "Q4_1": lambda w: quantize(w, "Q4_1"),
        "W4 g128 (AWQ, GPTQ, CT)": lambda w: grouped(w, 128, integers(4)),
        "W4 g32": lambda w: grouped(w, 32, integers(4)),
        "W4 a row": lambda w: grouped(w, w.shape[1], integers(4)),
        "NVFP4": lambda w: grouped(w, 16, by_codes("FP4", E2M1)),
        "NF4": lambda w: grouped(w, 64, by_codes("NF4", nf4)),
        "Q8_0": lambda w: quantize(w, "Q8_0"),
        "W8 g128 (GPTQ, CT)": lambda w: grouped(w, 128, integers(8)),
        "W8 a row": lambda w: grouped(w, w.shape[1], integers(8)),
        "FP8 g128": lambda w: grouped(w, 128, fp8),
        "FP8 a row": lambda w: grouped(w, w.shape[1], fp8),
    }


def seconds(copies: list[CpuWeight], x: Tensor) -> float:
    """Of one product, each with another copy."""
    start = time.perf_counter()
    for weight in copies:
        weight.linear(x)
    return (time.perf_counter() - start) / len(copies)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--shape", type=int, nargs=2, default=(4096, 2048), metavar=("N", "K"))
    parser.add_argument("--mib", type=int, default=96, help="of copies, for no cache to hold")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[], help="names of formats, all by default")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    cpu.set_num_threads(args.threads)
    n, k = args.shape
    weight = torch.randn(n, k) * 0.05
    weights, errors, refs = {}, {}, {}
    xs = {rows: torch.randn(rows, k) for rows in ROWS}
    for name, make in makers().items():
        if args.only and name not in args.only:
            continue
        stored = make(weight)
        one = cpu.prepare([stored])
        count = max(1, (args.mib << 20) // one.nbytes)
        weights[name] = [one] + [cpu.prepare([stored]) for _ in range(count - 1)]
        refs[name] = xs[1] @ one.dequantize().t()
        errors[name] = float((one.linear(xs[1]) - refs[name]).norm() / refs[name].norm())
    times: dict[str, dict[int, list[float]]] = {
        name: {rows: [] for rows in ROWS} for name in weights
    }
    for _ in range(args.rounds):
        for rows in ROWS:
            for name, copies in weights.items():
                some = copies if rows == 1 else copies[: max(1, len(copies) // rows)]
                times[name][rows].append(seconds(some, xs[rows]))
    rows_out = []
    print(
        f"{n} x {k}, level {cpu.level()}, {cpu.num_threads()} threads, torch {torch.__version__}\n"
    )
    heads = [f"{rows} row{'s' if rows > 1 else ''}, µs" for rows in ROWS]
    print("| format | bits | " + " | ".join(heads) + " | GB/s, 1 row | error |")
    print("|---|---|" + "---|" * (len(ROWS) + 2))
    for name, of_rows in times.items():
        medians = {rows: statistics.median(found) for rows, found in of_rows.items()}
        nbytes = weights[name][0].nbytes
        cells = " | ".join(f"{medians[rows] * 1e6:.0f}" for rows in ROWS)
        speed = nbytes / medians[1] / 1e9
        bits = 8 * nbytes / (n * k)
        print(f"| {name} | {bits:.2f} | {cells} | {speed:.1f} | {errors[name]:.1e} |")
        rows_out.append({"format": name, "bits": bits, "s": medians, "error": errors[name]})
    if args.json:
        args.json.write_text(json.dumps({"shape": [n, k], "formats": rows_out}, indent=1))


if __name__ == "__main__":
    main()
