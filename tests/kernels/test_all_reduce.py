"""Exchanges through peer memory: in the interpreter rank by rank, on GPUs as they meet.

With one GPU all ranks share it, each on a stream of its own.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

kernels = pytest.importorskip("octavo.kernels.gpu.all_reduce")
peer_memory = pytest.importorskip("octavo.kernels.gpu.peers")
from octavo.kernels import reference  # noqa: E402
from octavo.kernels.weights import Norm, share  # noqa: E402

ON_GPU = torch.cuda.is_available()
HALF = torch.bfloat16 if ON_GPU else torch.float16
# Of four exchanges each, three of them with flags of their own: 10^5 exchanges. More by
# OCTAVO_NUM_REPLAYS.
NUM_REPLAYS = int(os.environ.get("OCTAVO_NUM_REPLAYS", "25000"))
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def _several_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes a minute for what fills a GPU's buffers."""
    if not ON_GPU:
        monkeypatch.setattr(peer_memory, "MAX_PROGRAMS", 9)  # three or four a rank
        monkeypatch.setattr(peer_memory, "MAX_FLAGGED_ROWS", 2)
        monkeypatch.setattr(kernels, "PIECE", 64)
        monkeypatch.setattr(peer_memory, "HALF_BYTES", 1024)


# (in the interpreter, on a GPU)
def size(small: int, large: int) -> int:
    return large if ON_GPU else small


def devices_of(world: int) -> list[torch.device]:
    if not ON_GPU:
        return [torch.device("cpu")] * world
    count = torch.cuda.device_count()
    return [torch.device("cuda", rank % count) for rank in range(world)]


class Ranks:
    """Peers with a stream each."""

    def __init__(self, world: int, row_bytes: int, **options: Any) -> None:
        self.devices = devices_of(world)
        self.peers = peer_memory.make_peers(self.devices, row_bytes, **options)
        self.streams = [torch.cuda.Stream(d) if ON_GPU else None for d in self.devices]
        self.synchronize()

    def synchronize(self) -> None:
        for device in self.devices if ON_GPU else []:
            torch.cuda.synchronize(device)

    def run(self, plan: Callable[[int, Any], Any], meetings: int = 1) -> list[Any]:
        """The results of ``plan(rank, peers)``'s launches on every rank.

        ``meetings``: of a round.
        """
        if ON_GPU:
            pending = []
            for rank, stream in enumerate(self.streams):
                with torch.cuda.stream(stream):
                    pending.append(plan(rank, self.peers[rank]))
            self.synchronize()
            for one, stream in zip(pending, self.streams, strict=True):
                with torch.cuda.stream(stream):
                    one.launch()
            self.synchronize()
            return self.same_directly(pending, plan)
        # One rank runs at a time here: first all write their pieces and flags without waiting for
        # the others', then all read, which is the same for up to two meetings a program.
        for rank, peers in [*enumerate(self.peers)] * meetings:
            most, peers.max_ns = peers.max_ns, 0
            plan(rank, peers).launch()
            peers.max_ns = most
            for tensor in (peers.epochs, peers.flagged_epochs, peers.lost, peers.lost_on_host):
                tensor.zero_()
        pending = [plan(rank, peers) for rank, peers in enumerate(self.peers)]
        for one in pending:
            one.launch()
        return self.same_directly(pending, plan)

    def same_directly(self, pending: list[Any], plan: Callable[[int, Any], Any]) -> list[Any]:
        """The results, which a launch that reads all parts where they are gives too."""
        again = [plan(rank, peers) for rank, peers in enumerate(self.peers)]
        parts = [one.part for one in again]
        for one, device in zip(again, self.devices, strict=True):
            with torch.cuda.device(device) if ON_GPU else contextlib.nullcontext():
                one.launch_directly(parts)
        self.synchronize()
        for one, other in zip(pending, again, strict=True):
            for a, b in zip(tensors(one.result), tensors(other.result), strict=True):
                torch.testing.assert_close(a, b, atol=0, rtol=0)
        return [one.result for one in pending]

    def none_is_lost(self) -> bool:
        return not any(int(p.lost) or int(p.lost_on_host) for p in self.peers)


