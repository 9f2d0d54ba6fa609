"""Exchanges between GPUs: microseconds a call inside graphs, by rows, and polls of a lost rank.

    python bench/exchange.py [--hidden 4096] [--devices cuda:0,cuda:1] [--replays 20]

Each figure is a graph of 64 calls on every rank, the median of the replays; the sum is checked
against torch's. ``flagged``: rows whose words carry flags; ``met``: pieces that are met for.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from octavo.kernels.gpu import all_reduce as kernels
from octavo.kernels.gpu import peers as peer_memory
from octavo.kernels.gpu.ops import set_pdl
from octavo.kernels.weights import Norm

CALLS = 64
# More than octavo's own, for the place where the other way is better.
MAX_FLAGGED_ROWS = 64


class Bench:
    """Ranks with a stream each, on given devices."""

    def __init__(self, names: str, hidden: int, replays: int) -> None:
        self.devices = [torch.device(name) for name in names.split(",")]
        self.peers = peer_memory.make_peers(self.devices, 4 * hidden)
        self.streams = [torch.cuda.Stream(device) for device in self.devices]
        self.replays = replays

    def synchronize(self) -> None:
        for device in self.devices:
            torch.cuda.synchronize(device)

    def graphs(self, plan: Callable[[int], Any]) -> tuple[list[torch.cuda.CUDAGraph], list[Any]]:
        """Each rank's graph of CALLS launches, and what a first launch gave."""
        pending = []
        for rank, stream in enumerate(self.streams):
            with torch.cuda.stream(stream):
                pending.append(plan(rank))
        self.synchronize()
        for one, stream in zip(pending, self.streams, strict=True):
            with torch.cuda.stream(stream):
                one.launch()
        self.synchronize()
        graphs = []
        for rank, stream in enumerate(self.streams):
            with torch.cuda.stream(stream):
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(capture_error_mode="thread_local")
                for _ in range(CALLS):
                    plan(rank).launch()
                graph.capture_end()
                graphs.append(graph)
        self.synchronize()
        return graphs, [one.result for one in pending]

    def microseconds(self, plan: Callable[[int], Any]) -> tuple[float, list[Any]]:
        """Of a call, and the ranks' results."""
        graphs, results = self.graphs(plan)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        seen = []
        for _ in range(self.replays):
            for rank in reversed(range(len(graphs))):
                with torch.cuda.stream(self.streams[rank]):
                    if rank == 0:
                        begin.record()
                    graphs[rank].replay()
                    if rank == 0:
                        end.record()
            self.synchronize()
            seen.append(begin.elapsed_time(end) * 1e3 / CALLS)
        return statistics.median(seen), results


def measure(bench: Bench, rows: int, hidden: int) -> str:
    """One row of the table."""
    torch.manual_seed(0)
    parts = [torch.randn(rows, hidden).bfloat16().to(d) for d in bench.devices]
    residuals = [torch.zeros(rows, hidden).bfloat16().to(d) for d in bench.devices]
    norms = [Norm(torch.ones(hidden).bfloat16().to(d), 1e-5) for d in bench.devices]
    shares = [torch.randn(rows, hidden, device=d) for d in bench.devices]
    total = sum(part.float().cpu() for part in parts).bfloat16()
    cells = [f"{rows:,}", f"{rows * hidden * 2 / 1024:,.0f}"]
    for most in (0, MAX_FLAGGED_ROWS):
        for peers in bench.peers:
            peers.max_flagged_rows = most
        if rows > most > 0:
            cells += ["", ""]
            continue
        us, sums = bench.microseconds(
            lambda rank: kernels.all_reduce(parts[rank], bench.peers[rank])
        )
        assert all(torch.equal(found.cpu(), total) for found in sums)
        cells.append(f"{us:.2f}")
        us, _ = bench.microseconds(
            lambda rank: kernels.add_norm(
                parts[rank], residuals[rank], norms[rank], bench.peers[rank]
            )
        )
        cells.append(f"{us:.2f}")
    columns = hidden * len(bench.devices)
    us, _ = bench.microseconds(
        lambda rank: kernels.all_gather(shares[rank], columns, bench.peers[rank])
    )
    return f"| {' | '.join([*cells, f'{us:.2f}'])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--devices", default="cuda:0,cuda:1")
    parser.add_argument("--replays", type=int, default=20)
    parser.add_argument("--no-pdl", action="store_true", help="kernels start one after another")
    args = parser.parse_args()
    set_pdl(torch.cuda.get_device_capability() >= (9, 0) and not args.no_pdl)
    peer_memory.MAX_FLAGGED_ROWS = MAX_FLAGGED_ROWS
    bench = Bench(args.devices, args.hidden, args.replays)
    print(
        f"{args.devices}, {torch.cuda.get_device_name()}, rows of {args.hidden} bfloat16; us a call"
    )
    print("| rows | KiB | sum, met | and norm | sum, flagged | and norm | gather of float32 |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for rows in (1, 4, 8, 16, 32, 64, 96, 128, 256, 1024, 4096, 8192):
        print(measure(bench, rows, args.hidden), flush=True)
    assert not any(int(peers.lost) for peers in bench.peers)
    began = time.perf_counter()
    with torch.cuda.stream(bench.streams[0]):
        bench.peers[0].max_ns = 10**8
        kernels.all_reduce(torch.ones(1, 16, device=bench.devices[0]), bench.peers[0]).launch()
        kernels.all_reduce(torch.ones(99, 5000, device=bench.devices[0]), bench.peers[0]).launch()
    bench.synchronize()
    print(
        f"alone for a wait of 0.1 s, and one that is spared: {time.perf_counter() - began:.2f} s, "
        f"lost: {int(bench.peers[0].lost_on_host)}"
    )


if __name__ == "__main__":
    main()
