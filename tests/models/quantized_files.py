"""Quantized files written by hand: each writer rounds a float weight and lays it out as its tool does.

Bits are set one by one in Python's integers, so that nothing is shared with the code that reads them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

# (module's name, weight [N, K]) -> its tensors by suffix, and the weight they stand for. None: dense.
Written: TypeAlias = tuple[dict[str, Tensor], Tensor]
Writer: TypeAlias = Callable[[str, Tensor], Written | None]

E4M3_MAX = 448.0


def words(values: Tensor, bits: int) -> Tensor:
    """Non-negative integers [R, C] in words along C, from the lowest bit on: int32 [R, W]."""
    width = -(-values.shape[1] * bits // 32)
    rows = []
    for row in values.tolist():
        number = sum(int(value) << bits * i for i, value in enumerate(row))
        rows.append(np.frombuffer(number.to_bytes(4 * width, "little"), "<i4"))
    return torch.from_numpy(np.stack(rows).copy())


def affine(
    weight: Tensor,
    bits: int,
    group: list[int],
    *,
    sym: bool,
    negative: bool = False,
    dtype: torch.dtype = torch.float16,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q [N, K], scale [N, G], zero [N, G], weight) of integers from 0 on; group[k]: of column k.

    negative: scales of every other row are below zero, as auto-round's symmetric ones may be.
    """
    n, k = weight.shape
    top, groups = 2**bits - 1, max(group) + 1
    q = torch.zeros(n, k, dtype=torch.int64)
    scale = torch.zeros(n, groups, dtype=dtype)
    zero = torch.zeros(n, groups, dtype=torch.int64)
    rounded = torch.zeros(n, k)
    for g in range(groups):
        columns = [i for i in range(k) if group[i] == g]
        part = weight[:, columns]
        if sym:
            s = part.abs().amax(1) / (2 ** (bits - 1))
            z = torch.full((n,), 2 ** (bits - 1))
            if negative:
                s[::2] *= -1
        else:
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            s = (high - low) / top
            z = (-low / s).round().clamp(0, top).long()
        scale[:, g], zero[:, g] = s.to(dtype), z
        s = scale[:, g].float()[:, None]
        q[:, columns] = (part / s + z[:, None]).round().clamp(0, top).long()
        rounded[:, columns] = (q[:, columns] - z[:, None]).float() * s
    return q, scale, zero, rounded


