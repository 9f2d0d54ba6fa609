"""Heaps that threads share."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Each thread frees all it takes, and would keep it in a heap of its own.
MEASURE = """
import ctypes, re, threading
from octavo.runner.host_memory import limit_heaps

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = (ctypes.c_void_p,)

def heaps():
    # glibc maps 64 MiB for each, of which it opens what is used.
    text = open("/proc/self/maps").read()
    return len(re.findall(r"^[0-9a-f]+000000-\\S+ rw-p 00000000 00:00 0 +$", text, re.M))

def work():
    for _ in range(2):
        taken = [libc.malloc(60_000) for _ in range(200)]
        for address in taken:
            libc.free(address)
    barrier.wait()
    barrier.wait()

if {limited}:
    limit_heaps()
barrier = threading.Barrier(9)
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads:
    thread.start()
barrier.wait()
print(heaps())
barrier.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_threads_share_the_heaps_there_are() -> None:
    counts = {}
    for limited in (True, False):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE.replace("{limited}", str(limited))],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        counts[limited] = int(done.stdout)
    assert counts[True] < counts[False]