def tensors(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def parts_of(ranks: Ranks, *shape: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype).to(device) for device in ranks.devices]


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("shape", [(1, 64), (3, 5, 33), (1,), (size(7, 100), size(130, 4100))])
@pytest.mark.parametrize("world", [2, 3])
def test_every_rank_gets_the_sum_in_the_ranks_order(
    world: int, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    ranks = Ranks(world, 256)
    parts = parts_of(ranks, *shape, dtype=dtype)
    found = ranks.run(lambda rank, peers: kernels.all_reduce(parts[rank], peers))
    expected = reference.sum_of_ranks([part.cpu() for part in parts])
    for total in found:
        torch.testing.assert_close(total.cpu(), expected, atol=0, rtol=0)
    assert ranks.none_is_lost()


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("rows", "hidden"), [(1, 64), (5, 100), (size(7, 700), size(130, 4100))])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_sum_is_added_to_the_residual_and_normed(
    rows: int, hidden: int, offset: float, dtype: torch.dtype
) -> None:
    ranks = Ranks(2, 2 * hidden * dtype.itemsize)
    parts = parts_of(ranks, rows, hidden, dtype=dtype)
    residual, weight = torch.randn(rows, hidden).to(dtype), torch.rand(hidden).to(dtype)

    def plan(rank: int, peers: Any) -> Any:
        device = ranks.devices[rank]
        norm = Norm(weight.to(device), 1e-5, offset)
        own = residual.to(device, copy=True)
        return kernels.add_norm(parts[rank], own, norm, peers)

    found = ranks.run(plan)
    total = reference.sum_of_ranks([part.cpu() for part in parts])
    normed, added = reference.rms_norm(
        total, weight, 1e-5, residual=residual.clone(), weight_offset=offset
    )
    for y, after in found:
        torch.testing.assert_close(after.cpu(), added, atol=0, rtol=0)
        torch.testing.assert_close(y.cpu(), normed, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(found[0][0].cpu(), found[1][0].cpu(), atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(
    ("world", "shape"),
    [
        (3, (11, 70)),
        pytest.param(3, (1, 3), marks=pytest.mark.slow),
        pytest.param(3, (size(2, 700), size(64, 4096)), marks=pytest.mark.slow),
        pytest.param(4, (11, 70), marks=pytest.mark.slow),
    ],
)
def test_a_sum_in_two_shots_is_that_of_one(
    world: int, shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a norm and without; in the interpreter a program has one round."""
    monkeypatch.setattr(kernels, "TWO_SHOT_BYTES", 0)
    if not ON_GPU:
        monkeypatch.setattr(peer_memory, "MAX_PROGRAMS", 9 * world)
        monkeypatch.setattr(peer_memory, "HALF_BYTES", 4096)
    monkeypatch.setattr(peer_memory, "MAX_FLAGGED_ROWS", 0)
    ranks = Ranks(world, 2 * shape[1] * dtype.itemsize)
    parts = parts_of(ranks, *shape, dtype=dtype)
    residual, weight = torch.randn(shape).to(dtype), torch.rand(shape[1]).to(dtype)

    def plan(rank: int, peers: Any) -> Any:
        device = ranks.devices[rank]
        norm = Norm(weight.to(device), 1e-5)
        own = residual.to(device, copy=True)
        return kernels.add_norm(parts[rank], own, norm, peers)

    expected = reference.sum_of_ranks([part.cpu() for part in parts])
    for total in ranks.run(lambda rank, peers: kernels.all_reduce(parts[rank], peers), 2):
        torch.testing.assert_close(total.cpu(), expected, atol=0, rtol=0)
    normed, after = reference.rms_norm(expected, weight, 1e-5, residual=residual.clone())
    found = ranks.run(plan, 2)
    for y, own in found:
        torch.testing.assert_close(own.cpu(), after, atol=0, rtol=0)
        torch.testing.assert_close(y.cpu(), normed, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
        torch.testing.assert_close(y.cpu(), found[0][0].cpu(), atol=0, rtol=0)
    assert ranks.none_is_lost()


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 7), (5, 100), (3, 401), (size(2, 60), size(900, 12000))]
)
@pytest.mark.parametrize("world", [2, 3])
def test_shares_are_joined_in_the_ranks_order(
    world: int, rows: int, columns: int, dtype: torch.dtype
) -> None:
    ranks = Ranks(world, 256)
    whole = torch.randn(rows, columns).to(dtype)

    def plan(rank: int, peers: Any) -> Any:
        begin, end = share(columns, rank, world)
        own = whole[:, begin:end].contiguous().to(ranks.devices[rank])
        return kernels.all_gather(own, columns, peers)

    for found in ranks.run(plan):
        torch.testing.assert_close(found.cpu(), whole, atol=0, rtol=0)


def test_nothing_is_exchanged_of_empty_tensors() -> None:
    ranks = Ranks(2, 64)
    empty = [torch.zeros(0, 16, device=device) for device in ranks.devices]
    found = ranks.run(lambda rank, peers: kernels.all_reduce(empty[rank], peers))
    assert [tuple(part.shape) for part in found] == [(0, 16)] * 2


def test_wrong_shapes_are_refused() -> None:
    ranks = Ranks(2, 64)
    device = ranks.devices[0]
    wide, narrow = torch.zeros(2, 1 << 17, device=device), torch.zeros(2, 8, device=device)
    with pytest.raises(ValueError, match="do not fit"):
        kernels.add_norm(wide, wide, Norm(wide[0], 1e-5), ranks.peers[0])
    with pytest.raises(ValueError, match="its share is 5"):
        kernels.all_gather(narrow, 10, ranks.peers[0])
    with pytest.raises(ValueError, match="residual"):
        kernels.add_norm(narrow, narrow[:1], Norm(narrow[0], 1e-5), ranks.peers[0])


def test_a_rank_that_does_not_come_is_given_up() -> None:
    ranks = Ranks(2, 64, max_ns=10**6 if ON_GPU else 0)
    x = torch.ones(4, 16, device=ranks.devices[0])
    kernels.all_reduce(x, ranks.peers[0]).launch()
    ranks.synchronize()
    assert int(ranks.peers[0].lost_on_host) == 1
    # From then on it waits for none, so that the host sees it soon.
    ranks.peers[0].max_ns = 10**10
    kernels.all_reduce(x, ranks.peers[0]).launch()
    ranks.synchronize()


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("world", [2, 3])
def test_graphs_meet_again_and_again_whatever_their_delays(world: int) -> None:
    ranks = Ranks(world, 8192)
    shapes = [(1, 4096), (8, 4096), (500, 512)]
    parts = [parts_of(ranks, *shape, dtype=torch.bfloat16) for shape in shapes]
    wide = parts_of(ranks, 2, 5000, dtype=torch.float32)

    def plans(rank: int, peers: Any) -> list[Any]:
        sums = [kernels.all_reduce(part[rank], peers) for part in parts]
        return [*sums, kernels.all_gather(wide[rank], 5000 * world, peers)]

    expected = [reference.sum_of_ranks([p.cpu() for p in part]) for part in parts]
    expected.append(torch.cat([part.cpu() for part in wide], dim=-1))
    for kind in range(len(expected)):
        ranks.run(lambda rank, peers, kind=kind: plans(rank, peers)[kind])
    graphs, outputs = [], []
    for rank, stream in enumerate(ranks.streams):
        with torch.cuda.stream(stream):
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(capture_error_mode="thread_local")
            outputs.append([plan.launch() for plan in plans(rank, ranks.peers[rank])])
            graph.capture_end()
            graphs.append(graph)
    draw = random.Random(0)
    for replay in range(NUM_REPLAYS):
        order = list(range(world))
        draw.shuffle(order)
        for rank in order:
            if draw.random() < 0.02:
                until = time.perf_counter() + draw.random() * 2e-4
                while time.perf_counter() < until:
                    pass
            with torch.cuda.stream(ranks.streams[rank]):
                graphs[rank].replay()
        if replay % 500 == 499:
            ranks.synchronize()
            for output in outputs:
                for found, want in zip(output, expected, strict=True):
                    torch.testing.assert_close(found.cpu(), want, atol=0, rtol=0)
                    found.zero_()
            ranks.synchronize()
    assert ranks.none_is_lost()
