"""open_device: a GPU's context, made while torch is still being imported.

No torch here: its import, seconds of one core, and the driver's work, 0.4 s for an H100, have
nothing to do with each other.
"""

from __future__ import annotations

import contextlib
import ctypes
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
