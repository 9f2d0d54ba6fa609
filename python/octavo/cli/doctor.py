"""doctor: what this machine can run, how fast at most, and what stands in the way."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from octavo.cli.bandwidth import cpu_bandwidth, gpu_bandwidth
from octavo.cli.collect_env import cpu_name, usable_cores
from octavo.cli.model_sizes import ModelSizes

if TYPE_CHECKING:
    from octavo.models.source import ModelSource

Verdict = Literal["ok", "note", "bad"]

# Sockets of as many clients, files of weights, and some room.
MIN_FILES: Final = 4096
# The context that a table's memory is computed for, unless the model's is shorter.
CONTEXT: Final = 8192
_PORT: Final = 8000
# GPUs that share every layer at most.
_MAX_TP: Final = 8


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. ``bad``: octavo will not start, or not use what is there."""

    verdict: Verdict
    subject: str
    text: str


@dataclass(frozen=True, slots=True)
class Device:
    """A device that can hold a model.

    Attributes:
        memory: bytes that weights and KV cache may take.
        bandwidth: bytes a second.
    """

    name: str
    is_gpu: bool
    memory: int
    bandwidth: float


def doctor(model: str | None) -> int:
    """Print the report, of ``model`` too where one is named; 1 where something is bad."""
    findings: list[Finding] = []
    devices: list[Device] = []
    for finding in _findings(devices):
        print(f"  {finding.verdict:<5} {finding.subject:<9} {finding.text}", flush=True)
        findings.append(finding)
    if model is not None:
        print()
        print("\n".join(model_report(model, devices)))
    return int(any(finding.verdict == "bad" for finding in findings))


def _findings(devices: list[Device]) -> Iterator[Finding]:
    """Every check, the slow ones last. ``devices`` gets what they find."""
    yield _kernels()
    yield from _memory(devices)
    yield from gpu_findings(devices)
    yield _compiler()
    yield _files()
    yield _port()


def _kernels() -> Finding:
    from octavo._core import cpu_level, cpu_levels

    cores = f"{cpu_name()}, {usable_cores()} cores"
    try:
        level = cpu_level()
    except ValueError as error:
        return Finding("bad", "CPU", str(error))
    best = cpu_levels()[-1]
    text = f"{cores}, kernels for {level}"
    if level != best:
        return Finding("note", "CPU", f"{text}; it could {best} (OCTAVO_CPU_LEVEL is set)")
    return Finding("ok", "CPU", text)


def _memory(devices: list[Device]) -> Iterator[Finding]:
    from octavo.runner.host_memory import available_cpu_bytes

    available = available_cpu_bytes()
    bandwidth = cpu_bandwidth(available)
    devices.append(Device("CPU", False, available, bandwidth))
    text = f"{_size(available)} free, read at {_size(bandwidth)} a second"
    yield Finding("ok" if available > 1 << 30 else "bad", "memory", text)


