"""Pages of libraries that are let go of."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from octavo.runner.library_pages import _clean_mappings

SMAPS = """\
7f0000000000-7f0000010000 r--p 00000000 08:01 11    /usr/lib/libone.so.1.2
Rss:                  64 kB
Anonymous:             0 kB
7f0000010000-7f0000020000 r-xp 00010000 08:01 11    /usr/lib/libone.so.1.2
Rss:                  64 kB
Anonymous:             0 kB
7f0000020000-7f0000030000 r--p 00020000 08:01 11    /usr/lib/libone.so.1.2
Rss:                  64 kB
Anonymous:             4 kB
7f0000030000-7f0000040000 rw-p 00030000 08:01 11    /usr/lib/libone.so.1.2
Rss:                  64 kB
Anonymous:             0 kB
7f0000040000-7f0000050000 r--p 00000000 08:01 12    /data/weights.gguf
Rss:                  64 kB
Anonymous:             0 kB
7f0000050000-7f0000060000 r--p 00000000 00:00 0
Rss:                  64 kB
Anonymous:             0 kB
7f0000060000-7f0000070000 r-xp 00000000 08:01 13    /a b/_core.abi3.so
Rss:                  64 kB
Anonymous:             0 kB
"""

MEASURE = """
import re
from octavo.runner.library_pages import drop_library_pages
import torch

def clean():
    text = open("/proc/self/smaps_rollup").read()
    return sum(int(kb) for kb in re.findall(r"(?:Private|Shared)_Clean: +(\\d+)", text))

before = clean()
drop_library_pages()
after = clean()
assert (torch.ones(3, 3) @ torch.ones(3, 3)).sum() == 27
print(before, after, clean())
"""


def test_only_read_only_mappings_without_written_pages() -> None:
    assert list(_clean_mappings(SMAPS)) == [
        (0x7F0000000000, 0x7F0000010000),
        (0x7F0000010000, 0x7F0000020000),
        (0x7F0000060000, 0x7F0000070000),
    ]


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
def test_memory_is_given_back_and_torch_works_on() -> None:
    """In a process of its own, which has used little of torch."""
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after, used = map(int, re.findall(r"\d+", done.stdout))
    assert after < before / 3
    assert used < before
