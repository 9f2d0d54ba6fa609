"""The driver calls of a captured step, made without letting go of the interpreter's lock.

torch lets go of it around every call. On a loaded server the event loop takes it each time, and the
engine thread then waits a switch interval or more to get it back: launching a step of 64 requests
took 1.0 ms instead of 0.1. These calls only queue work and return within microseconds.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_size_t, c_void_p

import torch

_NOT_READY = 600


class CudaDriver:
    """Queues copies, graphs and events on one stream.

    Handles and addresses are integers, as torch gives them; the calling thread must have the
    device's context, which it has once it has run anything there.

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
        self._launch_graph = function("cuGraphLaunch", c_void_p, c_void_p)
        self._record_event = function("cuEventRecord", c_void_p, c_void_p)
        self._query_event = function("cuEventQuery", c_void_p)

    def copy_to_device(self, target: int, source: int, num_bytes: int) -> None:
        """``source`` is pinned, and stays as it is until the copy is done."""
        _check(self._copy_to_device(target, source, num_bytes, self._stream))

    def copy_to_host(self, target: int, source: int, num_bytes: int) -> None:
        """``target`` is pinned."""
        _check(self._copy_to_host(target, source, num_bytes, self._stream))

    def launch_graph(self, graph_exec: int) -> None:
        """An instantiated graph."""
        _check(self._launch_graph(graph_exec, self._stream))

    def record_event(self, event: torch.cuda.Event) -> None:
        """One that torch has recorded before: that made it."""
        _check(self._record_event(event.cuda_event, self._stream))

    def is_done(self, event: torch.cuda.Event) -> bool:
        """Whether the device has come past it."""
        status: int = self._query_event(event.cuda_event)
        if status != _NOT_READY:
            _check(status)
        return status != _NOT_READY


def _check(status: int) -> None:
    if status:
        raise CudaDriverError(f"CUDA driver error {status}")


class CudaDriverError(RuntimeError):
    """A call failed, or an earlier one's work did: no later step can succeed."""