def gpu_findings(devices: list[Device]) -> Iterator[Finding]:
    import torch

    drivers = _nvidia_smi("driver_version")
    if not torch.cuda.is_available():
        if drivers:
            yield Finding("bad", "GPU", _why_no_gpu(drivers[0]))
        else:
            yield Finding("note", "GPU", "none that nvidia-smi knows of: models run on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        properties = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        bandwidth = gpu_bandwidth(device)
        devices.append(Device(f"GPU {index}", True, free, bandwidth))
        text = (
            f"{properties.name} (sm_{properties.major}{properties.minor}), {_size(free)} of "
            f"{_size(total)} free, copied at {_size(bandwidth)} a second"
        )
        if free < total / 2:
            yield Finding("note", "GPU", f"{text}; something else holds the rest")
        else:
            yield Finding("ok", "GPU", text)
    if drivers:
        yield Finding("ok", "driver", f"{drivers[0]}, torch is built for CUDA {torch.version.cuda}")


def _why_no_gpu(driver: str) -> str:
    import torch

    if torch.version.cuda is None:
        return "there is one, and this torch is built for CPUs alone: install PyPI's torch"
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return "there is one, and CUDA_VISIBLE_DEVICES hides it"
    return (
        f"there is one, and torch (for CUDA {torch.version.cuda}) cannot use it with driver "
        f"{driver}: a newer driver, or a torch for an older CUDA"
    )


def _nvidia_smi(field: str) -> list[str]:
    """One value a GPU; none where there is no such program, or it fails."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.split()


def _compiler() -> Finding:
    """Triton compiles the launcher of its first kernel."""
    names = (os.environ.get("CC", ""), "cc", "gcc", "clang")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is not None:
        return Finding("ok", "compiler", found)
    return Finding("note", "compiler", "none: a GPU's kernels need one (apt install gcc)")


def _files() -> Finding:
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY or limit >= MIN_FILES:
        return Finding("ok", "files", f"{limit:,} may be open")
    return Finding("note", "files", f"only {limit:,} may be open, a client each: ulimit -n 65536")


def _port() -> Finding:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", _PORT))
        except OSError:
            return Finding("note", "port", f"{_PORT} is taken: another by --port")
    return Finding("ok", "port", f"{_PORT} is free")


def model_report(model: str, devices: list[Device]) -> Iterator[str]:
    """The model's lines: a row for each format on each kind of device."""
    from octavo.errors import ModelLoadError

    try:
        source = _source(model)
        sizes = ModelSizes.of(source)
        context, kv_bytes = _cache(source)
    except ModelLoadError as error:
        yield f"{error}"
        return
    head = f"{source.name} ({source.model_config.architecture})"
    yield f"{head}, KV cache for {context:,} tokens" if context else f"{head}, without a KV cache"
    columns = f"  {'device':<7} {'format':<9} {'weights':>9} {'KV cache':>9} {'fits':>5}"
    yield f"{columns}   one stream" if context else columns
    for is_gpu in (False, True):
        alike = [device for device in devices if device.is_gpu == is_gpu]
        for size in sizes.formats(on_gpu=is_gpu) if alike else ():
            num = _num_needed(size.weight_bytes + kv_bytes, alike)
            fits = {0: "no", 1: "yes"}.get(num, f"-tp {num}")
            row = (
                f"  {alike[0].name:<7} {size.name:<9} {_size(size.weight_bytes):>9} "
                f"{_size(kv_bytes):>9} {fits:>5}"
            )
            if num and context:
                # Each token reads the weights once; nothing is faster than memory.
                row += f"   at most {num * alike[0].bandwidth / size.read_bytes:,.0f} tok/s"
            yield row


def _num_needed(num_bytes: int, devices: list[Device]) -> int:
    """The number of them that share a model, a power of two as ``-tp`` divides heads; 0: too few.

    The devices of one machine are alike; the one with the least free memory limits a shard.
    """
    num = 1
    while num <= min(len(devices), _MAX_TP):
        if num_bytes / num <= min(device.memory for device in devices[:num]):
            return num
        num *= 2
    return 0


def _source(model: str) -> ModelSource:
    """The model's files, of which none is downloaded.

    Raises:
        ModelLoadError: they are not on this machine.
    """
    from pathlib import Path

    from octavo.checkpoints.hub import is_hub_id
    from octavo.config import EngineConfig
    from octavo.errors import ModelLoadError
    from octavo.models.source import resolve_model

    if not Path(model).expanduser().exists() and is_hub_id(model):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            model = snapshot_download(model, local_files_only=True)
        except (HFValidationError, LocalEntryNotFoundError):
            raise ModelLoadError(f"{model} is not on this machine: download it first") from None
    return resolve_model(EngineConfig(model=model))


def _cache(source: ModelSource) -> tuple[int, int]:
    """(tokens, bytes) of the KV cache of one long request; zeros where a model needs none."""
    import torch

    from octavo.models.pooling_model import is_pooling_model
    from octavo.runner.kv_cache import bytes_per_token

    if is_pooling_model(source):
        return 0, 0
    context = min(CONTEXT, source.model_config.max_context_len)
    return context, context * bytes_per_token(source.model_config, torch.bfloat16)


def _size(num_bytes: float) -> str:
    gib = num_bytes / 2**30
    return f"{gib:.1f} GiB" if gib >= 1 else f"{num_bytes / 2**20:.0f} MiB"
