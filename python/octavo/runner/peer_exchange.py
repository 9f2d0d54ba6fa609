"""PeerExchange: how the shards on GPUs exchange, by kernels that read each other's memory.

In a graph a kernel waits for its peers', which come because every rank launches the same graph.
Kernel by kernel that would not do: what a host does between two launches (memory, code that is
loaded at its first launch) may itself wait for the device that waits. So there the ranks run in
lockstep up to each exchange, and the last of them has the streams wait for each other's events.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from octavo.errors import ModelLoadError
from octavo.kernels.gpu.all_reduce import add_norm, all_gather, all_reduce
from octavo.kernels.gpu.compile_only import is_compiling
from octavo.kernels.gpu.peers import MAX_WORLD, Pending, make_peers
from octavo.kernels.weights import Norm
from octavo.runner.lockstep import Lockstep
from octavo.runner.peer_access import check_access

R = TypeVar("R")


class PeerExchange(Lockstep):
    """The Exchange of several ranks on GPUs of one host, or on one GPU.

    Args:
        devices: each rank's.
        row_bytes: of the widest row that is added up and normed.

    Raises:
        ModelLoadError: two of the devices cannot reach each other's memory, or they are too many.
    """

    def __init__(self, devices: Sequence[torch.device], row_bytes: int) -> None:
        super().__init__(len(devices))
        if len(devices) > MAX_WORLD:
            raise ModelLoadError(f"{len(devices)} shards of a layer: at most {MAX_WORLD}")
        check_access(devices)
        self._peers = make_peers(devices, row_bytes)
        for device in devices:
            torch.cuda.synchronize(device)
        self._events = [torch.cuda.Event() for _ in devices]  # type: ignore[no-untyped-call]
        self._lost = [peers.lost_on_host.numpy() for peers in self._peers]

    def all_reduce(self, tensor: Tensor, rank: int) -> Tensor:
        """As Exchange.all_reduce."""
        return self._launch(all_reduce(tensor, self._peers[rank]), rank)

    def gather(self, tensor: Tensor, columns: int, rank: int) -> Tensor:
        """As Exchange.gather."""
        return self._launch(all_gather(tensor, columns, self._peers[rank]), rank)

    def add_norm(self, x: Tensor, residual: Tensor, norm: Norm, rank: int) -> tuple[Tensor, Tensor]:
        """As Rank.add_norm."""
        return self._launch(add_norm(x, residual, norm, self._peers[rank]), rank)

    def has_lost_a_rank(self) -> bool:
        """As Exchange.has_lost_a_rank."""
        return any(lost[0] for lost in self._lost)

    def _launch(self, pending: Pending[R], rank: int) -> R:
        """Launch this rank's kernel, on its current stream."""
        if is_compiling() or torch.cuda.is_current_stream_capturing():
            return pending.launch()
        return self.meet((pending, torch.cuda.current_stream()), rank, self._launch_all)

    def _launch_all(self, launches: list[tuple[Pending[R], torch.cuda.Stream]]) -> list[R]:
        """Every rank's, once all parts are there; what comes after waits until all are read."""
        parts = [pending.part for pending, _ in launches]
        self._wait_for_each_other([stream for _, stream in launches])
        results = []
        for pending, stream in launches:
            with torch.inference_mode(), torch.cuda.stream(stream):
                results.append(pending.launch_directly(parts))
        self._wait_for_each_other([stream for _, stream in launches])
        return results

    def _wait_for_each_other(self, streams: list[torch.cuda.Stream]) -> None:
        for event, stream in zip(self._events, streams, strict=True):
            event.record(stream)
        for stream in streams:
            for event in self._events:
                stream.wait_event(event)
