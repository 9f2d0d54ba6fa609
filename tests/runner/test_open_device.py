"""A device's context, made beside the import of torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

BESIDE_TORCH = """
import sys, threading
from octavo.runner.open_device import open_device
open_device()
assert "torch" not in sys.modules
import torch
for thread in threading.enumerate():
    if thread.name == "open-device":
        thread.join(60)
        assert not thread.is_alive()
"""


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_without_a_device_nothing_happens() -> None:
    run(BESIDE_TORCH.replace("open_device()", "open_device(99)"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_torch_uses_the_context() -> None:
    run(BESIDE_TORCH + "assert (torch.ones(3, device='cuda') * 2).tolist() == [2, 2, 2]")


HASHED = """
import sys, threading, torch
from octavo.runner.open_device import open_compiler
open_compiler()
for thread in threading.enumerate():
    if thread.name == "open-compiler":
        thread.join(60)
        assert not thread.is_alive()
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device to compile for")
def test_without_a_device_no_compiler_is_imported() -> None:
    run(HASHED + "assert not any(name.startswith('triton') for name in sys.modules)")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_compilers_hash_is_there_before_a_kernel() -> None:
    run(
        HASHED
        + "from triton.runtime.cache import triton_key\n"
        + "assert triton_key.cache_info().currsize == 1"
    )
