"""Peers: one rank's side of the memory that a mesh of GPUs exchanges through.

``Pending`` is an exchange that every rank has prepared and may launch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch

from .compile_only import is_compiling
from .launch import next_power_of_2

# Programs of a launch wait for one another across devices, so all must be resident at once: fewer
# than the multiprocessors of any supported GPU (an H100 PCIe has 114).
MAX_PROGRAMS = 96
# Of one half of a program's buffer: a round that exchanges less leaves the links idle while it
# meets (bench/exchange.py).
HALF_BYTES = 64 << 10
# Of one wait: later than any rank that will come, and soon enough for the 15 s in which a lost one
# ends the engine.
MAX_WAIT_NS = 8 * 10**9
# Rows whose words carry flags, which doubles what travels (bench/exchange.py).
MAX_FLAGGED_ROWS = 32
# The direct kernels' arguments: addresses of up to eight ranks.
MAX_WORLD = 8
ADDRESSES = tuple(f"a{rank}" for rank in range(MAX_WORLD))

R = TypeVar("R")


class Peers:
    """One rank's side of the memory that its mesh exchanges through.

    buffers, flags, flagged: int64 [world] on this rank's device, every rank's addresses; epochs and
    flagged_epochs: int32 [MAX_PROGRAMS]; lost: int32 [1] on the device, and ``lost_on_host`` in
    pinned memory, not 0 once a rank has not come. ``half_bytes``, ``flagged_words``: of each
    program's two halves. ``on_device``: ranks on one device, at most. ``max_ns``: of one wait.
    ``kept``: what the addresses point to on this device.
    """

    def __init__(
        self,
        rank: int,
        devices: Sequence[torch.device],
        half_bytes: int,
        memory: Sequence[Sequence[torch.Tensor]],
        max_ns: int,
    ) -> None:
        self.rank, self.world = rank, len(devices)
        self.device = devices[rank]
        self.on_device = max(list(devices).count(device) for device in devices)
        # All of them on a device must be resident at once.
        self.max_programs = MAX_PROGRAMS // self.on_device
        self.max_flagged_rows = MAX_FLAGGED_ROWS
        self.half_bytes, self.flagged_words = half_bytes, half_bytes // 4
        self.max_ns = max_ns
        self.kept = [tensors[rank] for tensors in memory]
        self.buffers, self.flags, self.flagged = (self._addresses(tensors) for tensors in memory)
        self.epochs = self._ints(MAX_PROGRAMS)
        self.flagged_epochs = self._ints(MAX_PROGRAMS)
        self.lost = self._ints(1)
        pinned = self.device.type == "cuda"
        self.lost_on_host = torch.zeros(1, dtype=torch.int32, pin_memory=pinned)
        # Launches whose kernels are on this device: those that differ in nothing but sizes.
        self.loaded: set[Hashable] = set()

    def _addresses(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        addresses = [tensor.data_ptr() for tensor in tensors]
        return torch.tensor(addresses, dtype=torch.int64, device=self.device)

    def _ints(self, count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.int32, device=self.device)


def make_peers(
    devices: Sequence[torch.device], row_bytes: int, max_ns: int = MAX_WAIT_NS
) -> list[Peers]:
    """Exchange memory for rows of up to ``row_bytes`` between the ranks on ``devices``."""
    world = len(devices)
    half = max(HALF_BYTES, next_power_of_2(row_bytes))

    def zeros(count: int, dtype: torch.dtype) -> list[torch.Tensor]:
        return [torch.zeros(count, dtype=dtype, device=device) for device in devices]

    memory = (
        zeros(MAX_PROGRAMS * 2 * half, torch.uint8),
        zeros(MAX_PROGRAMS * world, torch.int32),
        zeros(MAX_FLAGGED_ROWS * 2 * world * (half // 4), torch.int64),
    )
    open_memory(devices)
    return [Peers(rank, devices, half, memory, max_ns) for rank in range(world)]


def open_memory(devices: Sequence[torch.device]) -> None:
    """Let every device reach the memory of all others, which the caller has checked they can."""
    for a in devices:
        for b in devices:
            if a != b:
                # torch opens it at the first copy between them.
                torch.zeros(1, device=a).to(b)


class Pending(Generic[R]):
    """An exchange that every rank of a mesh has to launch, and what it will have written.

    In a graph by ``launch``, whose kernel waits for the peers'. It is compiled and on the device
    from here on, so that it waits for nothing else. Kernel by kernel by ``launch_directly``, once
    the streams have waited for each other.

    Args:
        part: what this rank gives.
        grid: programs of the waiting kernel.
        direct: launches the other one, given the addresses of all ranks' parts.
    """

    def __init__(
        self,
        result: R,
        part: torch.Tensor,
        peers: Peers,
        kernel: Any,
        grid: int,
        args: Sequence[Any],
        constants: dict[str, Any],
        direct: Callable[[Sequence[int]], object],
    ) -> None:
        self.result, self.part, self._direct = result, part, direct
        self._launch = functools.partial(kernel[(grid,)], *args, **constants) if grid else None
        if not grid or peers.device.type == "cpu" or is_compiling():
            return
        # What a kernel is compiled for: sizes that are whole numbers of vectors, too.
        sizes = (arg % 16 == 0 for arg in args if isinstance(arg, int))
        key = (kernel, part.dtype, *sizes, *sorted(constants.items()))
        if key not in peers.loaded:
            # ``run`` loads the code, which is otherwise left to the first launch.
            _ = kernel.warmup(*args, grid=(grid,), **constants).run
            peers.loaded.add(key)

    def launch(self) -> R:
        """Launch the kernel that waits, on the current stream."""
        if self._launch is not None:
            self._launch()
        return self.result

    def launch_directly(self, parts: Sequence[torch.Tensor]) -> R:
        """Launch the kernel that reads the ranks' parts where they are, on the current stream."""
        if self._launch is not None:
            addresses = [part.data_ptr() for part in parts]
            self._direct([*addresses, *[0] * (MAX_WORLD - len(addresses))])
        return self.result
