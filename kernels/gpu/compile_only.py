"""compile_only: kernels compiled on all cores at once, before the first is launched.

A start without a kernel cache otherwise compiles about a hundred variants one after the other, 17
seconds of one core for an 8B Llama on an H100's host.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import triton
from triton.runtime.jit import JITFunction

# Compiling is mostly LLVM and ptxas, which hold no interpreter lock; the rest is Python.
MAX_THREADS = 16


@contextmanager
def compile_only() -> Iterator[None]:
    """Launches inside compile their kernels, on several threads, and run nothing.

    At the end all are compiled.

    torch's own operations run as ever, on whatever the memory holds, so what is computed means
    nothing. For use before a device's first step, on one thread: it is not for a serving engine.

    Raises:
        triton.CompilationError: at the end, if a kernel does not compile.
    """
    run = JITFunction.run

    def compile_alone(
        self: Any, *args: Any, grid: Any = None, warmup: bool = False, **kwargs: Any
    ) -> Any:
        del warmup
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    threads = min(MAX_THREADS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(threads, "compile") as executor, triton.AsyncCompileMode(executor):
        JITFunction.run = compile_alone
        try:
            yield
        finally:
            JITFunction.run = run