def groups_of(k: int, size: int) -> list[int]:
    return [i // (k if size == -1 else size) for i in range(k)]


def awq_gemm(size: int) -> Writer:
    def write(name: str, weight: Tensor) -> Written:
        q, scale, zero, rounded = affine(weight, 4, groups_of(weight.shape[1], size), sym=False)

        def packed(values: Tensor) -> Tensor:
            # Nibble i of a word holds this column of its eight.
            order = [0, 2, 4, 6, 1, 3, 5, 7]
            columns = [base + i for base in range(0, values.shape[1], 8) for i in order]
            return words(values[:, columns], 4)

        return {
            "qweight": packed(q.t()),
            "qzeros": packed(zero.t()),
            "scales": scale.t().contiguous(),
        }, rounded

    return write


def awq_gemv(size: int, pad: int) -> Writer:
    """pad: words of zero points in a row, more than are needed."""

    def write(name: str, weight: Tensor) -> Written:
        n, k = weight.shape
        q, scale, zero, rounded = affine(weight, 4, groups_of(k, size), sym=False)
        zeros, scales = torch.zeros(n, 8 * pad, dtype=torch.int64), torch.zeros(n, 8 * pad).half()
        zeros[:, : zero.shape[1]], scales[:, : zero.shape[1]] = zero, scale
        return {"qweight": words(q, 4), "qzeros": words(zeros, 4), "scales": scales}, rounded

    return write


def gptq(
    bits: int | Callable[[str], int],
    size: int,
    *,
    v1: bool,
    sym: bool = False,
    desc_act: bool = False,
    negative: bool = False,
    bias: bool = False,
    g_idx: bool = True,
) -> Writer:
    def write(name: str, weight: Tensor) -> Written | None:
        n, k = weight.shape
        b = bits if isinstance(bits, int) else bits(name)
        if b == 16:
            return None
        group = groups_of(k, size)
        if desc_act:
            group = [group[i] for i in torch.randperm(k).tolist()]
        q, scale, zero, rounded = affine(weight, b, group, sym=sym, negative=negative)
        stored = (zero - 1) % 2**b if v1 else zero
        tensors = {
            "qweight": words(q, b).t().contiguous(),
            "qzeros": words(stored.t(), b),
            "scales": scale.t().contiguous(),
        }
        if g_idx:
            tensors["g_idx"] = torch.tensor(group, dtype=torch.int32)
        if bias:
            tensors["bias"] = torch.zeros(n, dtype=torch.float16)
        return tensors, rounded

    return write


def ct_packed(
    bits: int | Callable[[str], int], size: int, *, sym: bool, actorder: bool = False
) -> Writer:
    """size -1: one scale a row (strategy channel)."""

    def write(name: str, weight: Tensor) -> Written | None:
        n, k = weight.shape
        b = bits if isinstance(bits, int) else bits(name)
        if b == 16:
            return None
        group = groups_of(k, size)
        if actorder:
            group = [group[i] for i in torch.randperm(k).tolist()]
        q, scale, zero, rounded = affine(weight, b, group, sym=sym, dtype=torch.bfloat16)
        tensors = {
            "weight_packed": words(q, b),
            "weight_scale": scale,
            "weight_shape": torch.tensor([n, k]),
        }
        if not sym:
            tensors["weight_zero_point"] = words(zero.t(), b).t().contiguous()
        if actorder:
            tensors["weight_g_idx"] = torch.tensor(group, dtype=torch.int32)
        return tensors, rounded

    return write


def int8(*, sym: bool = True) -> Writer:
    """compressed-tensors' int-quantized: one scale a row."""

    def write(name: str, weight: Tensor) -> Written:
        group = [0] * weight.shape[1]
        q, scale, zero, rounded = affine(weight, 8, group, sym=sym, dtype=torch.bfloat16)
        tensors = {"weight": (q - 128).to(torch.int8), "weight_scale": scale}
        if not sym:
            tensors["weight_zero_point"] = (zero - 128).to(torch.int8)
        return tensors, rounded

    return write


def fp8(
    scale_name: str,
    block: tuple[int, int] | None = None,
    *,
    rows: bool = False,
    shape: tuple[int, ...] = (1,),
    dtype: torch.dtype = torch.float32,
    power: bool = False,
    extra: Mapping[str, Tensor] | None = None,
) -> Writer:
    """rows: one scale a row; shape: of the only scale; power: scales are powers of two."""

    def write(name: str, weight: Tensor) -> Written:
        n, k = weight.shape
        height, width = (1, k) if rows else block or (n, k)
        scale = torch.zeros(-(-n // height), -(-k // width))
        q = torch.zeros(n, k, dtype=torch.float8_e4m3fn)
        rounded = torch.zeros(n, k)
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                at = slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)
                s = weight[at].abs().max() / E4M3_MAX
                s = torch.exp2(torch.ceil(torch.log2(s))) if power else s
                s = s.to(dtype).float()
                scale[i, j] = s
                q[at] = (weight[at] / s).to(torch.float8_e4m3fn)
                rounded[at] = q[at].float() * s
        stored = scale if rows or block else scale.reshape(shape)
        tensors = {"weight": q, scale_name: stored.to(dtype).contiguous()}
        # Files hold no tensor twice.
        return tensors | {key: value.clone() for key, value in (extra or {}).items()}, rounded

    return write


# As bitsandbytes stores them; FP4's are rounded.
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
       -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
       0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]  # fmt: skip
FP4 = [0.0, 0.0052, 0.6667, 1.0, 0.3333, 0.5, 0.1667, 0.25,
       0.0, -0.0052, -0.6667, -1.0, -0.3333, -0.5, -0.1667, -0.25]  # fmt: skip


def bnb4(kind: str, codes: list[float], *, double: bool, blocksize: int = 64) -> Writer:
    def write(name: str, weight: Tensor) -> Written:
        n, k = weight.shape
        table = torch.tensor(codes)
        flat = weight.reshape(-1)
        blocks = -(-flat.numel() // blocksize)
        absmax = torch.stack([b.abs().max() for b in flat.split(blocksize)])
        state: dict[str, Any] = {
            "quant_type": kind,
            "blocksize": blocksize,
            "dtype": "float32",
            "shape": [n, k],
        }
        tensors: dict[str, Tensor] = {"weight.quant_map": table}
        if double:
            offset = float(absmax.mean())
            nested_map = torch.linspace(-1, 1, 256)
            nested = torch.stack([b.abs().max() for b in (absmax - offset).split(256)])
            ids = []
            for i, value in enumerate((absmax - offset).tolist()):
                ids.append(int((nested_map - value / float(nested[i // 256])).abs().argmin()))
                absmax[i] = nested_map[ids[-1]] * nested[i // 256] + offset
            state |= {"nested_blocksize": 256, "nested_offset": offset, "nested_dtype": "float32"}
            tensors |= {
                "weight.absmax": torch.tensor(ids, dtype=torch.uint8),
                "weight.nested_absmax": nested,
                "weight.nested_quant_map": nested_map,
            }
        else:
            tensors["weight.absmax"] = absmax
        scale = torch.stack([absmax[i // blocksize] for i in range(n * k)])
        index = (flat[:, None] / scale[:, None] - table).abs().argmin(1)
        pairs = index.tolist()
        packed = [high << 4 | low for high, low in zip(pairs[::2], pairs[1::2], strict=True)]
        tensors["weight"] = torch.tensor(packed, dtype=torch.uint8)[:, None]
        text = json.dumps(state).encode()
        tensors[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(
            list(text), dtype=torch.uint8
        )
        assert blocks == absmax.numel()
        return tensors, (table[index] * scale).view(n, k)

    return write


E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]


def fp4(kind: str, packed: str, size: int) -> Writer:
    """kind: of the numbers beside: ct (a global scale that divides), modelopt (one that multiplies),
    mx (exponents alone).
    """

    def write(name: str, weight: Tensor) -> Written:
        n, k = weight.shape
        groups = -(-k // size)
        factor = 1.0 if kind == "mx" else float(weight.abs().max()) / (6 * E4M3_MAX)
        scale = torch.zeros(n, groups)
        rounded, q = torch.zeros(n, k), torch.zeros(n, k, dtype=torch.int64)
        table = torch.tensor(E2M1)
        for g in range(groups):
            at = slice(g * size, (g + 1) * size)
            s = weight[:, at].abs().amax(1) / 6 / factor
            s = s.log2().ceil() if kind == "mx" else s.to(torch.float8_e4m3fn).float()
            scale[:, g] = s
            s = s.exp2() if kind == "mx" else s * factor
            q[:, at] = (weight[:, at, None] / s[:, None, None] - table).abs().argmin(2)
            rounded[:, at] = table[q[:, at]] * s[:, None]
        bits = q[:, 0::2] + 16 * q[:, 1::2]
        tensors = {packed: bits.to(torch.uint8)}
        if kind == "mx":
            tensors["weight_scale"] = (scale + 127).to(torch.uint8)
        else:
            tensors["weight_scale"] = scale.to(torch.float8_e4m3fn)
        if kind == "ct":
            tensors["weight_global_scale"] = torch.tensor([1 / factor])
        if kind == "modelopt":
            tensors["weight_scale_2"] = torch.tensor(factor)
        return tensors, rounded

    return write


def bnb8() -> Writer:
    def write(name: str, weight: Tensor) -> Written:
        absmax = weight.abs().amax(1)
        q = (weight / absmax[:, None] * 127).round()
        return {
            "weight": q.to(torch.int8),
            "SCB": absmax,
            "weight_format": torch.tensor(0, dtype=torch.uint8),
        }, q * absmax[:, None] / 127

    return write


def changed(write: Writer, name: str, change: Callable[[Tensor], Tensor]) -> Writer:
    """The same numbers, one of whose tensors is stored in another form."""

    def write_changed(prefix: str, weight: Tensor) -> Written | None:
        written = write(prefix, weight)
        if written is None:
            return None
        tensors, rounded = written
        return {**tensors, name: change(tensors[name])}, rounded

    return write_changed


def is_projection(name: str, tensor: Tensor) -> bool:
    """Matrices that tools quantize: not the embedding, not a router."""
    prefix = name.removesuffix(".weight")
    return tensor.ndim == 2 and not prefix.endswith(("embed_tokens", ".gate"))


def requantize(
    path: Path, twin: Path, write: Writer, config: Mapping[str, Any], dense: tuple[str, ...]
) -> set[str]:
    """Rewrite a checkpoint's projections, and the numbers they stand for into ``twin``.

    config: the quantization_config. dense: parts of names that stay as they are.

    Returns:
        The rewritten modules.
    """
    torch.manual_seed(1)
    found: dict[str, Tensor] = {}
    rounded: dict[str, Tensor] = {}
    modules = set()
    for name, tensor in load_file(path / "model.safetensors").items():
        prefix = name.removesuffix(".weight")
        written = None
        if is_projection(name, tensor) and not any(part in f"{prefix}." for part in dense):
            written = write(prefix, tensor)
        if written is None:
            found[name] = rounded[name] = tensor
            continue
        modules.add(prefix)
        found |= {f"{prefix}.{suffix}": value for suffix, value in written[0].items()}
        rounded[name] = written[1]
    save_file(found, path / "model.safetensors")
    twin.mkdir()
    save_file(rounded, twin / "model.safetensors")
    values = json.loads((path / "config.json").read_text())
    (twin / "config.json").write_text(json.dumps(values))
    values["quantization_config"] = dict(config)
    (path / "config.json").write_text(json.dumps(values))
    return modules
