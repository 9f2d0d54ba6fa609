"""The driver calls of a captured step, made without releasing the interpreter's lock.

torch releases it around every call. On a loaded server the event loop takes it each time, and the
engine thread then waits a switch interval or more to get it back: launching a step of 64 requests
took 1.0 ms instead of 0.1. These calls only queue work and return within microseconds.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_size_t, c_uint, c_void_p

import torch

_NOT_READY = 600


class CudaDriver:
    """Queues copies, graphs and events on one stream.

    Handles and addresses are integers, as torch gives them; the calling thread must have the
    device's context, which it has once it has run anything there, or after ``enter``. Made on a
    thread that has it.

    Raises:
        OSError: there is no driver library.
    """

    def __init__(self, stream: int) -> None:
        # PyDLL, unlike CDLL, keeps the lock.
        library = ctypes.PyDLL("libcuda.so.1")
        self._stream = stream

        def function(name: str, *argument_types: type) -> ctypes._FuncPointer:
            found: ctypes._FuncPointer = getattr(library, name)
            found.argtypes = argument_types
            found.restype = c_int
            return found

        self._copy_to_device = function(
            "cuMemcpyHtoDAsync_v2", c_void_p, c_void_p, c_size_t, c_void_p
        )
        self._copy_to_host = function(
            "cuMemcpyDtoHAsync_v2", c_void_p, c_void_p, c_size_t, c_void_p
        )
        self._copy_on_devices = function(
            "cuMemcpyDtoDAsync_v2", c_void_p, c_void_p, c_size_t, c_void_p
        )
        self._launch_graph = function("cuGraphLaunch", c_void_p, c_void_p)
        self._record_event = function("cuEventRecord", c_void_p, c_void_p)
        self._wait_for_event = function("cuStreamWaitEvent", c_void_p, c_void_p, c_uint)
        self._query_event = function("cuEventQuery", c_void_p)
        self._upload_graph = function("cuGraphUpload", c_void_p, c_void_p)
        self._set_context = function("cuCtxSetCurrent", c_void_p)
        context = c_void_p()
        _check(function("cuCtxGetCurrent", c_void_p)(ctypes.byref(context)))
        self._context = context.value

    def enter(self) -> None:
        """Give the calling thread the device's context, in place of the one it has."""
        _check(self._set_context(self._context))

    def upload(self, graph_exec: int) -> None:
        """Queue a graph's first-launch work, which may allocate memory."""
        _check(self._upload_graph(graph_exec, self._stream))

    def run_step(
        self,
        plan: tuple[int, int, int],
        graph_exec: int,
        done: int,
        result: tuple[int, int, int] | None = None,
    ) -> None:
        """Queue a step: its plan to the device, its graph, its result to the host, an event.

        Args:
            plan: device address, pinned host address, bytes; the host's stay as they are until
                the copy is done.
            graph_exec: an instantiated graph.
            done: an event's handle.
            result: pinned host address, device address, bytes; None if the graph writes it.
        """
        stream = self._stream
        _check(
            self._copy_to_device(*plan, stream)
            or self._launch_graph(graph_exec, stream)
            or (result is not None and self._copy_to_host(*result, stream))
            or self._record_event(done, stream)
        )

    def start(self, copied: tuple[int, int, int], graph_exec: int) -> None:
        """Queue the first half of ``run_step``: a copy to the device, and a graph that reads it.

        Args:
            copied, graph_exec: as ``run_step``'s plan and graph.
        """
        stream = self._stream
        _check(self._copy_to_device(*copied, stream) or self._launch_graph(graph_exec, stream))

    def copy(self, copied: tuple[int, int, int], done: int) -> None:
        """Queue a copy to the device, as ``run_step``'s plan, and an event."""
        stream = self._stream
        _check(self._copy_to_device(*copied, stream) or self._record_event(done, stream))

    def send(self, copied: tuple[int, int, int], done: int) -> None:
        """Queue a copy between devices, or within one, and an event.

        ``copied``: the address to copy to, the one to copy from, bytes.
        """
        stream = self._stream
        _check(self._copy_on_devices(*copied, stream) or self._record_event(done, stream))

    def receive(self, copied: tuple[int, int, int], sent: int) -> None:
        """Queue a copy, as ``send``, that comes after another stream's event."""
        stream = self._stream
        _check(self._wait_for_event(stream, sent, 0) or self._copy_on_devices(*copied, stream))

    def await_event(self, event: int) -> None:
        """Have all that is queued from here on wait for an event of another stream."""
        _check(self._wait_for_event(self._stream, event, 0))

    def start_after(self, side: SideStream, graph_exec: int) -> None:
        """Queue a graph, which waits for another stream's last copy."""
        stream = self._stream
        _check(
            self._wait_for_event(stream, side.done.cuda_event, 0)
            or self._launch_graph(graph_exec, stream)
        )

    def record_event(self, event: int) -> None:
        """Record an event after everything that is queued."""
        _check(self._record_event(event, self._stream))

    def is_done(self, event: int) -> bool:
        """True once the device has come past the event."""
        status: int = self._query_event(event)
        if status != _NOT_READY:
            _check(status)
        return status != _NOT_READY


def _check(status: int) -> None:
    if status:
        raise CudaDriverError(f"CUDA driver error {status}")


class SideStream:
    """A stream for copies beside a device's work, and the event after the last one."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._driver = CudaDriver(self._stream.cuda_stream)
        self.done = make_event(self._stream)

    def copy(self, copied: tuple[int, int, int]) -> None:
        """As ``CudaDriver.copy``."""
        self._driver.copy(copied, self.done.cuda_event)


def make_event(stream: torch.cuda.Stream, *, timed: bool = False) -> torch.cuda.Event:
    """An event whose handle exists: torch makes it when it is recorded first."""
    event = torch.cuda.Event(enable_timing=timed)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


class DeviceClock:
    """Times at which a stream comes past marks; the events are made ``BATCH`` at once, since
    making one takes as long as several launches.

    Its marks count from its making, for which the device must be idle.
    """

    BATCH = 4096

    def __init__(self, driver: CudaDriver, stream: torch.cuda.Stream) -> None:
        self._driver, self._stream = driver, stream
        self._events: list[torch.cuda.Event] = []
        self._num_marks = 0
        self._grow()
        self._start = make_event(stream, timed=True)
        self._start.synchronize()

    def mark(self) -> int:
        """Mark the stream here: the mark's number."""
        if self._num_marks == len(self._events):
            self._grow()
        number = self._num_marks
        self._num_marks += 1
        self._driver.record_event(self._events[number].cuda_event)
        return number

    def times_ns(self) -> list[int]:
        """Times of the device at each mark. Waits for the last."""
        self._stream.synchronize()
        marks = self._events[: self._num_marks]
        return [round(self._start.elapsed_time(event) * 1e6) for event in marks]

    def _grow(self) -> None:
        self._events += [make_event(self._stream, timed=True) for _ in range(self.BATCH)]


class CudaDriverError(RuntimeError):
    """A call failed, or an earlier one's work did: no later step can succeed."""
