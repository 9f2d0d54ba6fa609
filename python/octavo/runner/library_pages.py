"""drop_library_pages: memory of shared libraries that only their loading has touched.

Importing a CUDA build of torch leaves 240 MiB of libraries resident, of which a CPU then uses 30.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from pathlib import Path

_SMAPS = Path("/proc/self/smaps")
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ \d+ +(.*\.so[.\d]*)$")
_MADV_DONTNEED = 4


def drop_library_pages() -> None:
    """Let go of the resident pages of libraries that are as their files are.

    Nothing is lost: what is used again comes back from the page cache. Pages that relocation has
    changed are kept, and so is every mapping that may still be written. Takes some 20 ms; does
    nothing where the kernel does not report changed pages (other than Linux).

    Raises:
        OSError: the kernel refuses.
    """
    if not _SMAPS.exists():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for start, end in _clean_mappings(_SMAPS.read_text()):
        if libc.madvise(start, end - start, _MADV_DONTNEED):
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))


def _clean_mappings(smaps: str) -> Iterator[tuple[int, int]]:
    """(start, end) of read-only mappings of libraries, none of whose pages differs from its file.

    A private page that was written is anonymous: advice would throw it away for good.
    """
    mapping = None
    for line in smaps.splitlines():
        if line.startswith("Anonymous:"):
            if mapping is not None and line.split()[1] == "0":
                yield mapping
            mapping = None
        elif (found := _MAPPING.match(line)) and "w" not in found[3]:
            mapping = int(found[1], 16), int(found[2], 16)
