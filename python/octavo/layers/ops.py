"""The choice of an op set, made once when a model is built; layers then hold its functions."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch

from octavo.kernels.opset import OpSet

Backend: TypeAlias = Literal["auto", "native", "reference"]


def get_ops(device: torch.device, backend: Backend, activation_bits: int = 16) -> OpSet:
    """The op set for a device: ``native`` (and ``auto``) is Triton on a GPU, Rust on a CPU.

    activation_bits: of the activations that quantized weights meet in Rust; 8 or 16.

    Raises:
        ImportError: the native module cannot be imported (the compiled core is missing).
    """
    # Imported by need: Triton takes a second, and is missing where there is no GPU.
    if backend == "reference":
        from octavo.kernels import reference

        return reference.OPS
    if device.type == "cpu":
        from octavo.kernels.cpu import ops as cpu

        return cpu.OPS if activation_bits == 16 else cpu.with_activation_bits(activation_bits)
    from octavo.kernels.gpu import ops as gpu

    return gpu.OPS
