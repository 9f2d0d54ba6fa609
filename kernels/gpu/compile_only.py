"""compile_only: kernels compiled on all cores at once, before the first is launched.

A start without a kernel cache otherwise compiles some 25 kernels one after the other, and the C
function that launches each, on one core: bench/NOTES.md, "Start-up on an H100".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import triton
from triton.runtime._async_compile import active_mode
from triton.runtime.jit import JITFunction

# Compiling is mostly LLVM and ptxas, which hold no interpreter lock; the rest is Python.
MAX_THREADS = 16

_is_compiling = False


def is_compiling() -> bool:
    """True within ``compile_only``: what is launched does not run."""
    return _is_compiling


class _Compilers(ThreadPoolExecutor):
    """Threads that compile kernels and load them, on this thread's device."""

    def __init__(self) -> None:
        threads = min(MAX_THREADS, len(os.sched_getaffinity(0)))
        # A thread begins on the first device.
        device = torch.cuda.current_device()
        super().__init__(threads, "compile", lambda: torch.cuda.set_device(device))

    def submit(
        self, compile_kernel: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Future[Any]:
        def compile_and_load() -> Any:
            kernel = compile_kernel(*args, **kwargs)
            # Triton leaves to the first launch: the launcher in C, and the kernel's code on the
            # device. 25 launchers one after the other take 2.5 s.
            _ = kernel.run
            return kernel

        return super().submit(compile_and_load)


@contextmanager
def _async_compile(compilers: _Compilers) -> Iterator[None]:
    """Triton's mode; left even if a kernel does not compile, when Triton itself stays in it."""
    try:
        with triton.AsyncCompileMode(compilers):
            yield
    finally:
        active_mode.set(None)


@contextmanager
def compile_only() -> Iterator[None]:
    """Make launches compile and load their kernels, on several threads, and run nothing.

    At the end all are ready.

    torch's own operations still run, on uninitialized memory, so results are meaningless. For use
    before a device's first step, on one thread, and never in a serving engine.

    Raises:
        triton.CompilationError: at the end, if a kernel does not compile.
    """
    run, compile_kernel = JITFunction.run, JITFunction._do_compile

    def compile_alone(
        self: Any, *args: Any, grid: Any = None, warmup: bool = False, **kwargs: Any
    ) -> Any:
        del warmup
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    def compile_once(self: Any, key: Any, signature: Any, device: Any, *rest: Any) -> Any:
        kernel = compile_kernel(self, key, signature, device, *rest)
        # Triton 3.6 looks for it in its files again at each launch, until all are compiled.
        self.device_caches[device][0][key] = kernel
        return kernel

    global _is_compiling
    with _Compilers() as compilers, _async_compile(compilers):
        JITFunction.run, JITFunction._do_compile = compile_alone, compile_once
        _is_compiling = True
        try:
            yield
        finally:
            _is_compiling = False
            JITFunction.run, JITFunction._do_compile = run, compile_kernel
