"""Limits of a GPU and of its matrix units that tiles are chosen by."""

from __future__ import annotations

import functools

import torch

from .launch import next_power_of_2

# Under the interpreter the CPU passes for a Hopper.
_INTERPRETED_CAPABILITY = (9, 0)
_INTERPRETED_SHARED_BYTES = 227 << 10


def block_rows(rows: int) -> int:
    """Rows of activations in a tile whose other side is the weight's: the units take 8 or more."""
    return max(next_power_of_2(rows), 8)


def capability(device: torch.device) -> tuple[int, int]:
    """A device's compute capability."""
    if device.type != "cuda":
        return _INTERPRETED_CAPABILITY
    return torch.cuda.get_device_capability(device)


def chip_name(device: torch.device) -> str:
    """The name of a device's kind of chip, as its driver gives it; "" of the interpreter's."""
    if device.type != "cuda":
        return ""
    return _chip_name(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _chip_name(device_index: int) -> str:
    return torch.cuda.get_device_name(device_index)


def shared_bytes(device: torch.device) -> int:
    """Shared memory that one program may have."""
    if device.type != "cuda":
        return _INTERPRETED_SHARED_BYTES
    return _shared_bytes(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _shared_bytes(device_index: int) -> int:
    return int(torch.cuda.get_device_properties(device_index).shared_memory_per_block_optin)
