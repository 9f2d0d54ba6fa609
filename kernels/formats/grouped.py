"""Grouped formats: small integers or floats, one scale (and zero point) for a group of a row.

Every layout of AWQ, GPTQ, compressed-tensors, FP8 and bitsandbytes files is one of these once its
words are unpacked, and w[n, k] = (value(q[n, k]) - zero[n, group(k)]) * scale[n, group(k)].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .format import Format, PlaneMap

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_PLANES = {"q", "scale", "zero", "group", "codes"}
# Of a weight as a whole; all others have a row for each of its rows.
_SHARED = ("group", "codes")


class GroupedFormat(Format):
    """Planes of a weight [N, K] with G groups a row.

    q: [N, K], one element a byte, of ``dtypes``. scale: float [N, G], of either sign.
    zero: integers [N, G]; absent: 0.
    group: int32 [K], the group of each column; absent: G runs of K / G columns each.
    codes: float32 [C], the value of each q; absent: q's own.
    """

    block = 1

    def __init__(self, name: str, *dtypes: torch.dtype) -> None:
        self.name = name
        self.dtypes = dtypes

    def check(self, planes: PlaneMap, shape: tuple[int, int]) -> None:
        n, k = shape
        if not {"q", "scale"} <= set(planes) <= _PLANES:
            raise ValueError(f"{self.name} has planes q, scale, ..., not {', '.join(planes)}")
        q, scale, zero = planes["q"], planes["scale"], planes.get("zero")
        if q.dtype not in self.dtypes or tuple(q.shape) != shape:
            raise ValueError(f"{self.name} {shape}: q is {q.dtype} {list(q.shape)}")
        if scale.dtype not in _FLOATS or scale.ndim != 2 or scale.shape[0] != n:
            raise ValueError(f"{self.name} {shape}: scale is {scale.dtype} {list(scale.shape)}")
        if zero is not None and (zero.is_floating_point() or zero.shape != scale.shape):
            raise ValueError(
                f"{self.name}: zero is {zero.dtype} {list(zero.shape)}, scale {list(scale.shape)}"
            )
        groups, group, codes = scale.shape[1], planes.get("group"), planes.get("codes")
        if group is None:
            if groups < 1 or k % groups:
                raise ValueError(f"{self.name}: {k} columns are no {groups} equal groups")
        elif group.dtype != torch.int32 or tuple(group.shape) != (k,):
            raise ValueError(f"{self.name} {shape}: group is {group.dtype} {list(group.shape)}")
        elif k and not 0 <= int(group.min()) <= int(group.max()) < groups:
            raise ValueError(f"{self.name}: group names groups outside of {groups}")
        if codes is not None and (codes.dtype != torch.float32 or codes.ndim != 1):
            raise ValueError(f"{self.name}: codes is {codes.dtype} {list(codes.shape)}")

    def dequantize(self, planes: PlaneMap, shape: tuple[int, int]) -> Tensor:
        q, codes, group = planes["q"], planes.get("codes"), planes.get("group")
        values = _floats(q) if codes is None else codes[q.int()]
        scale = planes["scale"].float()
        zero = planes["zero"].float() if "zero" in planes else None
        if group is None:
            values = values.view(shape[0], scale.shape[1], -1)
            scale = scale[:, :, None]
            zero = None if zero is None else zero[:, :, None]
        else:
            scale = scale.index_select(1, group)
            zero = None if zero is None else zero.index_select(1, group)
        if zero is not None:
            values -= zero
        values *= scale
        return values.view(shape)

    def rows(self, planes: PlaneMap, index: slice | Tensor) -> dict[str, Tensor]:
        return {name: plane if name in _SHARED else plane[index] for name, plane in planes.items()}

    def columns(self, planes: PlaneMap, begin: int, end: int) -> dict[str, Tensor]:
        part = {**planes, "q": planes["q"][:, begin:end].contiguous()}
        if "group" in planes:
            part["group"] = planes["group"][begin:end].contiguous()
            return part
        size = planes["q"].shape[1] // planes["scale"].shape[1]
        if begin % size or end % size:
            # Inside of groups: each part keeps all scales, and the map to them.
            columns = torch.arange(begin, end, device=planes["q"].device)
            part["group"] = (columns // size).to(torch.int32)
            return part
        groups = slice(begin // size, end // size)
        cut = {name: planes[name][:, groups] for name in ("scale", "zero") if name in planes}
        return part | cut

    def stack(self, parts: Sequence[PlaneMap]) -> dict[str, Tensor]:
        shared: Mapping[str, Tensor] = {
            name: parts[0][name] for name in _SHARED if name in parts[0]
        }
        for part in parts:
            if set(part) != set(parts[0]) or any(
                not torch.equal(part[name], plane) for name, plane in shared.items()
            ):
                raise ValueError(f"{self.name}: weights of other groups or codes cannot be stacked")
        return {
            name: shared[name] if name in shared else torch.cat([part[name] for part in parts])
            for name in parts[0]
        }


def _floats(q: Tensor) -> Tensor:
    """float32 of the same numbers."""
    if q.dtype != torch.float8_e4m3fn or not q.is_cpu:
        return q.float()
    # torch converts these one at a time on a CPU. As the bits of a half of the same sign, exponent
    # and mantissa they are 2^8 too small, subnormals included.
    bits = q.view(torch.int8).to(torch.int16)
    values = ((bits << 7) & ~0x4000).view(torch.float16).float() * 256
    return values.masked_fill_(bits & 0x7F == 0x7F, torch.nan)


def group_map(columns: tuple[int, int], size: int, device: torch.device) -> dict[str, Tensor]:
    """The plane "group" of these columns of a row in groups of ``size``, counted from their first
    group; {} where they are whole groups, or of one alone."""
    begin, end = columns
    first = begin // size
    if begin % size == (end - begin) % size == 0 or (end - 1) // size == first:
        return {}
    groups = torch.arange(begin, end, device=device) // size - first
    return {"group": groups.to(torch.int32)}


def round_to_fp8(weight: Tensor, block: tuple[int, int]) -> dict[str, Tensor]:
    """Round a float weight [N, K] to e4m3, its planes: the largest of a block becomes 448.

    block: (rows, columns) of one scale, which N and K need not be multiples of.
    """
    (n, k), (rows, columns) = weight.shape, block
    shape = (-(-n // rows), -(-k // columns))
    padded = torch.nn.functional.pad(weight, (0, -k % columns, 0, -n % rows))
    blocks = padded.view(shape[0], rows, shape[1], columns)
    scale = blocks.abs().amax((1, 3)).float() / torch.finfo(torch.float8_e4m3fn).max
    scale = torch.where(scale == 0, 1.0, scale)
    q = (blocks.float() / scale[:, None, :, None]).view(padded.shape)[:n, :k]
    planes = {"q": q.to(torch.float8_e4m3fn), "scale": scale.repeat_interleave(rows, 0)[:n]}
    return {**planes, **group_map((0, k), columns, weight.device)}


def _groups(weight: Tensor, size: int) -> Tensor:
    """float32 [N, K / size, size] of a weight [N, K]."""
    n, k = weight.shape
    return weight.float().view(n, k // size, size)


def _half_scales(scale: Tensor) -> Tensor:
    """Scales rounded to float16; 1 where they are 0 then."""
    scale = scale.half()
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def round_to_int4(weight: Tensor, size: int) -> dict[str, Tensor]:
    """Round a float weight [N, K] to 4 bits with zero points, per group of ``size`` columns.

    Scales are float16. K must be a multiple of ``size``.
    """
    groups = _groups(weight, size)
    # Zero is one of the numbers, so that a zero point is.
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scale = _half_scales((high - low) / 15)
    step = scale.float()
    zero = (-low / step).round().clamp(0, 15)
    q = (groups / step[:, :, None] + zero[:, :, None]).round().clamp(0, 15)
    return {"q": q.to(torch.uint8).flatten(1), "scale": scale, "zero": zero.to(torch.uint8)}


def round_to_int8(weight: Tensor, size: int) -> dict[str, Tensor]:
    """Round a float weight [N, K] to 8 bits around zero: the largest of ``size`` becomes 127.

    Scales are float16. K must be a multiple of ``size``.
    """
    groups = _groups(weight, size)
    scale = _half_scales(groups.abs().amax(2) / 127)
    q = (groups / scale.float()[:, :, None]).round().clamp(-127, 127)
    return {"q": q.to(torch.int8).flatten(1), "scale": scale}


# Numbers of a 4-bit float (e2m1) by its code, less the sign: the fourth bit.
E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def e2m1_codes(device: torch.device) -> Tensor:
    """The plane "codes" of 4-bit floats."""
    codes = [*E2M1_MAGNITUDES, *(-value for value in E2M1_MAGNITUDES)]
    return torch.tensor(codes, device=device)


def round_to_mxfp4(weight: Tensor, size: int) -> dict[str, Tensor]:
    """Round a float weight [N, K] to 4-bit floats times a power of two for ``size`` columns.

    The power is the one by which the group's largest lies in the numbers' highest binade, 4 to 8
    (OCP MX specification 1.0, 6.3). K must be a multiple of ``size``.
    """
    groups = _groups(weight, size)
    most = groups.abs().amax(2)
    exponent = torch.floor(torch.log2(most.clamp(min=2.0**-120))) - 2
    scale = torch.exp2(exponent)
    magnitudes = torch.tensor(E2M1_MAGNITUDES, device=weight.device)
    # Of two numbers equally near the one whose last bit is 0, an even place.
    middles = (magnitudes[1:] + magnitudes[:-1]) / 2
    found = (groups / scale[:, :, None]).abs()
    code = torch.bucketize(found, middles)
    code = torch.where(torch.isin(found, middles), code + code % 2, code)
    q = (code + 8 * (groups < 0)).to(torch.uint8).flatten(1)
    return {"q": q, "scale": scale, "codes": e2m1_codes(weight.device)}


_INTEGERS = (torch.uint8, torch.int8)
GROUPED_FORMATS: dict[str, GroupedFormat] = {
    found.name: found
    for found in (
        *(GroupedFormat(f"INT{bits}", *_INTEGERS) for bits in (2, 3, 4, 8)),
        # 4-bit floats: q indexes codes.
        GroupedFormat("FP4", torch.uint8),
        GroupedFormat("NF4", torch.uint8),
        GroupedFormat("FP8", torch.float8_e4m3fn, torch.float8_e5m2),
    )
}
