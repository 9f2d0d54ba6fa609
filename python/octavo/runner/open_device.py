"""open_device, open_compiler: what a GPU's first step needs, made on threads beside the loading.

No torch to begin with: its import, seconds of one core, and the driver's work have nothing to do
with each other.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading


def open_device(index: int = 0) -> None:
    """Begin to make a device's primary context, which torch will find and use, on a thread.

    Without a driver or such a device nothing happens: torch, which comes to it later, reports that.
    """
    threading.Thread(target=_retain_context, args=(index,), name="open-device", daemon=True).start()


def _retain_context(index: int) -> None:
    with contextlib.suppress(OSError):
        driver = ctypes.CDLL("libcuda.so.1")
        device, context = ctypes.c_int(), ctypes.c_void_p()
        if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), index) == 0:
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)


def open_compiler() -> None:
    """Begin to import Triton, and to hash its library, on a thread. Once torch is imported.

    Triton names what it compiles by that hash, of 400 MB: a start would wait for it before the
    first kernel. Without a GPU, or without Triton, nothing happens.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        threading.Thread(target=_hash_triton, name="open-compiler", daemon=True).start()


def _hash_triton() -> None:
    with contextlib.suppress(ImportError):
        from triton.runtime.cache import triton_key

        triton_key()  # which Triton remembers
